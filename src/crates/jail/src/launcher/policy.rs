//! Which system calls a VMM may make: plain lists.
//!
//! Architecture invariant: data only; `seccomp` turns it into filters. QEMU brings a deny-list of its own (`-sandbox`),
//! which is installed inside these filters and can only take more away.
//!
//! The allow-list was measured with QEMU 7.2 (Debian 12): `strace -f` over boot, pause, resume, disk traffic, QMP and
//! shutdown under TCG, then the whole test suite in an audit, which must not report a call. What KVM adds (`ioctl`,
//! `tgkill`) is taken from QEMU's sources. A VMM whose version has not been measured gets the deny-list instead.

use std::collections::BTreeMap;

use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

/// The rules of one filter, as seccompiler takes them: no rules means "whatever the arguments".
pub type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What a measured QEMU of a distribution may call; every other call is refused with EPERM.
pub const DISTRIBUTIONS: &[libc::c_long] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munmap,
    // Files: the root decides which ones there are.
    libc::SYS_access,
    libc::SYS_chdir,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
    libc::SYS_write,
    libc::SYS_writev,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_select,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // Sockets that it was given; it can make none.
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Threads and signals among them.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    // Time and chance.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_time,
    // Itself.
    libc::SYS_arch_prctl,
    libc::SYS_capget,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getrlimit,
    libc::SYS_getuid,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    // The VMM's own sandbox, inside this one.
    libc::SYS_seccomp,
    // The VMM itself; nothing else in its root can be executed, and QEMU's sandbox then forbids it.
    libc::SYS_execve,
];

/// What the QEMU of our own package may call. Measured with 10.0.13 of `make qemu-wheel`: `strace -f` over boots and clones with 1 and
/// 2 vCPUs, pause, disk traffic and discards, streams, copies, suspension, a network and shutdown; then tests of conformance, channel,
/// guest, snapshots and network in an audit, which reported one ioctl alone: a tap's eBPF program (TUNSETSTEERINGEBPF) stays refused.
/// It is static and has no modules, so that nothing of a loader's is here.
pub const OWN_QEMU: &[libc::c_long] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Files: the root decides which ones there are.
    libc::SYS_access,
    libc::SYS_close,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Waiting; epoll from the 64th descriptor on (util/aio-posix.h of QEMU).
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_signalfd4,
    // Sockets that it was given; it can make none.
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    // Its end of a network in user mode (net/socket.c).
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    // The launcher's: it tells that it has started, and why not.
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Threads and signals among them; KVM's are kicked and eat their signals.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    // Time and chance; the first and the third where the kernel has no vDSO.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // Itself, and its sandbox, inside this one.
    libc::SYS_arch_prctl,
    libc::SYS_execve,
    libc::SYS_seccomp,
    libc::SYS_sysinfo,
];

/// How files are opened: the calls that an audit looks at on Landlock's behalf.
pub const OPENS: [libc::c_long; 2] = [libc::SYS_open, libc::SYS_openat];

/// Calls that programs try and do without: answered ENOSYS, as by a kernel that has not heard of them.
const ABSENT: &[libc::c_long] = &[
    // Its flags are in memory, where a filter cannot look: the C library then uses clone.
    libc::SYS_clone3,
    libc::SYS_get_mempolicy,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_mbind,
    libc::SYS_memfd_create,
    libc::SYS_openat2,
    libc::SYS_pidfd_open,
    libc::SYS_set_mempolicy,
    libc::SYS_userfaultfd,
];

/// What no VMM needs: refused with EPERM to those that have not been measured.
const DENIED: &[libc::c_long] = &[
    // The kernel itself.
    libc::SYS_acct,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_lookup_dcookie,
    libc::SYS_modify_ldt,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    // Other processes.
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_tkill,
    libc::SYS_vfork,
    // Mounts and namespaces.
    libc::SYS_chroot,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_pivot_root,
    libc::SYS_setns,
    libc::SYS_umount2,
    libc::SYS_unshare,
    // Identity and keys.
    libc::SYS_add_key,
    libc::SYS_capset,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_setuid,
    // Sockets of its own making, and the IPC that needs none.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_mq_open,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_shmget,
    libc::SYS_socket,
    libc::SYS_socketpair,
    // Memory of other nodes and processes, secret memory.
    libc::SYS_memfd_secret,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
];

/// A call whose number has this bit set is made through the x32 ABI (Documentation/x86/x86_64 of the kernel). An
/// allow-list knows none; a deny-list has to name them.
const X32: libc::c_long = 0x4000_0000;
/// What x32 numbers differently: ptrace, kexec_load, process_vm_readv, process_vm_writev, execveat, execve, ioctl.
const X32_DENIED: [libc::c_long; 5] = [521, 528, 539, 540, 545];

