//! A process in its jail: launched by posix_spawn through the launcher, watched over one socket.
//!
//! The socket is the lifeline: when this side closes, for whatever reason, the launcher's supervisor kills all it holds.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{self, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_jail::{Confined, JailEvent, JailRequest, LaunchSpec};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    recvmsg, sendmsg, setsockopt, shutdown, socketpair, sockopt, AddressFamily, ControlMessage, ControlMessageOwned,
    MsgFlags, Shutdown, SockFlag, SockType,
};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;
use tokio::sync::watch;

use super::fork::{self, ForkGuard};
use super::pidfd;
use super::zygote::Zygotes;
use crate::error::{Cause, Error, Result};
use crate::mutex::Mutex;

/// How long a trial launch may take; it takes milliseconds.
const TRIAL_DEADLINE_S: i64 = 10;

/// How a jailed process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// The jail could not be set up, or the program not executed.
    Failed {
        stage: String,
        message: String,
    },
    /// The supervisor itself was killed; the kernel took the rest.
    SupervisorLost,
}

impl Exit {
    fn failed(stage: microvm_jail::Stage, errno: i32, message: &str) -> Self {
        Exit::Failed { stage: stage.to_string(), message: format!("{message} (errno {errno})") }
    }

    fn ended(code: Option<i32>, signal: Option<i32>) -> Self {
        match (code, signal) {
            (_, Some(signal)) => Exit::Signal(signal),
            (code, None) => Exit::Code(code.unwrap_or(0)),
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "killed by {name}"),
                Err(_) => write!(f, "killed by signal {signal}"),
            },
            Exit::Failed { stage, message } => write!(f, "jail stage {stage}: {message}"),
            Exit::SupervisorLost => f.write_str("its jail was killed"),
        }
    }
}

/// What an audit found: a layer would have denied this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub layer: String,
    pub what: String,
}

/// What the launcher of a jail has reported so far.
#[derive(Debug, Default)]
struct JailReport {
    confined: Option<Confined>,
    findings: Vec<Finding>,
}

/// The process that started this one, whose end can be waited for.
#[derive(Debug)]
pub struct Parent {
    pid: Pid,
    /// `None` where there are no such descriptors (before Linux 5.3).
    process: Option<OwnedFd>,
}

impl Parent {
    /// # Errors
    /// [`Error::Host`].
    pub fn of_this_process() -> Result<Self> {
        let pid = nix::unistd::getppid();
        let failed = |error: std::io::Error| Error::host("pidfd_open", pid, error);
        match pidfd::open(pid) {
            Ok(Some(process)) => Ok(Self { pid, process: Some(process) }),
            Ok(None) => Err(failed(std::io::Error::from_raw_os_error(libc::ESRCH))),
            Err(error) if pidfd::are_missing(&error) => Ok(Self { pid, process: None }),
            Err(error) => Err(failed(error)),
        }
    }

    /// Waits until it has ended with all its threads, and all its descriptors are closed.
    pub fn ended_within(&self, deadline: Duration) -> bool {
        let Some(process) = &self.process else { return self.left_within(deadline) };
        let timeout = PollTimeout::try_from(deadline).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, timeout), Ok(1))
    }

    /// The same, by looking again: this process has another parent then, which nothing announces.
    fn left_within(&self, deadline: Duration) -> bool {
        const PAUSE: Duration = Duration::from_millis(10);
        let end = Instant::now() + deadline;
        while nix::unistd::getppid() == self.pid {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
        true
    }
}

/// A running jail. Dropping it kills what is inside.
#[derive(Debug)]
pub struct Jailed {
    control: Arc<AsyncFd<OwnedFd>>,
    report: Arc<Mutex<JailReport>>,
    pid: watch::Receiver<Option<i32>>,
    exit: watch::Receiver<Option<Exit>>,
    gone: watch::Receiver<bool>,
    is_forked: bool,
    _fork_guard: ForkGuard,
}

