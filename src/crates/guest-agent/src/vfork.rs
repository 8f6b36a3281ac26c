//! A child that runs in its parent's memory until it executes a program, as vfork(2)'s does.
//!
//! After a fork both sides fault on each page that they write to, and under TCG the kernel's code for that is translated in each
//! clone. The standard library makes such children only where nothing but its own steps happens before the exec.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow};

/// Where programs are looked for when the environment does not say (execvp(3)).
const DEFAULT_PATH: &str = "/bin:/usr/bin";
const SHELL: &CStr = c"/bin/sh";
/// A few calls deep, none of which has buffers.
const STACK_BYTES: usize = 32 << 10;
/// What execvp(3) takes for "not here": the next folder may have the program.
const NOT_HERE: [Errno; 5] = [Errno::ENOENT, Errno::ENOTDIR, Errno::ESTALE, Errno::ENODEV, Errno::ETIMEDOUT];

/// What becomes of a child.
pub struct Command<'a> {
    /// With a slash a path from `cwd`; else it is looked for in the environment's PATH.
    pub program: &'a str,
    pub args: &'a [String],
    pub env: &'a BTreeMap<&'a str, &'a str>,
    pub cwd: &'a str,
    /// Uid and gid, if not its parent's; it is in no other group then.
    pub user: Option<(u32, u32)>,
    pub stdio: [BorrowedFd<'a>; 3],
}

/// Steps that a child takes before it executes: system calls alone, for its memory is its parent's, whose other threads run.
pub struct Steps<'a> {
    /// With the rights of its parent.
    pub first: &'a dyn Fn() -> io::Result<()>,
    /// With those of its user.
    pub last: &'a dyn Fn() -> io::Result<()>,
}

#[repr(align(16))]
struct Stack(#[allow(dead_code)] [MaybeUninit<u8>; STACK_BYTES]);

/// Everything that the child needs, made before it exists: it must not allocate.
struct Plan<'a> {
    places: Vec<CString>,
    argv: Vec<*const c_char>,
    /// The same for a script without a first line: the shell, the place, and the arguments.
    shell_argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    cwd: CString,
    user: Option<(u32, u32)>,
    stdio: [c_int; 3],
    steps: Steps<'a>,
    /// Why the child could not execute.
    failure: Option<Errno>,
}

/// Makes a child and waits until it has executed its program; returns its pid.
///
/// # Errors
/// Why there is no child, or why it did not execute: then it is reaped.
pub fn spawn(command: &Command<'_>, steps: Steps<'_>) -> io::Result<i32> {
    let path = command.env.get("PATH").copied().unwrap_or(DEFAULT_PATH);
    let name = CString::new(command.program)?;
    let args = command.args.iter().map(|arg| CString::new(arg.as_str())).collect::<Result<Vec<_>, _>>()?;
    let variables = command.env.iter().map(|(name, value)| CString::new(format!("{name}={value}")));
    let variables = variables.collect::<Result<Vec<_>, _>>()?;
    let pointers = |of: &[CString]| of.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
    let mut plan = Plan {
        places: places(command.program, path)?,
        argv: [name.as_ptr()].into_iter().chain(pointers(&args)).collect(),
        shell_argv: [SHELL.as_ptr(), ptr::null()].into_iter().chain(pointers(&args)).collect(),
        envp: pointers(&variables),
        cwd: CString::new(command.cwd)?,
        user: command.user,
        stdio: command.stdio.map(|fd| fd.as_raw_fd()),
        steps,
        failure: None,
    };
    let mut stack = Stack([MaybeUninit::uninit(); STACK_BYTES]);
    // A handler would run in this memory, too.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the child has a stack and a plan of its own; this thread waits until it does not use them any more.
    let pid = unsafe {
        let top = ptr::from_mut(&mut stack).add(1);
        libc::clone(
            child,
            top.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            ptr::from_mut(&mut plan).cast(),
        )
    };
    let made = Errno::result(pid);
    mask.thread_set_mask()?;
    let pid = made?;
    match plan.failure {
        None => Ok(pid),
        Some(errno) => {
            // SAFETY: waitpid(2) writes nothing through a null pointer.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            Err(errno.into())
        }
    }
}

/// Where a program may be, in order. An empty folder of PATH is the current one.
fn places(program: &str, path: &str) -> io::Result<Vec<CString>> {
    if program.contains('/') {
        return Ok(vec![CString::new(program)?]);
    }
    let place = |folder: &str| match folder {
        "" => CString::new(program),
        folder => CString::new(format!("{folder}/{program}")),
    };
    Ok(path.split(':').map(place).collect::<Result<_, _>>()?)
}

extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: the plan is its parent's, who waits.
    let plan = unsafe { &mut *plan.cast::<Plan<'_>>() };
    plan.failure = Some(plan.execute());
    // SAFETY: it ends this process without any of its parent's handlers.
    unsafe { libc::_exit(127) }
}

