//! A folder that is held by a descriptor.
//!
//! Architecture invariant: each operation names one entry of the folder, by a single component; the last component is
//! never followed when it is a link. What is opened must belong to this user. Whatever the umask is, what is made has the
//! mode that was asked for.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{openat, renameat, AtFlags, OFlag, AT_FDCWD};
use nix::sys::stat::{fchmod, fstat, fstatat, mkdirat, FileStat, Mode, SFlag};
use nix::unistd::{fchownat, geteuid, unlinkat, Uid, UnlinkatFlags};

use super::remove;

/// Which file it is, whatever its names are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id {
    device: u64,
    inode: u64,
}

impl Id {
    pub(super) fn of(stat: &FileStat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// One entry of a folder, as it was when the folder was listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: OsString,
    pub is_dir: bool,
    pub owner: u32,
    pub mode: u32,
}

/// An open folder. The path is for messages, and for programs that are told names.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Refuses what is not the name of one entry.
fn entry(name: &OsStr) -> io::Result<&OsStr> {
    let bytes = name.as_bytes();
    match bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.iter().any(|byte| matches!(byte, b'/' | 0)) {
        true => Err(io::Error::new(ErrorKind::InvalidInput, format!("{name:?} is not the name of an entry"))),
        false => Ok(name),
    }
}

pub(super) fn is_kind(stat: &FileStat, kind: SFlag) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == kind.bits()
}

fn refused(what: String) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, what)
}

/// Whether the file belongs to this user; the error says whose it is.
fn check_owner(stat: &FileStat) -> io::Result<()> {
    let own = geteuid().as_raw();
    match stat.st_uid == own {
        true => Ok(()),
        false => Err(refused(format!("it belongs to uid {}, not to uid {own}", stat.st_uid))),
    }
}

/// The flags of each opening here: no links, no waiting for a FIFO's other end.
fn flags(more: OFlag) -> OFlag {
    more | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY
}