/// Every CLONE_NEW* flag of clone(2), NEWTIME excepted: there its bit belongs to the exit signal.
const NEW_NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;
const THREAD: u64 = libc::CLONE_THREAD as u64;

/// asm-generic/ioctls.h: a terminal's settings, whether a descriptor waits, how much there is to read. QEMU asks its
/// standard streams; TIOCSTI, which types into a terminal, is not among them.
const IOCTLS: [u64; 4] = [0x5401, 0x5402, 0x5421, 0x541B];
/// The second byte of an ioctl's number names its driver: KVM, and taps (which have no other call of this letter that
/// the filter needs to fear: they act on descriptors that the VMM was given).
const IOCTL_DRIVER: u64 = 0xFF00;
const KVM: u64 = 0xAE00;
/// linux/if_tun.h: TUNSETOFFLOAD, TUNGETFEATURES, TUNGETIFF, TUNSETSNDBUF, TUNGETVNETHDRSZ, TUNSETVNETHDRSZ,
/// TUNSETQUEUE, TUNSETVNETLE, TUNSETVNETBE.
const TAP_IOCTLS: [u64; 9] = [
    0x4004_54D0,
    0x8004_54CF,
    0x8004_54D2,
    0x4004_54D4,
    0x8004_54D7,
    0x4004_54D8,
    0x4004_54D9,
    0x4004_54DC,
    0x4004_54DE,
];
/// linux/prctl.h: a thread's name, its timer slack, no_new_privs, whether a core may be dumped, what happens to it on a
/// memory error.
const PRCTLS: [u64; 7] = [15, 16, 29, 38, 3, 4, 33];

type Compiled<T> = Result<T, seccompiler::BackendError>;

fn equals(argument: u8, value: u64) -> Compiled<SeccompRule> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?])
}

fn masked(argument: u8, mask: u64, value: u64) -> Compiled<SeccompRule> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
}

fn any_arguments(calls: &[libc::c_long]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// What a measured VMM may do: `calls`, and some others with the arguments that it needs.
pub fn allowed(calls: &[libc::c_long]) -> Compiled<Rules> {
    let mut rules = any_arguments(calls);
    // Threads, never processes, and no namespaces.
    rules.insert(libc::SYS_clone, vec![masked(0, THREAD | NEW_NAMESPACES, THREAD)?]);
    let mut ioctls = vec![masked(1, IOCTL_DRIVER, KVM)?];
    for request in IOCTLS.into_iter().chain(TAP_IOCTLS) {
        ioctls.push(equals(1, request)?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    rules.insert(libc::SYS_prctl, PRCTLS.into_iter().map(|option| equals(0, option)).collect::<Compiled<_>>()?);
    // Reading limits, not setting them: the third argument is the new one.
    let no_new_limit = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![no_new_limit])?]);
    Ok(rules)
}

/// What the gateway of a user-mode network may do beside making sockets: every call of `microvm-usernet` (strace), and those
/// that the C library and Rust's start and end with. It opens nothing: no call with a path is here but the one that executes
/// it.
const GATEWAY: &[libc::c_long] = &[
    libc::SYS_arch_prctl,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    // The launcher's own, before it executes.
    libc::SYS_close_range,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];
/// The kind of a socket without its flags.
const SOCKET_KIND: u64 = 0xF;
/// linux/netlink.h: NETLINK_ROUTE.
const NETLINK_ROUTE: u64 = 0;

/// What a gateway may do. A socket is bound only by a port that the kernel chooses: `bind` cannot be told apart by its
/// address, but nothing may listen.
pub fn gateway() -> Compiled<Rules> {
    let mut rules = any_arguments(GATEWAY);
    rules.insert(libc::SYS_bind, Vec::new());
    let is = |argument, mask, value: i32| {
        let value = u64::try_from(value).unwrap_or(u64::MAX);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
    };
    let whole = u64::from(u32::MAX);
    let mut sockets = Vec::new();
    for domain in [libc::AF_INET, libc::AF_INET6] {
        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
            sockets.push(SeccompRule::new(vec![is(0, whole, domain)?, is(1, SOCKET_KIND, kind)?])?);
        }
    }
    let route = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, NETLINK_ROUTE)?;
    sockets.push(SeccompRule::new(vec![is(0, whole, libc::AF_NETLINK)?, route])?);
    rules.insert(libc::SYS_socket, sockets);
    // FIONBIO.
    rules.insert(libc::SYS_ioctl, vec![equals(1, 0x5421)?]);
    Ok(rules)
}

