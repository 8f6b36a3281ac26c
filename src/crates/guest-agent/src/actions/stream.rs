//! A program whose descriptors are the call's channels, live.

use std::time::Instant;

use microvm_protocol::identity::Identity;
use microvm_protocol::message::{Failure, Started};
use serde_json::Value;

use super::execute::{ended_json, Params};
use super::program::{Next, Partner};
use super::{read_params, Outcome};
use crate::job::{Input, Job};

/// The host, as a program's partner: it hears no faster than it gives credit.
struct Live<'a> {
    job: &'a Job,
    piece: Vec<u8>,
    written: usize,
}

impl Partner for Live<'_> {
    fn room(&mut self, channel: u8) -> usize {
        self.job.room(channel)
    }

    fn said(&mut self, channel: u8, bytes: &[u8]) -> Result<(), Failure> {
        // None: the host cancelled meanwhile, which the loop is about to see.
        self.job.send(channel, bytes).map(drop)
    }

    fn closed(&mut self, channel: u8) -> Result<(), Failure> {
        self.job.finish(channel)
    }

    fn next(&mut self) -> Result<Next<'_>, Failure> {
        while self.written == self.piece.len() {
            match self.job.input() {
                Input::Bytes(bytes) => (self.piece, self.written) = (bytes, 0),
                Input::Empty => return Ok(Next::Wait),
                Input::Ended => return Ok(Next::End),
            }
        }
        Ok(Next::Bytes(self.piece.get(self.written..).unwrap_or_default()))
    }

    fn wrote(&mut self, bytes: usize) -> Result<(), Failure> {
        self.written += bytes;
        self.job.consumed(bytes)
    }
}

pub fn stream(params: Value, identity: &Identity, job: &Job) -> Outcome {
    let params: Params = read_params(params)?;
    let program = params.streamed()?;
    let begun = Instant::now();
    let running = program.start(identity, job, true)?;
    job.started(&Started::Program { pid: running.pid().unsigned_abs() })?;
    let ended = running.drive(&mut Live { job, piece: Vec::new(), written: 0 })?;
    Ok(ended_json(ended, begun.elapsed()))
}
