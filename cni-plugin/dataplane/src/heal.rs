//! Passes over the whole node, when something changed and from time to time: what is not as planned is made so, and told.

use std::path::Path;
use std::sync::PoisonError;

use holdfast_net_core::plan::{EndpointPlan, NodePlan};

use crate::error::Result;
use crate::{Dataplane, hold, node, offload, routed, sandbox};

/// What a pass found.
#[derive(Debug, Default)]
pub struct Healed {
    /// What had to be made, each as "set the route to 10.0.0.0/24".
    pub mended: Vec<String>,
    /// Why it did not come to its end, if it did not.
    pub error: Option<crate::Error>,
}

impl Dataplane {
    /// Makes the node as planned, and then the node's side of all `endpoints`, which must be attached, and which nobody detaches
    /// until this returns. `checksum_offload`: whether the VXLAN device leaves checksums to the hardware; `None` leaves that as it is.
    /// Goes on after a failure as far as that makes sense.
    pub async fn heal(
        &self,
        plan: &NodePlan,
        endpoints: &[&EndpointPlan],
        checksum_offload: Option<bool>,
    ) -> Healed {
        let mut mended: Vec<String> = match self.differing_sysctls(plan) {
            Ok(paths) => paths.into_iter().map(|path| format!("set the sysctl net/{path}")).collect(),
            Err(_) => Vec::new(),
        };
        // What others wrote to the journal before is not this pass's.
        self.whole.take_journal();
        let made = node::apply(&self.whole, plan, &self.ours).await;
        let held = match made {
            Ok(_) => self.hold(plan, endpoints).await,
            Err(error) => Err(error),
        };
        mended.extend(self.whole.take_journal());
        // A device that does not exist was named as the reason already.
        let vxlan = plan.vxlan.as_ref().filter(|_| held.is_ok());
        let held = match vxlan
            .zip(checksum_offload)
            .map(|(vxlan, wanted)| offload::hold_checksum_offload(&vxlan.name, wanted))
        {
            None | Some(Ok(false)) => held,
            Some(Ok(true)) => {
                mended.push("set the checksum offload of the VXLAN device".to_owned());
                held
            }
            Some(Err(error)) => Err(error),
        };
        Healed { mended, error: held.err() }
    }

    async fn hold(&self, plan: &NodePlan, endpoints: &[&EndpointPlan]) -> Result<()> {
        let held = hold::endpoints(&self.whole, endpoints).await;
        let routed = routed::hold_all(&self.whole, endpoints).await;
        if let Some(bridge) = &plan.bridge {
            self.watch_link(&bridge.name).await?;
        }
        if let Some(vxlan) = &plan.vxlan {
            self.watch_link(&vxlan.name).await?;
        }
        self.interests.add(held?);
        routed.map(drop)
    }

    /// Paths of sysctls that are not as planned; cheap enough to be asked ten times a second.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn differing_sysctls(&self, plan: &NodePlan) -> Result<Vec<String>> {
        // Whatever a panic left is read anew.
        self.sysctls.lock().unwrap_or_else(PoisonError::into_inner).differing(plan)
    }

    /// Brings both ends of an attachment to the plan's MTU from `before`, the pod's end not above `limit`. Where somebody lowered that
    /// end it stays as low: that is the limit that is returned. A pod that is gone is fine.
    ///
    /// # Errors
    /// The kernel refuses one of them; the other may be done.
    pub async fn follow_mtu(
        &self,
        plan: &EndpointPlan,
        netns: &Path,
        before: u32,
        mut limit: u32,
    ) -> Result<u32> {
        let outside = hold::set_mtu(&self.whole, plan).await;
        match sandbox::open(netns) {
            Ok(sandbox) => limit = sandbox::follow_mtu(&sandbox, plan, before, limit).await?,
            Err(error) => {
                tracing::debug!(%error, ifname = plan.host_ifname, "there is no sandbox to tell the MTU")
            }
        }
        outside.map(|()| limit)
    }

    /// Returns when links, addresses, routes, neighbours or forwarding entries that matter may have been changed by somebody else
    /// since the last return: a reason for [`Dataplane::heal`]. Cancellation safe.
    ///
    /// # Errors
    /// The notification socket failed for good.
    pub async fn disturbed(&self) -> Result<()> {
        self.watch.links().await
    }

    /// Returns when there is something for [`Dataplane::tables_changed`] to look at. Cancellation safe.
    ///
    /// # Errors
    /// The notification socket failed for good.
    pub async fn tables_touched(&self) -> Result<()> {
        self.watch.tables().await
    }

    /// Names the interface below the overlay: changes of it are a disturbance, too.
    pub fn watch_uplink(&self, index: u32) {
        self.interests.set_uplink(index);
    }

    pub(crate) async fn watch_link(&self, name: &str) -> Result<()> {
        let found = self.whole.link(name).await?;
        self.interests.add(found.map(|link| link.header.index));
        Ok(())
    }

    /// It is about to be removed by us.
    pub(crate) async fn unwatch_link(&self, name: &str) -> Result<()> {
        if let Some(link) = self.links.link(name).await? {
            self.interests.remove(link.header.index);
        }
        Ok(())
    }
}
