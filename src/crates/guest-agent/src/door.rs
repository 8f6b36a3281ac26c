//! The door that each new program goes through; it is shut while programs stand still.
//!
//! A child that was stopped between fork and exec would keep its parent waiting for the exec, and everyone who waits for
//! that parent.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Default)]
struct State {
    is_shut: bool,
    within: usize,
}

pub struct Door {
    state: Mutex<State>,
    moved: Condvar,
}

/// Someone is on the way through.
pub struct Passage<'a>(&'a Door);

/// Nobody is on the way through, and nobody begins to.
pub struct Shut<'a>(&'a Door);

impl Door {
    pub const fn new() -> Self {
        Self { state: Mutex::new(State { is_shut: false, within: 0 }), moved: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while it is shut.
    pub fn pass(&self) -> Passage<'_> {
        let open = self.moved.wait_while(self.state(), |state| state.is_shut);
        open.unwrap_or_else(PoisonError::into_inner).within += 1;
        Passage(self)
    }

    /// Waits, at most `deadline`, for those on the way; `None` and open again when one takes longer. It is shut by one
    /// thread only.
    pub fn shut(&self, deadline: Duration) -> Option<Shut<'_>> {
        let mut state = self.state();
        state.is_shut = true;
        let shut = Shut(self);
        let waited = self.moved.wait_timeout_while(state, deadline, |state| state.within > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let is_empty = state.within == 0;
        drop(state);
        is_empty.then_some(shut)
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.0.state().within -= 1;
        self.0.moved.notify_all();
    }
}

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        self.0.state().is_shut = false;
        self.0.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn test_shut_waits_for_those_on_the_way() {
        let door = Door::new();
        let passage = door.pass();
        assert!(door.shut(SOON).is_none());
        // It is open again.
        drop(door.pass());
        thread::scope(|scope| {
            let shutting = scope.spawn(|| door.shut(LONG).is_some());
            thread::sleep(SOON);
            drop(passage);
            assert!(shutting.join().unwrap());
        });
    }

    #[test]
    fn test_pass_waits_while_it_is_shut() {
        let door = Door::new();
        let (sender, receiver) = mpsc::channel();
        let shut = door.shut(SOON).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                drop(door.pass());
                sender.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(SOON).is_err());
            drop(shut);
            receiver.recv_timeout(LONG).unwrap();
        });
    }
}
