//! Requests in, answers out.
//!
//! One thread reads the port and never waits for anything else: what is quick it answers itself, the rest runs on the
//! pool. Whatever a request does, a panic included, it is answered, and the agent lives on.

use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use microvm_protocol::json::{self, Unwritten};
use microvm_protocol::message::{
    is_modest, Code, Failure, Request, Response, FREEZE, MAX_MESSAGE, MAX_VALUES, WRITE_DISK,
};
use microvm_protocol::mux::Incoming;

use crate::actions::{Answer, Guest};
use crate::freeze::Standstill;
use crate::job::Job;
use crate::pool::Pool;
use crate::port::{Link, Sender};
use crate::{boot, freeze, memory};

/// Longer requests are parsed on the pool.
const QUICK_BYTES: usize = 4096;

/// Why the serving ended.
pub enum End {
    /// The host closed the port.
    Closed,
    /// The session is suspended, and the programs are frozen.
    Frozen(Standstill),
}

/// One VM's requests, for as long as it is that VM.
pub struct Server {
    guest: Guest,
    jobs: Mutex<HashMap<u32, Arc<Job>>>,
    pool: Arc<Pool>,
    sender: Sender,
}

/// Serves until the host closes the port or freezes the guest.
pub fn serve(link: &mut Link, server: &Arc<Server>) -> Result<End, String> {
    while let Some(incoming) = link.receive()? {
        match incoming {
            Incoming::Request { id, body } => {
                if let Accepted::Frozen(standstill) = server.accept(id, body)? {
                    return Ok(End::Frozen(standstill));
                }
            }
            Incoming::Refused { id } => {
                let message =
                    "the request needs more of the VM's memory than can be spared: send less at once".to_owned();
                let error = Failure { code: Code::TooLarge, message };
                answer(&server.sender, id, &Response::Error { error })?;
            }
            Incoming::Cancel { id } => server.tell(id, |job| job.cancel()),
            Incoming::Data { id, bytes, last, .. } => server.tell(id, |job| job.feed(bytes, last)),
            Incoming::Credit { id, .. } => server.tell(id, |job| job.notifier().notify()),
            Incoming::Control { id, body } => match serde_json::from_slice(&body) {
                Ok(control) => server.tell(id, |job| job.control(control)),
                Err(error) => eprintln!("microvm-agent: control of {id}: {error}"),
            },
            other => return Err(format!("the host sent what only a guest may send: {other:?}")),
        }
    }
    Ok(End::Closed)
}

enum Accepted {
    Taken,
    Frozen(Standstill),
}

/// From which size on a block of memory is the kernel's again as soon as it is freed.
const LARGE_BLOCK: i32 = 1 << 20;

/// The allocator gives the top of the heap back to the kernel whenever 128 KiB of it are free, so every long frame would
/// fault its pages in again; and each large block that is freed raises that, until PID 1 holds 64 MiB of what it once
/// needed (mallopt(3)). So both thresholds are fixed.
pub fn keep_freed_memory() {
    for (option, value) in [(libc::M_MMAP_THRESHOLD, LARGE_BLOCK), (libc::M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)] {
        // SAFETY: the call changes the allocator's settings alone.
        if unsafe { libc::mallopt(option, value) } != 1 {
            eprintln!("microvm-agent: mallopt({option}, {value}) was refused");
        }
    }
}

impl Server {
    pub fn new(sender: Sender, guest: Guest) -> Arc<Self> {
        Arc::new(Self { guest, jobs: Mutex::default(), pool: Arc::default(), sender })
    }

    /// Nobody waits for what is under way.
    pub fn cancel_all(&self) {
        let jobs: Vec<Arc<Job>> = self.jobs().drain().map(|(_, job)| job).collect();
        jobs.iter().for_each(|job| job.cancel());
    }

    /// Gets ready to be frozen: on this thread, so that nothing is taken in after it.
    fn freeze(&self, id: u32, writes_disk: bool) -> Result<Accepted, String> {
        match self.guest.settle().and_then(|()| freeze::stop_programs()) {
            Ok(standstill) => {
                if writes_disk {
                    freeze::write_disk();
                }
                let body = serde_json::to_vec(&Response::Ok { result: serde_json::json!({}) });
                self.sender.suspend(id, body.map_err(|e| e.to_string())?)?;
                Ok(Accepted::Frozen(standstill))
            }
            Err(error) => {
                answer(&self.sender, id, &Response::Error { error })?;
                Ok(Accepted::Taken)
            }
        }
    }

