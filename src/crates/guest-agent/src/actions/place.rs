//! Opening files of the guest: none of them holds a request up, and none is replaced that should be written.
//!
//! A FIFO, a terminal or /proc/kmsg may have no bytes for ever. They are opened with O_NONBLOCK (for regular files on a
//! disk it means nothing), and a request waits for them and for its cancellation at once.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{fchown, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use microvm_protocol::message::{Code, Failure};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::fail;
use super::files::io_failure;
use crate::job::{cancelled, Job};

/// O_NOCTTY: the agent leads a session, and a terminal that it opened would become its own.
const FLAGS: libc::c_int = libc::O_NONBLOCK | libc::O_NOCTTY;
/// How often to look whether a FIFO has a reader: poll(2) does not tell.
const LOOK: Duration = Duration::from_millis(20);
/// Runs of zeros are left out of a new file in blocks of this size, as ext4 and tmpfs have them.
const BLOCK: usize = 4096;
/// Links that a path may lead through, as path_resolution(7) has it.
const MAX_LINKS: usize = 40;
/// Names for a draft that may be taken already.
const MAX_NAMES: usize = 100;

/// The request for which a file is read or written.
pub trait Waiter {
    /// Waits until a descriptor is ready, at most `limit`.
    ///
    /// # Errors
    /// [`Code::Cancelled`].
    fn ready(&self, fd: Option<BorrowedFd<'_>>, events: PollFlags, limit: Option<Duration>) -> Result<(), Failure>;
}

impl Waiter for Job {
    fn ready(&self, fd: Option<BorrowedFd<'_>>, events: PollFlags, limit: Option<Duration>) -> Result<(), Failure> {
        let timeout = limit.map_or(PollTimeout::NONE, |limit| PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX));
        loop {
            if self.is_cancelled() {
                return Err(cancelled("a file"));
            }
            let mut fds = vec![PollFd::new(self.notifier().as_fd(), PollFlags::POLLIN)];
            fds.extend(fd.map(|fd| PollFd::new(fd, events)));
            match poll(&mut fds, timeout) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return fail(Code::IoError, format!("poll: {error}")),
            }
            let seen: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if seen.first() == Some(&true) {
                self.notifier().wait();
            }
            if seen.get(1) == Some(&true) {
                return Ok(());
            }
        }
    }
}

fn refuse(path: &str, what: &str, way_out: &str) -> Failure {
    Failure { code: Code::NotAFile, message: format!("{path}: it is {what}; {way_out}") }
}

fn directory<T>(path: &str, way_out: &str) -> Result<T, Failure> {
    fail(Code::IoError, format!("{path}: it is a directory; {way_out}"))
}

/// Opens what has bytes: regular files, those of /proc included, and devices.
pub fn open_to_read(path: &str) -> Result<(File, Metadata), Failure> {
    let failed = |error: io::Error| io_failure(path, &error);
    let check = |meta: &Metadata| {
        let kind = meta.file_type();
        let way_out = "a program can read it: stream(\"cat\", [path])";
        if kind.is_dir() {
            return directory(path, "pack it: stream(\"tar\", [\"-c\", \"-C\", path, \".\"])");
        }
        match (kind.is_fifo(), kind.is_socket()) {
            (true, _) => Err(refuse(path, "a FIFO", way_out)),
            (_, true) => Err(refuse(path, "a socket", "only programs can connect to it")),
            _ => Ok(()),
        }
    };
    // Before it is opened: a FIFO's writer would wake for a reader that goes at once.
    check(&fs::metadata(path).map_err(failed)?)?;
    let file = OpenOptions::new().read(true).custom_flags(FLAGS).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    check(&meta)?;
    Ok((file, meta))
}

/// Reads what there is; waits while there is nothing.
pub fn read_some(path: &str, file: &mut File, buffer: &mut [u8], waiter: &dyn Waiter) -> Result<usize, Failure> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                waiter.ready(Some(file.as_fd()), PollFlags::POLLIN, None)?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return read.map_err(|error| io_failure(path, &error)),
        }
    }
}

