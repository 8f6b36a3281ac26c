//! A folder in which a jailed VMM makes its sockets, and where this process meets it.
//!
//! Architecture invariant: the folder is held by a descriptor, and everything in it is named through that: it may be
//! renamed meanwhile, and its path may be longer than the 107 bytes of a socket's name. The VMM can make sockets in it and
//! is not trusted: names are ours, and nothing is followed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{openat, AtFlags, OFlag};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::{fstat, Mode, SFlag};
use nix::unistd::{fchownat, geteuid, mkfifoat, unlinkat, Uid, UnlinkatFlags};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};

use crate::error::{Error, Result};

/// Between a socket's appearance in the folder and its being listened on there is no event, and some microseconds.
const BIND_TO_LISTEN: Duration = Duration::from_millis(1);

struct InotifyFd(Inotify);

impl AsRawFd for InotifyFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// The magic link to an open file: it leads to the file itself, wherever that is by now.
fn by_descriptor(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives it the mode 0600. The descriptor may be one of O_PATH, which fchmod(2) refuses.
fn close_to_others(file: &File) -> io::Result<()> {
    fs::set_permissions(by_descriptor(file), fs::Permissions::from_mode(0o600))
}

/// The folder of one VMM.
pub struct SocketDir {
    path: PathBuf,
    folder: File,
    owner: Option<u32>,
    watch: AsyncFd<InotifyFd>,
}

impl SocketDir {
    /// Opens a folder that was made for the VMM, and empties it of what an earlier VMM left. Call on the runtime.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn open(path: &Path, owner: Option<u32>) -> Result<Self> {
        let failed = |operation, error: io::Error| Error::host(operation, path.display(), error);
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let folder = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|e| failed("open", e))?;
        for entry in fs::read_dir(by_descriptor(&folder)).map_err(|e| failed("list", e))? {
            let left = entry.map_err(|e| failed("list", e))?.file_name();
            let removed = unlinkat(&folder, left.as_os_str(), UnlinkatFlags::NoRemoveDir);
            removed.map_err(|e| failed("empty", e.into()))?;
        }
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let inotify = inotify.map_err(|e| failed("watch", e.into()))?;
        inotify.add_watch(&by_descriptor(&folder), AddWatchFlags::IN_CREATE).map_err(|e| failed("watch", e.into()))?;
        // SAFETY: the descriptor stays the same and open for as long as the watch lives.
        let watch = unsafe { AsyncFd::register(InotifyFd(inotify)) }.map_err(|e| failed("watch", e.into()))?;
        Ok(Self { path: path.to_owned(), folder, owner, watch })
    }

    fn named(&self, name: &str) -> PathBuf {
        by_descriptor(&self.folder).join(name)
    }

    /// Opens what was made here a moment ago: the VMM may have put something else there since.
    fn made(&self, name: &str, kind: SFlag, flags: OFlag) -> io::Result<File> {
        let opened = openat(&self.folder, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = fstat(&opened)?;
        let ours = stat.st_uid == geteuid().as_raw() && stat.st_nlink == 1;
        match ours && stat.st_mode & SFlag::S_IFMT.bits() == kind.bits() {
            true => Ok(opened.into()),
            false => Err(io::Error::other("another file has its name")),
        }
    }

    /// Gives the VMM the right to use what was made here.
    fn give(&self, made: &File) -> io::Result<()> {
        close_to_others(made)?;
        let owner = self.owner.map(Uid::from_raw);
        owner.map_or(Ok(()), |owner| Ok(fchownat(made, "", Some(owner), None, AtFlags::AT_EMPTY_PATH)?))
    }

    /// A listening socket for the VMM, to which this process connects.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn bind(&self, name: &str) -> Result<OwnedFd> {
        let bound = StdListener::bind(self.named(name)).and_then(|listener| {
            // Whatever the umask left of it.
            close_to_others(&self.made(name, SFlag::S_IFSOCK, OFlag::O_PATH)?)?;
            Ok(listener.into())
        });
        bound.map_err(|error| self.failed("listen at", name, error))
    }

    /// Listens at a name to which the VMM connects.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn listen(&self, name: &str) -> Result<UnixListener> {
        let listener = StdListener::from(self.bind(name)?);
        let listen = || {
            self.give(&self.made(name, SFlag::S_IFSOCK, OFlag::O_PATH)?)?;
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener)
        };
        listen().map_err(|error| self.failed("listen at", name, error))
    }

    /// Makes a pipe that the VMM opens by its name; this process reads it.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn pipe(&self, name: &str) -> Result<pipe::Receiver> {
        let make = || {
            mkfifoat(&self.folder, name, Mode::S_IRUSR | Mode::S_IWUSR)?;
            let pathless = self.made(name, SFlag::S_IFIFO, OFlag::O_PATH)?;
            self.give(&pathless)?;
            // Open for writing, too: it does not end when the VMM's end closes. By the magic link: it is the same pipe.
            pipe::OpenOptions::new().read_write(true).open_receiver(by_descriptor(&pathless))
        };
        make().map_err(|error| self.failed("make a pipe at", name, error))
    }

    /// Makes an empty file that the VMM may read and write.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn file(&self, name: &str) -> Result<File> {
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(self.named(name));
        let made = made.and_then(|file| self.give(&file).map(|()| file));
        made.map_err(|error| self.failed("make a file at", name, error))
    }

    /// What the VMM wrote into a file that it made here.
    ///
    /// # Errors
    /// [`Error::Host`], also when it is no file or has more than `limit` bytes.
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let read = || {
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = OpenOptions::new().read(true).custom_flags(flags).open(self.named(name))?;
            let mut bytes = Vec::new();
            if !file.metadata()?.is_file() || file.take(limit + 1).read_to_end(&mut bytes)? as u64 > limit {
                return Err(io::Error::other(format!("it must be a file of at most {limit} bytes")));
            }
            Ok(bytes)
        };
        read().map_err(|error| self.failed("read", name, error))
    }

    /// Waits until the VMM has made the socket `name`, and connects to it. Has no deadline of its own.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub async fn connect(&self, name: &str) -> Result<UnixStream> {
        loop {
            match UnixStream::connect(self.named(name)).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == ErrorKind::NotFound => self.changed().await,
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(BIND_TO_LISTEN).await;
                    Ok(())
                }
                Err(error) => Err(error),
            }
            .map_err(|error| self.failed("connect to", name, error))?;
        }
    }

    /// Waits for something to be made here that nobody has been told of yet.
    async fn changed(&self) -> io::Result<()> {
        let read = self.watch.async_io(tokio::io::Interest::READABLE, |watch| Ok(watch.0.read_events()?));
        read.await.map(drop)
    }

    /// Takes a name of ours away; who is connected stays so.
    pub fn remove(&self, name: &str) {
        match unlinkat(&self.folder, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => log::warn!("{}", self.failed("remove", name, errno.into())),
        }
    }

    fn failed(&self, operation: &'static str, name: &str, error: io::Error) -> Error {
        Error::host(operation, self.path.join(name).display(), error)
    }
}