/// Gives a folder that may be closed to its own owner (umask) the mode 0700, then opens it.
fn open_closed(pathless: &OwnedFd) -> nix::Result<OwnedFd> {
    let by_fd = format!("/proc/self/fd/{}", pathless.as_raw_fd());
    nix::sys::stat::fchmodat(AT_FDCWD, by_fd.as_str(), Mode::S_IRWXU, nix::sys::stat::FchmodatFlags::FollowSymlink)?;
    openat(pathless, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

impl Dir {
    /// Takes over a descriptor of a folder, also one opened with `O_PATH`.
    pub(super) fn from_fd(fd: &impl AsFd, path: PathBuf) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { fd: openat(fd, ".", flags, Mode::empty())?, path })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Notes that the folder has another name by now.
    pub(super) fn renamed(&mut self, path: PathBuf) {
        self.path = path;
    }

    /// The path of an entry, for messages and for programs that are told names.
    #[must_use]
    pub fn at(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.path.join(name.as_ref())
    }

    /// A path by which this process alone reaches an entry, wherever the folder is by then.
    #[must_use]
    pub fn by_descriptor(&self, name: impl AsRef<OsStr>) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd())).join(name.as_ref())
    }

    /// # Errors
    /// What fstat(2) failed with.
    pub fn id(&self) -> io::Result<Id> {
        Ok(Id::of(&fstat(&self.fd)?))
    }

    pub(super) fn stat(&self, name: &OsStr) -> io::Result<FileStat> {
        Ok(fstatat(&self.fd, entry(name)?, AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// Whether there is an entry of that name, be it a link that leads nowhere.
    ///
    /// # Errors
    /// All but `NotFound`.
    pub fn has(&self, name: impl AsRef<OsStr>) -> io::Result<bool> {
        match self.stat(name.as_ref()) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens a folder of this user's in it.
    ///
    /// # Errors
    /// `NotFound`; `PermissionDenied` when it belongs to another user or is open to others, `NotADirectory`, also for links.
    pub fn dir(&self, name: impl AsRef<OsStr>) -> io::Result<Self> {
        let name = entry(name.as_ref())?;
        let fd = openat(&self.fd, name, flags(OFlag::O_PATH | OFlag::O_DIRECTORY), Mode::empty())?;
        let stat = fstat(&fd)?;
        check_owner(&stat)?;
        if stat.st_mode & 0o077 != 0 {
            return Err(refused(format!("its mode is {:o}, it must be closed to others", stat.st_mode & 0o777)));
        }
        Self::from_fd(&fd, self.path.join(name))
    }

    /// Makes a folder with mode 0700.
    ///
    /// # Errors
    /// `AlreadyExists`.
    pub fn make_dir(&self, name: impl AsRef<OsStr>) -> io::Result<Self> {
        let name = entry(name.as_ref())?;
        mkdirat(&self.fd, name, Mode::S_IRWXU)?;
        let fd = openat(&self.fd, name, flags(OFlag::O_PATH | OFlag::O_DIRECTORY), Mode::empty())?;
        check_owner(&fstat(&fd)?)?;
        Ok(Self { fd: open_closed(&fd)?, path: self.path.join(name) })
    }

    /// Opens a folder of this user's in it, which is made when there is none.
    ///
    /// # Errors
    /// As [`Dir::dir`]'s.
    pub fn make_or_open_dir(&self, name: impl AsRef<OsStr>) -> io::Result<Self> {
        match self.make_dir(name.as_ref()) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => self.dir(name),
            made => made,
        }
    }

    fn checked(&self, file: OwnedFd) -> io::Result<File> {
        let stat = fstat(&file)?;
        if !is_kind(&stat, SFlag::S_IFREG) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
        }
        check_owner(&stat)?;
        match stat.st_nlink {
            0 | 1 => Ok(file.into()),
            names => Err(refused(format!("it has {names} names (hard links)"))),
        }
    }

    /// Opens a regular file of this user's for reading.
    ///
    /// # Errors
    /// `NotFound`, `PermissionDenied` for another user's or one with several names, `InvalidInput` for what is no file.
    pub fn open(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        let name = entry(name.as_ref())?;
        self.checked(openat(&self.fd, name, flags(OFlag::O_RDONLY), Mode::empty())?)
    }

    /// Opens a regular file of this user's for reading and writing.
    ///
    /// # Errors
    /// As [`Dir::open`]'s.
    pub fn open_writable(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        let name = entry(name.as_ref())?;
        self.checked(openat(&self.fd, name, flags(OFlag::O_RDWR), Mode::empty())?)
    }

    /// Makes a file with mode 0600.
    ///
    /// # Errors
    /// `AlreadyExists`, also for a link of that name.
    pub fn create(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        let name = entry(name.as_ref())?;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(&self.fd, name, flags(OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL), mode)?;
        fchmod(&file, mode)?;
        Ok(file.into())
    }

    /// Opens a file of this user's, which is made when there is none.
    ///
    /// # Errors
    /// As [`Dir::open`]'s.
    pub fn create_or_open(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        loop {
            match self.create(name.as_ref()) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                made => return made,
            }
            match self.open_writable(name.as_ref()) {
                // It was removed in between.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                opened => return opened,
            }
        }
    }

    /// The content of a regular file of this user's, at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Dir::open`]'s; `InvalidData` when it is longer.
    pub fn read(&self, name: impl AsRef<OsStr>, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = self.open(name)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        match read as u64 > limit {
            true => Err(io::Error::new(ErrorKind::InvalidData, format!("it has more than {limit} bytes"))),
            false => Ok(bytes),
        }
    }

    /// Writes a file anew; a reader sees the old content or the new, never a part.
    ///
    /// # Errors
    /// What one of the system calls failed with; the old content stays then.
    pub fn write(&self, name: impl AsRef<OsStr>, content: &[u8]) -> io::Result<()> {
        let name = entry(name.as_ref())?;
        let draft = OsString::from(format!(".{}.draft", name.to_string_lossy()));
        self.remove_file(&draft)?;
        let written = self.create(&draft).and_then(|mut file| file.write_all(content));
        written.and_then(|()| self.rename(&draft, self, name)).inspect_err(|_| {
            if let Err(error) = self.remove_file(&draft) {
                log::debug!("{}: {error}", self.at(&draft).display());
            }
        })
    }

    /// Gives an entry another name, over what has that name.
    ///
    /// # Errors
    /// What renameat(2) failed with.
    pub fn rename(&self, from: impl AsRef<OsStr>, to: &Self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(renameat(&self.fd, entry(from.as_ref())?, &to.fd, entry(name.as_ref())?)?)
    }

    /// Gives an entry to another user; a link itself, not its target.
    ///
    /// # Errors
    /// What fchownat(2) failed with.
    pub fn give(&self, name: impl AsRef<OsStr>, owner: u32) -> io::Result<()> {
        let name = entry(name.as_ref())?;
        Ok(fchownat(&self.fd, name, Some(Uid::from_raw(owner)), None, AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// Removes an entry that is no folder, if it is there.
    ///
    /// # Errors
    /// What unlinkat(2) failed with.
    pub fn remove_file(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        match unlinkat(&self.fd, entry(name.as_ref())?, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes an entry, if it is there, with all it holds: links themselves, and nothing on another file system.
    ///
    /// # Errors
    /// What could not be removed; the rest may be gone.
    pub fn remove_all(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        remove::all(&self.fd, entry(name.as_ref())?)
    }

    /// The entries, but for those that vanish meanwhile.
    ///
    /// # Errors
    /// What reading the folder failed with.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut found = Vec::new();
        for name in remove::names(&self.fd)? {
            match self.stat(&name) {
                Ok(stat) => found.push(Entry {
                    name,
                    is_dir: is_kind(&stat, SFlag::S_IFDIR),
                    owner: stat.st_uid,
                    mode: stat.st_mode & 0o7777,
                }),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// Flushes the folder itself: names that were made or renamed survive a crash of the machine.
    ///
    /// # Errors
    /// What fsync(2) failed with.
    pub fn sync(&self) -> io::Result<()> {
        Ok(nix::unistd::fsync(&self.fd)?)
    }
}

/// Makes a folder in `parent` unless it is there; a new one has mode 0700 whatever the umask. Whether it was made.
pub(super) fn make_in(parent: &OwnedFd, name: &OsStr) -> nix::Result<bool> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        Ok(()) => {}
        Err(Errno::EEXIST) => return Ok(false),
        Err(errno) => return Err(errno),
    }
    let fd = openat(parent, name, flags(OFlag::O_PATH | OFlag::O_DIRECTORY), Mode::empty())?;
    // In a sticky folder, another user may have put a folder there between the two; it is checked with all the others.
    match fstat(&fd)?.st_uid == geteuid().as_raw() {
        true => open_closed(&fd).map(|_| true),
        false => Ok(false),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
    use tempfile::TempDir;

    /// A folder that only this user may enter; a plain TempDir has the mode that the umask leaves.
    pub fn private_dir() -> TempDir {
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    /// A folder of a test's own; removed when dropped.
    pub struct Scratch(TempDir);

    impl Scratch {
        pub fn new() -> Self {
            Self(private_dir())
        }

        pub fn path(&self) -> &Path {
            self.0.path()
        }

        pub fn dir(&self) -> Dir {
            let fd = nix::fcntl::open(self.path(), OFlag::O_PATH, Mode::empty()).unwrap();
            Dir::from_fd(&fd, self.path().to_owned()).unwrap()
        }
    }

    #[test]
    fn test_names_of_more_than_one_component_are_refused() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        for name in ["", ".", "..", "a/b", "/etc", "a\0b"] {
            assert_eq!(dir.create(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
            assert_eq!(dir.remove_all(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
        }
    }

    #[test]
    fn test_links_are_not_followed_by_any_operation() {
        let (scratch, outside) = (Scratch::new(), Scratch::new());
        let dir = scratch.dir();
        fs::write(outside.path().join("file"), b"kept").unwrap();
        symlink(outside.path().join("file"), scratch.path().join("to-file")).unwrap();
        symlink(outside.path().join("new"), scratch.path().join("to-nothing")).unwrap();
        symlink(outside.path(), scratch.path().join("to-folder")).unwrap();
        assert!(dir.open("to-file").is_err() && dir.open_writable("to-file").is_err());
        assert!(dir.create("to-nothing").is_err() && dir.create_or_open("to-nothing").is_err());
        assert!(dir.dir("to-folder").is_err() && dir.make_or_open_dir("to-folder").is_err());
        dir.write("to-file", b"new").unwrap();
        dir.give("to-folder", geteuid().as_raw()).unwrap();
        for name in ["to-file", "to-nothing", "to-folder"] {
            dir.remove_all(name).unwrap();
        }
        assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"kept");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }

    #[test]
    fn test_only_regular_files_with_one_name_are_opened() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        nix::unistd::mkfifo(&scratch.path().join("fifo"), Mode::S_IRWXU).unwrap();
        fs::write(scratch.path().join("file"), b"12345").unwrap();
        assert_eq!(dir.read("file", 5).unwrap(), b"12345");
        assert_eq!(dir.read("file", 4).unwrap_err().kind(), ErrorKind::InvalidData);
        fs::hard_link(scratch.path().join("file"), scratch.path().join("twin")).unwrap();
        for name in ["fifo", "file", "twin"] {
            assert!(dir.open(name).is_err() && dir.open_writable(name).is_err(), "{name}");
        }
    }

    #[test]
    fn test_a_folder_open_to_others_is_not_opened() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        dir.make_dir("shared").unwrap();
        fs::set_permissions(scratch.path().join("shared"), fs::Permissions::from_mode(0o750)).unwrap();
        assert!(dir.dir("shared").unwrap_err().to_string().contains("750"));
        assert!(dir.make_or_open_dir("shared").is_err());
    }

    #[test]
    fn test_write_replaces_and_leaves_no_draft() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        dir.write("file", b"one").unwrap();
        dir.write("file", b"two").unwrap();
        assert_eq!(dir.read("file", 10).unwrap(), b"two");
        assert_eq!(dir.entries().unwrap().len(), 1);
        assert_eq!(scratch.path().join("file").metadata().unwrap().mode() & 0o777, 0o600);
    }
}
