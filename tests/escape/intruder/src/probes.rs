//! One attempt each at whatever a jail must deny.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::sync::OnceLock;
use std::time::Duration;

use crate::system::{aside, buffer, plain, text, Answer};
use crate::Orders;

type Probe = (&'static str, fn(&Orders) -> Answer);

const NEW_NAMESPACES: [(&str, i32); 7] = [
    ("user", libc::CLONE_NEWUSER),
    ("mount", libc::CLONE_NEWNS),
    ("PID", libc::CLONE_NEWPID),
    ("network", libc::CLONE_NEWNET),
    ("IPC", libc::CLONE_NEWIPC),
    ("UTS", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
];

const PROBES: &[Probe] = &[
    // Other files.
    ("read_host_file", |_| opened("/etc/passwd", false)),
    ("read_secret", |o| opened(o.text("secret"), false)),
    ("read_other_vm", |o| opened(o.text("other_disk"), false)),
    ("list_runtime_dir", |o| listed(o.text("runtime_dir"))),
    ("list_home", |_| listed("/root").or_else(|_| listed("/home"))),
    ("write_kernel", |o| opened(&o.kernel, true)),
    ("write_outside", |o| created(o.text("scratch"))),
    ("write_in_root", |_| created("").or_else(|_| created("/vm")).or_else(|_| created("/dev"))),
    ("make_executable", |o| executable(o)),
    ("set_user_id_bit", |o| set_user_id(o)),
    ("symlink", |o| aside(|| done(std::os::unix::fs::symlink("/", format!("{}/link", o.text("scratch")))))),
    ("device_node", |o| device_node(o)),
    ("open_by_handle", |_| open_by_handle()),
    // Devices.
    ("kernel_log", |_| opened("/dev/kmsg", false)),
    ("physical_memory", |_| opened("/dev/mem", false)),
    ("raw_disk", |o| opened(o.text("block_device"), false)),
    ("kvm", |_| opened("/dev/kvm", true)),
    ("tap_driver", |_| opened("/dev/net/tun", true)),
    // Other processes.
    ("list_processes", |_| listed("/proc")),
    ("signal_process", |o| plain(libc::SYS_kill, [o.number("decoy") as usize, 0])),
    ("signal_everyone", |o| signal_everyone(o)),
    ("trace_process", |o| trace(o.number("decoy") as i32)),
    ("trace_supervisor", |o| trace(if o.number("jailed") == 1 { 1 } else { o.number("decoy") as i32 })),
    ("read_process_memory", |o| read_memory(o.number("decoy") as usize)),
    ("process_descriptor", |o| plain(libc::SYS_pidfd_open, [o.number("decoy") as usize, 0])),
    ("new_process", |_| new_process()),
    // The network.
    ("tcp_to_host", |o| tcp(o.number("port") as u16)),
    ("other_vms_socket", |o| done(UnixStream::connect(o.text("other_socket")))),
    ("abstract_socket", |o| abstract_socket(o.text("abstract"))),
    ("packet_socket", |_| plain(libc::SYS_socket, [libc::AF_PACKET as usize, libc::SOCK_RAW as usize, 0])),
    ("netlink_socket", |_| plain(libc::SYS_socket, [libc::AF_NETLINK as usize, libc::SOCK_RAW as usize, 0])),
    ("vsock_socket", |_| plain(libc::SYS_socket, [libc::AF_VSOCK as usize, libc::SOCK_STREAM as usize, 0])),
    ("other_interfaces", |_| other_interfaces()),
    ("new_tap", |_| attach("intruder-new")),
    ("others_tap", |o| attach(o.text("others_tap"))),
    ("own_tap", |o| attach(o.text("tap"))),
    ("namespace_of_tap", |_| namespace_of_tap()),
    ("second_tap_device", |_| done(open_tap_device())),
    // Privileges.
    ("become_root", |_| aside(|| plain(libc::SYS_setresuid, [0, 0, 0]))),
    ("become_someone", |_| aside(|| plain(libc::SYS_setresuid, [12345, 12345, 12345]))),
    ("join_group", |_| aside(|| plain(libc::SYS_setgroups, [1, buffer([0u32])]))),
    ("gain_capabilities", |_| gain_capabilities()),
    ("hold_capabilities", |_| hold_capabilities()),
    ("change_root", |_| aside(|| plain(libc::SYS_chroot, [text("/")]))),
    ("mount", |_| aside(mount)),
    ("remount_writable", |o| remount(o)),
    ("unmount", |o| unmount(o)),
    ("new_mount_api", |_| plain(libc::SYS_fsopen, [text("tmpfs"), 0])),
    ("any_new_namespace", |_| any_namespace()),
    ("namespace_by_clone", |_| namespace_by_clone()),
    ("raise_limit", |_| aside(raise_limit)),
    ("real_time", |_| aside(|| plain(libc::SYS_sched_setscheduler, [0, libc::SCHED_FIFO as usize, buffer([1i32])]))),
    ("lock_memory", |_| plain(libc::SYS_mlock, [buffer([0u8; 4096]), 4096])),
    // The kernel.
    ("load_module", |_| reaches(plain(libc::SYS_init_module, [buffer([0u8; 8]), 8, text("")]), libc::ENOEXEC)),
    ("reboot", |_| reaches(plain(libc::SYS_reboot, [1, 2, 3]), libc::EINVAL)),
    ("bpf", |_| plain(libc::SYS_bpf, [0, buffer([2u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0]), 48])),
    ("perf", |_| perf()),
    ("io_uring", |_| plain(libc::SYS_io_uring_setup, [1, buffer([0u8; 120])])),
    ("userfaultfd", |_| plain(libc::SYS_userfaultfd, [0])),
    ("keyring", |_| plain(libc::SYS_keyctl, [0, -3isize as usize, 0])),
    ("add_key", |_| plain(libc::SYS_add_key, [text("user"), text("intruder"), text("x"), 1, -1isize as usize])),
    ("kernel_ring", |_| plain(libc::SYS_syslog, [3, buffer([0u8; 64]), 64])),
    ("io_ports", |_| plain(libc::SYS_ioperm, [0x80, 1, 0])),
    ("sysctl", |_| opened("/proc/sys/kernel/core_pattern", true)),
    ("cgroup_files", |o| opened(o.text("cgroup"), true)),
    ("shared_memory", |_| shared_memory()),
    ("message_queue", |_| message_queue()),
    ("anonymous_program", |_| plain(libc::SYS_memfd_create, [text("x"), 0])),
    ("host_name", |o| host_name(o)),
];

/// Tries everything; the last is to become another program.
pub fn all(orders: &Orders) {
    for (name, probe) in PROBES {
        say(name, &probe(orders));
    }
    say(
        "execute_shell",
        &aside(|| plain(libc::SYS_execve, [text("/bin/sh"), buffer([text("sh"), text("-c"), text("exit 0"), 0]), 0])),
    );
    println!("DONE");
}

fn say(name: &str, answer: &Answer) {
    match answer {
        Ok(value) => println!("PROBE {name} worked {value}"),
        Err(error) => println!("PROBE {name} failed {error}"),
    }
}

fn done<T>(result: std::io::Result<T>) -> Answer {
    result.map(|_| 0)
}

/// The kernel got as far as looking at nonsense: whoever is not allowed to is refused before.
fn reaches(answer: Answer, errno: i32) -> Answer {
    match answer {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(0),
        other => other,
    }
}

fn denied() -> Error {
    Error::from_raw_os_error(libc::ENOENT)
}

fn opened(path: &str, write: bool) -> Answer {
    // Never waits, truncates or writes: that it opens is enough.
    done(OpenOptions::new().read(!write).write(write).custom_flags(libc::O_NONBLOCK).open(path))
}

fn listed(path: &str) -> Answer {
    let entries = fs::read_dir(path)?.count();
    if entries > 0 {
        Ok(entries as i64)
    } else {
        Err(denied())
    }
}

fn created(folder: &str) -> Answer {
    let path = format!("{folder}/intruder-was-here");
    File::create(&path)?.write_all(b"x")?;
    done(fs::remove_file(path))
}

fn executable(orders: &Orders) -> Answer {
    let path = format!("{}/program", orders.text("scratch"));
    fs::write(&path, "#!/bin/sh\n")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    done(fs::remove_file(path))
}

fn set_user_id(orders: &Orders) -> Answer {
    // In the jail the disk is the one file that may be written; outside, a file of the test's.
    let path =
        if orders.number("jailed") == 1 { orders.disk.clone() } else { format!("{}/mode", orders.text("scratch")) };
    if orders.number("jailed") != 1 {
        fs::write(&path, "")?;
    }
    done(fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)))
}

