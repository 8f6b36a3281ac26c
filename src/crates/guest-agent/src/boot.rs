//! From an empty initramfs to a guest that lacks nothing but an identity.
//!
//! All of it happens before HELLO, and so before a template is frozen: a clone finds it done.
use std::sync::OnceLock;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use microvm_protocol::cmdline::Machine;
use microvm_protocol::identity::{DISK_SERIAL, ROOTFS_SERIAL};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::reboot::{reboot, RebootMode};

use crate::{environment, memory, network};

/// Where the VM's own disk is mounted.
pub const DATA: &str = "/data";
const LOWER: &str = "/mnt/lower";
const ROOT: &str = "/mnt/root";
/// The root of all control groups; the agent is in it.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// How often its limit was hit, and how many of it were killed for want of memory (this kernel counts that nowhere else).
pub const PROCESS_EVENTS: &str = "/sys/fs/cgroup/work/pids.events";
pub const MEMORY_EVENTS: &str = "/sys/fs/cgroup/work/memory.events";
/// The group for our own programs: half of the memory, however many there are at once.
pub const TOOLS_CGROUP: &str = "/sys/fs/cgroup/tools";
const MAX_TOOLS: u32 = 64;
/// The program for HTML and HTTP, in the initramfs.
pub const TOOLS: &str = "/usr/lib/microvm-tools";
/// The group for everything that runs on request.
pub const WORK_CGROUP: &str = "/sys/fs/cgroup/work";

// linux/fs ext4.h: EXT4_IOC_RESIZE_FS takes the number of blocks.
nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);

fn mount_at(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> Result<(), String> {
    fs::create_dir_all(target).map_err(|e| format!("mkdir {target}: {e}"))?;
    mount(Some(source), target, Some(kind), flags, Some(data)).map_err(|e| format!("mount {kind} on {target}: {e}"))
}

pub fn mount_kernel_filesystems() -> Result<(), String> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    mount_at("dev", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "")?;
    mount_at("proc", "/proc", "proc", safe, "")?;
    mount_at("sys", "/sys", "sysfs", safe, "")
}

/// How the VMM differs from QEMU.
pub fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| Machine::from_cmdline(&fs::read_to_string("/proc/cmdline").unwrap_or_default()))
}

/// The block device whose virtio serial number is `serial`, or whose place is its.
pub fn drive(serial: &str) -> Option<String> {
    let drives = &machine().drives;
    if !drives.is_empty() {
        // Drives are found one after the other, in the order of the VMM's configuration.
        let place = drives.iter().position(|name| name == serial)?;
        return Some(format!("/dev/vd{}", char::from(b'a' + u8::try_from(place).ok()?)));
    }
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|device| {
        let found = fs::read_to_string(device.path().join("serial")).ok()?;
        (found.trim() == serial).then(|| format!("/dev/{}", device.file_name().to_string_lossy()))
    })
}

/// File systems, control groups, disks; the error names its stage.
pub fn set_up() -> Result<(), (&'static str, String)> {
    let stage = |name: &'static str| move |message: String| (name, message);
    mount_scratch().and_then(|()| environment::prepare_kernel()).map_err(stage("mounts"))?;
    make_cgroups().map_err(stage("cgroup"))?;
    let disk = drive(DISK_SERIAL);
    if let Some(device) = &disk {
        mount_disk(device).and_then(|()| environment::open_disk()).map_err(stage("disk"))?;
    }
    tools().ok_or_else(|| ("mounts", format!("{TOOLS} is missing in the initramfs")))?;
    let image = drive(ROOTFS_SERIAL);
    if let Some(device) = &image {
        enter_rootfs(device, disk.is_some()).map_err(stage("rootfs"))?;
    }
    environment::prepare_folders().map_err(stage("rootfs"))?;
    if image.is_none() && disk.is_some() {
        environment::move_to_disk().map_err(stage("disk"))?;
    }
    network::bring_up_loopback().map_err(stage("network"))?;
    // What is written now need not be written by every clone.
    nix::unistd::sync();
    Ok(())
}

fn mount_scratch() -> Result<(), String> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_at("tmp", "/tmp", "tmpfs", safe, "mode=1777")?;
    mount_at("run", "/run", "tmpfs", safe, "mode=755")?;
    mount_at("pts", "/dev/pts", "devpts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=620,ptmxmode=666")?;
    mount_at("shm", "/dev/shm", "tmpfs", safe, "mode=1777")?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", safe | MsFlags::MS_NOEXEC, "")?;
    mount_at("cgroup", CGROUPS, "cgroup2", safe | MsFlags::MS_NOEXEC, "nsdelegate")
}

/// Each program moves into a group of its own: without this option (Linux 6.0) that waits for all CPUs to be quiet once, as
/// setting it does. A kernel that has it not is slower at programs, and no worse.
pub fn favor_moves_between_cgroups() {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(None::<&str>, CGROUPS, None::<&str>, flags, Some("nsdelegate,favordynmods")).unwrap_or_default();
}