impl Jailed {
    /// Launches `spec` with `fds` (in the order of `spec.fds`). `held` is dropped once no process of the jail is left.
    ///
    /// # Errors
    /// [`Error::Host`] when the launcher does not start.
    pub fn launch(launcher: &Path, spec: &LaunchSpec, fds: &[BorrowedFd<'_>], held: Box<dyn Send>) -> Result<Self> {
        Self::launch_by(&Launcher { program: launcher, zygote: None }, |_| Ok(spec.clone()), fds, held)
    }

    /// As [`Jailed::launch`]; `spec` learns whether the program is forked, and so has opened its own files by then.
    ///
    /// # Errors
    /// [`Error::Host`] when the launcher does not start; those of `spec`.
    pub fn launch_by(
        launcher: &Launcher<'_>,
        spec: impl FnOnce(bool) -> Result<LaunchSpec>,
        fds: &[BorrowedFd<'_>],
        held: Box<dyn Send>,
    ) -> Result<Self> {
        let Launcher { program, zygote } = launcher;
        let failed = |operation, cause: Cause| Error::host(operation, program.display(), cause);
        let (ours, child) = spawn(program, *zygote)?;
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
            .map_err(|e| failed("O_NONBLOCK", e.into()))?;
        // SAFETY: an `OwnedFd` answers with the same open descriptor for as long as it lives.
        let control = unsafe { AsyncFd::register(ours) }.map_err(|e| failed("epoll", e.into()))?;
        let control = Arc::new(control);
        let (pid_tx, pid) = watch::channel(None);
        let (exit_tx, exit) = watch::channel(None);
        let (gone_tx, gone) = watch::channel(false);
        let report = Arc::<Mutex<JailReport>>::default();
        let is_forked = matches!(child, Child::Forked(_));
        // From here on the task owns the child: it is reaped whatever happens next.
        tokio::spawn(watch_jail(control.clone(), child, report.clone(), pid_tx, exit_tx, gone_tx, held));
        let _fork_guard = fork::guard(control.get_ref());
        let jailed = Self { control, report, pid, exit, gone, is_forked, _fork_guard };
        send_spec(program, jailed.control.get_ref(), &spec(is_forked)?, fds)?;
        Ok(jailed)
    }

    /// Which of the layers that depend on the kernel the program got, once it runs.
    #[must_use]
    pub fn confined(&self) -> Option<Confined> {
        self.report.lock().confined.clone()
    }

    /// Whether it came out of a zygote, whose layout in memory it shares.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.is_forked
    }

    /// What an audit has found so far.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        self.report.lock().findings.clone()
    }

    /// The program's process id on this host, once it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        *self.pid.borrow()
    }

    /// Waits until the program has ended; never returns before.
    pub async fn exited(&self) -> Exit {
        wait_exit(self.exit.clone()).await
    }

    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// A receiver for the exit, for tasks that outlive the borrow.
    #[must_use]
    pub fn exit_receiver(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.clone()
    }

    /// Waits until the launcher has been reaped: no process of the jail is left.
    pub async fn reaped(&self) {
        let mut gone = self.gone.clone();
        // An error means that the watching task is gone, and so is the jail.
        if gone.wait_for(|gone| *gone).await.is_err() {
            log::debug!("the jail's watcher ended before it reported");
        }
    }

    /// A way to send signals that outlives the borrow, but not the jail.
    #[must_use]
    pub fn signals(&self) -> Signals {
        Signals { control: self.control.clone(), pid: self.pid.clone() }
    }

    /// Asks the supervisor to send `signal` to the program.
    pub fn signal(&self, signal: i32) {
        self.signals().send(signal);
    }

    /// Lets go of the lifeline: the supervisor reads end-of-file and kills everything.
    pub fn kill(&self) {
        if let Err(error) = shutdown(self.control.as_raw_fd(), Shutdown::Write) {
            log::debug!("the jail's socket was closed already: {error}");
        }
    }
}

/// Sends signals to a jailed program.
#[derive(Debug, Clone)]
pub struct Signals {
    control: Arc<AsyncFd<OwnedFd>>,
    pid: watch::Receiver<Option<i32>>,
}

