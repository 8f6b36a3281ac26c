//! The gate through which every call goes. A blocking one releases the interpreter and sees Ctrl-C within 50 ms; one of
//! asyncio begins here and ends in `aio/queue.rs`.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use tokio::runtime::Runtime;
use tokio::task::{AbortHandle, JoinSet};

use super::errors;
use crate::error::Error;
use crate::host::fork::{Incarnation, PerProcess};
use crate::mutex::Mutex;
use crate::vm::MicroVm;

/// How long a signal may wait to be seen.
const SLICE: Duration = Duration::from_millis(50);
/// How long all VMs together may take to be destroyed when the interpreter exits.
const EXIT_DEADLINE: Duration = Duration::from_secs(10);

/// A forked child leaves its parent's where it is, without its threads, and makes its own.
static RUNTIME: PerProcess<Runtime> = PerProcess::new();
static EXITING: AtomicBool = AtomicBool::new(false);
/// The VMs to destroy at exit; handles own them.
static LIVE: PerProcess<Mutex<Vec<Weak<MicroVm>>>> = PerProcess::new();

/// What becomes of the work when the caller is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// It is dropped; dropping undoes it.
    Abandon,
    /// It goes on in the background: half of it would be worse.
    Finish,
}

fn runtime() -> PyResult<&'static Runtime> {
    RUNTIME.get_or_try_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("microvm-isolation")
            .enable_all()
            .build()
            .map_err(|error| PyRuntimeError::new_err(format!("the runtime could not be started: {error}")))
    })
}

fn check_not_exiting() -> PyResult<()> {
    match is_exiting() {
        true => Err(PyRuntimeError::new_err("the interpreter is exiting")),
        false => Ok(()),
    }
}

/// Whether the interpreter is exiting, and the VMs are being destroyed.
#[pyfunction]
pub fn is_exiting() -> bool {
    EXITING.load(Ordering::Acquire)
}

/// Waits for `future` without holding the interpreter.
pub fn wait<F>(py: Python<'_>, on_interrupt: OnInterrupt, future: F) -> PyResult<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    check_not_exiting()?;
    // A caller that loops over waits that end at once would not come to look otherwise.
    py.check_signals()?;
    wait_unchecked(py, on_interrupt, future)
}

/// Lets `future` run on the runtime until it ends or is aborted, which drops it there.
pub fn begin(future: impl Future<Output = ()> + Send + 'static) -> PyResult<AbortHandle> {
    check_not_exiting()?;
    Ok(runtime()?.spawn(future).abort_handle())
}

/// As [`begin`], but polls `future` once on this thread first, which saves a call that waits for another party the way over
/// a worker. For what does not block. `None` when `future` has ended.
pub fn begin_here(future: impl Future<Output = ()> + Send + 'static) -> PyResult<Option<AbortHandle>> {
    check_not_exiting()?;
    let runtime = runtime()?;
    let mut future = Box::pin(future);
    let _context = runtime.enter();
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(()) => Ok(None),
        // The runtime polls it anew, with a waker.
        Poll::Pending => Ok(Some(runtime.spawn(future).abort_handle())),
    }
}

/// Lets `future` go on by itself.
pub fn spawn(future: impl Future<Output = ()> + Send + 'static) -> PyResult<()> {
    runtime()?.spawn(future);
    Ok(())
}

/// Wakes the thread that polls a future.
struct Unpark {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Polls `future` on this thread: what can be done at once is done here, and whoever completes it wakes this thread
/// directly. The runtime only drives timers and sockets.
fn wait_unchecked<F>(py: Python<'_>, on_interrupt: OnInterrupt, future: F) -> PyResult<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let runtime = runtime()?;
    let mut future = Box::pin(future);
    loop {
        let polled = py.detach(|| poll_for(runtime, future.as_mut(), SLICE));
        if let Some(output) = polled {
            return Ok(output);
        }
        if let Err(interrupt) = py.check_signals() {
            py.detach(|| {
                let _context = runtime.enter();
                match on_interrupt {
                    OnInterrupt::Abandon => drop(future),
                    OnInterrupt::Finish => drop(runtime.spawn(future)),
                }
            });
            return Err(interrupt);
        }
    }
}

/// Polls until the future is ready, at most for `slice`.
fn poll_for<F: Future>(runtime: &Runtime, mut future: Pin<&mut F>, slice: Duration) -> Option<F::Output> {
    let _context = runtime.enter();
    let unpark = Arc::new(Unpark { thread: std::thread::current(), woken: AtomicBool::new(true) });
    let waker = Waker::from(unpark.clone());
    let mut context = Context::from_waker(&waker);
    let end = Instant::now() + slice;
    loop {
        if unpark.woken.swap(false, Ordering::AcqRel) {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return Some(output);
            }
            continue;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        std::thread::park_timeout(left);
    }
}

/// A shared thing that belongs to the process that made it. A forked child neither uses nor ends it: that would end the
/// parent's VMs.
pub struct Owned<T> {
    what: &'static str,
    made_by: Incarnation,
    value: Arc<T>,
}

impl<T> Owned<T> {
    pub fn new(what: &'static str, value: Arc<T>) -> Self {
        Self { what, made_by: Incarnation::now(), value }
    }

    /// Whether this process made it.
    pub fn is_ours(&self) -> bool {
        self.made_by == Incarnation::now()
    }

    /// # Errors
    /// `ForkedProcessError` in a forked child.
    pub fn get(&self, py: Python<'_>) -> PyResult<&Arc<T>> {
        let now = Incarnation::now();
        if self.made_by == now {
            return Ok(&self.value);
        }
        let error = Error::ForkedProcess { what: self.what, made_in: self.made_by.pid, used_in: now.pid };
        Err(errors::raise(py, &error))
    }

    /// For plain data that a child may read, too. Nothing behind a lock: the parent may have held it at the fork.
    pub fn peek(&self) -> &Arc<T> {
        &self.value
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if !self.is_ours() {
            // One reference that nobody gives back: the child never comes to drop the thing itself.
            std::mem::forget(self.value.clone());
        }
    }
}

/// Notes a VM for the end of the process.
pub fn track(vm: &Arc<MicroVm>) {
    let mut live = LIVE.get().lock();
    live.retain(|vm| vm.strong_count() > 0);
    live.push(Arc::downgrade(vm));
}

/// Destroys every VM of this process and refuses new work; called when the interpreter exits.
#[pyfunction]
pub fn shutdown(py: Python<'_>) -> PyResult<()> {
    EXITING.store(true, Ordering::Release);
    let live = std::mem::take(&mut *LIVE.get().lock());
    let vms: Vec<_> = live.iter().filter_map(Weak::upgrade).filter(|vm| vm.state().is_live()).collect();
    if vms.is_empty() {
        return Ok(());
    }
    wait_unchecked(py, OnInterrupt::Finish, async move {
        let mut destroying = JoinSet::new();
        for vm in vms {
            destroying.spawn(async move { vm.destroy().await });
        }
        if tokio::time::timeout(EXIT_DEADLINE, destroying.join_all()).await.is_err() {
            log::error!("not every VM was destroyed in time; the kernel ends the rest with this process");
        }
    })
}