fn make_cgroups() -> Result<(), String> {
    let control = format!("{CGROUPS}/cgroup.subtree_control");
    fs::write(&control, "+pids +memory").map_err(|e| format!("{control}: {e}"))?;
    for group in [WORK_CGROUP, TOOLS_CGROUP] {
        fs::create_dir_all(group).map_err(|e| format!("mkdir {group}: {e}"))?;
    }
    for (name, value) in [("memory.max", memory::total() / 2), ("pids.max", MAX_TOOLS.into())] {
        let path = format!("{TOOLS_CGROUP}/{name}");
        fs::write(&path, value.to_string()).map_err(|e| format!("{path}: {e}"))?;
    }
    Ok(())
}

/// Opened before an image is entered, in which it has no path.
pub fn tools() -> Option<&'static File> {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    FILE.get_or_init(|| File::open(TOOLS).inspect_err(|error| eprintln!("microvm-agent: {TOOLS}: {error}")).ok())
        .as_ref()
}

/// The group for everything that runs on request, with its limit, which is set when it is first asked for: a clone's may
/// be another one.
pub fn work_cgroup(max_processes: u64) -> io::Result<&'static str> {
    static LIMIT: AtomicU64 = AtomicU64::new(0);
    if LIMIT.load(Ordering::Acquire) != max_processes {
        fs::write(format!("{WORK_CGROUP}/pids.max"), max_processes.to_string())?;
        // Two first callers write the same.
        LIMIT.store(max_processes, Ordering::Release);
    }
    Ok(WORK_CGROUP)
}

/// Mounts the disk and grows its small file system to the device's size.
fn mount_disk(device: &str) -> Result<(), String> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    // `noinit_itable`: a kernel thread would zero the inode tables of every clone, block by block.
    mount_at(device, DATA, "ext4", flags, "noinit_itable")?;
    let sectors = fs::read_to_string(format!("/sys/block/{}/size", device.trim_start_matches("/dev/")));
    let sectors: u64 = sectors.ok().and_then(|text| text.trim().parse().ok()).ok_or("the disk has no size")?;
    let have = nix::sys::statvfs::statvfs(DATA).map_err(|e| format!("statvfs: {e}"))?;
    let block = have.fragment_size();
    let blocks = sectors * 512 / block;
    let root = File::open(DATA).map_err(|e| format!("{DATA}: {e}"))?;
    // SAFETY: the descriptor is open on an ext4 file system, and the argument is a u64 that the request reads.
    let resized = unsafe { ext4_resize(root.as_raw_fd(), &blocks) };
    resized.map(drop).map_err(|e| format!("growing the file system to {blocks} blocks of {block} bytes: {e}"))
}

/// Whether the superblock is that of EROFS (linux/fs/erofs/erofs_fs.h).
fn is_erofs(device: &str) -> Result<bool, String> {
    let mut magic = [0; 4];
    let read = File::open(device).and_then(|file| file.read_exact_at(&mut magic, 1024));
    read.map_err(|e| format!("{device}: {e}"))?;
    Ok(u32::from_le_bytes(magic) == 0xE0F5_E1E2)
}

/// Lays a writable layer over the read-only image and makes it the root.
fn enter_rootfs(device: &str, has_disk: bool) -> Result<(), String> {
    // `noload`: a journal cannot be replayed on a read-only device; `errors=continue` reports instead of panicking.
    let (kind, options) = if is_erofs(device)? { ("erofs", "") } else { ("ext4", "noload") };
    mount_at(device, LOWER, kind, MsFlags::MS_RDONLY | MsFlags::MS_NODEV, options)?;
    let layer = if has_disk { format!("{DATA}/.overlay") } else { "/run/overlay".to_owned() };
    for part in ["upper", "work"] {
        let path = format!("{layer}/{part}");
        fs::create_dir_all(&path).map_err(|e| format!("mkdir {path}: {e}"))?;
    }
    let options = format!("lowerdir={LOWER},upperdir={layer}/upper,workdir={layer}/work");
    mount_at("overlay", ROOT, "overlay", MsFlags::MS_NODEV, &options)?;
    let mut shared = vec!["/dev", "/proc", "/sys", "/tmp", "/run"];
    shared.extend(has_disk.then_some(DATA));
    for path in shared {
        let target = format!("{ROOT}{path}");
        fs::create_dir_all(&target).map_err(|e| format!("mkdir {target}: {e}"))?;
        mount(Some(path), target.as_str(), None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
            .map_err(|e| format!("bind {path}: {e}"))?;
    }
    nix::unistd::chroot(ROOT).map_err(|e| format!("chroot: {e}"))?;
    nix::unistd::chdir("/").map_err(|e| format!("chdir: {e}"))
}

/// Ends the VM: kills what runs, writes what is cached, and then what ends this VMM: QEMU and Firecracker end by a reboot,
/// and Firecracker by nothing else; Cloud Hypervisor boots again.
pub fn power_off() {
    let everyone = nix::unistd::Pid::from_raw(-1);
    // ESRCH: nothing else runs.
    let killed = nix::sys::signal::kill(everyone, nix::sys::signal::Signal::SIGKILL);
    nix::unistd::sync();
    let unmounted = umount2(DATA, MntFlags::MNT_DETACH);
    let how = if machine().power_off { RebootMode::RB_POWER_OFF } else { RebootMode::RB_AUTOBOOT };
    let Err(error) = reboot(how);
    eprintln!("microvm-agent: reboot: {error} (kill: {killed:?}, umount: {unmounted:?})");
}
