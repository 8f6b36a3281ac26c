//! The signals by which programs ask PID 1 to end the machine, as `poweroff`, `halt` and `reboot` do.
//!
//! The kernel drops a signal that PID 1 has no handler for, unless it is blocked (signal(7), kill(2)): so they are
//! blocked in every thread, and one thread takes them. Only a program with CAP_KILL may send one.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::time::Duration;

use nix::errno::Errno;

use crate::boot;
use crate::children::{self, FORK_GATE};

/// The thread waits, and ends the machine.
const STACK_BYTES: usize = 64 << 10;
/// How long programs may take to end after SIGTERM; busybox's init gives them as long.
const GRACE: Duration = Duration::from_secs(1);

/// busybox's halt, poweroff and reboot (init/halt.c), Ctrl-Alt-Del (reboot(2)), and systemd's halt, poweroff and reboot,
/// in order and at once (systemd(1)). A microVM that would reboot is stopped, as it is by reboot(2).
fn requests() -> [libc::c_int; 10] {
    let real_time = |number| libc::SIGRTMIN() + number;
    let [halt, poweroff, reboot] = [3, 4, 5].map(real_time);
    let [halt_now, poweroff_now, reboot_now] = [13, 14, 15].map(real_time);
    let busybox = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM];
    [busybox[0], busybox[1], busybox[2], libc::SIGINT, halt, poweroff, reboot, halt_now, poweroff_now, reboot_now]
}

/// Not nix's sets: those know no real-time signals.
fn set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset(3) makes the set a valid one.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was made one by the call before.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the set is valid and the signal's number, too.
        unsafe { libc::sigaddset(&mut set, *signal) };
    }
    set
}

/// Blocks the requests, in this thread and in all that it begins.
pub fn block() -> io::Result<()> {
    change_mask(libc::SIG_BLOCK, &set(&requests()))
}

/// Blocks nothing: a program inherits its parent's mask (execve(2)). May be called between fork and exec.
pub fn unblock() -> io::Result<()> {
    change_mask(libc::SIG_SETMASK, &set(&[]))
}

fn change_mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is valid, and nothing is written through the null pointer.
    match unsafe { libc::pthread_sigmask(how, set, ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Begins to take the requests.
pub fn start() -> io::Result<()> {
    let requests = set(&requests());
    let take = move || loop {
        match wait(&requests) {
            Ok(signal) => end_machine(signal),
            Err(error) => eprintln!("microvm-agent: sigwait: {error}"),
        }
    };
    std::thread::Builder::new().name("signals".into()).stack_size(STACK_BYTES).spawn(take).map(drop)
}

fn wait(set: &libc::sigset_t) -> Result<libc::c_int, Errno> {
    let mut signal = 0;
    // SAFETY: the set is valid, and sigwait(3) writes one number.
    match unsafe { libc::sigwait(set, &mut signal) } {
        0 => Ok(signal),
        errno => Err(Errno::from_raw(errno)),
    }
}

fn end_machine(signal: libc::c_int) {
    // A guest that ends is not frozen any more: its clones would end as soon as they run.
    let _permit = FORK_GATE.enter();
    eprintln!("microvm-agent: signal {signal}: this machine ends");
    children::end_all(GRACE);
    boot::power_off();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_block_holds_a_request_back_for_the_one_who_waits_and_unblock_ends_it() {
        block().unwrap();
        let set = set(&requests());
        for signal in requests() {
            // SAFETY: the signal goes to this thread, in which it is blocked.
            unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
            assert_eq!(wait(&set), Ok(signal));
        }
        unblock().unwrap();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(status.contains("SigBlk:\t0000000000000000\n"), "{status}");
    }
}
