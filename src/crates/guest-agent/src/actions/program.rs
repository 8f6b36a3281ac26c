//! Programs: started in a session and control group of their own, then driven to their end by one thread.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm_protocol::identity::Identity;
use microvm_protocol::message::{Code, Failure};
use microvm_protocol::mux::{STDERR, STDOUT};
use nix::fcntl::{fcntl, open, FcntlArg, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::pty::{posix_openpt, unlockpt, Winsize};
use nix::sys::resource::{setrlimit, Resource, RLIM_INFINITY};
use nix::sys::stat::Mode;
use nix::unistd::{fchown, Gid, Uid};

use super::fail;
use crate::boot;
use crate::children::{self, Ended, Group, Spawned, FORK_GATE};
use crate::job::{cancelled, Job};
use crate::signals;
use crate::users::{self, User};
use crate::vfork::{Command, Steps};

pub const ROOT: u32 = 0;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// For a connection, what it reads, and the pipes.
const TOOL_FILES: u64 = 64;
/// Parsers recurse on what they are given.
const TOOL_STACK: u64 = 16 << 20;
const LANG: &str = "C.UTF-8";
/// What every image's terminfo knows.
const TERM: &str = "xterm";
/// How long a program's children may go on holding its pipes after it has ended.
const GRACE: Duration = Duration::from_millis(200);
/// What a pipe holds (pipe(7)): more than that of its output cannot be left when a program has ended.
const PIPE_BYTES: usize = 64 * 1024;
const READ_BYTES: usize = 64 * 1024;
/// What a terminal takes for the end of its input: control-D (termios(3), VEOF).
const END_OF_TRANSMISSION: u8 = 4;

nix::ioctl_write_int_bad!(make_controlling, libc::TIOCSCTTY);
nix::ioctl_write_int_bad!(open_peer, libc::TIOCGPTPEER);
nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);

/// A program to run, whoever asked for it.
pub struct Program<'a> {
    pub path: &'a str,
    pub args: &'a [String],
    pub env: &'a BTreeMap<String, String>,
    pub cwd: &'a str,
    pub timeout: Option<Duration>,
    pub uid: u32,
    /// Rows and columns of a terminal for it, instead of pipes.
    pub terminal: Option<(u16, u16)>,
    /// One of our own, with limits of its own.
    pub tool: Option<Tool<'a>>,
}

/// What a program of our own may take.
#[derive(Clone, Copy)]
pub struct Tool<'a> {
    /// What its errors call it.
    pub name: &'a str,
    pub memory_bytes: u64,
    pub cpu_seconds: u64,
}

/// What a program is to read next.
pub enum Next<'a> {
    Bytes(&'a [u8]),
    /// Nothing yet.
    Wait,
    End,
}

/// The one that a program talks with.
pub trait Partner {
    /// How many bytes of a channel it takes now.
    fn room(&mut self, channel: u8) -> usize;
    /// Takes bytes, never more than it has room for.
    fn said(&mut self, channel: u8, bytes: &[u8]) -> Result<(), Failure>;
    fn closed(&mut self, channel: u8) -> Result<(), Failure>;
    fn next(&mut self) -> Result<Next<'_>, Failure>;
    /// `bytes` of what was next were written.
    fn wrote(&mut self, bytes: usize) -> Result<(), Failure>;
}

/// A partner that says what it was given and keeps what it hears, up to a limit.
pub struct Collected {
    pub stdin: Vec<u8>,
    written: usize,
    pub streams: [Stream; 2],
    limit: usize,
}

#[derive(Default)]
pub struct Stream {
    pub bytes: Vec<u8>,
    pub truncated: bool,
}

impl Collected {
    pub fn new(stdin: Vec<u8>, limit: usize) -> Self {
        Self { stdin, written: 0, streams: Default::default(), limit }
    }
}

impl Partner for Collected {
    fn room(&mut self, _: u8) -> usize {
        READ_BYTES
    }

    /// What is over the limit is dropped, so that the program does not stall.
    fn said(&mut self, channel: u8, bytes: &[u8]) -> Result<(), Failure> {
        let [stdout, stderr] = &mut self.streams;
        let stream = if channel == STDOUT { stdout } else { stderr };
        let kept = bytes.len().min(self.limit - stream.bytes.len());
        stream.bytes.extend(bytes.iter().take(kept));
        stream.truncated |= kept < bytes.len();
        Ok(())
    }

    fn closed(&mut self, _: u8) -> Result<(), Failure> {
        Ok(())
    }

