//! Every byte of each generation, frozen: `golden/generation-N.txt`.
//!
//! A file holds a whole conversation with fixed keys: the handshake, then one frame of every kind from either side. Two
//! things are held true: today's code says the same bytes, and today's code understands the recorded ones. A generation
//! that has shipped never changes; a new one gets a file of its own. `MICROVM_BLESS=1` writes the newest anew.

use crate::connection::Connection;
use crate::handshake::{GuestHandshake, HostHandshake, HostStep};
use crate::identity::{Credentials, Key};
use crate::mux::{Incoming, STDIN, STDOUT, WINDOW};
use crate::session::tests::{records, NOW};
use crate::GENERATION_MAX;

const KEY: Key = Key([0x11; 32]);
const HOST_EPHEMERAL: Key = Key([0x22; 32]);
const GUEST_EPHEMERAL: Key = Key([0x33; 32]);
const READY: &[u8] = br#"{"guest":"ready"}"#;

/// The guest's.
fn credentials() -> Credentials {
    Credentials::agree(KEY, &HOST_EPHEMERAL, &GUEST_EPHEMERAL)
}

fn path() -> String {
    format!("{}/golden/generation-{GENERATION_MAX}.txt", env!("CARGO_MANIFEST_DIR"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Both sides with fixed keys, and what they said so far.
struct Conversation {
    host: Connection,
    guest: Connection,
    lines: Vec<String>,
}

impl Conversation {
    fn begin() -> Self {
        let guest = GuestHandshake::new(false).unwrap();
        let mut host = HostHandshake::new(credentials().of_peer());
        let hello = guest.hello().unwrap();
        let HostStep::Send(offer) = host.receive(&records(&hello)[0], NOW).unwrap() else { panic!() };
        let offered = guest.receive(&records(&offer)[0], &credentials()).unwrap();
        let (accept, guest_session) = offered.accept(READY).unwrap();
        let HostStep::Established(session, _) = host.receive(&records(&accept)[0], NOW).unwrap() else { panic!() };
        let lines = [("guest HELLO", &hello), ("host OFFER", &offer), ("guest ACCEPT", &accept)];
        Self {
            host: Connection::new(*session),
            guest: Connection::new(guest_session),
            lines: lines.map(|(title, bytes)| format!("{title} {}", hex(bytes))).into(),
        }
    }

    /// Sends what the host has to say and notes the bytes; returns what the guest made of them.
    fn host_says(&mut self, title: &str) -> Vec<Incoming> {
        let mut bytes = Vec::new();
        self.host.transmit(&mut bytes, usize::MAX).unwrap();
        self.lines.push(format!("host {title} {}", hex(&bytes)));
        records(&bytes).iter().filter_map(|body| self.guest.receive(body).unwrap()).collect()
    }

    fn guest_says(&mut self, title: &str) -> Vec<Incoming> {
        let mut bytes = Vec::new();
        self.guest.transmit(&mut bytes, usize::MAX).unwrap();
        self.lines.push(format!("guest {title} {}", hex(&bytes)));
        records(&bytes).iter().filter_map(|body| self.host.receive(body).unwrap()).collect()
    }
}

fn whole() -> Vec<String> {
    let mut talk = Conversation::begin();
    talk.guest.calls.event(br#"{"event":"ready"}"#.to_vec()).unwrap();
    talk.guest_says("EVENT");
    let id =
        talk.host.calls.request(br#"{"action":"stream","params":{"program":"cat"},"stream":true}"#.to_vec()).unwrap();
    talk.host_says("REQUEST");
    talk.guest.calls.started(id, br#"{"started":"program","pid":7}"#.to_vec()).unwrap();
    talk.guest_says("STARTED");
    talk.host.calls.send(id, STDIN, b"to the program").unwrap();
    talk.host_says("DATA");
    talk.host.calls.control(id, br#"{"control":"signal","signal":15}"#.to_vec()).unwrap();
    talk.host_says("CONTROL");
    talk.guest.calls.send(id, STDOUT, &[0x5a; WINDOW]).unwrap();
    // A quarter of the window is credited at once; the digest of the long records is enough of them.
    let mut bulk = Vec::new();
    talk.guest.transmit(&mut bulk, usize::MAX).unwrap();
    for body in records(&bulk) {
        talk.host.receive(&body).unwrap();
    }
    talk.host.calls.consumed(id, STDOUT, WINDOW / 4);
    talk.host_says("CREDIT");
    talk.guest.calls.finish(id, STDOUT).unwrap();
    talk.guest_says("DATA-LAST");
    talk.host.calls.ping(0x01020304);
    talk.host_says("PING");
    talk.guest_says("PONG");
    talk.host.calls.cancel(id).unwrap();
    talk.host_says("CANCEL");
    talk.guest.calls.respond(id, br#"{"status":"error","error":{"code":"cancelled","message":"m"}}"#.to_vec()).unwrap();
    talk.guest_says("RESPONSE");
    talk.lines
}

#[test]
fn test_generation_todays_bytes_are_the_frozen_ones() {
    let text = whole().join("\n") + "\n";
    if std::env::var_os("MICROVM_BLESS").is_some() {
        std::fs::write(path(), &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path()).unwrap(), text, "{}", path());
}

#[test]
fn test_generation_frozen_requests_are_understood_by_todays_guest() {
    let recorded = std::fs::read_to_string(path()).unwrap();
    let of = |who: &str| -> Vec<(String, Vec<u8>)> {
        let mine = recorded.lines().filter_map(|line| line.strip_prefix(who)?.strip_prefix(' ')?.split_once(' '));
        mine.map(|(title, bytes)| (title.to_owned(), unhex(bytes))).collect()
    };
    let guest = GuestHandshake::new(false).unwrap();
    let (host, said) = (of("host"), of("guest"));
    assert_eq!(guest.hello().unwrap(), said[0].1);
    let offered = guest.receive(&records(&host[0].1)[0], &credentials()).unwrap();
    let (accept, session) = offered.accept(READY).unwrap();
    assert_eq!(accept, said[1].1);
    let mut guest = Connection::new(session);
    let mut understood = Vec::new();
    for (title, bytes) in &host[1..] {
        if title == "CREDIT" {
            guest.calls.send(1, STDOUT, &[0; WINDOW]).unwrap();
            guest.transmit(&mut Vec::new(), usize::MAX).unwrap();
        }
        for body in records(bytes) {
            understood.push((title.as_str(), guest.receive(&body).unwrap()));
        }
    }
    let titles: Vec<&str> = understood.iter().map(|(title, _)| *title).collect();
    assert_eq!(titles, ["REQUEST", "DATA", "CONTROL", "CREDIT", "PING", "CANCEL"]);
    assert!(
        matches!(&understood[0].1, Some(Incoming::Request { id: 1, body }) if body.starts_with(b"{\"action\":\"stream\""))
    );
    assert!(
        matches!(&understood[1].1, Some(Incoming::Data { channel: STDIN, bytes, .. }) if bytes == b"to the program")
    );
    assert!(matches!(&understood[2].1, Some(Incoming::Control { .. })));
    assert_eq!(understood[5].1, Some(Incoming::Cancel { id: 1 }));
}
