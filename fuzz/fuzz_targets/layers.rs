//! An image's layers: any bytes are an image within its limits, or an error.
#![no_main]

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use microvm_image::{build, Layers, Limits};

struct Stack(Vec<Vec<u8>>);

impl Layers for Stack {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn name(&self, index: usize) -> String {
        index.to_string()
    }

    fn open(&self, index: usize) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(&self.0[index])))
    }
}

/// The fuzzer finds no checksums: they are put into what looks like a header.
fn with_checksums(mut layer: Vec<u8>) -> Vec<u8> {
    for block in layer.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    layer
}

fuzz_target!(|bytes: &[u8]| {
    static OUTPUT: OnceLock<File> = OnceLock::new();
    let output = OUTPUT.get_or_init(|| tempfile::tempfile().expect("a file"));
    output.set_len(0).expect("an empty file");
    let Some((count, mut rest)) = bytes.split_first() else { return };
    let mut layers = Vec::new();
    for _ in 0..=count % 4 {
        let Some((length, after)) = rest.split_first_chunk() else { break };
        let (layer, after) = after.split_at(after.len().min(u16::from_le_bytes(*length).into()));
        layers.push(with_checksums(layer.to_vec()));
        rest = after;
    }
    let limits = Limits { bytes: 1 << 20, entries: 1000, metadata: 1 << 20, ratio: 100, free: 1 << 20 };
    if let Ok(summary) = build(&Stack(layers), output, &limits, &["etc/passwd"]) {
        assert_eq!(output.metadata().expect("its size").len(), summary.bytes);
        assert!(summary.bytes < 64 << 20, "{summary:?}");
    }
});
