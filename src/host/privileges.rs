//! What this process may do on this host.

use std::fs;
use std::path::Path;

/// The facts that decide how a VM can be confined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Privileges {
    pub root: bool,
    pub user_namespaces: bool,
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
    let limit = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let enabled = limit("/proc/sys/kernel/unprivileged_userns_clone").unwrap_or(1) > 0;
    let allowed = limit("/proc/sys/user/max_user_namespaces").unwrap_or(0) > 0;
    let restricted = limit("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").unwrap_or(0) > 0;
    let root = nix::unistd::geteuid().is_root() && effective & (1 << CAP_SYS_ADMIN) != 0;
    Privileges {
        root,
        user_namespaces: allowed && (root || (enabled && !restricted)),
        net_admin: effective & (1 << CAP_NET_ADMIN) != 0,
        cgroup: cgroup_version(),
    }
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
