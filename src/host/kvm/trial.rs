//! A guest of some thousand instructions, in a process that can be killed: a KVM that hangs does so in a system call.
//!
//! The child has a copy of a process with threads, so it allocates nothing and makes bare system calls only. It has no exit
//! signal: neither a SIGCHLD handler nor a `wait()` of this process's user hears of it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::SigSet;

/// It takes a millisecond, and some hundred where KVM itself is emulated.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long the kernel may take to end a child that was killed.
const KILL_DEADLINE: Duration = Duration::from_secs(1);

/// linux/kvm.h, for x86-64: the requests, and the sizes of what they take.
const API_VERSION: libc::c_int = 12;
const GET_API_VERSION: u64 = 0xAE00;
const CREATE_VM: u64 = 0xAE01;
const GET_VCPU_MMAP_SIZE: u64 = 0xAE04;
const CREATE_VCPU: u64 = 0xAE41;
const SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
const SET_TSS_ADDR: u64 = 0xAE47;
const RUN: u64 = 0xAE80;
const GET_REGS: u64 = 0x8090_AE81;
const SET_REGS: u64 = 0x4090_AE82;
const GET_SREGS: u64 = 0x8138_AE83;
const SET_SREGS: u64 = 0x4138_AE84;
/// struct kvm_regs in words, and two of its places; struct kvm_sregs, which begins with the code segment.
const REGS: usize = 18;
const RIP: usize = 16;
const RFLAGS: usize = 17;
const SREGS: usize = 39;
/// struct kvm_run.
const EXIT_REASON: usize = 8;
const EXIT_HLT: u32 = 5;
/// Three pages below 4 GiB that Intel's real mode wants for itself (Documentation/virt/kvm/api.rst, 4.35).
const TSS_PAGES: libc::c_ulong = 0xFFFB_D000;

const PAGE: usize = 4096;
/// Where the guest's only page is.
const CODE_AT: u64 = 0x1000;
/// `xor cx, cx; loop $` (65,536 times); `mov al, 42; hlt`.
const CODE: [u8; 7] = [0x31, 0xC9, 0xE2, 0xFE, 0xB0, 42, 0xF4];
const ANSWER: u64 = 42;

/// What the child is at, by the call's name.
const STEPS: [&str; 12] = [
    "KVM_GET_API_VERSION",
    "KVM_CREATE_VM",
    "KVM_SET_TSS_ADDR",
    "mmap of a page",
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_CREATE_VCPU",
    "KVM_GET_VCPU_MMAP_SIZE",
    "mmap of the vCPU",
    "KVM_GET_SREGS",
    "KVM_SET_SREGS",
    "KVM_SET_REGS",
    "KVM_RUN",
];
/// Stands for a step once all are done.
const DONE: u8 = u8::MAX;
/// Stands for an errno where a call worked and its answer is wrong.
const WRONG: i32 = -1;

/// What the child says: the step that it begins, or the errno with which that step failed.
const RECORD: usize = 5;

/// Runs a guest on an open `/dev/kvm`. Blocking, for [`DEADLINE`] at most.
///
/// # Errors
/// What did not work, for people.
pub fn run(kvm: &File) -> Result<(), String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("it could not be tried: {what}: {error}");
    let (told, tell) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed("pipe", &errno.desc()))?;
    let child = Child::start(kvm, &tell).map_err(|errno| failed("clone", &errno.desc()))?;
    drop(tell);
    let verdict = listen(told.into());
    child.end();
    verdict
}

/// Reads what the child says until the last word or the deadline.
fn listen(mut told: File) -> Result<(), String> {
    let begun = Instant::now();
    let mut at = 0;
    loop {
        let left = DEADLINE.saturating_sub(begun.elapsed());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(told.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(format!("{} did not return within {} s", name(at), DEADLINE.as_secs())),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(format!("it could not be tried: poll: {}", errno.desc())),
        }
        let mut record = [0; RECORD];
        // A record is written at once, and a pipe keeps it in one piece.
        match told.read_exact(&mut record) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(format!("the process that tried it died at {}", name(at)))
            }
            Err(error) => return Err(format!("it could not be tried: {error}")),
        }
        let [step, errno @ ..] = record;
        match (step, i32::from_ne_bytes(errno)) {
            (DONE, _) => return Ok(()),
            (step, 0) => at = step,
            (step, WRONG) => return Err(format!("{} gave a wrong answer", name(step))),
            (step, errno) => return Err(format!("{}: {}", name(step), Errno::from_raw(errno).desc())),
        }
    }
}

