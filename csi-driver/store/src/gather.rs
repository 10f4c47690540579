//! Joins the answers of several asynchronous operations into one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use holdfast_io::Errno;

type Then = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// Calls its continuation once all parts answered: with the first failure, if any.
pub struct Gather {
    left: AtomicUsize,
    rest: Mutex<(Option<Errno>, Option<Then>)>,
}

impl Gather {
    /// Waits for `parts` answers (at least one).
    pub fn new(parts: usize, then: Then) -> Arc<Self> {
        assert!(parts > 0, "nothing to wait for");
        Arc::new(Self { left: AtomicUsize::new(parts), rest: Mutex::new((None, Some(then))) })
    }

    /// One part answered.
    pub fn part_done(&self, result: Result<(), Errno>) {
        if let Err(errno) = result {
            self.lock().0.get_or_insert(errno);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let (failed, then) = {
                let mut rest = self.lock();
                (rest.0, rest.1.take())
            };
            if let Some(then) = then {
                then(failed.map_or(Ok(()), Err));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Option<Errno>, Option<Then>)> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_answer_continues_with_the_first_failure() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let gather = Gather::new(3, Box::new(move |result| sender.send(result).unwrap()));
        gather.part_done(Ok(()));
        gather.part_done(Err(Errno(5)));
        assert!(receiver.try_recv().is_err());
        gather.part_done(Err(Errno(6)));
        assert_eq!(receiver.try_recv(), Ok(Err(Errno(5))));
    }
}