/// Opens a file to be written where it stands; waits for the reader of a FIFO.
fn open_in_place(path: &str, options: &mut OpenOptions, waiter: &dyn Waiter) -> Result<(File, Metadata), Failure> {
    let failed = |error: io::Error| io_failure(path, &error);
    loop {
        match options.custom_flags(FLAGS).open(path) {
            Ok(file) => {
                let meta = file.metadata().map_err(failed)?;
                return Ok((file, meta));
            }
            Err(error) => {
                let kind = fs::metadata(path).map_err(failed)?.file_type();
                match error.raw_os_error() {
                    Some(libc::ENXIO) if kind.is_fifo() => waiter.ready(None, PollFlags::empty(), Some(LOOK))?,
                    Some(libc::ENXIO) if kind.is_socket() => {
                        return Err(refuse(path, "a socket", "only programs can connect to it"));
                    }
                    _ => return Err(failed(error)),
                }
            }
        }
    }
}

/// A file that is written under another name, and removed unless it is kept.
struct Draft {
    path: PathBuf,
    kept: bool,
}

impl Draft {
    fn create(target: &Path, mode: u32) -> io::Result<(Self, File)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        // A file name has at most 255 bytes.
        let name: String = name.chars().take(50).collect();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        let mut last = io::Error::from(ErrorKind::AlreadyExists);
        for _ in 0..MAX_NAMES {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".{name}.upload-{number}"));
            match options.open(&path) {
                Ok(file) => return Ok((Self { path, kept: false }, file)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path).or_else(absent_is_fine) {
            eprintln!("microvm-agent: {}: {error}", self.path.display());
        }
    }
}

fn absent_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == ErrorKind::NotFound {
        Ok(())
    } else {
        Err(error)
    }
}

/// The file that a path names, through all links, whether it is there or not.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            // EINVAL: it is no link.
            Err(_) => return Ok(path),
        }
    }
    Err(Errno::ELOOP.into())
}

/// A file that is being written.
pub struct Destination {
    shown: String,
    file: File,
    is_regular: bool,
    /// Zeros of a new file need not be written.
    is_new: bool,
    position: u64,
    /// Written instead of the target, whose place it takes when it is whole; the mode that the target had.
    draft: Option<(Draft, PathBuf, Option<u32>)>,
    /// What an append that fails goes back to.
    undo_to: Option<u64>,
}

impl Destination {
    /// New content for `path`. A regular file is written beside what it replaces and keeps its owner; a device, a FIFO, and a
    /// file that has other names is written where it stands.
    pub fn replace(shown: &str, new_mode: u32, waiter: &dyn Waiter) -> Result<Self, Failure> {
        let failed = |error: io::Error| io_failure(shown, &error);
        let path = Path::new(shown);
        let meta = match fs::metadata(path) {
            Ok(meta) => Some(meta),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if path.file_name().is_none() || meta.as_ref().is_some_and(Metadata::is_dir) {
            return directory(
                shown,
                "give the path of a file, or unpack one there: stream(\"tar\", [\"-x\", \"-C\", path])",
            );
        }
        let mut in_place = OpenOptions::new();
        in_place.write(true).truncate(meta.as_ref().is_some_and(Metadata::is_file));
        let Some(meta) = meta else {
            let target = follow(path).map_err(failed)?;
            let (draft, file) = Draft::create(&target, new_mode).map_err(failed)?;
            return Ok(Self::new(shown, file, true, Some((draft, target, None))));
        };
        if meta.is_file() && meta.nlink() == 1 {
            let target = fs::canonicalize(path).map_err(failed)?;
            match Draft::create(&target, 0o600) {
                Ok((draft, file)) => {
                    fchown(&file, Some(meta.uid()), Some(meta.gid())).map_err(failed)?;
                    return Ok(Self::new(shown, file, true, Some((draft, target, Some(meta.mode() & 0o7777)))));
                }
                Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                    return Err(failed(error));
                }
                // No file can be made beside it: /proc, /sys, a read-only folder with a writable file mounted in it.
                Err(_) => {}
            }
        }
        let (file, meta) = open_in_place(shown, &mut in_place, waiter)?;
        Ok(Self::new(shown, file, meta.is_file(), None))
    }