impl std::fmt::Debug for SocketDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketDir").field("path", &self.path).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// What a VMM in an attacker's power does between our making of a name and our next step.
    #[tokio::test]
    async fn test_what_the_vmm_put_in_a_names_place_is_neither_given_nor_opened() {
        let (folder, outside) = (tempdir().unwrap(), tempdir().unwrap());
        let (victim, other) = (outside.path().join("victim"), outside.path().join("fifo"));
        fs::write(&victim, b"").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o644)).unwrap();
        nix::unistd::mkfifo(&other, Mode::S_IRWXU).unwrap();
        let sockets = SocketDir::open(folder.path(), None).unwrap();
        for (name, target) in [("socket", &victim), ("pipe", &other)] {
            std::os::unix::fs::symlink(target, folder.path().join(name)).unwrap();
            for kind in [SFlag::S_IFSOCK, SFlag::S_IFIFO, SFlag::S_IFREG] {
                assert!(sockets.made(name, kind, OFlag::O_PATH).is_err(), "{name}");
            }
            assert!(sockets.listen(name).is_err() && sockets.pipe(name).is_err() && sockets.file(name).is_err());
        }
        fs::hard_link(&victim, folder.path().join("twin")).unwrap();
        assert!(sockets.made("twin", SFlag::S_IFREG, OFlag::O_PATH).is_err());
        assert_eq!(victim.metadata().unwrap().permissions().mode() & 0o777, 0o644);
    }

    #[tokio::test]
    async fn test_connect_waits_for_a_socket_that_is_made_later() {
        let folder = tempdir().unwrap();
        let sockets = SocketDir::open(folder.path(), None).unwrap();
        let made = folder.path().join("api");
        let serving = tokio::spawn(async move {
            tokio::task::yield_now().await;
            std::fs::write(made.with_file_name("other"), b"").unwrap();
            UnixListener::bind(made).unwrap().accept().await.unwrap().0.write_all(b"x").await.unwrap();
        });
        let mut stream = tokio::time::timeout(Duration::from_secs(5), sockets.connect("api")).await.unwrap().unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn test_open_removes_what_was_left_and_names_outlive_a_rename() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("sockets");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("stale"), b"").unwrap();
        let sockets = SocketDir::open(&path, None).unwrap();
        assert!(!path.join("stale").exists());
        let moved = path.with_extension("moved");
        fs::rename(&path, &moved).unwrap();
        let _listener = sockets.listen("agent").unwrap();
        assert!(moved.join("agent").exists());
        sockets.remove("agent");
        assert!(!moved.join("agent").exists());
    }

    #[tokio::test]
    async fn test_read_takes_files_of_a_size_alone() {
        let folder = tempdir().unwrap();
        let sockets = SocketDir::open(folder.path(), None).unwrap();
        fs::write(folder.path().join("file"), b"1234").unwrap();
        assert_eq!(sockets.read("file", 4).unwrap(), b"1234");
        assert!(sockets.read("file", 3).unwrap_err().to_string().contains("at most 3 bytes"));
        std::os::unix::fs::symlink("file", folder.path().join("link")).unwrap();
        assert!(sockets.read("link", 4).is_err());
        let _pipe = sockets.pipe("pipe").unwrap();
        assert!(sockets.read("pipe", 4).is_err());
    }

    #[tokio::test]
    async fn test_pipe_is_read_across_writers() {
        let folder = tempdir().unwrap();
        let sockets = SocketDir::open(folder.path(), None).unwrap();
        let mut pipe = sockets.pipe("metrics").unwrap();
        for byte in [1, 2] {
            fs::write(folder.path().join("metrics"), [byte]).unwrap();
            assert_eq!(pipe.read_u8().await.unwrap(), byte);
        }
    }
}