fn device_node(orders: &Orders) -> Answer {
    let path = format!("{}/node", orders.text("scratch"));
    let made = plain(libc::SYS_mknod, [text(&path), (libc::S_IFCHR | 0o600) as usize, libc::makedev(1, 5) as usize])?;
    fs::remove_file(path)?;
    Ok(made)
}

/// The way out of a container that only changed its root: by an inode's number. A handle of nonsense is enough.
fn open_by_handle() -> Answer {
    let root = File::open("/")?;
    let handle = buffer([8u32, 1, 2, 0]);
    let answer = plain(libc::SYS_open_by_handle_at, [root.as_raw_fd() as usize, handle, 0]);
    reaches(reaches(answer, libc::ESTALE), libc::EINVAL)
}

/// Signal 0 to every number there may be: whether anyone but the jail's own two answers.
fn signal_everyone(orders: &Orders) -> Answer {
    let own = [std::process::id() as usize, 1];
    let jailed = orders.number("jailed") == 1;
    let numbers = if jailed { 1..70_000 } else { orders.number("decoy") as usize..orders.number("decoy") as usize + 1 };
    numbers.filter(|pid| !own.contains(pid)).find_map(|pid| plain(libc::SYS_kill, [pid, 0]).ok()).ok_or_else(denied)
}

