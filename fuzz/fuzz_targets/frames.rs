//! A byte stream from a guest: cut into records, read as frames. What decodes must encode to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_protocol::frame::Frame;
use microvm_protocol::identity::Identity;
use microvm_protocol::record::Decoder;

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let mut decoder = Decoder::default();
    'stream: for piece in bytes.chunks(usize::from(step).max(1)) {
        decoder.feed(piece);
        loop {
            match decoder.next_record() {
                Ok(Some(record)) => {
                    if let Ok(frame) = Frame::decode(record) {
                        let mut again = Vec::new();
                        frame.encode(&mut again);
                        assert_eq!(again, record);
                    }
                }
                Ok(None) => break,
                Err(_) => break 'stream,
            }
        }
    }
    drop(Identity::from_drive(bytes));
});