impl Signals {
    /// The program's process id on this host, once it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        *self.pid.borrow()
    }

    /// Asks the supervisor to send `signal` to the program.
    pub fn send(&self, signal: i32) {
        let request = JailRequest { signal };
        let sent = serde_json::to_vec(&request).map_err(|e| e.to_string()).and_then(|packet| {
            sendmsg::<()>(self.control.as_raw_fd(), &[IoSlice::new(&packet)], &[], MsgFlags::MSG_NOSIGNAL, None)
                .map_err(|e| e.to_string())
        });
        if let Err(error) = sent {
            // The supervisor is gone, and with it the program.
            log::debug!("signal {signal} was not sent: {error}");
        }
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How a jail's launcher comes to run.
#[derive(Debug, Clone, Copy)]
pub struct Launcher<'a> {
    pub program: &'a Path,
    /// Where it is forked from, if it can be: the zygote of the program that it will jail.
    pub zygote: Option<(&'a Arc<Zygotes>, &'a Path)>,
}

/// A launcher, this process's child.
#[derive(Debug)]
enum Child {
    Executed(process::Child),
    Forked(Pid),
}

impl Child {
    /// Waits until it has ended. Blocking.
    fn wait(&mut self) -> std::io::Result<()> {
        match self {
            Child::Executed(child) => child.wait().map(drop),
            Child::Forked(pid) => loop {
                match waitpid(*pid, None) {
                    Err(Errno::EINTR) => {}
                    ended => return Ok(ended.map(drop)?),
                }
            },
        }
    }
}

/// Starts the launcher; its control socket, and the process.
fn spawn(launcher: &Path, zygote: Option<(&Arc<Zygotes>, &Path)>) -> Result<(OwnedFd, Child)> {
    let failed = |operation, cause: Cause| Error::host(operation, launcher.display(), cause);
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| failed("socketpair", e.into()))?;
    setsockopt(&ours, sockopt::PassCred, &true).map_err(|e| failed("SO_PASSCRED", e.into()))?;
    if let Some(forked) = zygote.and_then(|(zygotes, program)| zygotes.fork(program, &theirs)) {
        return Ok((ours, Child::Forked(forked)));
    }
    let child = Command::new(launcher)
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env_clear()
        .spawn()
        .map_err(|e| failed("spawn", not_started(launcher, e)))?;
    Ok((ours, Child::Executed(child)))
}

/// Why a program of the package does not start.
fn not_started(program: &Path, error: std::io::Error) -> Cause {
    use nix::sys::statvfs::{statvfs, FsFlags};
    let is_noexec = || statvfs(program).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_NOEXEC));
    match error.kind() {
        std::io::ErrorKind::PermissionDenied if is_noexec() => {
            let remedy = "install the package on another one, or mount -o remount,exec";
            let text = format!("{error}: its file system is mounted noexec; {remedy}");
            Cause::explained(error, text)
        }
        _ => error.into(),
    }
}

fn send_spec(launcher: &Path, control: &OwnedFd, spec: &LaunchSpec, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let failed = |operation, cause: Cause| Error::host(operation, launcher.display(), cause);
    let packet = serde_json::to_vec(spec).map_err(|e| failed("encode the launch spec", e.into()))?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(control.as_raw_fd(), &[IoSlice::new(&packet)], rights, MsgFlags::MSG_NOSIGNAL, None)
        .map(drop)
        .map_err(|e| failed("send the launch spec", e.into()))
}