    fn next(&mut self) -> Result<Next<'_>, Failure> {
        let rest = self.stdin.get(self.written..).unwrap_or_default();
        Ok(if rest.is_empty() { Next::End } else { Next::Bytes(rest) })
    }

    fn wrote(&mut self, bytes: usize) -> Result<(), Failure> {
        self.written += bytes;
        Ok(())
    }
}

/// Where a program writes to, until it is closed.
struct Output {
    channel: u8,
    file: File,
    /// How much of it is still listened to.
    left: usize,
    /// How much its partner takes now.
    room: usize,
    is_ready: bool,
}

impl Output {
    fn new(channel: u8, fd: impl Into<OwnedFd>) -> Self {
        Self { channel, file: File::from(fd.into()), left: usize::MAX, room: 0, is_ready: false }
    }

    /// Reads what there is; true when there will be no more.
    fn hear(&mut self, buffer: &mut [u8], partner: &mut dyn Partner) -> Result<bool, Failure> {
        match self.file.read(buffer.get_mut(..self.room).unwrap_or_default()) {
            Ok(length @ 1..) => {
                partner.said(self.channel, buffer.get(..length).unwrap_or_default())?;
                self.left -= length;
                Ok(self.left == 0)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            // A terminal whose other end is closed reads EIO.
            Ok(_) | Err(_) => Ok(true),
        }
    }
}

/// A program that runs.
pub struct Running<'a> {
    shown: String,
    job: &'a Job,
    spawned: Arc<Spawned>,
    stdin: Option<File>,
    outputs: Vec<Output>,
    is_terminal: bool,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
}

