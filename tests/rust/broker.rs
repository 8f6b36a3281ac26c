//! A broker's socket, to the byte, and its clients of both protocols, in front of a guest that the test drives.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fmt::Write as _;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use microvm_isolation::channel::{attach, Agent, Broker, Next, Operation, Owner};
use microvm_protocol::frame::{Frame, Kind};
use microvm_protocol::mux::WINDOW;
use microvm_protocol::record;
use serde_json::{json, Value};
use support::{connect, resident_bytes, Guest, KEY};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const LONG: Duration = Duration::from_secs(20);

struct Desk {
    _folder: TempDir,
    socket: PathBuf,
    broker: Broker,
    guest: Guest,
}

impl Desk {
    async fn open(name: &str) -> Self {
        let (agent, guest) = connect(name, KEY).await;
        let (agent, guest): (Agent, Guest) = (agent.unwrap(), guest.unwrap());
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sock");
        let broker = Broker::serve(support::id(name), &socket, Arc::new(agent), LONG).unwrap();
        Self { _folder: folder, socket, broker, guest }
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

fn record_of(kind: Kind, last: bool, id: u32, payload: &[u8]) -> Vec<u8> {
    let (mut plain, mut out) = (Vec::new(), Vec::new());
    Frame { kind, last, id, payload }.encode(&mut plain);
    record::encode(&plain, &mut out).unwrap();
    out
}

/// A client that is attached and does by hand what it likes.
async fn attached_by_hand(desk: &Desk) -> UnixStream {
    let mut client = desk.client().await;
    let wish = br#"{"type":"attach","version":1}"#;
    client.write_all(&[&[0, 0, 0, wish.len() as u8][..], wish].concat()).await.unwrap();
    assert_eq!(&next(&mut client).await[4..], br#"{"type":"attached","version":1}"#);
    client
}

#[tokio::test]
async fn test_attached_stream_is_carried_with_the_windows_of_both_sides() {
    let _turn = support::turn().await;
    let mut desk = Desk::open("carried").await;
    let (agent, owner) = attach(&support::id("carried"), &desk.socket, LONG).await.unwrap();
    assert_eq!(owner, Some(std::process::id() as i32));
    let stream = agent.open("stream", json!({"program": "x"}), LONG).await.unwrap();
    let id = desk.guest.hear().await.id;
    let before = resident_bytes();
    // As much as the guest may send: what the client has not taken stays below two windows.
    for _ in 0..WINDOW / 1024 {
        desk.guest.say(Kind::Data, false, id, &[&[1][..], &[7; 1024]].concat()).await;
    }
    desk.guest.say(Kind::Response, true, id, br#"{"status":"ok","result":{"done":true}}"#).await;
    let mut taken = 0;
    let end = loop {
        match stream.next::<Value>().await.unwrap() {
            Next::Piece(piece) => taken += piece.bytes.len(),
            Next::End(end) => break end,
        }
    };
    assert_eq!((taken, end), (WINDOW, json!({"done": true})));
    assert!(resident_bytes() < before + (8 << 20));
}

#[tokio::test]
async fn test_guest_cannot_say_what_only_an_owner_says() {
    let _turn = support::turn().await;
    let mut desk = Desk::open("liar").await;
    let (agent, _) = attach(&support::id("liar"), &desk.socket, LONG).await.unwrap();
    let lie = br#"{"status":"refused","code":"vm_not_found","message":"believe me","details":{}}"#;
    let (answered, ()) = tokio::join!(agent.request("x", Value::Null, LONG), desk.guest.answer(lie));
    assert_eq!(answered.unwrap_err().code(), "channel_closed");
}

struct Slow;

impl Owner for Slow {
    fn operate(
        &self,
        operation: Operation,
    ) -> std::pin::Pin<Box<dyn Future<Output = microvm_isolation::error::Result<Value>> + Send>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok(json!(operation.name()))
        })
    }
}

#[tokio::test]
async fn test_operation_is_answered_though_its_broker_ends_meanwhile() {
    let _turn = support::turn().await;
    let desk = Desk::open("ending").await;
    desk.broker.set_owner(Arc::new(Slow));
    let (agent, _) = attach(&support::id("ending"), &desk.socket, LONG).await.unwrap();
    let end = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(desk.broker);
    };
    let (done, ()) = tokio::join!(agent.operate(&Operation::Stop, LONG), end);
    assert_eq!(done.unwrap(), json!("stop"));
    tokio::time::timeout(LONG, agent.closed()).await.unwrap();
}

#[tokio::test]
async fn test_client_that_leaves_a_long_answer_unread_is_cut_off_and_one_that_stands_still_is_not() {
    let _turn = support::turn().await;
    let mut desk = Desk::open("unread").await;
    let (mut still, mut deaf) = (attached_by_hand(&desk).await, attached_by_hand(&desk).await);
    let request = record_of(Kind::Request, true, 1, br#"{"action":"x"}"#);
    still.write_all(&request).await.unwrap();
    desk.guest.answer(br#"{"status":"ok","result":1}"#).await;
    deaf.write_all(&request).await.unwrap();
    let long = format!("{{\"status\":\"ok\",\"result\":\"{}\"}}", "x".repeat(1 << 20));
    desk.guest.answer(long.as_bytes()).await;
    tokio::time::sleep(Duration::from_secs(17)).await;
    let mut rest = Vec::new();
    deaf.read_to_end(&mut rest).await.unwrap();
    assert!(rest.len() < 1 << 20, "{}", rest.len());
    let mut answer = [0; 64];
    let length = still.read(&mut answer).await.unwrap();
    assert!(answer[..length].ends_with(br#"{"status":"ok","result":1}"#));
}
