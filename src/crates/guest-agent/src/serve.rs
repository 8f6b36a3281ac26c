//! Requests in, answers out.
//!
//! One thread reads the port and never waits for anything else: what is quick it answers itself, the rest runs on the
//! pool. Whatever a request does, a panic included, it is answered, and the agent lives on.

use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use microvm_protocol::message::{Code, Failure, Request, Response, MAX_MESSAGE};
use microvm_protocol::mux::Incoming;

use crate::actions::Guest;
use crate::boot;
use crate::job::Job;
use crate::pool::Pool;
use crate::port::{Link, Sender};

/// Longer requests are parsed on the pool.
const QUICK_BYTES: usize = 4096;

struct Server {
    guest: Guest,
    jobs: Mutex<HashMap<u32, Arc<Job>>>,
    pool: Arc<Pool>,
    sender: Sender,
}

/// Serves until the host closes the port.
pub fn serve(mut link: Link, guest: Guest) -> Result<(), String> {
    let server = Arc::new(Server { guest, jobs: Mutex::default(), pool: Arc::default(), sender: link.sender() });
    while let Some(incoming) = link.receive()? {
        match incoming {
            Incoming::Request { id, body } => server.accept(id, body)?,
            Incoming::Cancel { id } => server.tell(id, |job| job.cancel()),
            Incoming::Data { id, bytes, last, .. } => server.tell(id, |job| job.feed(bytes, last)),
            Incoming::Credit { id, .. } => server.tell(id, |job| job.bell().ring()),
            Incoming::Control { id, body } => match serde_json::from_slice(&body) {
                Ok(control) => server.tell(id, |job| job.control(control)),
                Err(error) => eprintln!("microvm-agent: control of {id}: {error}"),
            },
            other => return Err(format!("the host sent what only a guest may send: {other:?}")),
        }
    }
    Ok(())
}

/// The allocator gives the top of the heap back to the kernel whenever 128 KiB of it are free, so every long frame would
/// fault its pages in again. Freeing one large block raises that threshold to twice its size (mallopt(3)).
pub fn keep_freed_memory() {
    drop(std::hint::black_box(vec![0u8; 1 << 20]));
}

impl Server {
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

    fn accept(self: &Arc<Self>, id: u32, body: Vec<u8>) -> Result<(), String> {
        if body.len() <= QUICK_BYTES {
            if let Some(response) = serde_json::from_slice(&body).ok().and_then(|request| self.guest.at_once(&request))
            {
                return answer(&self.sender, id, &response);
            }
        }
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
            Ok(result) => Response::Ok { result },
            Err(error) => Response::Error { error },
        };
        self.jobs().remove(&id);
        if let Err(error) = answer(&self.sender, id, &response) {
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

fn answer(sender: &Sender, id: u32, response: &Response) -> Result<(), String> {
    let mut body = serde_json::to_vec(response).map_err(|e| e.to_string())?;
    if body.len() > MAX_MESSAGE {
        let message = format!("the answer has {} bytes, at most {MAX_MESSAGE} may be sent", body.len());
        let error = Failure { code: Code::TooLarge, message };
        body = serde_json::to_vec(&Response::Error { error }).map_err(|e| e.to_string())?;
    }
    sender.respond(id, body)
}