impl Plan<'_> {
    /// Returns only why it did not.
    fn execute(&mut self) -> Errno {
        match self.prepare() {
            Ok(()) => self.search(),
            Err(error) => error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        }
    }

    fn prepare(&self) -> io::Result<()> {
        (self.steps.first)()?;
        for (at, fd) in (0..).zip(self.stdio) {
            // SAFETY: the descriptors are numbers; dup2(2) leaves one that is its own copy closed on exec.
            Errno::result(unsafe {
                if fd == at {
                    libc::fcntl(fd, libc::F_SETFD, 0)
                } else {
                    libc::dup2(fd, at)
                }
            })?;
        }
        if let Some((uid, gid)) = self.user {
            // The C library's functions would change every thread of the parent.
            // SAFETY: they take numbers, and a null pointer to no groups.
            unsafe {
                Errno::result(libc::syscall(libc::SYS_setgroups, 0, ptr::null::<libc::gid_t>()))?;
                Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
                Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
            }
        }
        // SAFETY: the path is a string; the runtime ignores SIGPIPE, which an exec would leave so.
        unsafe {
            Errno::result(libc::chdir(self.cwd.as_ptr()))?;
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        }
        (self.steps.last)()
    }

    /// As execvp(3) does.
    fn search(&mut self) -> Errno {
        let mut denied = None;
        let mut failure = Errno::ENOENT;
        for place in &self.places {
            // SAFETY: the strings and the arrays of pointers to them, which end with a null pointer, are the plan's.
            unsafe { libc::execve(place.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
            failure = Errno::last();
            if failure == Errno::ENOEXEC {
                if let Some(script) = self.shell_argv.get_mut(1) {
                    *script = place.as_ptr();
                }
                // SAFETY: as above.
                unsafe { libc::execve(SHELL.as_ptr(), self.shell_argv.as_ptr(), self.envp.as_ptr()) };
                failure = Errno::last();
            }
            match failure {
                Errno::EACCES => denied = Some(failure),
                errno if NOT_HERE.contains(&errno) => {}
                errno => return errno,
            }
        }
        denied.unwrap_or(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    const NOTHING: Steps<'static> = Steps { first: &|| Ok(()), last: &|| Ok(()) };

    /// The exit code and what it said.
    fn ran(program: &str, args: &[&str], env: &[(&str, &str)], steps: Steps<'_>) -> io::Result<(i32, String)> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let (null, (mut heard, said)) = (File::open("/dev/null")?, io::pipe()?);
        let env = env.iter().copied().collect();
        let stdio = [null.as_fd(), said.as_fd(), said.as_fd()];
        let pid = spawn(&Command { program, args: &args, env: &env, cwd: "/", user: None, stdio }, steps)?;
        drop(said);
        let (mut text, mut status) = (String::new(), 0);
        heard.read_to_string(&mut text)?;
        // SAFETY: waitpid(2) writes one number.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        Ok((libc::WEXITSTATUS(status), text))
    }

    #[test]
    fn test_program_has_its_arguments_its_environment_and_its_folder() {
        let script = "echo $0 $1 $NAME $(pwd); exit 7";
        let (code, said) =
            ran("sh", &["-c", script, "a b", "c"], &[("PATH", "/none:/bin"), ("NAME", "d")], NOTHING).unwrap();
        assert_eq!((code, said.as_str()), (7, "a b c d /\n"));
    }

    #[test]
    fn test_last_steps_are_the_childs_alone() {
        let limit = || Ok(nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 77, 77)?);
        let steps = Steps { first: &|| Ok(()), last: &limit };
        assert_eq!(ran("/bin/sh", &["-c", "ulimit -n"], &[], steps).unwrap(), (0, "77\n".into()));
        assert_ne!(nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap().0, 77);
    }

    #[test]
    fn test_failure_is_told_and_no_child_is_left() {
        let kind = |program: &str, path: &str| ran(program, &[], &[("PATH", path)], NOTHING).unwrap_err().kind();
        assert_eq!(kind("/bin/none", ""), io::ErrorKind::NotFound);
        assert_eq!(kind("none", "/bin:/usr/bin:"), io::ErrorKind::NotFound);
        assert_eq!(kind("/etc/passwd", ""), io::ErrorKind::PermissionDenied);
        assert_eq!(kind("passwd", "/etc:/none"), io::ErrorKind::PermissionDenied);
        let steps = Steps { first: &|| Err(Errno::EAGAIN.into()), last: &|| Ok(()) };
        assert_eq!(ran("/bin/true", &[], &[], steps).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn test_script_without_a_first_line_is_the_shells() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        fs::write(&script, "echo $1 from $0\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().to_str().unwrap();
        let (code, said) = ran("script", &["a"], &[("PATH", path)], NOTHING).unwrap();
        assert_eq!((code, said), (0, format!("a from {path}/script\n")));
    }

    #[test]
    fn test_program_takes_signals_and_a_closed_pipe_as_any_other() {
        let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status | tr -d '\\t\\n'";
        let unblock = crate::signals::unblock;
        let (_, said) =
            ran("/bin/sh", &["-c", script], &[("PATH", "/bin:/usr/bin")], Steps { first: &unblock, last: &|| Ok(()) })
                .unwrap();
        let (blocked, ignored) = said.trim_start_matches("SigBlk:").split_once("SigIgn:").unwrap();
        assert_eq!(u64::from_str_radix(blocked, 16).unwrap(), 0);
        assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & 1 << (libc::SIGPIPE - 1), 0);
    }
}