fn name(step: u8) -> &'static str {
    STEPS.get(usize::from(step)).copied().unwrap_or("the end")
}

/// The process that tries it.
struct Child(libc::pid_t);

impl Child {
    fn start(kvm: &File, tell: &OwnedFd) -> Result<Self, Errno> {
        let (kvm, tell) = (kvm.as_raw_fd(), tell.as_raw_fd());
        // No handler of this process's runs in the child.
        let before = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)?;
        // SAFETY: clone(2) as fork, without an exit signal; the child calls nothing but `in_child`.
        let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        if pid == 0 {
            in_child(kvm, tell);
        }
        let cloned = Errno::result(pid);
        before.thread_set_mask()?;
        cloned.map(|pid| Self(libc::pid_t::try_from(pid).unwrap_or(-1)))
    }

    /// Kills and reaps it. One that the kernel does not let die is left to a thread.
    fn end(self) {
        // SAFETY: a child of this process that has not been waited for, so the number is its.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        let begun = Instant::now();
        while begun.elapsed() < KILL_DEADLINE {
            if self.wait(libc::WNOHANG) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        log::warn!("process {}, which tried KVM, does not die: it hangs in the kernel", self.0);
        std::thread::spawn(move || self.wait(0));
    }

    /// Whether it is gone.
    fn wait(&self, options: libc::c_int) -> bool {
        loop {
            // SAFETY: no status is asked for. __WALL: a child without an exit signal is found by no other wait.
            match Errno::result(unsafe { libc::waitpid(self.0, std::ptr::null_mut(), options | libc::__WALL) }) {
                Ok(0) => return false,
                Err(Errno::EINTR) => {}
                Ok(_) | Err(_) => return true,
            }
        }
    }
}

/// The child: keeps two descriptors, tries, says how it went, and exits.
fn in_child(kvm: RawFd, tell: RawFd) -> ! {
    let (low, high) = (kvm.min(tell), kvm.max(tell));
    // SAFETY: bare system calls on plain numbers. What others hold open must not stay open here; before Linux 5.9 it does,
    // for the moment that this takes.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        for (first, last) in [(0, low - 1), (low + 1, high - 1), (high + 1, RawFd::MAX)] {
            if first <= last {
                libc::syscall(libc::SYS_close_range, first, last, 0);
            }
        }
    }
    let mut at = 0;
    let outcome = attempt(kvm, &mut |step| {
        at = step;
        say(tell, step, 0);
    });
    match outcome {
        Ok(()) => say(tell, DONE, 0),
        Err(errno) => say(tell, at, errno),
    }
    // SAFETY: it ends this process, without handlers of the program that it is a copy of.
    unsafe { libc::_exit(0) }
}

fn say(tell: RawFd, step: u8, errno: i32) {
    let [a, b, c, d] = errno.to_ne_bytes();
    let record = [step, a, b, c, d];
    // SAFETY: the buffer is as long as said. Who does not hear it sees the end of the pipe.
    unsafe { libc::write(tell, record.as_ptr().cast(), record.len()) };
}

/// One request; its answer, or the errno.
fn ask(fd: RawFd, request: u64, argument: libc::c_ulong) -> Result<libc::c_int, i32> {
    // SAFETY: each request is made with the argument that linux/kvm.h gives it: a number, or the address of a struct of the
    // size that the request holds, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd, request, argument) }).map_err(|errno| errno as i32)
}