impl Program<'_> {
    /// Starts it; without `with_stdin` it reads from /dev/null.
    pub fn start<'j>(&self, identity: &Identity, job: &'j Job, with_stdin: bool) -> Result<Running<'j>, Failure> {
        if !Path::new(self.cwd).is_dir() {
            return fail(Code::BadParams, format!("cwd: {:?} is not a directory", self.cwd));
        }
        let user = self.user();
        let mut env = BTreeMap::from([("PATH", PATH), ("LANG", LANG)]);
        if self.tool.is_none() {
            env.extend([
                ("HOME", &*user.home),
                ("USER", &*user.name),
                ("LOGNAME", &*user.name),
                ("SHELL", &*user.shell),
            ]);
        }
        if self.terminal.is_some() {
            env.insert("TERM", TERM);
        }
        env.extend(self.env.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let (stdio, stdin, outputs) = match self.terminal {
            Some(size) => self.open_terminal(size)?,
            None => {
                open_pipes(with_stdin).map_err(|e| Failure { code: Code::IoError, message: format!("pipe: {e}") })?
            }
        };
        let [theirs_in, theirs_out, theirs_err] = &stdio;
        let command = Command {
            program: self.path,
            args: self.args,
            env: &env,
            cwd: self.cwd,
            user: (self.uid != ROOT).then_some((self.uid, user.gid)),
            stdio: [theirs_in.as_fd(), theirs_out.as_fd(), theirs_err.as_fd()],
        };
        let failed =
            |e: io::Error| Failure { code: Code::IoError, message: format!("the program's control group: {e}") };
        let parent = match self.tool {
            None => boot::work_cgroup(identity.max_processes),
            Some(_) => Ok(boot::TOOLS_CGROUP),
        };
        let group = parent.and_then(Group::create).map_err(failed)?;
        let procs = group.procs().map_err(failed)?;
        // The limit on processes counts all of a uid's; those of our own programs are counted by their group.
        let (files, processes) = match self.tool {
            None => (identity.max_file_handles, identity.max_processes),
            Some(_) => (TOOL_FILES, RLIM_INFINITY),
        };
        let (tool, is_terminal) = (self.tool, self.terminal.is_some());
        let first = || {
            if tool.is_some() {
                // When memory runs out, the kernel ends it before the user's programs. To raise it needs no right, but the
                // files of a process that changed its uid are root's (proc(5)).
                let score = open("/proc/self/oom_score_adj", OFlag::O_WRONLY, Mode::empty())?;
                nix::unistd::write(&score, b"1000")?;
            }
            Ok(())
        };
        let last = || {
            signals::unblock()?;
            nix::unistd::setsid()?;
            if is_terminal {
                // SAFETY: descriptor 0 is the terminal by now.
                unsafe { make_controlling(0, 0) }?;
            }
            // Opened by root: the right to write was checked then.
            nix::unistd::write(&procs, b"0")?;
            setrlimit(Resource::RLIMIT_NPROC, processes, processes)?;
            if let Some(Tool { memory_bytes, cpu_seconds, .. }) = tool {
                setrlimit(Resource::RLIMIT_AS, memory_bytes, memory_bytes)?;
                setrlimit(Resource::RLIMIT_STACK, TOOL_STACK, TOOL_STACK)?;
                setrlimit(Resource::RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)?;
            }
            // Last: the agent's own descriptors are open until the exec, and nothing more could be opened beside them.
            setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
            Ok(())
        };
        let permit = FORK_GATE.enter();
        // While this thread waited at the gate the guest may have become another VM.
        if job.is_cancelled() {
            return Err(cancelled(self.shown()));
        }
        let spawning = children::spawn(&command, Steps { first: &first, last: &last }, group, job.notifier());
        drop(permit);
        let spawned = spawning.map_err(|error| {
            let code = match error.kind() {
                ErrorKind::NotFound => Code::ProgramNotFound,
                ErrorKind::PermissionDenied => Code::PermissionDenied,
                ErrorKind::WouldBlock => Code::Busy,
                _ => Code::IoError,
            };
            Failure { code, message: format!("{}: {error}", self.shown()) }
        })?;
        let spawned = Arc::new(spawned);
        job.runs(&spawned);
        // While the program's ends are open, its end would not show.
        drop(stdio);
        for file in stdin.iter().chain(outputs.iter().map(|output| &output.file)) {
            fcntl(file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| failed(e.into()))?;
        }
        let deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let (shown, timeout) = (self.shown().to_owned(), self.timeout);
        Ok(Running { shown, job, spawned, stdin, outputs, is_terminal, timeout, deadline })
    }

    /// Whom it runs as. Root's home is where every image has it, whatever its passwd says.
    fn user(&self) -> User {
        if self.uid == ROOT {
            return User { name: "root".into(), gid: ROOT, home: "/root".into(), shell: "/bin/sh".into() };
        }
        if self.tool.is_some() {
            return User { name: "nobody".into(), gid: self.uid, home: "/".into(), shell: "/bin/false".into() };
        }
        users::of(self.uid)
    }

    /// As its errors call it.
    fn shown(&self) -> &str {
        self.tool.map_or(self.path, |tool| tool.name)
    }

    /// A terminal, as the program's ends and ours.
    fn open_terminal(&self, (rows, columns): (u16, u16)) -> Result<Ends, Failure> {
        let failed = |what: &str, e: io::Error| Failure { code: Code::IoError, message: format!("{what}: {e}") };
        // Not openpty(3): its descriptors are open in every program that begins beside this one.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let open_pair = || -> nix::Result<_> {
            let ours = posix_openpt(flags)?;
            unlockpt(&ours)?;
            // SAFETY: the request takes flags and makes a descriptor, which nobody else has.
            let theirs = unsafe { OwnedFd::from_raw_fd(open_peer(ours.as_raw_fd(), flags.bits())?) };
            let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            // SAFETY: the descriptor is open, and the structure is the one that the request reads.
            unsafe { set_window_size(ours.as_raw_fd(), &size) }?;
            Ok((OwnedFd::from(ours), theirs))
        };
        let (ours, theirs) = open_pair().map_err(|e| failed("a terminal", e.into()))?;
        if self.uid != ROOT {
            let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.uid));
            fchown(&theirs, Some(uid), Some(gid)).map_err(|e| failed("fchown", e.into()))?;
        }
        let again = |fd: &OwnedFd| fd.try_clone().map_err(|e| failed("dup", e));
        let (stdout, stderr) = (again(&theirs)?, again(&theirs)?);
        let output = Output::new(STDOUT, again(&ours)?);
        Ok(([theirs, stdout, stderr], Some(File::from(ours)), vec![output]))
    }
}

/// Where a program reads and writes; where we write what it reads, and read what it writes.
type Ends = ([OwnedFd; 3], Option<File>, Vec<Output>);

fn open_pipes(with_stdin: bool) -> io::Result<Ends> {
    let (theirs, ours): (OwnedFd, _) = match with_stdin {
        true => io::pipe().map(|(reader, writer)| (reader.into(), Some(File::from(OwnedFd::from(writer)))))?,
        false => (File::open("/dev/null")?.into(), None),
    };
    let ((heard, stdout), (heard_too, stderr)) = (io::pipe()?, io::pipe()?);
    let outputs = vec![Output::new(STDOUT, heard), Output::new(STDERR, heard_too)];
    Ok(([theirs, stdout.into(), stderr.into()], ours, outputs))
}