    /// `path` from `offset` on: what stood behind it is cut off, so its size says where to resume.
    pub fn resume(shown: &str, offset: u64, new_mode: u32, waiter: &dyn Waiter) -> Result<Self, Failure> {
        let failed = |error: io::Error| io_failure(shown, &error);
        if Path::new(shown).is_dir() {
            return directory(shown, "give the path of a file");
        }
        let mut options = OpenOptions::new();
        let (mut file, meta) = open_in_place(shown, options.write(true).create(true).mode(new_mode), waiter)?;
        if meta.is_file() {
            if offset > meta.len() {
                let message = format!("offset: {offset} is beyond the file's {} bytes", meta.len());
                return fail(Code::BadParams, message);
            }
            file.set_len(offset).map_err(failed)?;
        }
        if offset > 0 {
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        Ok(Self { is_new: meta.is_file(), position: offset, ..Self::new(shown, file, meta.is_file(), None) })
    }

    /// `path` as it stands, written from `offset` or, without one, at its end.
    pub fn change(shown: &str, offset: Option<u64>, new_mode: u32, waiter: &dyn Waiter) -> Result<Self, Failure> {
        let failed = |error: io::Error| io_failure(shown, &error);
        let mut options = OpenOptions::new();
        options.write(true).create(true).append(offset.is_none()).mode(new_mode);
        let (mut file, meta) = open_in_place(shown, &mut options, waiter)?;
        if let Some(offset) = offset.filter(|offset| *offset > 0) {
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        let undo_to = (meta.is_file() && offset.is_none()).then_some(meta.len());
        Ok(Self { undo_to, ..Self::new(shown, file, meta.is_file(), None) })
    }

    fn new(shown: &str, file: File, is_regular: bool, draft: Option<(Draft, PathBuf, Option<u32>)>) -> Self {
        Self { shown: shown.to_owned(), file, is_regular, is_new: draft.is_some(), position: 0, draft, undo_to: None }
    }

    /// Writes all bytes; waits while a FIFO or a terminal takes none.
    pub fn write(&mut self, bytes: &[u8], waiter: &dyn Waiter) -> Result<(), Failure> {
        let written = if self.is_new { self.write_without_zeros(bytes, waiter) } else { self.write_all(bytes, waiter) };
        if let (Err(_), Some(size)) = (&written, self.undo_to) {
            // What of it was written is taken back, so that it can be tried again.
            self.file.set_len(size).map_err(|error| io_failure(&self.shown, &error))?;
        }
        written
    }

    fn write_all(&mut self, mut bytes: &[u8], waiter: &dyn Waiter) -> Result<(), Failure> {
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(io_failure(&self.shown, &ErrorKind::WriteZero.into())),
                Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    waiter.ready(Some(self.file.as_fd()), PollFlags::POLLOUT, None)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(io_failure(&self.shown, &error)),
            }
        }
        Ok(())
    }

    /// Leaves holes where whole blocks are zero.
    fn write_without_zeros(&mut self, mut bytes: &[u8], waiter: &dyn Waiter) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let (length, is_zero) = run(self.position, bytes);
            let (now, rest) = bytes.split_at(length);
            if is_zero {
                let skipped = self.file.seek(SeekFrom::Current(length as i64));
                skipped.map_err(|error| io_failure(&self.shown, &error))?;
            } else {
                self.write_all(now, waiter)?;
            }
            self.position += length as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Everything was written: `mode` is set if it is given, and a draft takes its place.
    pub fn finish(self, mode: Option<u32>) -> Result<(), Failure> {
        let failed = |error: io::Error| io_failure(&self.shown, &error);
        if self.is_new {
            // A hole at the end.
            self.file.set_len(self.position).map_err(failed)?;
        }
        let old_mode = self.draft.as_ref().and_then(|(_, _, mode)| *mode);
        if let Some(mode) = mode.or(old_mode).filter(|_| self.is_regular) {
            self.file.set_permissions(Permissions::from_mode(mode)).map_err(failed)?;
        }
        let Some((mut draft, target, _)) = self.draft else { return Ok(()) };
        let mut file = self.file;
        match fs::rename(&draft.path, &target) {
            Ok(()) => {
                draft.kept = true;
                Ok(())
            }
            // It is mounted there: only its content can change.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EXDEV)) => {
                file.rewind().map_err(|error| io_failure(&self.shown, &error))?;
                let copied = OpenOptions::new().write(true).truncate(true).open(&target).and_then(|mut there| {
                    io::copy(&mut file, &mut there)?;
                    mode.map_or(Ok(()), |mode| there.set_permissions(Permissions::from_mode(mode)))
                });
                copied.map_err(|error| io_failure(&self.shown, &error))
            }
            Err(error) => Err(io_failure(&self.shown, &error)),
        }
    }
}