fn trace(pid: i32) -> Answer {
    // The kernel lets go of it when the tracer ends.
    aside(|| plain(libc::SYS_ptrace, [libc::PTRACE_SEIZE as usize, pid as usize, 0, 0]))
}

fn read_memory(pid: usize) -> Answer {
    // Address 0 is not mapped: EFAULT means that the right to read was there.
    let (local, remote) = (buffer([buffer([0u8; 8]), 8]), buffer([0usize, 8]));
    reaches(plain(libc::SYS_process_vm_readv, [pid, local, 1, remote, 1, 0]), libc::EFAULT)
}

fn new_process() -> Answer {
    // SAFETY: one thread; the child ends at once.
    match unsafe { libc::fork() } {
        // SAFETY: as above.
        0 => unsafe { libc::_exit(0) },
        -1 => Err(Error::last_os_error()),
        child => {
            // SAFETY: a null status is allowed.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            Ok(i64::from(child))
        }
    }
}

fn tcp(port: u16) -> Answer {
    done(TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), Duration::from_secs(2)))
}

fn abstract_socket(name: &str) -> Answer {
    let address = UnixAddr::from_abstract_name(name)?;
    done(UnixStream::connect_addr(&address))
}

/// Asked of a socket of the one domain that some VMMs may make.
fn other_interfaces() -> Answer {
    let socket = plain(libc::SYS_socket, [libc::AF_UNIX as usize, libc::SOCK_DGRAM as usize, 0])?;
    let is_other = |index: &i32| {
        // struct ifreq: a name of 16 bytes, then the index.
        let mut request = [0u8; 40];
        request[16..20].copy_from_slice(&index.to_ne_bytes());
        let request = Box::into_raw(Box::new(request));
        let asked = plain(libc::SYS_ioctl, [socket as usize, libc::SIOCGIFNAME as usize, request as usize]);
        // SAFETY: made above, written by the kernel, used by nobody else.
        let request = unsafe { *Box::from_raw(request) };
        asked.is_ok() && !request.starts_with(b"lo\0")
    };
    (1..1000).find(is_other).map(i64::from).ok_or_else(denied)
}

/// As Firecracker opens it.
fn open_tap_device() -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")
}

/// The device that the probes use, opened by the first of them: it may be handed out once.
fn tap_device() -> std::io::Result<&'static File> {
    static DEVICE: OnceLock<File> = OnceLock::new();
    match DEVICE.get() {
        Some(device) => Ok(device),
        None => open_tap_device().map(|device| DEVICE.get_or_init(|| device)),
    }
}

/// Attaches to the tap of this name, or makes it.
fn attach(name: &str) -> Answer {
    if name.is_empty() {
        return Err(denied());
    }
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request[16..20].copy_from_slice(&flags.to_ne_bytes());
    // linux/if_tun.h: TUNSETIFF.
    plain(libc::SYS_ioctl, [tap_device()?.as_raw_fd() as usize, 0x4004_54ca, buffer(request)])
}

/// A way into the network namespace of the tap.
fn namespace_of_tap() -> Answer {
    // linux/if_tun.h: TUNGETDEVNETNS.
    plain(libc::SYS_ioctl, [tap_device()?.as_raw_fd() as usize, 0x54e3, 0])
}

fn gain_capabilities() -> Answer {
    aside(|| plain(libc::SYS_capset, [buffer([0x2008_0522u32, 0]), buffer([1u32 << 21, 1 << 21, 0, 0, 0, 0])]))
}

