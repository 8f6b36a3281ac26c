//! The client's end of the richer protocol: an agent whose transport is the socket of a VM's broker.

use std::path::Path;
use std::time::Duration;

use microvm_protocol::record::Decoder;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::agent::Agent;
use super::client::connect;
use super::error::SessionError;
use super::framing::{self, Reader};
use crate::error::{Error, Result};
use crate::model::VmId;

/// What is said after the handshake: calls as `microvm_protocol::mux` has them, and [`super::Operation`].
pub(super) const VERSION: u64 = 1;

/// Attaches to the VM whose broker listens at `socket`; returns the agent, and the process that has the VM.
///
/// # Errors
/// [`Error::NothingToAttach`] when nobody listens, [`Error::ChannelTimeout`], [`Error::ForeignSocket`],
/// [`Error::UntrustedSocket`], [`Error::ChannelClosed`] when the owner speaks no such protocol.
pub async fn attach(vm_id: &VmId, socket: &Path, deadline: Duration) -> Result<(Agent, Option<i32>)> {
    let attached = tokio::time::timeout(deadline, agreed(vm_id, socket)).await;
    attached.unwrap_or_else(|_| {
        let (vm_id, what, limit_s) = (vm_id.to_string(), "attach".to_owned(), deadline.as_secs_f64());
        Err(Error::ChannelTimeout { vm_id, what, limit_s, sent: false })
    })
}

async fn agreed(vm_id: &VmId, socket: &Path) -> Result<(Agent, Option<i32>)> {
    let nothing = |error: std::io::Error| {
        let (vm_id, socket, source) = (vm_id.clone(), socket.to_owned(), error.into());
        Error::NothingToAttach { vm_id, socket, source }
    };
    let closed = |reason: SessionError| Error::channel_closed(vm_id, reason, false);
    let mut stream = connect(vm_id, socket).await?.map_err(nothing)?;
    let owner = stream.peer_cred().map_err(nothing)?.pid();
    let wish = framing::encode(&json!({"type": "attach", "version": VERSION})).map_err(|e| closed(e.into()))?;
    stream.write_all(&wish).await.map_err(nothing)?;
    let mut reader = Reader::default();
    match reader.next(&mut stream).await {
        Ok(Some(answer)) if answer["type"] == "attached" => {}
        Ok(Some(answer)) => {
            let answer = answer["error"]["message"].as_str().unwrap_or_default().to_owned();
            return Err(closed(SessionError::OtherVersion { answer }));
        }
        Ok(None) => return Err(nothing(std::io::ErrorKind::ConnectionReset.into())),
        Err(error) => return Err(closed(error.into())),
    }
    let mut decoder = Decoder::default();
    decoder.feed(&reader.into_rest());
    Ok((Agent::attached(vm_id.clone(), stream, decoder), owner))
}