impl Running<'_> {
    pub fn pid(&self) -> i32 {
        self.spawned.pid()
    }

    /// Carries bytes between the program and its partner until it has ended and is heard out.
    pub fn drive(mut self, partner: &mut dyn Partner) -> Result<Ended, Failure> {
        let mut buffer = vec![0; READ_BYTES];
        let mut ended = None;
        // Until when an ended program's outputs are listened to.
        let mut until: Option<Instant> = None;
        loop {
            if self.job.is_cancelled() {
                return Err(cancelled(&format!("{} was killed", self.shown)));
            }
            if ended.is_none() {
                ended = self.spawned.ended();
                if ended.is_some() {
                    self.outputs.iter_mut().for_each(|output| output.left = PIPE_BYTES);
                    self.stdin = None;
                }
            }
            for output in &mut self.outputs {
                output.room = partner.room(output.channel).min(output.left).min(READ_BYTES);
            }
            let now = Instant::now();
            let deadline = match ended {
                None => self.deadline,
                Some(ended) if self.outputs.is_empty() => return Ok(ended),
                // A partner that is slow to listen costs the program's last words no time.
                Some(_) if self.outputs.iter().any(|output| output.room == 0) => {
                    until = None;
                    None
                }
                Some(_) => Some(*until.get_or_insert(now + GRACE)),
            };
            if deadline.is_some_and(|deadline| deadline <= now) {
                return ended.ok_or_else(|| self.too_long());
            }
            self.resize();
            let wants_stdin = self.feed_or_close(partner)?;
            if self.wait(wants_stdin, deadline)? {
                self.write(partner)?;
            }
            let mut still_open = Vec::with_capacity(self.outputs.len());
            for mut output in self.outputs.drain(..) {
                if output.is_ready && output.hear(&mut buffer, partner)? {
                    partner.closed(output.channel)?;
                } else {
                    still_open.push(output);
                }
            }
            self.outputs = still_open;
        }
    }

    fn too_long(&self) -> Failure {
        self.spawned.kill();
        let seconds = self.timeout.unwrap_or_default().as_secs_f64();
        Failure { code: Code::Timeout, message: format!("{} was killed: it ran longer than {seconds} s", self.shown) }
    }

    fn resize(&mut self) {
        let Some((rows, columns)) = self.job.resize().filter(|_| self.is_terminal) else { return };
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let Some(Output { file: terminal, .. }) = self.outputs.first() else { return };
        // SAFETY: the descriptor is open, and the structure is the one that the request reads.
        if let Err(error) = unsafe { set_window_size(terminal.as_raw_fd(), &size) } {
            eprintln!("microvm-agent: TIOCSWINSZ: {error}");
        }
    }

    /// Whether there is something to write; closes the program's input when nothing more will come.
    fn feed_or_close(&mut self, partner: &mut dyn Partner) -> Result<bool, Failure> {
        let Some(stdin) = &mut self.stdin else { return Ok(false) };
        match partner.next()? {
            Next::Bytes(_) => return Ok(true),
            Next::Wait => return Ok(false),
            Next::End => {}
        }
        if self.is_terminal {
            // Full of input that nobody reads: then its end matters no more.
            if let Err(error) = stdin.write(&[END_OF_TRANSMISSION]) {
                eprintln!("microvm-agent: the end of a terminal's input: {error}");
            }
        }
        self.stdin = None;
        Ok(false)
    }

    fn write(&mut self, partner: &mut dyn Partner) -> Result<(), Failure> {
        let Some(stdin) = &mut self.stdin else { return Ok(()) };
        let written = match partner.next()? {
            Next::Bytes(bytes) => stdin.write(bytes),
            Next::Wait | Next::End => return Ok(()),
        };
        match written {
            Ok(length) => partner.wrote(length),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            // A program need not read what it is given.
            Err(_) => {
                self.stdin = None;
                Ok(())
            }
        }
    }

    /// Waits until something can be done: the end of the program notifies, too. Returns whether the
    /// program's input can be written; the outputs note it for themselves.
    fn wait(&mut self, wants_stdin: bool, deadline: Option<Instant>) -> Result<bool, Failure> {
        let mut fds = vec![PollFd::new(self.job.notifier().as_fd(), PollFlags::POLLIN)];
        let listened = |output: &&Output| output.room > 0;
        fds.extend(self.outputs.iter().filter(listened).map(|o| PollFd::new(o.file.as_fd(), PollFlags::POLLIN)));
        let stdin = self.stdin.as_ref().filter(|_| wants_stdin);
        fds.extend(stdin.map(|file| PollFd::new(file.as_fd(), PollFlags::POLLOUT)));
        // Rounded up: a wait that ends a moment early would be followed by one of nothing.
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            let millis = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return fail(Code::IoError, format!("poll: {error}")),
        }
        let seen: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let mut seen = seen.into_iter();
        if seen.next() == Some(true) {
            self.job.notifier().wait();
        }
        for output in &mut self.outputs {
            output.is_ready = output.room > 0 && seen.next() == Some(true);
        }
        Ok(seen.next() == Some(true))
    }
}