fn hold_capabilities() -> Answer {
    let sets = Box::into_raw(Box::new([0u32; 6]));
    plain(libc::SYS_capget, [buffer([0x2008_0522u32, 0]), sets as usize])?;
    // SAFETY: made above, written by the kernel, used by nobody else.
    let held = unsafe { sets.read() };
    if held.iter().any(|word| *word != 0) {
        Ok(i64::from(held[0]))
    } else {
        Err(denied())
    }
}

fn mount() -> Answer {
    // Outside a jail, in a namespace of its own: nothing of it is seen elsewhere.
    if let Ok(_private) = plain(libc::SYS_unshare, [libc::CLONE_NEWNS as usize]) {
        plain(libc::SYS_mount, [0, text("/"), 0, (libc::MS_REC | libc::MS_PRIVATE) as usize, 0])?;
    }
    plain(libc::SYS_mount, [text("x"), text("/"), text("tmpfs"), 0, 0])
}

fn remount(orders: &Orders) -> Answer {
    let flags = (libc::MS_REMOUNT | libc::MS_BIND) as usize;
    aside(|| {
        if let Ok(_private) = plain(libc::SYS_unshare, [libc::CLONE_NEWNS as usize]) {
            plain(libc::SYS_mount, [0, text("/"), 0, (libc::MS_REC | libc::MS_PRIVATE) as usize, 0])?;
            return plain(libc::SYS_mount, [0, text("/"), 0, flags, 0]);
        }
        plain(libc::SYS_mount, [0, text(&orders.kernel), 0, flags, 0])
    })
}

fn unmount(orders: &Orders) -> Answer {
    aside(|| {
        if let Ok(_private) = plain(libc::SYS_unshare, [libc::CLONE_NEWNS as usize]) {
            plain(libc::SYS_mount, [0, text("/"), 0, (libc::MS_REC | libc::MS_PRIVATE) as usize, 0])?;
            return plain(libc::SYS_umount2, [text("/proc"), libc::MNT_DETACH as usize]);
        }
        plain(libc::SYS_umount2, [text(&orders.kernel), libc::MNT_DETACH as usize])
    })
}

fn any_namespace() -> Answer {
    let attempts = NEW_NAMESPACES.iter().map(|(_, flag)| aside(|| plain(libc::SYS_unshare, [*flag as usize])));
    attempts.reduce(Result::or).unwrap_or_else(|| Err(denied()))
}

fn namespace_by_clone() -> Answer {
    aside(|| {
        let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as usize;
        let child = plain(libc::SYS_clone, [flags, 0, 0, 0, 0])?;
        if child == 0 {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) }
        }
        Ok(child)
    })
}

fn raise_limit() -> Answer {
    let unlimited = u64::MAX;
    plain(libc::SYS_prlimit64, [0, libc::RLIMIT_FSIZE as usize, buffer([unlimited, unlimited]), 0])?;
    plain(libc::SYS_prlimit64, [0, libc::RLIMIT_MEMLOCK as usize, buffer([unlimited, unlimited]), 0])
}

fn perf() -> Answer {
    // struct perf_event_attr: a software event (type 1), its size, the CPU clock; excluding the kernel.
    let mut attributes = [0u32; 32];
    attributes[0] = 1;
    attributes[1] = 128;
    attributes[10] = 1 << 5;
    plain(libc::SYS_perf_event_open, [buffer(attributes), 0, -1isize as usize, -1isize as usize, 0])
}

fn shared_memory() -> Answer {
    let id = plain(libc::SYS_shmget, [libc::IPC_PRIVATE as usize, 4096, 0o600])?;
    plain(libc::SYS_shmctl, [id as usize, libc::IPC_RMID as usize, 0])
}

fn message_queue() -> Answer {
    let name = text("intruder");
    let queue = plain(libc::SYS_mq_open, [name, (libc::O_CREAT | libc::O_RDWR) as usize, 0o600, 0])?;
    plain(libc::SYS_mq_unlink, [name])?;
    Ok(queue)
}

fn host_name(orders: &Orders) -> Answer {
    let name = Box::into_raw(Box::new([0u8; 6 * 65]));
    plain(libc::SYS_uname, [name as usize])?;
    // SAFETY: made above, written by the kernel, used by nobody else.
    let names = unsafe { name.read() };
    let node = names.get(65..130).unwrap_or_default();
    let node = String::from_utf8_lossy(node).trim_end_matches('\0').to_owned();
    if node == orders.text("host_name") {
        Ok(0)
    } else {
        Err(denied())
    }
}
