//! The host's calls: what its users do, and whatever frames a guest sends between.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use microvm_protocol::message::MAX_MESSAGE;
use microvm_protocol::mux::{Incoming, Mux, MAX_CALLS};
use microvm_protocol::session::Role;

#[derive(Debug, Arbitrary)]
enum Step<'a> {
    Request(u16),
    Cancel(u8),
    Control(u8),
    Ping(u32),
    Send {
        id: u8,
        channel: u8,
        size: u16,
    },
    Finish {
        id: u8,
        channel: u8,
    },
    Transmit(u8),
    /// A frame of the guest: kind, flags, id, payload.
    Receive {
        kind: u8,
        flags: u8,
        id: u8,
        payload: &'a [u8],
    },
    /// The same with a payload of this size.
    Long {
        kind: u8,
        flags: u8,
        id: u8,
        channel: u8,
        size: u16,
    },
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let mut host = Mux::new(Role::Host);
    let mut frame = Vec::new();
    let mut unread = 0usize;
    for step in steps.into_iter().take(4096) {
        let received = match step {
            Step::Request(size) => {
                let _id = host.request(vec![0; usize::from(size) * 8]);
                continue;
            }
            Step::Cancel(id) => {
                let _sent = host.cancel(id.into());
                continue;
            }
            Step::Control(id) => {
                let _taken = host.control(id.into(), vec![1]);
                continue;
            }
            Step::Ping(token) => {
                host.ping(token);
                continue;
            }
            Step::Send { id, channel, size } => {
                let _taken = host.send(id.into(), channel, &vec![2; size.into()]);
                continue;
            }
            Step::Finish { id, channel } => {
                let _taken = host.finish(id.into(), channel);
                continue;
            }
            Step::Transmit(count) => {
                for _ in 0..count {
                    host.next_frame(&mut frame);
                }
                continue;
            }
            Step::Receive { kind, flags, id, payload } => {
                let mut bytes = vec![kind % 12, flags & 3, 0, 0, 0, id];
                bytes.extend_from_slice(payload);
                host.receive(&bytes)
            }
            Step::Long { kind, flags, id, channel, size } => {
                let mut bytes = vec![kind % 12, flags & 3, 0, 0, 0, id, channel % 4];
                bytes.resize(bytes.len() + usize::from(size), 7);
                host.receive(&bytes)
            }
        };
        match received {
            Ok(Some(Incoming::Data { id, channel, bytes, .. })) => {
                unread += bytes.len();
                // Every other byte is taken by its user.
                host.consumed(id, channel, bytes.len() / 2);
            }
            Ok(Some(Incoming::Response { body, .. })) => assert!(body.len() <= MAX_MESSAGE),
            Ok(_) => {}
            Err(_) => return,
        }
        assert!(host.len() <= MAX_CALLS);
        assert!(unread <= 4096 * 65_535);
    }
});
