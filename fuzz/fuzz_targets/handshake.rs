//! The host's handshake against any bytes: nobody without the key gets a session.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_protocol::handshake::{GuestHandshake, HostHandshake, HostStep};
use microvm_protocol::identity::{Credentials, Key};
use microvm_protocol::record::Decoder;

/// Not the one of the recorded conversation in the corpus.
const KEY: Key = Key([0x12; 32]);

fuzz_target!(|bytes: &[u8]| {
    let credentials = Credentials::agree(KEY, &KEY, &KEY);
    let mut host = HostHandshake::new(credentials.of_peer());
    let mut decoder = Decoder::default();
    decoder.feed(bytes);
    while let Ok(Some(record)) = decoder.next_record() {
        match host.receive(record, 0) {
            Ok(HostStep::Send(_)) => {}
            Ok(HostStep::Established(..)) => panic!("a session without the key"),
            Err(_) => break,
        }
    }
    let guest = GuestHandshake::new(false).expect("the pattern is known");
    assert!(guest.receive(bytes, &credentials).is_err());
});
