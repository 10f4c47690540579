//! Follows the uplink's MTU at both ends of living pods' attachments.
//!
//! Promised: within a second of a change the bridge, the VXLAN device and both ends of all pods have it, the leases say so durably,
//! and CHECK agrees. A pod's end that a later plugin of the chain lowered stays lower. Killed between kernel and lease: the next
//! pass finds the lease behind and does it again, which changes nothing.

use std::path::Path;

use futures::StreamExt;
use tracing::{info, warn};

use super::{Engine, sentence};
use crate::leases::{AttachmentKey, Lease};

/// Sandboxes that are visited at a time, each by a thread of its own.
const VISITS_MAX: usize = 16;

impl Engine {
    /// An attachment that began before the MTU changed is brought up to it soon.
    pub(super) fn note_mtu(&mut self, lease: &Lease) {
        if self.attachment.borrow().as_ref().is_some_and(|current| current.mtu() != lease.plan.mtu) {
            self.heal.want_links();
        }
    }

    /// Brings all attachments to the MTU of new ones.
    ///
    /// # Errors
    /// The store failed, or an interface refused; those are tried again with the next pass.
    pub(super) async fn follow_mtu(&mut self, mtu: u32) -> Result<(), String> {
        let behind: Vec<Lease> =
            self.endpoints.values().filter(|lease| lease.plan.mtu != mtu).cloned().collect();
        if behind.is_empty() {
            return Ok(());
        }
        let dataplane = &self.dataplane;
        let visits = behind.into_iter().map(|mut lease| async move {
            let before = std::mem::replace(&mut lease.plan.mtu, mtu);
            let (netns, limit) = (Path::new(&lease.netns), lease.mtu_limit());
            let followed = dataplane.follow_mtu(&lease.plan, netns, before, limit).await;
            (lease.key, followed)
        });
        let visited: Vec<(AttachmentKey, _)> =
            futures::stream::iter(visits).buffer_unordered(VISITS_MAX).collect().await;
        let (mut done, mut first_error) = (Vec::new(), None);
        for (key, followed) in visited {
            match followed {
                Ok(limit) => done.push((key, limit)),
                Err(error) => {
                    warn!(attachment = %key, error = sentence(&error), mtu, "the MTU could not be followed");
                    first_error = first_error.or(Some(format!("{key}: {}", sentence(&error))));
                }
            }
        }
        self.leases.set_mtu(&done, mtu).await.map_err(|error| sentence(&error))?;
        for (key, limit) in &done {
            if let Some(lease) = self.endpoints.get_mut(key) {
                lease.follow_mtu(mtu, *limit);
            }
        }
        info!(mtu, pods = done.len(), "the pods' interfaces follow the uplink's MTU");
        first_error.map_or(Ok(()), Err)
    }
}
