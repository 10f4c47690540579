//! Claims of blocks of the cluster range: swaps by comparison, made where the objects come from.
//!
//! **Promise**: of many that claim a block, one gets it, and it has it for good once the swap has answered [`Swapped::Done`]. Who could
//! break it: a concurrent claim of another node, which both sides compare with; a swap whose answer got lost, which is an error
//! here, and whose repetition finds the block its own or another's; a kill between the swap and its answer, likewise.

mod api;
mod folder;

use std::path::PathBuf;

use holdfast_net_core::pod_ranges::Proposal;

use crate::engine::sentence;
use crate::kubernetes::Api;

/// Where claims are made.
pub struct Claims(Side);

enum Side {
    Folder(PathBuf),
    Kubernetes(Api),
}

/// What a swap found.
#[derive(Debug, PartialEq, Eq)]
pub enum Swapped {
    /// The block is the node's now, on stable storage.
    Done,
    /// It belongs to somebody else than the proposal was made from; `None`: to nobody.
    Is(Option<String>),
}

impl Claims {
    /// In a folder of objects.
    pub(crate) fn in_folder(folder: PathBuf) -> Self {
        Self(Side::Folder(folder))
    }

    /// At the API server.
    pub(crate) fn at(api: Api) -> Self {
        Self(Side::Kubernetes(api))
    }

    /// Gives the block to `node` if it belongs to whom the proposal says. Takes up to some seconds where others hold things up.
    ///
    /// Not cancelled half way: dropped, it may still happen, as if its answer got lost.
    ///
    /// # Errors
    /// A sentence. Whether the block was claimed is not known then; the same proposal may be made again.
    pub async fn swap(&self, proposal: &Proposal, node: &str) -> Result<Swapped, String> {
        match &self.0 {
            Side::Folder(folder) => {
                let (folder, wanted, node) = (folder.clone(), proposal.clone(), node.to_owned());
                let swapped =
                    tokio::task::spawn_blocking(move || folder::swap(&folder, &wanted, &node)).await;
                let swapped = swapped.map_err(|_| "claiming was cut off".to_owned())?;
                swapped.map_err(|error| sentence(&error))
            }
            Side::Kubernetes(api) => api::swap(api, proposal, node).await,
        }
    }
}
