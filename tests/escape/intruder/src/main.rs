//! A VMM that an attacker controls: it takes QEMU's place in the jail, or that of another VMM, and tries to get out.
//!
//! What it is to do is in the first KiB of the image that it is given as `rootfs` (`key value` a line): the tests have no
//! other way to speak to a jailed program, and need none. QEMU's arguments say where that is; the others would hear it over
//! their API, but every jail with a root of its own has it at the same place. Without a jail, run by hand with the same arguments, it shows
//! that the attacks work. It prints a line for each: `PROBE name worked|failed why`.

mod probes;
mod siege;
mod system;

use std::collections::HashMap;
use std::io::Read;

/// Where a jail's own root has the VM's files.
const ROOTFS: &str = "/image/rootfs";
const KERNEL: &str = "/image/kernel";
const DISK: &str = "/vm/disk";

/// The instructions, and where the VM's files are.
pub struct Orders {
    values: HashMap<String, String>,
    pub kernel: String,
    pub disk: String,
}

impl Orders {
    /// # Errors
    /// When the image cannot be read.
    fn read(arguments: &[String]) -> Result<Self, String> {
        let after = |name: &str| {
            arguments.iter().position(|argument| argument == name).and_then(|at| arguments.get(at + 1)).cloned()
        };
        let drive = |id: &str| {
            let prefix = format!("id={id},");
            let drive = arguments.iter().find(|argument| argument.starts_with(&prefix))?;
            drive.rsplit_once("file=").map(|(_, path)| path.to_owned())
        };
        let image = drive("rootfs").unwrap_or_else(|| ROOTFS.to_owned());
        let mut text = [0; 1024];
        let mut file = std::fs::File::open(&image).map_err(|error| format!("{image}: {error}"))?;
        file.read_exact(&mut text).map_err(|error| format!("{image}: {error}"))?;
        let text = String::from_utf8_lossy(&text);
        let pairs = text.trim_end_matches('\0').lines().filter_map(|line| line.split_once(' '));
        Ok(Self {
            values: pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            kernel: after("-kernel").unwrap_or_else(|| KERNEL.to_owned()),
            disk: drive("disk").unwrap_or_else(|| DISK.to_owned()),
        })
    }

    pub fn text(&self, key: &str) -> &str {
        self.values.get(key).map_or("", String::as_str)
    }

    pub fn number(&self, key: &str) -> i64 {
        self.text(key).parse().unwrap_or(0)
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--version") {
        // The jail's filter depends on what QEMU says of itself.
        let is_own = std::env::args().next().is_some_and(|name| name.contains("/intr-own-"));
        println!("QEMU emulator version {}", if is_own { "10.0.13 (microvm)" } else { "7.2.22 (an intruder)" });
        return;
    }
    let orders = match Orders::read(&arguments) {
        Ok(orders) => orders,
        Err(error) => {
            eprintln!("intruder: {error}");
            std::process::exit(64);
        }
    };
    match orders.text("mode") {
        "probes" => probes::all(&orders),
        "cpu" => siege::cpu(&orders),
        "memory" => siege::memory(&orders),
        "threads" => siege::threads(),
        "forks" => siege::forks(),
        "files" => siege::files(),
        "disk" => siege::disk(&orders),
        "int80" => siege::old_system_calls(),
        other => eprintln!("intruder: unknown mode {other:?}"),
    }
}
