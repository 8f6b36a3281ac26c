//! Becoming one VM.
//!
//! Architecture invariant: all that can be opened is opened before HELLO, between OFFER and ACCEPT nothing is done but
//! to read who this guest is, and nothing of the user's runs before [`GuestIdentity::settle`]. A clone runs this code on an
//! emulated CPU for the first time, and each new piece of code that it runs is translated first.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use microvm_protocol::identity::{Identity, Key, CONFIG_SERIAL, DRIVE_BYTES};
use microvm_protocol::IDENTITY_PORT_NAME;
use nix::mount::{mount, MsFlags};
use nix::sys::time::TimeSpec;
use nix::time::{clock_settime, ClockId};

use crate::{boot, port};

/// random(4): `RNDADDENTROPY` takes this structure.
#[repr(C)]
struct PoolInfo {
    entropy_count_bits: i32,
    size_bytes: i32,
    bytes: [u8; 32],
}

nix::ioctl_write_ptr_bad!(add_entropy, 0x4008_5203u32 as libc::c_ulong, PoolInfo);
nix::ioctl_none_bad!(reseed, 0x5207);

/// A file that holds a name of this VM.
struct Name {
    path: &'static str,
    file: File,
}

impl Name {
    fn open(path: &'static str) -> Result<Self, String> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(path);
        file.map(|file| Self { path, file }).map_err(|e| format!("{path}: {e}"))
    }

    fn write(&self, text: &str) -> Result<(), String> {
        let written = self.file.write_all_at(text.as_bytes(), 0);
        // What stood there before may have been longer.
        let cut = written.and_then(|()| self.file.set_len(text.len() as u64));
        cut.map_err(|e| format!("{}: {e}", self.path))
    }
}

/// A block of memory that a drive can be read into past the page cache.
#[repr(C, align(4096))]
struct Block([u8; DRIVE_BYTES]);

/// Where it says who this guest is.
enum IdentitySource {
    /// A port of its own: what was read is gone, and the code that reads it has just read the OFFER.
    ByPort(File),
    /// The config drive, where the VMM has no ports.
    ByDrive(File),
}

impl IdentitySource {
    fn open() -> Result<Self, String> {
        let Some(device) = boot::drive(CONFIG_SERIAL) else {
            return port::open_serial(IDENTITY_PORT_NAME).map(Self::ByPort);
        };
        // O_DIRECT: what a template's kernel knows of its drive is not true of a clone's.
        let drive = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&device);
        drive.map(Self::ByDrive).map_err(|e| format!("{device}: {e}"))
    }

    fn read(&self, block: &mut Block) -> Result<(), String> {
        match self {
            Self::ByPort(port) => {
                let mut port = port;
                port.read_exact(&mut block.0).map_err(|e| format!("the identity's port: {e}"))
            }
            Self::ByDrive(drive) => drive.read_exact_at(&mut block.0, 0).map_err(|e| format!("the config drive: {e}")),
        }
    }
}

/// A guest that can become any VM.
pub struct UnprovisionedGuest {
    source: IdentitySource,
    block: Mutex<Box<Block>>,
    random: File,
    machine_id: Name,
    hostname: Name,
    hosts: Name,
    boot_id: Name,
}

impl UnprovisionedGuest {
    pub fn open() -> Result<Self, String> {
        let source = IdentitySource::open()?;
        let random = OpenOptions::new().write(true).open("/dev/urandom");
        fs::create_dir_all("/etc").map_err(|e| format!("mkdir /etc: {e}"))?;
        let boot_id = Name::open("/run/boot_id")?;
        let shown = "/proc/sys/kernel/random/boot_id";
        // The kernel's own is the same in all clones once someone has read it.
        mount(Some(boot_id.path), shown, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|e| format!("bind {shown}: {e}"))?;
        Ok(Self {
            source,
            block: Mutex::new(Box::new(Block([0; DRIVE_BYTES]))),
            random: random.map_err(|e| format!("/dev/urandom: {e}"))?,
            machine_id: Name::open("/etc/machine-id")?,
            hostname: Name::open("/etc/hostname")?,
            hosts: Name::open("/etc/hosts")?,
            boot_id,
        })
    }

    pub fn read_identity(&self) -> Result<Identity, String> {
        let mut block = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        self.source.read(&mut block)?;
        let identity = Identity::from_drive(&block.0).map_err(|e| e.to_string());
        block.0.fill(0);
        identity
    }