/// Launches `spec` and waits for its end, to find out whether it can be launched here. Blocking.
///
/// # Errors
/// [`Error::Host`] when the launcher does not start or hangs; a launch that fails is an [`Exit::Failed`].
pub fn try_launch(launcher: &Path, spec: &LaunchSpec) -> Result<(Option<Confined>, Exit)> {
    let failed = |operation, cause: Cause| Error::host(operation, launcher.display(), cause);
    let (control, mut child) = spawn(launcher, None)?;
    let deadline = nix::sys::time::TimeVal::new(TRIAL_DEADLINE_S, 0);
    let talk = || -> Result<(Option<Confined>, Exit)> {
        setsockopt(&control, sockopt::ReceiveTimeout, &deadline).map_err(|e| failed("SO_RCVTIMEO", e.into()))?;
        send_spec(launcher, &control, spec, &[])?;
        let (mut confined, mut exit) = (None, None);
        while let Some((event, _)) = receive(&control).map_err(|e| failed("try a launch with", e.into()))? {
            match event {
                JailEvent::Started { confined: found } => confined = Some(found),
                JailEvent::Failed { stage, errno, message } => {
                    exit.get_or_insert(Exit::failed(stage, errno, &message));
                }
                JailEvent::Exited { code, signal } => drop(exit.get_or_insert(Exit::ended(code, signal))),
                JailEvent::Supervising | JailEvent::WouldDeny { .. } => {}
            }
        }
        Ok((confined, exit.unwrap_or(Exit::SupervisorLost)))
    };
    let outcome = talk();
    // Whatever is left of it ends with the socket.
    drop(control);
    child.wait().map_err(|e| failed("wait for", e.into()))?;
    outcome
}

/// Waits on an exit receiver.
pub async fn wait_exit(mut exit: watch::Receiver<Option<Exit>>) -> Exit {
    let ended = match exit.wait_for(Option::is_some).await {
        Ok(exit) => exit.clone(),
        Err(_) => None,
    };
    ended.unwrap_or(Exit::SupervisorLost)
}

async fn watch_jail(
    control: Arc<AsyncFd<OwnedFd>>,
    mut child: Child,
    report: Arc<Mutex<JailReport>>,
    pid: watch::Sender<Option<i32>>,
    exit: watch::Sender<Option<Exit>>,
    gone: watch::Sender<bool>,
    held: Box<dyn Send>,
) {
    let mut ended = None;
    loop {
        match control.async_io(Interest::READABLE, receive).await {
            Ok(Some((JailEvent::Started { confined }, sender))) => {
                report.lock().confined = Some(confined);
                pid.send_replace(sender);
            }
            Ok(Some((JailEvent::WouldDeny { layer, what }, _))) => {
                log::warn!("audit: {layer} would have denied {what}");
                report.lock().findings.push(Finding { layer, what });
            }
            Ok(Some((JailEvent::Failed { stage, errno, message }, _))) => {
                ended = Some(Exit::failed(stage, errno, &message));
            }
            Ok(Some((JailEvent::Exited { code, signal }, _))) => {
                let how = Exit::ended(code, signal);
                // A failure before exec explains the exit better than its code does.
                exit.send_replace(Some(ended.get_or_insert(how).clone()));
            }
            Ok(Some((JailEvent::Supervising, _))) => {}
            Ok(None) => break,
            Err(error) => {
                log::warn!("the jail's socket failed: {error}");
                break;
            }
        }
    }
    exit.send_replace(Some(ended.unwrap_or(Exit::SupervisorLost)));
    let reaped = tokio::task::spawn_blocking(move || {
        let ended = child.wait();
        drop(held);
        ended
    })
    .await;
    if !matches!(reaped, Ok(Ok(()))) {
        log::warn!("the jail's launcher was not reaped: {reaped:?}");
    }
    gone.send_replace(true);
}

/// One packet and its sender's pid; `None` at end-of-file.
fn receive(fd: &OwnedFd) -> std::io::Result<Option<(JailEvent, Option<i32>)>> {
    let mut buffer = [0; 8192];
    let mut ancillary = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(fd.as_raw_fd(), &mut slices, Some(&mut ancillary), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let length = message.bytes;
    let sender = message.cmsgs()?.find_map(|cmsg| match cmsg {
        ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
        _ => None,
    });
    if length == 0 {
        return Ok(None);
    }
    let event = serde_json::from_slice(&buffer[..length])?;
    Ok(Some((event, sender)))
}
