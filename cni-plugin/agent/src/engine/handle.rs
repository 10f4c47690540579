//! What others of the agent ask of the engine.

use std::sync::Arc;

use holdfast_net_core::plan::Attachment;
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use super::questions::Ask;
use crate::leases::{AttachmentKey, Lease};

/// What the engine is asked.
pub(super) enum Command {
    /// A new endpoint; answered when its policy is in the kernel. `true`: its pod is known.
    Put(Box<Lease>, oneshot::Sender<Result<bool, String>>),
    /// An endpoint is gone. Answered when no later pass can bring it back; the rules follow with [`Command::Sync`].
    Forget(AttachmentKey, oneshot::Sender<()>),
    /// Answered when everything known before is in the kernel.
    Sync(oneshot::Sender<Result<(), String>>),
    /// Answered when links, routes and neighbours were compared and mended, as far as that was possible.
    Hold(oneshot::Sender<()>),
    /// A question, answered when everything known before is compiled and, if possible, in the kernel.
    Ask(Ask),
}

/// Talks to the engine.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) attachment: watch::Receiver<Option<Attachment>>,
    pub(super) seen: watch::Receiver<Seen>,
    /// Whoever has the kernel asked holds it: one such question at a time is in the engine's way.
    pub(super) alone: Arc<Mutex<()>>,
}

/// How far the engine has come with the objects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Everything was read at least once.
    pub ready: bool,
    /// Rises with each batch of changes.
    pub batches: u64,
}

pub(super) const ENDED: &str = "the agent is ending";

impl EngineHandle {
    /// Adds an endpoint (again) and waits until its policy is applied.
    pub(crate) async fn put(&self, lease: Lease) -> Result<bool, String> {
        self.ask(|reply| Command::Put(Box::new(lease), reply)).await.unwrap_or_else(Err)
    }

    pub(crate) async fn forget(&self, key: &AttachmentKey) -> Result<(), String> {
        self.ask(|reply| Command::Forget(key.clone(), reply)).await
    }

    pub(crate) async fn sync(&self) -> Result<(), String> {
        self.ask(Command::Sync).await.unwrap_or_else(Err)
    }

    /// Has links, routes and neighbours of the node and of all endpoints mended, as far as possible.
    pub(crate) async fn hold(&self) -> Result<(), String> {
        self.ask(Command::Hold).await
    }

    /// What new pods are attached to, once the node's plan is applied.
    pub(crate) fn attachment(&self) -> Option<Attachment> {
        self.attachment.borrow().clone()
    }

    /// Wakes on new objects.
    pub(crate) fn seen(&self) -> watch::Receiver<Seen> {
        self.seen.clone()
    }

    pub(super) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, String> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| ENDED.to_owned())?;
        answer.await.map_err(|_| ENDED.to_owned())
    }
}