/// The bytes up to the next change between blocks of zeros and others, and which they are.
fn run(position: u64, bytes: &[u8]) -> (usize, bool) {
    let first = BLOCK - (position % BLOCK as u64) as usize;
    let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut end = first.min(bytes.len());
    let kind = is_zero(bytes.get(..end).unwrap_or_default());
    while let Some(block) = bytes.get(end..).filter(|rest| !rest.is_empty()) {
        let block = block.get(..BLOCK).unwrap_or(block);
        if is_zero(block) != kind {
            break;
        }
        end += block.len();
    }
    (end, kind)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Waits for nothing for long.
    pub struct Impatient;

    impl Waiter for Impatient {
        fn ready(&self, _: Option<BorrowedFd<'_>>, _: PollFlags, _: Option<Duration>) -> Result<(), Failure> {
            Err(cancelled("a file"))
        }
    }

    fn put(path: &Path, bytes: &[u8], mode: Option<u32>) -> Result<(), Failure> {
        let mut destination = Destination::replace(path.to_str().unwrap(), mode.unwrap_or(0o644), &Impatient)?;
        destination.write(bytes, &Impatient)?;
        destination.finish(mode)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn test_replace_keeps_mode_links_and_other_names() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link, dangling) =
            (folder.path().join("file"), folder.path().join("link"), folder.path().join("dangling"));
        put(&file, b"one", Some(0o600)).unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        put(&link, b"two", None).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!((fs::read(&file).unwrap(), mode(&file)), (b"two".to_vec(), 0o600));
        put(&link, b"two", Some(0o755)).unwrap();
        assert_eq!(mode(&file), 0o755);
        std::os::unix::fs::symlink("new", &dangling).unwrap();
        put(&dangling, b"three", None).unwrap();
        assert_eq!(fs::read(folder.path().join("new")).unwrap(), b"three");
        fs::hard_link(&file, folder.path().join("twin")).unwrap();
        put(&file, b"four", None).unwrap();
        assert_eq!(fs::read(folder.path().join("twin")).unwrap(), b"four");
        let hidden = fs::read_dir(&folder)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
        assert_eq!(hidden.count(), 0);
    }

    #[test]
    fn test_replace_given_up_leaves_the_old_file_and_no_draft() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"old").unwrap();
        let mut destination = Destination::replace(file.to_str().unwrap(), 0o644, &Impatient).unwrap();
        destination.write(b"half", &Impatient).unwrap();
        drop(destination);
        let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!((names, fs::read(&file).unwrap()), (vec!["file".into()], b"old".to_vec()));
    }

    #[test]
    fn test_special_files_are_refused_waited_for_or_written_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let path = fifo.to_str().unwrap();
        assert_eq!(open_to_read(path).unwrap_err().code, Code::NotAFile);
        // No reader: it waits, and is given up.
        assert_eq!(put(&fifo, b"x", None).unwrap_err().code, Code::Cancelled);
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
        put(&fifo, b"through", Some(0o644)).unwrap();
        let mut heard = String::new();
        reader.read_to_string(&mut heard).unwrap();
        assert_eq!((heard.as_str(), mode(&fifo)), ("through", 0o600));
        put(Path::new("/dev/null"), b"x", Some(0o600)).unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        // Nothing comes from a terminal whose other end says nothing.
        let pty = nix::pty::openpty(None, None).unwrap();
        let name = nix::unistd::ttyname(&pty.slave).unwrap();
        let (mut file, _) = open_to_read(name.to_str().unwrap()).unwrap();
        let read = read_some("tty", &mut file, &mut [0; 8], &Impatient);
        assert_eq!(read.unwrap_err().code, Code::Cancelled);
    }

    #[test]
    fn test_zeros_become_holes_and_read_back_as_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let mut bytes = vec![0u8; 1 << 20];
        (bytes[5000], bytes[700_000]) = (1, 2);
        let mut destination = Destination::replace(file.to_str().unwrap(), 0o644, &Impatient).unwrap();
        // Pieces that end within blocks.
        for piece in bytes.chunks(65_513) {
            destination.write(piece, &Impatient).unwrap();
        }
        destination.finish(None).unwrap();
        assert!(fs::read(&file).unwrap() == bytes);
        assert!(fs::metadata(&file).unwrap().blocks() * 512 <= 64 * 1024);
    }
}
