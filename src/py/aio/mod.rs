//! The asyncio face: the same async functions of the core as the blocking face waits for, each as an operation whose end a
//! loop hears of through a queue of its own.
//!
//! Architecture invariant: no worker of the runtime touches a Python object or attaches to the interpreter. A worker puts the
//! number of an operation that has ended into the loop's queue and makes an eventfd readable; the loop watches it by
//! `add_reader`, and converts the result on its own thread. So an interpreter that exits has nobody to wait for. A
//! library that completes futures from workers (`pyo3-async-runtimes`) attaches each time, and a worker that attaches
//! while the interpreter ends hangs or crashes it. The queue needs nothing of a loop but `add_reader`, which uvloop's has, too.

mod attached;
mod events;
mod instance;
mod manager;
mod queue;
mod stream;
mod transfer;

pub use attached::{begin_attach, begin_running_vms, AttachedOperations};
pub use events::{EventOperations, TakenEvent};
pub use instance::VmOperations;
pub use manager::{ManagerOperations, PrepareOperation};
pub use queue::OperationQueue;
pub use stream::StreamOperations;
pub use transfer::{DownloadOperations, UploadOperations};
