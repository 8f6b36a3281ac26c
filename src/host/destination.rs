//! Files of the user's that are read or written for a guest: never waited for in a system call, never replaced unless regular.
//!
//! Everything is opened with O_NONBLOCK, which means nothing for regular files: a caller that waits for a FIFO or a terminal
//! waits in slices of [`ready`], between which it sees signals.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{fchown, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

/// O_NOCTTY: a terminal that is written to must not become this process's own.
const FLAGS: libc::c_int = libc::O_NONBLOCK | libc::O_NOCTTY;
/// Runs of zeros are left out of a new file in blocks of this size.
const BLOCK: usize = 4096;
/// Links that a path may lead through, as path_resolution(7) has it.
const MAX_LINKS: usize = 40;

fn directory(way_out: &str) -> io::Error {
    io::Error::new(io::ErrorKind::IsADirectory, format!("it is a directory; {way_out}"))
}

/// Opens a file to be read from `offset`.
///
/// # Errors
/// The system's; a directory.
pub fn open_source(path: &Path, offset: u64) -> io::Result<(File, Metadata)> {
    let mut file = OpenOptions::new().read(true).custom_flags(FLAGS).open(path)?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Err(directory("send it as a tar archive: stream(\"tar\", [\"-x\", \"-C\", guest_path], stdin=...)"));
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    Ok((file, meta))
}

/// Reads at most `size` bytes, none at the end; `None` when there were none yet within `slice`.
///
/// # Errors
/// The system's.
pub fn read_some(file: &File, meta: &Metadata, size: usize, slice: Duration) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::with_capacity(size);
    if meta.is_file() {
        file.take(size as u64).read_to_end(&mut bytes)?;
        return Ok(Some(bytes));
    }
    // Before a FIFO has its first writer, a read would be its end.
    if !ready(file, PollFlags::POLLIN, slice)? {
        return Ok(None);
    }
    bytes.resize(size, 0);
    let mut file = file;
    match file.read(&mut bytes) {
        Ok(length) => {
            bytes.truncate(length);
            Ok(Some(bytes))
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a descriptor is, or becomes within `slice`, ready.
fn ready(fd: &impl AsFd, events: PollFlags, slice: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(slice).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd.as_fd(), events)], timeout) {
        Ok(seen) => Ok(seen > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// What is written beside a file, and takes its place when it is whole.
#[derive(Debug)]
struct Draft {
    path: PathBuf,
    target: PathBuf,
    /// What the target had.
    mode: Option<u32>,
    is_kept: bool,
}

impl Draft {
    fn create(target: &Path, mode: u32) -> io::Result<(Self, File)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().ok_or_else(|| directory("give the path of a file"))?;
        // A file name has at most 255 bytes.
        let name: String = name.to_string_lossy().chars().take(50).collect();
        let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = target.with_file_name(format!(".{name}.download-{pid}-{number}"));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(&path)?;
        Ok((Self { path, target: target.to_owned(), mode: None, is_kept: false }, file))
    }

    /// For a regular file that is there: with its owner and mode.
    fn like(target: &Path, meta: &Metadata) -> io::Result<(Self, File)> {
        let (mut draft, file) = Self::create(target, 0o600)?;
        let made = file.metadata()?;
        if (made.uid(), made.gid()) != (meta.uid(), meta.gid()) {
            fchown(&file, Some(meta.uid()), Some(meta.gid()))?;
        }
        draft.mode = Some(meta.mode() & 0o7777);
        Ok((draft, file))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: an unfinished download could not be removed: {error}", self.path.display());
        }
    }
}

/// A file that is being written.
#[derive(Debug)]
pub struct Destination {
    file: File,
    /// Zeros of a new file need not be written.
    is_new: bool,
    position: u64,
    draft: Option<Draft>,
}

