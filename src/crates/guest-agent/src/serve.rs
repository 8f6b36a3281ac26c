//! Requests in, answers out; each request on a thread of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use microvm_protocol::frame::Kind;
use microvm_protocol::message::{Code, Failure, Request, Response, MAX_MESSAGE};
use microvm_protocol::session::Message;

use crate::actions::{Guest, Job};
use crate::boot;
use crate::port::{Link, Sender};

/// Requests that may run at once.
const MAX_IN_FLIGHT: usize = 64;
/// Parsing hostile documents may recurse; the memory is touched only when it does.
const STACK_BYTES: usize = 16 << 20;

type InFlight = Arc<Mutex<HashMap<u32, Arc<Job>>>>;

fn jobs(in_flight: &InFlight) -> MutexGuard<'_, HashMap<u32, Arc<Job>>> {
    in_flight.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until the host closes the port.
pub fn serve(mut link: Link, guest: Guest) -> Result<(), String> {
    let guest = Arc::new(guest);
    let in_flight = InFlight::default();
    while let Some(message) = link.receive()? {
        match message.kind {
            Kind::Request => accept(message, &guest, &in_flight, link.sender())?,
            Kind::Cancel => {
                let job = jobs(&in_flight).get(&message.id).cloned();
                if let Some(job) = job {
                    job.cancel();
                }
            }
            Kind::Response | Kind::Event => return Err("the host sent what only a guest may send".into()),
        }
    }
    Ok(())
}

fn accept(message: Message, guest: &Arc<Guest>, in_flight: &InFlight, sender: Sender) -> Result<(), String> {
    let id = message.id;
    let request: Request = match serde_json::from_slice(&message.body) {
        Ok(request) => request,
        Err(error) => return answer(&sender, id, failure(Code::BadParams, format!("not a request: {error}"))),
    };
    let job = Arc::new(Job::default());
    {
        let mut running = jobs(in_flight);
        if running.len() >= MAX_IN_FLIGHT {
            drop(running);
            let busy = format!("{MAX_IN_FLIGHT} requests are running; try again when one has ended");
            return answer(&sender, id, failure(Code::Busy, busy));
        }
        running.insert(id, job.clone());
    }
    let (guest, shared, replies) = (guest.clone(), in_flight.clone(), sender.clone());
    let work = move || {
        let shutting_down = request.action == "shutdown";
        let response = match guest.perform(&request.action, request.params, &job) {
            Ok(result) => Response::Ok { result },
            Err(error) => Response::Error { error },
        };
        jobs(&shared).remove(&id);
        if let Err(error) = answer(&replies, id, response) {
            eprintln!("microvm-agent: answer {id}: {error}");
        }
        if shutting_down {
            boot::power_off();
        }
    };
    if let Err(error) = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(work) {
        jobs(in_flight).remove(&id);
        return answer(&sender, id, failure(Code::Busy, format!("no thread: {error}")));
    }
    Ok(())
}

fn failure(code: Code, message: String) -> Response {
    Response::Error { error: Failure { code, message } }
}

fn answer(sender: &Sender, id: u32, response: Response) -> Result<(), String> {
    let mut body = serde_json::to_vec(&response).map_err(|e| e.to_string())?;
    if body.len() > MAX_MESSAGE {
        let text = format!("the answer has {} bytes, at most {MAX_MESSAGE} may be sent", body.len());
        body = serde_json::to_vec(&failure(Code::TooLarge, text)).map_err(|e| e.to_string())?;
    }
    sender.send(Kind::Response, id, &body)
}
