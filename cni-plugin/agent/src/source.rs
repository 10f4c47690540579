//! Where Kubernetes' objects come from: a folder or the API server, behind one interface.

use anyhow::Context;
use tokio::sync::mpsc;

use crate::batch::Batch;
use crate::claims::Claims;
use crate::folder;
use crate::kubernetes::{self, Api};
use crate::settings::ObjectSource;

/// Begins to watch objects for a node, until the receiver is gone. Neither folder nor API server need to be there yet. To be called in a
/// runtime.
///
/// # Errors
/// There are no usable settings for the way to the API server.
pub async fn open_objects(
    source: &ObjectSource,
    node: &str,
) -> anyhow::Result<(mpsc::Receiver<Batch>, Claims)> {
    match source {
        ObjectSource::Folder(folder) => Ok((folder::watch(folder), Claims::in_folder(folder.clone()))),
        ObjectSource::Kubernetes { kubeconfig } => {
            let api = Api::new(kubeconfig.as_deref()).await.map_err(anyhow::Error::msg);
            let api = api.context("the API server cannot be watched")?;
            Ok((kubernetes::watch(api.clone(), node.into()), Claims::at(api)))
        }
    }
}
