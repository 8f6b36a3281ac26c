//! A broker's socket, to the byte, and its clients of both protocols, in front of a guest that the test drives.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use microvm_isolation::channel::{Agent, Broker};
use support::{connect, Guest, KEY};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const LONG: Duration = Duration::from_secs(20);

struct Desk {
    _folder: TempDir,
    socket: PathBuf,
    _broker: Broker,
    guest: Guest,
}

impl Desk {
    async fn open(name: &str) -> Self {
        let (agent, guest) = connect(name, KEY).await;
        let (agent, guest): (Agent, Guest) = (agent.unwrap(), guest.unwrap());
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sock");
        let broker = Broker::serve(support::id(name), &socket, Arc::new(agent), LONG).unwrap();
        Self { _folder: folder, socket, _broker: broker, guest }
    }

    async fn client(&self) -> UnixStream {
        UnixStream::connect(&self.socket).await.unwrap()
    }
}

/// A message as the socket carries it, its length in hexadecimal digits.
fn shown(side: &str, bytes: &[u8]) -> String {
    let (length, text) = bytes.split_first_chunk::<4>().unwrap();
    format!("{side} {:08x} {}", u32::from_be_bytes(*length), String::from_utf8_lossy(text))
}

async fn next(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    stream.read_exact(&mut bytes).await.unwrap();
    let length = u32::from_be_bytes(*bytes.first_chunk().unwrap()) as usize;
    bytes.resize(4 + length, 0);
    stream.read_exact(&mut bytes[4..]).await.unwrap();
    bytes
}

/// Every byte of the 4-byte framing, frozen: clients that were written before go on. `MICROVM_BLESS=1` writes it anew.
#[tokio::test]
async fn test_framing_is_what_it_was() {
    let _turn = support::turn().await;
    let mut desk = Desk::open("frozen").await;
    let mut client = desk.client().await;
    let answered = br#"{"status":"ok","result":{"exit_code":0,"stdout":"caf\u00e9\n"}}"#;
    let failed = br#"{"status":"error","error":{"code":"program_not_found","message":"no such program"}}"#;
    let rows: [(&str, Option<&[u8]>); 12] = [
        (r#"{"type":"ping"}"#, Some(br#"{"status":"ok","result":"pong"}"#)),
        (r#"{"id":7,"type":"ping"}"#, Some(br#"{"status":"ok","result":"pong"}"#)),
        (r#"{"type":"command","command":"exec","params":{"program":"ls"}}"#, Some(answered)),
        (r#"{"type":"command","action":"exec","data":{"program":"ls"},"id":{"any":[1,"x"]}}"#, Some(answered)),
        (r#"{"type":"command","command":"exec","params":{"program":"nothing"}}"#, Some(failed)),
        (r#"{"type":"command","command":"freeze"}"#, None),
        (r#"{"type":"command"}"#, None),
        (r#"{"type":"command","command":"exec","params":[1]}"#, None),
        (r#"{"type":"attach"}"#, None),
        (r#"{"type":"attach","version":1}"#, None),
        ("[]", None),
        ("{no json", None),
    ];
    let mut said = String::new();
    for (question, answer) in rows {
        let bytes = [&u32::try_from(question.len()).unwrap().to_be_bytes()[..], question.as_bytes()].concat();
        client.write_all(&bytes).await.unwrap();
        if let Some(answer) = answer {
            desk.guest.answer(answer).await;
        }
        let heard = tokio::time::timeout(LONG, next(&mut client)).await.unwrap();
        writeln!(said, "{}\n{}", shown("client", &bytes), shown("broker", &heard)).unwrap();
    }
    client.write_all(&[0xff; 4]).await.unwrap();
    let heard = tokio::time::timeout(LONG, next(&mut client)).await.unwrap();
    writeln!(said, "client ffffffff\n{}", shown("broker", &heard)).unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/broker.framing");
    if std::env::var_os("MICROVM_BLESS").is_some() {
        std::fs::write(path, &said).unwrap();
    }
    assert_eq!(said, std::fs::read_to_string(path).unwrap());
}
