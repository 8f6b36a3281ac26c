//! The files that templates are made of, whoever keeps them.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use super::digest::{self, FileId};
use super::{folder, Digest, Fit, Manifest};
use crate::host::fork::PerProcess;
use crate::host::memfd;
use crate::mutex::{Mutex, MutexGuard};
use crate::store::Dir;

/// What [`describe`] finds written.
pub const RAM: &str = "ram";
pub const STATE: &str = "state";
pub const DISK: &str = "disk";
pub(super) const MANIFEST: &str = "manifest";

/// Device state is some ten to some hundred kilobytes; what a VMM wrote is held in this process's memory.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// A template that was checked and is held in sealed memory, but for a user's own disk, which may be large.
#[derive(Debug)]
pub struct Template {
    pub manifest: Manifest,
    pub ram: Arc<OwnedFd>,
    pub state: Arc<OwnedFd>,
    pub disk: Arc<File>,
    /// The files that it was read from, as they were then.
    files: [(PathBuf, FileId); 4],
}

impl Template {
    /// Reads the files in `place` and checks them; `check` has the manifest's bytes, `open` the disk. Blocking.
    pub(super) fn read(
        place: &Dir,
        check: impl FnOnce(&[u8]) -> io::Result<Manifest>,
        open: impl FnOnce(File, &Digest) -> io::Result<OwnedFd>,
    ) -> io::Result<Self> {
        let seen = |name: &str| -> io::Result<_> {
            let file = place.open(name)?;
            let id = FileId::from(&file.metadata()?);
            Ok((file, (place.at(name), id)))
        };
        let ((_, manifest_id), (ram, ram_id)) = (seen(MANIFEST)?, seen(RAM)?);
        let ((state, state_id), (disk, disk_id)) = (seen(STATE)?, seen(DISK)?);
        let manifest = check(&folder::read_manifest(place)?)?;
        let ram = Arc::new(seal(&ram, &manifest.ram, RAM)?);
        held().push(Arc::downgrade(&ram));
        check_state(&state)?;
        let state = Arc::new(seal(&state, &manifest.state, STATE)?);
        let disk = Arc::new(File::from(open(disk, &manifest.disk)?));
        let files = [manifest_id, ram_id, state_id, disk_id];
        let template = Self { manifest, ram, state, disk, files };
        if template.is_unchanged() {
            return Ok(template);
        }
        Err(io::Error::new(ErrorKind::InvalidData, "it changed while it was read"))
    }

    /// Whether its files are still what was read.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        self.files.iter().all(|(path, id)| FileId::of(path).is_ok_and(|now| now == *id))
    }
}

fn check_state(file: &File) -> io::Result<()> {
    match file.metadata()?.len() {
        ..=MAX_STATE_BYTES => Ok(()),
        length => Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("the VMM wrote {length} bytes of device state, over the limit of {MAX_STATE_BYTES}"),
        )),
    }
}

/// The manifest of the three files in `new`, which are made sparse on the way.
pub(super) fn describe(new: &Dir, fit: Fit, hello: Vec<u8>) -> io::Result<Manifest> {
    describe_unless(new, fit, hello, || false)
}

/// As [`describe`]; an error as soon as `is_stopped`.
pub(super) fn describe_unless(
    new: &Dir,
    fit: Fit,
    hello: Vec<u8>,
    is_stopped: impl Fn() -> bool,
) -> io::Result<Manifest> {
    check_state(&new.open(STATE)?)?;
    let digest = |name: &str| {
        let file = new.open_writable(name)?;
        digest::pages(&file, |at, page| match page {
            _ if is_stopped() => Err(io::Error::other("it was given up")),
            Some(_) => Ok(()),
            // What the guest has given back; file systems without holes keep the zeros.
            None => memfd::punch_hole(&file, at..at + 4096).or(Ok(())),
        })
    };
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (ram, state, disk) = (digest(RAM)?, digest(STATE)?, digest(DISK)?);
    Ok(Manifest { fit, hello, ram, state, disk, created_unix_s: created.as_secs() })
}

/// The memory of all templates that this process holds, those included that only clones hold any more.
fn held() -> MutexGuard<'static, Vec<Weak<OwnedFd>>> {
    static HELD: PerProcess<Mutex<Vec<Weak<OwnedFd>>>> = PerProcess::new();
    HELD.get().lock()
}

/// Bytes of all templates in memory that no page was made for yet: the first clone that writes there has one made, for
/// all to come.
#[must_use]
pub fn untouched_bytes() -> u64 {
    let mut held = held();
    held.retain(|ram| ram.strong_count() > 0);
    held.iter().filter_map(Weak::upgrade).filter_map(|ram| memfd::untouched_bytes(&ram).ok()).sum()
}

fn mismatch(name: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("{name} does not have the digest it should have"))
}

/// Takes a file if it holds what it should. Whoever reads it looks afterwards whether it still does.
pub(super) fn checked(file: File, expected: &Digest) -> io::Result<OwnedFd> {
    match digest::pages(&file, |_, _| Ok(()))? == *expected {
        true => Ok(file.into()),
        false => Err(mismatch(DISK)),
    }
}

/// Copies a file into sealed memory if it holds what it should.
pub(super) fn seal(file: &File, expected: &Digest, name: &str) -> io::Result<OwnedFd> {
    memfd::sealed(name, file.metadata()?.len(), |copy| {
        let found = digest::pages(file, |at, page| match page {
            Some(page) => copy.write_all_at(page, at),
            None => Ok(()),
        })?;
        if found == *expected {
            Ok(())
        } else {
            Err(mismatch(name))
        }
    })
}
