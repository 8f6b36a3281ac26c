//! The broker's documents and the guest's answers: any bytes are a command, an answer or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm_isolation::channel::framing::{encode, FramingError, Reader};
use microvm_isolation::channel::parse_command;
use microvm_protocol::message::{is_modest, Outcome, Response, Started};
use serde_json::Value;

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (mut stream, mut reader) = (bytes, Reader::default());
        loop {
            match reader.next(&mut stream).await {
                Ok(Some(document)) => {
                    if let Value::Object(message) = &document {
                        drop(parse_command(message));
                    }
                    let again = encode(&document).expect("what was read can be written");
                    assert!(again.len() > 4);
                }
                Err(FramingError::NotJson(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
    });
    if is_modest(bytes) {
        drop(serde_json::from_slice::<Response>(bytes));
        drop(serde_json::from_slice::<Outcome>(bytes));
        drop(serde_json::from_slice::<Started>(bytes));
    }
});