/// What every VMM is told that the kernel does not have.
pub fn absent() -> Rules {
    any_arguments(ABSENT)
}

/// What a VMM that has not been measured may not do.
pub fn denied() -> Compiled<Rules> {
    let mut rules = any_arguments(DENIED);
    rules.extend(DENIED.iter().chain(ABSENT).chain(&X32_DENIED).map(|call| (call | X32, Vec::new())));
    // A new process, or any of the new namespaces.
    let mut clones = vec![masked(0, THREAD, 0)?];
    for bit in (0..64).map(|bit| 1 << bit).filter(|bit| NEW_NAMESPACES & bit != 0) {
        clones.push(masked(0, bit, bit)?);
    }
    for number in [libc::SYS_clone, libc::SYS_clone | X32] {
        rules.insert(number, clones.clone());
    }
    // TIOCSTI and TIOCLINUX, which type into terminals.
    for number in [libc::SYS_ioctl, 514 | X32] {
        rules.insert(number, vec![equals(1, 0x5412)?, equals(1, 0x541C)?]);
    }
    Ok(rules)
}

/// The calls that make sockets of a domain, and those that use a socket whatever its domain.
const SOCKET_MAKERS: [libc::c_long; 2] = [libc::SYS_socket, libc::SYS_socketpair];
const SOCKET_USERS: [libc::c_long; 5] =
    [libc::SYS_accept, libc::SYS_accept4, libc::SYS_bind, libc::SYS_connect, libc::SYS_listen];

/// Takes what Firecracker and Cloud Hypervisor need out of a deny-list: sockets of the Unix domain. Its root and its network
/// namespace decide which of them a VMM can reach.
pub fn permit_rust_vmms(rules: &mut Rules) -> Compiled<()> {
    let unix = u64::try_from(libc::AF_UNIX).unwrap_or_default();
    for call in SOCKET_MAKERS {
        let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, unix)?;
        rules.insert(call, vec![SeccompRule::new(vec![other])?]);
    }
    // The x32 calls stay denied: nobody has a use for them.
    rules.retain(|call, _| !SOCKET_USERS.contains(call));
    Ok(())
}

/// Openings for reading and writing, among which that of a tap's device is.
pub fn opens_for_writing() -> Compiled<Rules> {
    let access = |argument| masked(argument, libc::O_ACCMODE as u64, libc::O_RDWR as u64);
    Ok(Rules::from([(libc::SYS_open, vec![access(1)?]), (libc::SYS_openat, vec![access(2)?])]))
}

/// How many calls an allow-list names.
pub fn allowed_count(calls: &[libc::c_long]) -> usize {
    calls.len() + 4
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn test_no_call_is_in_two_lists() {
        let (absent, denied) = (absent(), denied().unwrap());
        for calls in [DISTRIBUTIONS, OWN_QEMU] {
            let allowed = allowed(calls).unwrap();
            assert!(allowed.keys().all(|call| !absent.contains_key(call)));
            assert!(DENIED.iter().all(|call| !allowed.contains_key(call) && !absent.contains_key(call)));
            assert_eq!(allowed.len(), allowed_count(calls));
        }
        assert!(denied.contains_key(&(libc::SYS_mount | X32)));
    }

    #[test]
    fn test_own_qemu_may_do_less_than_those_of_distributions() {
        assert!(OWN_QEMU.iter().all(|call| DISTRIBUTIONS.contains(call)));
        assert!(OWN_QEMU.len() < DISTRIBUTIONS.len());
    }

    #[test]
    fn test_a_gateway_opens_no_file_and_starts_nothing() {
        let gateway = gateway().unwrap();
        for call in OPENS.into_iter().chain([
            libc::SYS_clone,
            libc::SYS_fork,
            libc::SYS_listen,
            libc::SYS_accept4,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_prctl,
            libc::SYS_socketpair,
            libc::SYS_unlink,
        ]) {
            assert!(!gateway.contains_key(&call), "{call}");
        }
        assert_eq!(gateway[&libc::SYS_socket].len(), 5);
        assert!(gateway.keys().all(|call| !absent().contains_key(call)));
    }

    #[test]
    fn test_unix_sockets_are_all_that_rust_vmms_may_make() {
        let (before, mut rules) = (denied().unwrap(), denied().unwrap());
        permit_rust_vmms(&mut rules).unwrap();
        assert!(SOCKET_USERS.iter().all(|call| before.contains_key(call) && !rules.contains_key(call)));
        assert!(SOCKET_MAKERS.iter().all(|call| rules[call].len() == 1));
        assert_eq!(rules.len(), before.len() - SOCKET_USERS.len());
    }
}
