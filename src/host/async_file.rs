//! The user's files as tasks of the runtime read and write them. A worker never waits for a disk: a few threads of their own
//! do, however many tasks there are. FIFOs and terminals are waited for by epoll(7).

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;
use tokio::sync::Semaphore;

use super::destination::{is_unread, open_source, read_some, Destination};
use super::fork::PerProcess;

/// Files that are read or written at the same time. Threads may be some more: one that has just ended is not idle yet for the next.
const AT_ONCE: usize = 4;
/// How long a task waits before it looks again for the reader of a FIFO: open(2) tells of none by an error alone.
const SLICE: Duration = Duration::from_millis(20);

static TURNS: PerProcess<Semaphore> = PerProcess::new();

/// Does what may wait for a disk. It goes on when the task is aborted, and keeps its turn until its end.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let turn = TURNS.get_or_init(|| Semaphore::new(AT_ONCE)).acquire().await.map_err(io::Error::other)?;
    let working = move || {
        let _turn = turn;
        work()
    };
    tokio::task::spawn_blocking(working).await.map_err(io::Error::other)?
}

/// Tells when a file is ready; `None` for one that always is: epoll(7) refuses regular files and the likes of `/dev/zero`.
fn watch(fd: BorrowedFd<'_>, interest: Interest) -> io::Result<Option<AsyncFd<OwnedFd>>> {
    // SAFETY: an `OwnedFd` answers with the same open descriptor for as long as it lives.
    match unsafe { AsyncFd::register_with_interest(fd.try_clone_to_owned()?, interest) } {
        Ok(watched) => Ok(Some(watched)),
        Err(error) => match io::Error::from(error) {
            error if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok(None),
            error => Err(error),
        },
    }
}

/// A file that is being read.
pub struct SourceFile {
    file: Arc<(File, Metadata)>,
    watched: Option<AsyncFd<OwnedFd>>,
}

impl SourceFile {
    /// # Errors
    /// As for [`open_source`].
    pub async fn open(path: PathBuf, offset: u64) -> io::Result<Self> {
        let (file, meta) = on_disk(move || open_source(&path, offset)).await?;
        let watched = watch(file.as_fd(), Interest::READABLE)?;
        Ok(Self { file: Arc::new((file, meta)), watched })
    }

    /// What is known of it, for a regular file.
    #[must_use]
    pub fn meta(&self) -> Option<&Metadata> {
        Some(&self.file.1).filter(|meta| meta.is_file())
    }

    /// The next bytes, at most `size`; none at the end.
    ///
    /// # Errors
    /// The system's.
    pub async fn read(&self, size: usize) -> io::Result<Vec<u8>> {
        let file = self.file.clone();
        let read = move || read_some(&file.0, &file.1, size, Duration::ZERO)?.ok_or(io::ErrorKind::WouldBlock.into());
        match &self.watched {
            Some(watched) => watched.async_io(Interest::READABLE, |_| read()).await,
            None => on_disk(read).await,
        }
    }
}

/// A file that is being written. Dropped before [`DestinationFile::finish`], it is what [`Destination`] says.
pub struct DestinationFile {
    destination: Destination,
    watched: Option<AsyncFd<OwnedFd>>,
}

impl DestinationFile {
    /// New content for `path`, or what follows `offset` of it. A FIFO is waited for until it has a reader.
    ///
    /// # Errors
    /// As for [`Destination::replace`] and [`Destination::resume`].
    pub async fn open(path: PathBuf, offset: Option<u64>, new_mode: u32) -> io::Result<Self> {
        loop {
            let path = path.clone();
            let opened = on_disk(move || {
                let opened = match offset {
                    None => Destination::replace(&path, new_mode),
                    Some(offset) => Destination::resume(&path, offset, new_mode),
                };
                match opened {
                    Err(error) if is_unread(&path, &error) => Ok(None),
                    opened => opened.map(Some),
                }
            });
            if let Some(destination) = opened.await? {
                let watched = watch(destination.as_fd(), Interest::WRITABLE)?;
                return Ok(Self { destination, watched });
            }
            tokio::time::sleep(SLICE).await;
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The system's; the file is dropped then.
    pub async fn write(mut self, bytes: Vec<u8>) -> io::Result<Self> {
        let Some(watched) = &self.watched else {
            return on_disk(move || {
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let taken = self.destination.write(rest, Duration::ZERO)?;
                    rest = &rest[taken..];
                }
                Ok(self)
            })
            .await;
        };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let destination = &mut self.destination;
            let mut write = |rest: &[u8]| match destination.write(rest, Duration::ZERO) {
                Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
                written => written,
            };
            let taken = watched.async_io(Interest::WRITABLE, |_| write(rest)).await?;
            rest = &rest[taken..];
        }
        Ok(self)
    }

    /// As [`Destination::finish`].
    ///
    /// # Errors
    /// Its.
    pub async fn finish(self) -> io::Result<()> {
        let Self { destination, watched } = self;
        drop(watched);
        on_disk(move || destination.finish()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[tokio::test]
    async fn test_files_and_devices_are_copied_on_few_threads() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::write(&from, vec![7; 100_000]).unwrap();
        let source = SourceFile::open(from.clone(), 99_000).await.unwrap();
        assert_eq!(source.meta().unwrap().len(), 100_000);
        let file = DestinationFile::open(to.clone(), None, 0o600).await.unwrap();
        let file = file.write(source.read(600).await.unwrap()).await.unwrap();
        file.write(source.read(600).await.unwrap()).await.unwrap().finish().await.unwrap();
        assert!(source.read(600).await.unwrap().is_empty());
        assert_eq!(fs::read(&to).unwrap(), vec![7; 1000]);
        let zeros = SourceFile::open("/dev/zero".into(), 0).await.unwrap();
        assert!(zeros.meta().is_none());
        assert_eq!(zeros.read(10).await.unwrap(), [0; 10]);
        let nothing = DestinationFile::open("/dev/null".into(), None, 0o600).await.unwrap();
        nothing.write(vec![1; 10]).await.unwrap().finish().await.unwrap();
        assert!(SourceFile::open(folder.path().into(), 0).await.is_err());
    }

    #[tokio::test]
    async fn test_dropped_destination_leaves_the_old_content() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("to");
        fs::write(&to, "old").unwrap();
        let file = DestinationFile::open(to.clone(), None, 0o600).await.unwrap();
        drop(file.write(b"new".to_vec()).await.unwrap());
        assert_eq!((fs::read(&to).unwrap(), fs::read_dir(&folder).unwrap().count()), (b"old".to_vec(), 1));
    }

    #[tokio::test]
    async fn test_fifos_are_waited_for_without_a_thread() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let opening = tokio::spawn(DestinationFile::open(fifo.clone(), None, 0o600));
        let source = SourceFile::open(fifo, 0).await.unwrap();
        let nothing = tokio::time::timeout(SLICE, source.read(10)).await;
        assert!(nothing.is_err(), "{nothing:?}");
        let file = opening.await.unwrap().unwrap();
        // More than a FIFO holds (pipe(7)).
        let writing = tokio::spawn(async move { file.write(vec![7; 300_000]).await.unwrap().finish().await.unwrap() });
        let mut length = 0;
        loop {
            let read = source.read(100_000).await.unwrap();
            if read.is_empty() {
                break;
            }
            length += read.len();
        }
        writing.await.unwrap();
        assert_eq!(length, 300_000);
    }
}