impl Destination {
    /// New content for `path`. A regular file is written beside what it replaces and keeps its owner and mode; a device, a
    /// FIFO, and a file that has other names is written where it stands. A file that was not there gets `new_mode`, less the
    /// umask.
    ///
    /// # Errors
    /// The system's; [`is_unread`] tells that of a FIFO without a reader.
    pub fn replace(path: &Path, new_mode: u32) -> io::Result<Self> {
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (draft, file) = Draft::create(&follow(path)?, new_mode)?;
                return Ok(Self { file, is_new: true, position: 0, draft: Some(draft) });
            }
            Err(error) => return Err(error),
        };
        if meta.is_dir() {
            return Err(directory("give the path of a file in it"));
        }
        if meta.is_file() && meta.nlink() == 1 {
            match fs::canonicalize(path).and_then(|target| Draft::like(&target, &meta)) {
                Ok((draft, file)) => return Ok(Self { file, is_new: true, position: 0, draft: Some(draft) }),
                Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                    return Err(error);
                }
                // No file can be made beside it, or none with its owner.
                Err(_) => {}
            }
        }
        let file = OpenOptions::new().write(true).truncate(meta.is_file()).custom_flags(FLAGS).open(path)?;
        Ok(Self { is_new: meta.is_file(), file, position: 0, draft: None })
    }

    /// `path` from `offset` on: what stood behind it is cut off, so its size says where to resume.
    ///
    /// # Errors
    /// As for [`Destination::replace`].
    pub fn resume(path: &Path, offset: u64, new_mode: u32) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(false).mode(new_mode).custom_flags(FLAGS).open(path)?;
        let is_new = file.metadata()?.is_file();
        if is_new {
            file.set_len(offset)?;
        }
        if offset > 0 {
            file.seek(SeekFrom::Start(offset))?;
        }
        Ok(Self { file, is_new, position: offset, draft: None })
    }

    /// Writes some of `bytes`, and says how many; none when it takes none within `slice`. Blocks of zeros become holes.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&mut self, bytes: &[u8], slice: Duration) -> io::Result<usize> {
        let mut length = bytes.len();
        if self.is_new {
            let is_zero;
            (length, is_zero) = run(self.position, bytes);
            if is_zero {
                self.file.seek(SeekFrom::Current(length as i64))?;
                self.position += length as u64;
                return Ok(length);
            }
        }
        match self.file.write(&bytes[..length]) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                self.position += written as u64;
                Ok(written)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready(&self.file, PollFlags::POLLOUT, slice).map(|_| 0)
            }
            Err(error) => Err(error),
        }
    }

    /// Everything was written: a draft takes its place.
    ///
    /// # Errors
    /// The system's; the old file is as it was then, unless it could be written only where it stands.
    pub fn finish(mut self) -> io::Result<()> {
        if self.is_new {
            // A hole at the end.
            self.file.set_len(self.position)?;
        }
        let Some(mut draft) = self.draft else { return Ok(()) };
        if let Some(mode) = draft.mode {
            self.file.set_permissions(Permissions::from_mode(mode))?;
        }
        match fs::rename(&draft.path, &draft.target) {
            Ok(()) => {
                draft.is_kept = true;
                Ok(())
            }
            // It is mounted there, as containers' volumes of one file are: only its content can change.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EXDEV)) => {
                self.file.rewind()?;
                let mut there = OpenOptions::new().write(true).truncate(true).open(&draft.target)?;
                io::copy(&mut self.file, &mut there).map(drop)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Destination {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether opening failed because `path` is a FIFO that nothing reads.
#[must_use]
pub fn is_unread(path: &Path, error: &io::Error) -> bool {
    let is_fifo = || fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
    error.raw_os_error() == Some(libc::ENXIO) && is_fifo()
}

/// The file that a path names, through all links, whether it is there or not.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("")).join(target),
            // EINVAL: it is no link.
            Err(_) => return Ok(path),
        }
    }
    Err(Errno::ELOOP.into())
}

/// The bytes up to the next change between blocks of zeros and others, and which they are.
fn run(position: u64, bytes: &[u8]) -> (usize, bool) {
    let first = BLOCK - (position % BLOCK as u64) as usize;
    let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut end = first.min(bytes.len());
    let kind = is_zero(&bytes[..end]);
    while end < bytes.len() {
        let block = &bytes[end..bytes.len().min(end + BLOCK)];
        if is_zero(block) != kind {
            break;
        }
        end += block.len();
    }
    (end, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLICE: Duration = Duration::from_millis(20);

    fn put(mut destination: Destination, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken = destination.write(bytes, SLICE).unwrap();
            bytes = &bytes[taken..];
        }
        destination.finish().unwrap();
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn test_replace_keeps_mode_links_and_other_names() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        put(Destination::replace(&file, 0o640).unwrap(), b"one");
        assert_eq!(mode(&file) & 0o600, 0o600);
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        put(Destination::replace(&link, 0o755).unwrap(), b"two");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!((fs::read(&file).unwrap(), mode(&file)), (b"two".to_vec(), 0o600));
        std::os::unix::fs::symlink("new", folder.path().join("dangling")).unwrap();
        put(Destination::replace(&folder.path().join("dangling"), 0o600).unwrap(), b"three");
        assert_eq!(fs::read(folder.path().join("new")).unwrap(), b"three");
        fs::hard_link(&file, folder.path().join("twin")).unwrap();
        put(Destination::replace(&file, 0o644).unwrap(), b"four");
        assert_eq!(fs::read(folder.path().join("twin")).unwrap(), b"four");
        drop(Destination::replace(&folder.path().join("new"), 0o644).unwrap());
        assert_eq!(fs::read(folder.path().join("new")).unwrap(), b"three");
        let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["dangling", "file", "link", "new", "twin"]);
    }

    #[test]
    fn test_zeros_become_holes_in_new_files_and_are_written_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let mut bytes = vec![0u8; 1 << 20];
        bytes[300_000] = 1;
        for destination in [Destination::replace(&file, 0o600), Destination::resume(&file, 0, 0o600)] {
            put(destination.unwrap(), &bytes);
            assert!(fs::read(&file).unwrap() == bytes);
            assert!(fs::metadata(&file).unwrap().blocks() * 512 <= 64 * 1024);
        }
    }

    #[test]
    fn test_fifos_are_waited_for_in_slices_and_written_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let error = Destination::replace(&fifo, 0o600).unwrap_err();
        assert!(is_unread(&fifo, &error));
        let (source, meta) = open_source(&fifo, 0).unwrap();
        assert_eq!(read_some(&source, &meta, 10, SLICE).unwrap(), None);
        put(Destination::replace(&fifo, 0o600).unwrap(), b"\0through");
        assert_eq!(read_some(&source, &meta, 10, SLICE).unwrap(), Some(b"\0through".to_vec()));
        assert_eq!(read_some(&source, &meta, 10, SLICE).unwrap(), Some(Vec::new()));
        assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
        assert!(open_source(folder.path(), 0).unwrap_err().to_string().contains("tar"));
    }
}
