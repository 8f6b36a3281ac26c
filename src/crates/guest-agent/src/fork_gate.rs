//! The gate that each fork passes; it is closed while the guest is frozen.
//!
//! A child that was frozen between fork and exec would keep its parent waiting for the exec, and with the parent every
//! thread that waits for it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Default)]
struct GateState {
    is_closed: bool,
    forking: usize,
}

pub struct ForkGate {
    state: Mutex<GateState>,
    changed: Condvar,
}

/// Held by a thread from before its fork until after the exec.
pub struct ForkPermit<'a>(&'a ForkGate);

/// No fork is under way and none begins while this lives.
pub struct ClosedGate<'a>(&'a ForkGate);

impl ForkGate {
    pub const fn new() -> Self {
        Self { state: Mutex::new(GateState { is_closed: false, forking: 0 }), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is closed.
    pub fn enter(&self) -> ForkPermit<'_> {
        let open = self.changed.wait_while(self.state(), |state| state.is_closed);
        open.unwrap_or_else(PoisonError::into_inner).forking += 1;
        ForkPermit(self)
    }

    /// Closes the gate and waits, at most `deadline`, for the forks under way; `None`, and open again, when one takes
    /// longer. Only one thread closes it.
    pub fn close(&self, deadline: Duration) -> Option<ClosedGate<'_>> {
        let mut state = self.state();
        state.is_closed = true;
        let closed = ClosedGate(self);
        let waited = self.changed.wait_timeout_while(state, deadline, |state| state.forking > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let is_empty = state.forking == 0;
        drop(state);
        is_empty.then_some(closed)
    }
}

impl Drop for ForkPermit<'_> {
    fn drop(&mut self) {
        self.0.state().forking -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for ClosedGate<'_> {
    fn drop(&mut self) {
        self.0.state().is_closed = false;
        self.0.changed.notify_all();
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
    fn test_close_waits_for_forks_under_way() {
        let gate = ForkGate::new();
        let permit = gate.enter();
        assert!(gate.close(SOON).is_none());
        // The gate is open again.
        drop(gate.enter());
        thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(LONG).is_some());
            thread::sleep(SOON);
            drop(permit);
            assert!(closing.join().unwrap());
        });
    }

    #[test]
    fn test_enter_waits_while_the_gate_is_closed() {
        let gate = ForkGate::new();
        let (sender, receiver) = mpsc::channel();
        let closed = gate.close(SOON).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                drop(gate.enter());
                sender.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(SOON).is_err());
            drop(closed);
            receiver.recv_timeout(LONG).unwrap();
        });
    }
}
