//! Requests in flight, by cookie.

use bytes::Bytes;
use holdfast_io::{BlockError, Completion};

use crate::proto::errno;
use crate::provider::ExtentsCompletion;

/// Requests in flight on one connection; one more fails with ENOMEM. Far above what front ends have in flight, so that
/// meeting it is a defect of the caller.
const IN_FLIGHT_MAX: usize = 16_384;

/// What the reply to a request looks like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    /// The request's first byte, which extended replies repeat.
    pub(crate) offset: u64,
    pub(crate) content: Content,
}

/// What a successful reply brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Nothing,
    /// So many bytes.
    Data(u32),
    /// Extents of the context with this number, of which so many bytes are of interest.
    Extents {
        context_id: u32,
        len: u64,
    },
}

/// Who waits for a reply.
pub(crate) enum Waiter {
    Data(Completion),
    Extents(ExtentsCompletion),
}

impl Waiter {
    pub(crate) fn fail(self, errno: i32) {
        match self {
            Self::Data(done) => done(Err(BlockError(errno))),
            Self::Extents(done) => done(Err(BlockError(errno))),
        }
    }

    /// Gives data; one who waits for extents gets EIO.
    pub(crate) fn give(self, data: Bytes) {
        match self {
            Self::Data(done) => done(Ok(data)),
            Self::Extents(_) => self.fail(errno::EIO),
        }
    }
}

/// The table. A cookie is a slot's index and how often the slot was used, so that a reply that comes twice is told from
/// the reply to the slot's next user.
#[derive(Default)]
pub(crate) struct Pending {
    slots: Vec<Slot>,
    free: Vec<u32>,
    closed: bool,
}

#[derive(Default)]
struct Slot {
    uses: u32,
    waiting: Option<(Expected, Waiter)>,
}

impl Pending {
    pub(crate) fn insert(&mut self, expected: Expected, waiter: Waiter) -> Result<u64, Box<(Waiter, i32)>> {
        if self.closed {
            return Err(Box::new((waiter, errno::ENOTCONN)));
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < IN_FLIGHT_MAX => {
                self.slots.push(Slot::default());
                u32::try_from(self.slots.len() - 1).expect("at most 16,384 slots")
            }
            None => return Err(Box::new((waiter, errno::ENOMEM))),
        };
        let slot = &mut self.slots[index as usize];
        slot.uses = slot.uses.wrapping_add(1);
        slot.waiting = Some((expected, waiter));
        Ok(u64::from(slot.uses) << 32 | u64::from(index))
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn expected(&mut self, cookie: u64) -> Option<Expected> {
        self.slot(cookie)?.waiting.as_ref().map(|(expected, _)| *expected)
    }

    pub(crate) fn take(&mut self, cookie: u64) -> Option<Waiter> {
        let (_, waiter) = self.slot(cookie)?.waiting.take()?;
        self.free.push((cookie & 0xffff_ffff) as u32);
        Some(waiter)
    }

    pub(crate) fn close(&mut self) -> Vec<Waiter> {
        self.closed = true;
        self.free.clear();
        self.slots.drain(..).filter_map(|slot| slot.waiting).map(|(_, waiter)| waiter).collect()
    }

    fn slot(&mut self, cookie: u64) -> Option<&mut Slot> {
        let (uses, index) = ((cookie >> 32) as u32, (cookie & 0xffff_ffff) as usize);
        self.slots.get_mut(index).filter(|slot| slot.uses == uses)
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let in_flight = self.slots.len() - self.free.len();
        f.debug_struct("Pending")
            .field("in_flight", &in_flight)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}
