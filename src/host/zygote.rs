//! Programs that are loaded and linked once and forked for each VM (`microvm-zygote`).
//!
//! Best effort: whatever goes wrong with a zygote, the program is executed instead. All managers of a process fork the
//! same zygotes, which end with the last one that uses them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::sys::socket::{
    recvmsg, sendmsg, setsockopt, socketpair, sockopt, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType,
};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;

use super::fork::{self, ForkGuard, PerProcess};

use crate::mutex::Mutex;

/// How long a zygote may take to load, and to fork; it takes milliseconds.
const DEADLINE_S: i64 = 5;
/// Room for the arguments that `ps` shows of a VMM.
const TITLE_BYTES: usize = 16 * 1024;

/// A program that waits to be forked. Dropping it ends it.
#[derive(Debug)]
struct Zygote {
    socket: OwnedFd,
    child: Child,
    _fork_guard: ForkGuard,
}

#[derive(Debug)]
enum ZygoteState {
    Loading,
    Ready(Zygote),
    /// It was tried, and does not work here.
    Unfit,
}

/// The use that one manager makes of this process's zygotes.
#[derive(Debug)]
pub struct Zygotes {
    library: PathBuf,
    /// `None` until the first fork.
    shared: Mutex<Option<Arc<Shared>>>,
}

/// The zygotes of this process that `library` is preloaded into, by program. They end with their last user.
#[derive(Debug)]
struct Shared {
    library: PathBuf,
    known: Mutex<HashMap<PathBuf, ZygoteState>>,
}

impl Zygotes {
    /// `library` is preloaded into the programs.
    #[must_use]
    pub fn new(library: &Path) -> Self {
        Self { library: library.to_owned(), shared: Mutex::default() }
    }

    /// Forks the jail's launcher out of the zygote of `program`, with `control` as its end of the control socket; it is
    /// this process's child. `None` when there is no zygote: the first time one begins to load, beside the caller.
    #[must_use]
    pub fn fork(&self, program: &Path, control: &OwnedFd) -> Option<Pid> {
        let shared = self.shared.lock().get_or_insert_with(|| Shared::of_process(&self.library)).clone();
        shared.fork(program, control)
    }

    /// Uses them no more, until the next fork.
    pub fn end(&self) {
        let shared = self.shared.lock().take();
        drop(shared);
    }
}

impl Shared {
    fn of_process(library: &Path) -> Arc<Self> {
        static ALL: PerProcess<Mutex<HashMap<PathBuf, Weak<Shared>>>> = PerProcess::new();
        let mut all = ALL.get().lock();
        let found = all.get(library).and_then(Weak::upgrade);
        found.unwrap_or_else(|| {
            let made = Arc::new(Self { library: library.to_owned(), known: Mutex::default() });
            all.insert(library.to_owned(), Arc::downgrade(&made));
            made
        })
    }

    fn fork(self: &Arc<Self>, program: &Path, control: &OwnedFd) -> Option<Pid> {
        let mut known = self.known.lock();
        match known.get(program) {
            Some(ZygoteState::Ready(zygote)) => match zygote.fork(control) {
                Ok(launcher) => return Some(launcher),
                Err(error) => log::debug!("the zygote of {}: {error}; it is started again", program.display()),
            },
            Some(ZygoteState::Loading | ZygoteState::Unfit) => return None,
            None => {}
        }
        known.insert(program.to_owned(), ZygoteState::Loading);
        drop(known);
        let (shared, library, program) = (Arc::downgrade(self), self.library.clone(), program.to_owned());
        std::thread::spawn(move || {
            let state = match Zygote::start(&program, &library) {
                Ok(zygote) => ZygoteState::Ready(zygote),
                Err(error) => {
                    log::warn!("{} is executed for each VM, which takes longer: no zygote: {error}", program.display());
                    ZygoteState::Unfit
                }
            };
            // Unless its last user is gone meanwhile.
            if let Some(shared) = shared.upgrade() {
                shared.known.lock().insert(program, state);
            }
        });
        None
    }
}

impl Zygote {
    fn start(program: &Path, library: &Path) -> std::io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        setsockopt(&ours, sockopt::ReceiveTimeout, &TimeVal::new(DEADLINE_S, 0))?;
        let (preload, file) = preload(library)?;
        let mut command = Command::new(program);
        command
            .arg0("microvm-zygote")
            .arg(" ".repeat(TITLE_BYTES))
            .env_clear()
            .env("LD_PRELOAD", preload)
            // Where a VMM with a root of its own looks for what it loads later.
            .env("LD_LIBRARY_PATH", "/lib")
            .stdin(Stdio::from(theirs))
            .stdout(file.map_or_else(Stdio::null, Stdio::from))
            .stderr(Stdio::null())
            .current_dir("/")
            // Ctrl-C is for those who have a terminal.
            .process_group(0);
        let child = fork::inherit_nothing(&mut command).spawn()?;
        // Its end of the socket.
        drop(command);
        let _fork_guard = fork::guard(&ours);
        let zygote = Self { socket: ours, child, _fork_guard };
        match zygote.receive::<1>()? {
            [1] => Ok(zygote),
            _ => Err(std::io::ErrorKind::InvalidData.into()),
        }
    }

    fn fork(&self, control: &OwnedFd) -> std::io::Result<Pid> {
        let rights = [control.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&[0])], &message, MsgFlags::MSG_NOSIGNAL, None)?;
        match i32::from_ne_bytes(self.receive()?) {
            pid @ 1.. => Ok(Pid::from_raw(pid)),
            errno => Err(std::io::Error::from_raw_os_error(-errno)),
        }
    }

    fn receive<const N: usize>(&self) -> std::io::Result<[u8; N]> {
        let mut buffer = [0; N];
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let length = loop {
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut slices, None, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                received => break received?.bytes,
            }
        };
        if length == N {
            return Ok(buffer);
        }
        Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it has ended"))
    }
}

/// What names the library to the loader. It splits its list at spaces and colons (ld.so(8)), so a path that holds one of
/// these is given as a descriptor, which is the zygote's stdout.
fn preload(library: &Path) -> std::io::Result<(OsString, Option<File>)> {
    if library.as_os_str().as_bytes().iter().any(|byte| b" :".contains(byte)) {
        return Ok(("/proc/self/fd/1".into(), Some(File::open(library)?)));
    }
    Ok((library.into(), None))
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // Its other end reads end-of-file, and it exits; one that hangs is not waited for.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            log::debug!("a zygote was not reaped: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_program_that_is_no_zygote_is_unfit() {
        for program in ["/bin/true", "/bin/cat", "/no/such/program"] {
            assert!(Zygote::start(Path::new(program), Path::new("/no/such/library")).is_err(), "{program}");
        }
    }
}
