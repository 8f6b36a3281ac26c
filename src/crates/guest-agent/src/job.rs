//! One request that runs, and what the host says to it meanwhile.
//!
//! The thread that reads the port notes what came and notifies the request's own thread, which waits for the notifier
//! alone or together with a program's pipes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use microvm_protocol::message::{Code, Control, Failure, Started};
use microvm_protocol::mux::STDIN;

use crate::children::Spawned;
use crate::notifier::Notifier;
use crate::port::Sender;

#[derive(Default)]
struct Said {
    cancelled: bool,
    input: VecDeque<Vec<u8>>,
    input_ended: bool,
    resize: Option<(u16, u16)>,
    program: Option<Arc<Spawned>>,
}

/// What a request's input holds.
pub enum Input {
    Bytes(Vec<u8>),
    /// Nothing yet.
    Empty,
    Ended,
}

/// One request that runs; cancelling it kills the program that it waits for.
pub struct Job {
    id: u32,
    sender: Sender,
    said: Mutex<Said>,
    notifier: Arc<Notifier>,
}

impl Job {
    pub fn new(id: u32, sender: Sender) -> Result<Arc<Self>, Failure> {
        Ok(Arc::new(Self { id, sender, said: Mutex::default(), notifier: Notifier::new()? }))
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn notifier(&self) -> &Arc<Notifier> {
        &self.notifier
    }

    pub fn cancel(&self) {
        let program = {
            let mut said = self.said();
            said.cancelled = true;
            said.program.clone()
        };
        if let Some(program) = program {
            program.kill();
        }
        self.notifier.notify();
    }

    pub fn is_cancelled(&self) -> bool {
        self.said().cancelled
    }

    /// The program that a CANCEL or a signal is meant for.
    pub fn runs(&self, program: &Arc<Spawned>) {
        self.said().program = Some(program.clone());
        // A cancel that came before the program was noted.
        if self.is_cancelled() {
            program.kill();
        }
    }

    pub fn control(&self, control: Control) {
        let program = self.said().program.clone();
        match control {
            Control::Signal { signal } => {
                if let Some(program) = program {
                    program.signal(signal);
                }
            }
            Control::Resize { rows, columns } => {
                self.said().resize = Some((rows, columns));
                self.notifier.notify();
            }
        }
    }

    /// The newest size that the program's terminal is to have, once.
    pub fn resize(&self) -> Option<(u16, u16)> {
        self.said().resize.take()
    }

    /// Bytes of the host, or their end.
    pub fn feed(&self, bytes: Vec<u8>, last: bool) {
        let mut said = self.said();
        if !bytes.is_empty() {
            said.input.push_back(bytes);
        }
        said.input_ended |= last;
        drop(said);
        self.notifier.notify();
    }

    pub fn input(&self) -> Input {
        let mut said = self.said();
        match said.input.pop_front() {
            Some(bytes) => Input::Bytes(bytes),
            None if said.input_ended => Input::Ended,
            None => Input::Empty,
        }
    }

    /// Lets the host send as many bytes more on channel 0.
    pub fn consumed(&self, bytes: usize) -> Result<(), Failure> {
        self.sender.consumed(self.id, STDIN, bytes).map_err(port_failure)
    }

    pub fn started(&self, started: &Started) -> Result<(), Failure> {
        self.sender.started(self.id, started).map_err(port_failure)
    }

    pub fn room(&self, channel: u8) -> usize {
        self.sender.room(self.id, channel)
    }

    /// Sends what the host has room for; `None` when it wants no more.
    pub fn send(&self, channel: u8, bytes: &[u8]) -> Result<Option<usize>, Failure> {
        self.sender.send(self.id, channel, bytes).map_err(port_failure)
    }

    pub fn finish(&self, channel: u8) -> Result<(), Failure> {
        self.sender.finish(self.id, channel).map_err(port_failure)
    }
}

fn port_failure(message: String) -> Failure {
    Failure { code: Code::IoError, message }
}

pub fn cancelled(what: &str) -> Failure {
    Failure { code: Code::Cancelled, message: format!("{what}: the request was cancelled") }
}
