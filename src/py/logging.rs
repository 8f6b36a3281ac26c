//! Log records on their way to Python's `logging`.
//!
//! The core logs from worker threads, which never attach to the interpreter: records wait in a bounded queue, and a
//! Python thread fetches them.

use std::collections::VecDeque;
use std::sync::{Condvar, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::host::fork::PerProcess;
use crate::model::{printable, RECORD_BYTES};
use crate::mutex::Mutex;

const PACKAGE: &str = "thirstys_waterfall.security.microvm_isolation";
/// Records kept while nobody fetches; older ones give way.
const CAPACITY: usize = 4096;

type Line = (&'static str, &'static str, String);

#[derive(Default)]
struct Queue {
    lines: VecDeque<Line>,
    lost: usize,
    closed: bool,
}

#[derive(Default)]
struct Records {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

impl Records {}

static RECORDS: PerProcess<Records> = PerProcess::new();

struct Collector;

impl Log for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("microvm_isolation")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        // Records quote guests and VMMs.
        let message = printable(&record.args().to_string(), RECORD_BYTES).into_owned();
        let records = RECORDS.get();
        let mut queue = records.queue.lock();
        if queue.closed {
            return;
        }
        if queue.lines.len() == CAPACITY {
            queue.lines.pop_front();
            queue.lost += 1;
        }
        queue.lines.push_back((level, PACKAGE, message));
        records.arrived.notify_one();
    }

    fn flush(&self) {}
}

pub fn install() {
    // A second interpreter in this process finds the collector in place: fine.
    if log::set_logger(&Collector).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
}

/// Starts the Python thread that fetches, once.
pub fn start(py: Python<'_>) -> PyResult<()> {
    py.import("thirstys_waterfall.security.microvm_isolation._logging")?.call_method0("start").map(drop)
}

pub fn logger(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let made = LOGGER.get_or_try_init(py, || -> PyResult<Py<PyAny>> {
        Ok(py.import("logging")?.call_method1("getLogger", (PACKAGE,))?.unbind())
    })?;
    Ok(made.bind(py).clone())
}

/// Logs at once, from a thread that is attached.
pub fn on_this_thread(py: Python<'_>, level: &'static str, message: &str) -> PyResult<()> {
    logger(py)?.call_method1(level, ("%s", printable(message, RECORD_BYTES))).map(drop)
}

/// Waits up to `timeout` seconds for records; `None` once the log is closed.
#[pyfunction]
pub fn next_log_records(py: Python<'_>, timeout: f64) -> Option<Vec<Line>> {
    let deadline = Instant::now() + Duration::from_secs_f64(timeout.clamp(0.0, 60.0));
    py.detach(|| {
        let records = RECORDS.get();
        let mut queue = records.queue.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !queue.lines.is_empty() || (left.is_zero() && !queue.closed) {
                let mut lines: Vec<Line> = queue.lines.drain(..).collect();
                if queue.lost > 0 {
                    lines.push(("warning", PACKAGE, format!("{} log records were lost", queue.lost)));
                    queue.lost = 0;
                }
                return Some(lines);
            }
            if queue.closed {
                return None;
            }
            queue = records.arrived.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    })
}

/// Takes no more records and wakes whoever waits for them.
#[pyfunction]
pub fn close_log() {
    let records = RECORDS.get();
    records.queue.lock().closed = true;
    records.arrived.notify_all();
}
