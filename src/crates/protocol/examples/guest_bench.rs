//! What `benches/channel.rs` runs inside the guest, to know what the transport and the cipher give by themselves there.
//!
//! `cipher BYTES`: seconds to seal so many bytes in full records, then to open them, then the same for 64-byte records.
//! `echo PORT`, `source PORT BYTES`, `sink PORT BYTES`: plain bytes on a virtio-serial port.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::time::Instant;

use microvm_protocol::frame::MAX_PAYLOAD;
use microvm_protocol::handshake::{GuestHandshake, HostHandshake, HostStep};
use microvm_protocol::identity::{Credentials, Key};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::Session;

type Failure = Box<dyn std::error::Error>;

fn record(bytes: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut decoder = Decoder::default();
    decoder.feed(bytes);
    Ok(decoder.next_record()?.ok_or("no record")?.to_vec())
}

fn sessions() -> Result<(Session, Session), Failure> {
    let credentials = Credentials::agree(Key([1; 32]), &Key([2; 32]), &Key([3; 32]));
    let (guest, mut host) = (GuestHandshake::new(false)?, HostHandshake::new(credentials.of_peer()));
    let HostStep::Send(offer) = host.receive(&record(&guest.hello()?)?, 0)? else { return Err("no offer".into()) };
    let (accept, guest) = guest.receive(&record(&offer)?, &credentials)?.accept(b"")?;
    let HostStep::Established(host, _) = host.receive(&record(&accept)?, 0)? else { return Err("no session".into()) };
    Ok((*host, guest))
}

fn cipher(bytes: usize) -> Result<(), Failure> {
    for size in [MAX_PAYLOAD, 64] {
        let (mut host, mut guest) = sessions()?;
        let count = if size == 64 { 2000 } else { bytes / size };
        let plain = vec![7; size];
        let (mut sealed, mut sealing, mut opening) = (Vec::new(), 0.0, 0.0);
        for _ in 0..count {
            sealed.clear();
            let begun = Instant::now();
            host.seal(&plain, &mut sealed)?;
            sealing += begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            guest.open(&sealed[2..])?;
            opening += begun.elapsed().as_secs_f64();
        }
        println!("{size} {count} {sealing} {opening}");
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().collect();
    let number = |at: usize| args.get(at).ok_or("a number is missing").map(|text| text.parse::<usize>());
    if args.get(1).is_some_and(|mode| mode == "cipher") {
        return cipher(number(2)??);
    }
    let (mode, path) = (args.get(1).ok_or("a mode is missing")?, args.get(2).ok_or("a port is missing")?);
    let mut port = OpenOptions::new().read(true).write(true).open(path)?;
    let mut buffer = vec![0; 64 * 1024];
    match mode.as_str() {
        "echo" => loop {
            let length = port.read(&mut buffer)?;
            port.write_all(&buffer[..length])?;
        },
        "source" => {
            let mut left = number(3)??;
            while left > 0 {
                let length = left.min(buffer.len());
                port.write_all(&buffer[..length])?;
                left -= length;
            }
        }
        "sink" => {
            let mut left = number(3)??;
            while left > 0 {
                left = left.saturating_sub(port.read(&mut buffer)?);
            }
            port.write_all(b"!")?;
        }
        other => return Err(format!("no mode {other:?}").into()),
    }
    Ok(())
}
