//! From an empty initramfs to what the host asked for.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;

use microvm_protocol::identity::{Identity, CONFIG_SERIAL, DISK_SERIAL, DRIVE_BYTES, ROOTFS_SERIAL};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::reboot::{reboot, RebootMode};
use nix::sys::time::TimeSpec;
use nix::time::{clock_settime, ClockId};

use crate::{network, random};

/// Where the VM's own disk is mounted.
pub const DATA: &str = "/data";
const LOWER: &str = "/mnt/lower";
const ROOT: &str = "/mnt/root";
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

/// The block device whose virtio serial number is `serial`.
fn drive(serial: &str) -> Option<String> {
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|device| {
        let found = fs::read_to_string(device.path().join("serial")).ok()?;
        (found.trim() == serial).then(|| format!("/dev/{}", device.file_name().to_string_lossy()))
    })
}

pub fn read_identity() -> Result<Identity, String> {
    let device = drive(CONFIG_SERIAL).ok_or("there is no config drive")?;
    let mut bytes = vec![0; DRIVE_BYTES];
    let mut file = File::open(&device).map_err(|e| format!("{device}: {e}"))?;
    file.read_exact(&mut bytes).map_err(|e| format!("{device}: {e}"))?;
    let identity = Identity::from_drive(&bytes).map_err(|e| e.to_string());
    bytes.fill(0);
    identity
}

/// Entropy, clock and names: before the first key is made and before anything else runs.
pub fn become_identity(identity: &Identity) -> Result<(), String> {
    random::credit(&identity.seed.0)?;
    set_clock(identity.unix_time_ns)?;
    nix::unistd::sethostname(&identity.hostname).map_err(|e| format!("sethostname: {e}"))
}

pub fn set_clock(unix_time_ns: u64) -> Result<(), String> {
    let seconds = i64::try_from(unix_time_ns / 1_000_000_000).map_err(|_| "the time is out of range")?;
    let nanos = i64::try_from(unix_time_ns % 1_000_000_000).unwrap_or(0);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanos)).map_err(|e| format!("clock_settime: {e}"))
}

/// Everything between the handshake and Ready; the error names its stage.
pub fn set_up(identity: &Identity) -> Result<(), (&'static str, String)> {
    let stage = |name: &'static str| move |message: String| (name, message);
    mount_scratch().map_err(stage("mounts"))?;
    limit_processes(identity.max_processes).map_err(stage("cgroup"))?;
    if identity.disk {
        mount_disk().map_err(stage("disk"))?;
    }
    if identity.rootfs {
        enter_rootfs(identity.disk).map_err(stage("rootfs"))?;
    }
    write_names(identity).map_err(stage("names"))?;
    // After the root is what it will be: resolv.conf goes into it.
    network::bring_up_loopback().map_err(stage("network"))?;
    identity.network.as_ref().map_or(Ok(()), network::set_up).map_err(stage("network"))
}

fn mount_scratch() -> Result<(), String> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_at("tmp", "/tmp", "tmpfs", safe, "mode=1777")?;
    mount_at("run", "/run", "tmpfs", safe, "mode=755")?;
    mount_at("pts", "/dev/pts", "devpts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=620,ptmxmode=666")?;
    mount_at("shm", "/dev/shm", "tmpfs", safe, "mode=1777")?;
    mount_at("cgroup", "/sys/fs/cgroup", "cgroup2", safe | MsFlags::MS_NOEXEC, "")
}

fn limit_processes(max: u64) -> Result<(), String> {
    let write = |path: &str, text: &str| fs::write(path, text).map_err(|e| format!("{path}: {e}"));
    write("/sys/fs/cgroup/cgroup.subtree_control", "+pids")?;
    fs::create_dir_all(WORK_CGROUP).map_err(|e| format!("mkdir {WORK_CGROUP}: {e}"))?;
    write(&format!("{WORK_CGROUP}/pids.max"), &max.to_string())
}

/// Mounts the disk and grows its small file system to the device's size.
fn mount_disk() -> Result<(), String> {
    let device = drive(DISK_SERIAL).ok_or("there is no disk")?;
    mount_at(&device, DATA, "ext4", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME, "")?;
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

/// Lays a writable layer over the read-only image and makes it the root.
fn enter_rootfs(has_disk: bool) -> Result<(), String> {
    let device = drive(ROOTFS_SERIAL).ok_or("there is no rootfs drive")?;
    // `noload`: a journal cannot be replayed on a read-only device; `errors=continue` reports instead of panicking.
    mount_at(&device, LOWER, "ext4", MsFlags::MS_RDONLY | MsFlags::MS_NODEV, "noload")?;
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

fn write_names(identity: &Identity) -> Result<(), String> {
    fs::create_dir_all("/etc").map_err(|e| format!("mkdir /etc: {e}"))?;
    let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {}\n", identity.hostname);
    for (path, text) in [
        ("/etc/machine-id", format!("{}\n", identity.machine_id)),
        ("/etc/hostname", format!("{}\n", identity.hostname)),
        ("/etc/hosts", hosts),
    ] {
        fs::write(path, text).map_err(|e| format!("{path}: {e}"))?;
    }
    Ok(())
}

/// Ends the VM: kills what runs, writes what is cached, reboots (which ends every VMM; a power-off would not).
pub fn power_off() {
    let everyone = nix::unistd::Pid::from_raw(-1);
    // ESRCH: nothing else runs.
    let killed = nix::sys::signal::kill(everyone, nix::sys::signal::Signal::SIGKILL);
    nix::unistd::sync();
    let unmounted = umount2(DATA, MntFlags::MNT_DETACH);
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    eprintln!("microvm-agent: reboot: {error} (kill: {killed:?}, umount: {unmounted:?})");
}
