//! What this process may do on this host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The facts that decide how a VM can be confined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Privileges {
    pub root: bool,
    pub net_admin: bool,
    pub cgroup: &'static str,
}

/// CAP_NET_ADMIN's bit in capabilities(7).
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Reads the facts; nothing is changed.
#[must_use]
pub fn probe() -> Privileges {
    let effective = effective_capabilities();
    let root = nix::unistd::geteuid().is_root() && effective & (1 << CAP_SYS_ADMIN) != 0;
    Privileges { root, net_admin: effective & (1 << CAP_NET_ADMIN) != 0, cgroup: cgroup_version() }
}

/// Whether this process's root is not that of its mount namespace, as far as it can be seen: no mount is at `/`, or the first
/// process has another root.
#[must_use]
pub fn is_in_chroot() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !mounts.is_empty() && !has_root(&mounts) {
        return true;
    }
    let id = |path: &str| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let same_namespace = |name: &str| {
        fs::read_link(format!("/proc/1/ns/{name}")).ok() == fs::read_link(format!("/proc/self/ns/{name}")).ok()
    };
    match (id("/proc/1/root/"), id("/")) {
        (Some(first), Some(own)) => first != own && same_namespace("mnt"),
        _ => false,
    }
}

/// Whether a container manager started this process, as far as it can be seen. A virtual machine that was made of a container's
/// image has its marks, but not its namespaces; Kubernetes' runtimes leave no mark, but an overlay.
#[must_use]
pub fn is_in_container() -> bool {
    // The kernel's numbers of the first ones (include/linux/proc_ns.h); `--pid=host` and the like leave the others.
    const FIRST: [(&str, u64); 3] = [("ipc", 0xEFFF_FFFF), ("uts", 0xEFFF_FFFE), ("pid", 0xEFFF_FFFC)];
    let is_own = |(name, first): &(&str, u64)| {
        fs::metadata(format!("/proc/self/ns/{name}")).is_ok_and(|namespace| namespace.ino() != *first)
    };
    // Docker's and Podman's; the variable is every manager's (systemd's "container interface").
    let is_marked = || {
        let has_file = ["/.dockerenv", "/run/.containerenv"].iter().any(|mark| Path::new(mark).exists());
        has_file || std::env::var_os("container").is_some()
    };
    let has_overlay = || has_overlay_root(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
    FIRST.iter().any(is_own) && (is_marked() || has_overlay())
}

/// proc_pid_mountinfo(5): behind the dash, the type. The last one mounted at `/` is seen.
fn has_overlay_root(mountinfo: &str) -> bool {
    let root = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some("/"));
    let kind = root.and_then(|line| line.split_once(" - ")?.1.split(' ').next());
    kind.is_some_and(|kind| kind == "overlay" || kind == "fuse.fuse-overlayfs")
}

/// proc_pid_mountinfo(5): the fifth field is where it is mounted, seen from the process's root.
fn has_root(mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| line.split(' ').nth(4) == Some("/"))
}

fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn cgroup_version() -> &'static str {
    let has_v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let has_v1 = Path::new("/sys/fs/cgroup/memory").is_dir() || Path::new("/sys/fs/cgroup/cpu").is_dir();
    let hybrid = Path::new("/sys/fs/cgroup/unified/cgroup.controllers").exists();
    match (has_v2, has_v1, hybrid) {
        (true, _, _) => "v2",
        (_, true, true) => "hybrid",
        (_, true, _) => "v1",
        _ => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_has_root_where_a_mount_is_at_the_root() {
        let line = |at: &str| format!("36 35 98:0 /tree {at} rw,noatime shared:1 - ext4 /dev/root rw\n");
        assert!(has_root(&(line("/proc") + &line("/"))));
        assert!(!has_root(&(line("/proc") + &line("/dev"))));
    }

    #[test]
    fn test_has_overlay_root_the_last_mount_counts() {
        let line =
            |at: &str, kind: &str| format!("36 35 0:50 / {at} rw,noatime shared:1 - {kind} overlay rw,lowerdir=/a\n");
        assert!(has_overlay_root(&(line("/", "ext4") + &line("/", "overlay") + &line("/proc", "proc"))));
        assert!(has_overlay_root(&line("/", "fuse.fuse-overlayfs")));
        assert!(!has_overlay_root(&(line("/", "overlay") + &line("/", "ext4") + &line("/mnt", "overlay"))));
        assert!(!has_overlay_root(""));
    }

    #[test]
    fn test_is_in_chroot_this_process_is_not() {
        assert!(!is_in_chroot());
    }
}
