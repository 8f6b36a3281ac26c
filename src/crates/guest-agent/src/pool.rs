//! Threads for requests. Under TCG a new thread costs more than a small request, so idle ones wait for the next.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Nothing here recurses on what it is given; parsers bring a stack of their own.
const STACK_BYTES: usize = 512 << 10;
/// How long a thread waits for work before it ends, unless it is one of the last [`KEPT`].
const IDLE: Duration = Duration::from_secs(10);
const KEPT: usize = 2;

type Work = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct PoolState {
    waiting: VecDeque<Work>,
    idle: usize,
}

#[derive(Default)]
pub struct Pool {
    state: Mutex<PoolState>,
    wake: Condvar,
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on an idle thread, else on a new one.
    pub fn run(self: &Arc<Self>, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let work: Work = Box::new(work);
        let mut state = self.state();
        if state.idle > state.waiting.len() {
            state.waiting.push_back(work);
            drop(state);
            self.wake.notify_one();
            return Ok(());
        }
        drop(state);
        let pool = self.clone();
        let serve = move || {
            work();
            while let Some(work) = pool.next() {
                work();
            }
        };
        std::thread::Builder::new().stack_size(STACK_BYTES).spawn(serve).map(drop)
    }

    fn next(&self) -> Option<Work> {
        let mut state = self.state();
        state.idle += 1;
        loop {
            if let Some(work) = state.waiting.pop_front() {
                state.idle -= 1;
                return Some(work);
            }
            if state.idle <= KEPT {
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (again, waited) = self.wake.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = again;
            if waited.timed_out() && state.waiting.is_empty() && state.idle > KEPT {
                state.idle -= 1;
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn test_run_reuses_a_thread_that_waits() {
        let pool = Arc::new(Pool::default());
        let (sender, receiver) = mpsc::channel();
        let mut ids = Vec::new();
        for _ in 0..3 {
            let sender = sender.clone();
            pool.run(move || sender.send(std::thread::current().id()).unwrap()).unwrap();
            ids.push(receiver.recv().unwrap());
            while pool.state().idle == 0 {
                std::thread::yield_now();
            }
        }
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    }

    #[test]
    fn test_run_all_work_runs_at_once() {
        let pool = Arc::new(Pool::default());
        let barrier = Arc::new(std::sync::Barrier::new(9));
        for _ in 0..8 {
            let barrier = barrier.clone();
            let meet = move || {
                barrier.wait();
            };
            pool.run(meet).unwrap();
        }
        barrier.wait();
    }
}