    fn jobs(&self) -> MutexGuard<'_, HashMap<u32, Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something to a request; one that is over does not hear it.
    fn tell(&self, id: u32, say: impl FnOnce(&Job)) {
        let job = self.jobs().get(&id).cloned();
        if let Some(job) = job {
            say(&job);
        }
    }

    fn accept(self: &Arc<Self>, id: u32, body: Vec<u8>) -> Result<Accepted, String> {
        if let Some(request) = quick(&body) {
            if request.action == FREEZE {
                return self.freeze(id, request.params[WRITE_DISK] == true);
            }
            if let Some(response) = self.guest.at_once(&request) {
                return answer(&self.sender, id, &response).map(|()| Accepted::Taken);
            }
        }
        self.hand_over(id, body).map(|()| Accepted::Taken)
    }

    fn hand_over(self: &Arc<Self>, id: u32, body: Vec<u8>) -> Result<(), String> {
        let job = match Job::new(id, self.sender.clone()) {
            Ok(job) => job,
            Err(error) => return answer(&self.sender, id, &Response::Error { error }),
        };
        self.jobs().insert(id, job.clone());
        let server = self.clone();
        let Err(error) = self.pool.run(move || server.perform(id, &body, &job)) else { return Ok(()) };
        self.jobs().remove(&id);
        let error = Failure { code: Code::Busy, message: format!("no thread: {error}") };
        answer(&self.sender, id, &Response::Error { error })
    }

    fn perform(&self, id: u32, body: &[u8], job: &Job) {
        let mut shutting_down = false;
        let act = || {
            // Its texts are copied, and decoded once more.
            let _promise = memory::afford(2 * body.len() as u64, "the request")?;
            if body.len() > QUICK_BYTES && !is_modest(body) {
                let message = format!("the request holds over {MAX_VALUES} values");
                return Err(Failure { code: Code::TooLarge, message });
            }
            let request: Request = serde_json::from_slice(body)
                .map_err(|error| Failure { code: Code::BadParams, message: format!("not a request: {error}") })?;
            shutting_down = request.action == "shutdown";
            self.guest.perform(request, job)
        };
        let outcome = catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| {
            let message = "the action failed within the agent; the guest's console says where".to_owned();
            Err(Failure { code: Code::ActionFailed, message })
        });
        let response = match outcome {
            Ok(Answer::Encoded(body)) => Ok(body),
            Ok(Answer::Result(result)) => encode(&Response::Ok { result }),
            Err(error) => encode(&Response::Error { error }),
        };
        self.jobs().remove(&id);
        if let Err(error) = response.and_then(|body| self.sender.respond(id, body)) {
            eprintln!("microvm-agent: {error}");
        }
        if shutting_down {
            // The answer first: it may be another thread that writes it.
            if let Err(error) = self.sender.drain() {
                eprintln!("microvm-agent: {error}");
            }
            boot::power_off();
        }
    }
}

/// A request that is parsed faster than it is handed to another thread.
fn quick(body: &[u8]) -> Option<Request> {
    Some(body).filter(|body| body.len() <= QUICK_BYTES).and_then(|body| serde_json::from_slice(body).ok())
}

fn answer(sender: &Sender, id: u32, response: &Response) -> Result<(), String> {
    sender.respond(id, encode(response)?)
}

/// The response in JSON, or that it is too long for a message or for the memory that can be spared.
fn encode(response: &Response) -> Result<Vec<u8>, String> {
    let limit = || usize::try_from(memory::spare()).unwrap_or(usize::MAX).min(MAX_MESSAGE);
    match json::encode(response, limit) {
        Ok(body) => Ok(body),
        Err(error @ Unwritten::TooLong { .. }) => {
            let error =
                Failure { code: Code::TooLarge, message: format!("the answer: {error}, more than may be sent") };
            serde_json::to_vec(&Response::Error { error }).map_err(|e| e.to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}
