//! What the VMMs with an HTTP API share: requests whose refusal is an error in the VMM's words, and the limits of a disk.
//!
//! Their bodies of a rate limiter are the same: the golden files hold both.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::Serialize;

use crate::error::{Cause, Error, Result};
use crate::host::socket_dir::SocketDir;
use crate::model::VmId;
use crate::vmm::error::ControlError;
use crate::vmm::http::{Answer, Call, Client};
use crate::vmm::{LaunchPlan, CONTROL_DEADLINE};

/// Any number from 3 up: a VM's vsock knows no other guest.
pub const GUEST_CID: u32 = 3;
/// In milliseconds: a bucket is filled at this pace, and holds as much.
const REFILL_MS: u64 = 1000;

/// Reads the VMM's words from the body of a refusal; `None` when it has none.
pub type Words = fn(&[u8]) -> Option<String>;

/// The API of one VMM that runs.
pub struct Rest {
    vm_id: VmId,
    pub sockets: Arc<SocketDir>,
    /// The name of the API's socket in `sockets`.
    socket: &'static str,
    words: Words,
    client: Client,
}

impl Rest {
    #[must_use]
    pub fn new(vm_id: VmId, sockets: Arc<SocketDir>, socket: &'static str, words: Words) -> Self {
        Self { vm_id, sockets, socket, words, client: Client::new(CONTROL_DEADLINE) }
    }

    #[must_use]
    pub fn failed(&self, operation: &'static str, cause: impl Into<Cause>) -> Error {
        Error::Vmm { vm_id: self.vm_id.clone(), operation, source: cause.into() }
    }

    /// # Errors
    /// [`Error::Vmm`] with the request and the VMM's words.
    pub async fn ask(&self, operation: &'static str, call: Call) -> Result<Answer> {
        self.ask_by(&self.client, operation, call, None).await
    }

    /// As [`Rest::ask`], by a client with a deadline of its own; `fd` goes along with the request.
    ///
    /// # Errors
    /// As [`Rest::ask`]'s.
    pub async fn ask_by(
        &self,
        client: &Client,
        operation: &'static str,
        call: Call,
        fd: Option<OwnedFd>,
    ) -> Result<Answer> {
        let named = format!("{} {}", call.method, call.path);
        let error = match client.ask(call, fd, || self.sockets.connect(self.socket)).await {
            Ok(answer) if answer.status.is_success() => return Ok(answer),
            Ok(answer) => ControlError::Refused(refusal(&answer, self.words)),
            Err(error) => error,
        };
        let text = format!("{named}: {error}");
        Err(self.failed(operation, Cause::explained(error, text)))
    }
}

/// The VMM's words, or the status where it has none.
#[must_use]
pub fn refusal(answer: &Answer, words: Words) -> String {
    let status = || format!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body).trim());
    words(&answer.body).unwrap_or_else(status)
}

#[derive(Debug, Serialize)]
pub struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<TokenBucket>,
}

#[derive(Debug, Serialize)]
struct TokenBucket {
    size: u64,
    refill_time: u64,
}

/// The limits of a VM's disk, for reads and writes together; `None` when there are none.
#[must_use]
pub fn rate_limiter(plan: &LaunchPlan) -> Option<RateLimiter> {
    let bucket = |size| TokenBucket { size, refill_time: REFILL_MS };
    let (bandwidth, ops) = (plan.limits.disk_bytes_per_s.map(bucket), plan.limits.disk_ops_per_s.map(bucket));
    (bandwidth.is_some() || ops.is_some()).then_some(RateLimiter { bandwidth, ops })
}