    /// This guest as the VM that `identity` says it is; `settled`: it took on its names already.
    pub fn become_one(self: &Arc<Self>, mut identity: Identity, time: HostTime, settled: bool) -> GuestIdentity {
        // The session has keys of its own by now; assigning zeroes what was there.
        (identity.credentials.key, identity.credentials.shared) = (Key([0; 32]), Key([0; 32]));
        let names = Mutex::new(Names { vm_id: identity.vm_id.clone(), hostname: identity.hostname.clone() });
        GuestIdentity { guest: self.clone(), identity, names, time, settled: Mutex::new(settled) }
    }

    /// Entropy first, so that no key is made before it; then clock and names.
    pub fn settle(&self, identity: &Identity, time: HostTime) -> Result<(), String> {
        self.credit(&identity.seed.0)?;
        set_clock(time.unix_time_ns + u64::try_from(time.arrived.elapsed().as_nanos()).unwrap_or(0))?;
        self.machine_id.write(&(hex(&identity.machine_id) + "\n"))?;
        self.boot_id.write(&(uuid(&identity.boot_id) + "\n"))?;
        self.write_hostname(&identity.hostname)
    }

    /// Credits `seed` and forces a reseed: writing to /dev/urandom would do neither.
    fn credit(&self, seed: &[u8; 32]) -> Result<(), String> {
        let info = PoolInfo { entropy_count_bits: 256, size_bytes: 32, bytes: *seed };
        // SAFETY: the descriptor is open, and the structure is the one that the request reads.
        unsafe { add_entropy(self.random.as_raw_fd(), &info) }.map_err(|e| format!("RNDADDENTROPY: {e}"))?;
        // SAFETY: the request takes no argument.
        unsafe { reseed(self.random.as_raw_fd()) }.map_err(|e| format!("RNDRESEEDCRNG: {e}"))?;
        Ok(())
    }

    fn write_hostname(&self, name: &str) -> Result<(), String> {
        nix::unistd::sethostname(name).map_err(|e| format!("sethostname: {e}"))?;
        self.hostname.write(&[name, "\n"].concat())?;
        self.hosts
            .write(&["127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 ", name, "\n"].concat())
    }
}

/// What a VM is called; one that stood by is called otherwise once it is taken.
#[derive(Debug, Clone)]
pub struct Names {
    pub vm_id: String,
    pub hostname: String,
}

/// A guest that is one VM.
pub struct GuestIdentity {
    guest: Arc<UnprovisionedGuest>,
    pub identity: Identity,
    names: Mutex<Names>,
    time: HostTime,
    settled: Mutex<bool>,
}

impl GuestIdentity {
    /// Takes on everything that a program could tell one VM from another by: before the first one runs, not before the
    /// first question is answered. What failed is tried again by the next caller.
    pub fn settle(&self) -> Result<(), String> {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        if !*settled {
            self.guest.settle(&self.identity, self.time)?;
            *settled = true;
        }
        Ok(())
    }
}

impl GuestIdentity {
    pub fn names(&self) -> Names {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes other names, and the time: a guest that stood by slept until now.
    pub fn adopt(&self, names: Names, unix_time_ns: u64) -> Result<(), String> {
        self.settle()?;
        set_clock(unix_time_ns)?;
        self.guest.write_hostname(&names.hostname)?;
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) = names;
        Ok(())
    }
}

/// The host's clock, and when it was told here.
#[derive(Debug, Clone, Copy)]
pub struct HostTime {
    pub unix_time_ns: u64,
    pub arrived: Instant,
}

impl HostTime {
    /// This guest's own idea of it.
    pub fn local() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(0), arrived: Instant::now() }
    }
}

pub fn set_clock(unix_time_ns: u64) -> Result<(), String> {
    let seconds = i64::try_from(unix_time_ns / 1_000_000_000).map_err(|_| "the time is out of range")?;
    let nanos = i64::try_from(unix_time_ns % 1_000_000_000).unwrap_or(0);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanos)).map_err(|e| format!("clock_settime: {e}"))
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

/// The bytes as the kernel writes a boot id: a UUID of version 4.
fn uuid(bytes: &[u8; 16]) -> String {
    let mut bytes = *bytes;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex(&bytes);
    [&hex[..8], "-", &hex[8..12], "-", &hex[12..16], "-", &hex[16..20], "-", &hex[20..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::alloc::Layout;

    #[test]
    fn test_uuid_is_of_version_4() {
        assert_eq!(uuid(&[0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(uuid(&[0; 16]), "00000000-0000-4000-8000-000000000000");
    }

    #[test]
    fn test_block_is_aligned_for_direct_reads() {
        assert_eq!(Layout::new::<Block>().align(), 4096);
        assert_eq!(Layout::new::<Block>().size(), DRIVE_BYTES);
    }
}
