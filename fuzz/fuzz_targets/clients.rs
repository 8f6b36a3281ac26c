//! An attached client: whatever records it sends, its requests, and what the owner holds for it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_isolation::channel::parse_request;
use microvm_protocol::connection::Connection;
use microvm_protocol::message::{Control, MAX_MESSAGE};
use microvm_protocol::mux::{Incoming, CHANNELS, MAX_CALLS, STDOUT, WINDOW};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::{Role, Session};

fuzz_target!(|bytes: &[u8]| {
    let mut connection = Connection::new(Session::unsealed(Role::Guest));
    let mut decoder = Decoder::default();
    let (mut unread, mut out) = (0, Vec::new());
    decoder.feed(bytes);
    while let Ok(Some(record)) = decoder.next_record() {
        let Ok(incoming) = connection.receive(record) else { return };
        match incoming {
            Some(Incoming::Request { id, body }) => {
                assert!(body.len() <= MAX_MESSAGE);
                drop(parse_request(&body));
                connection.calls.started(id, b"{}".to_vec()).ok();
                let sent = connection.calls.send(id, STDOUT, &[7; 2 * WINDOW]).unwrap_or(0);
                assert!(sent <= WINDOW);
                // Every other one is answered at once.
                if id % 2 == 0 {
                    connection.calls.respond(id, body).expect("it was asked for");
                }
            }
            Some(Incoming::Data { id, channel, bytes, .. }) => {
                unread += bytes.len() - bytes.len() / 2;
                connection.calls.consumed(id, channel, bytes.len() / 2);
            }
            Some(Incoming::Control { body, .. }) => drop(serde_json::from_slice::<Control>(&body)),
            Some(Incoming::Cancel { id }) => {
                connection.calls.respond(id, b"{}".to_vec()).ok();
            }
            _ => {}
        }
        assert!(connection.calls.len() <= MAX_CALLS);
        assert!(unread <= bytes.len().min(MAX_CALLS * CHANNELS * WINDOW * 64));
        out.clear();
        connection.transmit(&mut out, WINDOW).expect("nothing is sealed");
    }
});