fn map(fd: RawFd, length: usize, flags: libc::c_int) -> Result<*mut u8, i32> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, fd, 0) };
    if place == libc::MAP_FAILED {
        return Err(Errno::last_raw());
    }
    Ok(place.cast())
}

fn attempt(kvm: RawFd, at: &mut dyn FnMut(u8)) -> Result<(), i32> {
    let mut step = 0..;
    let mut next = || at(step.next().unwrap_or(DONE));
    next();
    if ask(kvm, GET_API_VERSION, 0)? != API_VERSION {
        return Err(WRONG);
    }
    next();
    let vm = ask(kvm, CREATE_VM, 0)?;
    next();
    ask(vm, SET_TSS_ADDR, TSS_PAGES)?;
    next();
    let page = map(-1, PAGE, libc::MAP_SHARED | libc::MAP_ANONYMOUS)?;
    // SAFETY: the page is there, writable, and larger than the code.
    unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), page, CODE.len()) };
    next();
    // struct kvm_userspace_memory_region: slot and flags, guest address, size, host address.
    let region = [0, CODE_AT, PAGE as u64, page as u64];
    ask(vm, SET_USER_MEMORY_REGION, region.as_ptr() as libc::c_ulong)?;
    next();
    let vcpu = ask(vm, CREATE_VCPU, 0)?;
    next();
    let length = usize::try_from(ask(kvm, GET_VCPU_MMAP_SIZE, 0)?).map_err(|_| WRONG)?;
    if length < PAGE {
        return Err(WRONG);
    }
    next();
    let shared = map(vcpu, length, libc::MAP_SHARED)?;
    next();
    let mut sregs = [0u64; SREGS];
    ask(vcpu, GET_SREGS, sregs.as_mut_ptr() as libc::c_ulong)?;
    next();
    // The code segment's base, and its selector, 16 bits behind a limit of 32: both 0.
    let [base, limit_and_selector, ..] = &mut sregs;
    *base = 0;
    *limit_and_selector &= !(0xFFFF << 32);
    ask(vcpu, SET_SREGS, sregs.as_ptr() as libc::c_ulong)?;
    next();
    let mut regs = [0u64; REGS];
    // Bit 1 is always set.
    (regs[RIP], regs[RFLAGS]) = (CODE_AT, 2);
    ask(vcpu, SET_REGS, regs.as_ptr() as libc::c_ulong)?;
    next();
    ask(vcpu, RUN, 0)?;
    // SAFETY: the mapping has at least a page; the kernel has written the field.
    let reason = unsafe { shared.add(EXIT_REASON).cast::<u32>().read_volatile() };
    ask(vcpu, GET_REGS, regs.as_mut_ptr() as libc::c_ulong)?;
    let [answer, ..] = regs;
    if reason == EXIT_HLT && answer & 0xFF == ANSWER {
        Ok(())
    } else {
        Err(WRONG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_run_on_what_is_no_kvm_says_which_call_failed() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let reason = run(&null).unwrap_err();
        assert!(reason.starts_with("KVM_GET_API_VERSION: "), "{reason}");
    }

    #[test]
    fn test_run_leaves_no_child() {
        let null = File::open("/dev/null").unwrap();
        (0..20).for_each(|_| drop(run(&null).unwrap_err()));
        assert_eq!(std::fs::read_to_string("/proc/thread-self/children").unwrap(), "");
    }

    #[test]
    fn test_listen_names_the_step_at_which_the_child_died() {
        let (told, tell) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        say(tell.as_raw_fd(), 11, 0);
        drop(tell);
        assert_eq!(listen(told.into()).unwrap_err(), "the process that tried it died at KVM_RUN");
    }

    #[test]
    fn test_listen_gives_up_on_a_child_that_hangs() {
        let (told, tell) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        say(tell.as_raw_fd(), 11, 0);
        let begun = Instant::now();
        assert_eq!(listen(told.into()).unwrap_err(), "KVM_RUN did not return within 5 s");
        // poll(2) counts whole milliseconds.
        assert!(begun.elapsed() >= DEADLINE - Duration::from_millis(1));
        drop(tell);
    }
}
