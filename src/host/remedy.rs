//! What to do on this host about what is missing: from facts to a sentence. The facts are read at the end of the file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{getgroups, Gid, Group, Uid, User};

use super::privileges;

/// Where this process runs, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub user: String,
    pub is_root: bool,
    pub is_in_container: bool,
    pub is_in_chroot: bool,
    /// systemd is the init of this host.
    pub has_systemd: bool,
}

/// A device node that does not open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub path: String,
    pub mode: u32,
    pub owner: String,
    pub gid: u32,
    /// `None`: no group of this host has the number.
    pub group: Option<String>,
    /// The group's list has the user, and this process does not have the group: its session is older.
    pub is_listed: bool,
    /// This host has a group called `kvm`.
    pub has_kvm_group: bool,
}

/// The sysctls that decide about user namespaces; `None` where the kernel has no such one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserNamespaces {
    pub max: Option<u64>,
    pub unprivileged_clone: Option<u64>,
    pub apparmor_restricts: Option<u64>,
}

/// What makes a node open that the kernel refuses to this user.
#[must_use]
pub fn kvm_denied(node: &Node, place: &Place) -> String {
    let Node { path, mode, gid, .. } = node;
    let user = &place.user;
    if mode & 0o006 == 0o006 || place.is_root {
        return match place.is_in_container {
            true => format!("start the container with --device {path}: its device control group denies it"),
            false => format!(
                "its mode would let {user} open it: its device control group or a security module denies it (dmesg)"
            ),
        };
    }
    let by_group = mode & 0o060 == 0o060 && *gid != 0;
    if place.is_in_container {
        return match by_group {
            true => format!("start the container with --device {path} --group-add {gid}"),
            false => format!("on the container's host: sudo chmod 666 {path}, or start the container as root"),
        };
    }
    match (&node.group, by_group) {
        (Some(group), true) if node.is_listed => {
            format!("{user} is in the group {group}, but this session is older than that: log in again (or: newgrp {group})")
        }
        (Some(group), true) => format!("sudo usermod -aG {group} {user}, and log in again"),
        _ => {
            let group = if node.has_kvm_group { "" } else { "sudo groupadd --system kvm && " };
            format!(
                "no group may open it: {group}sudo chgrp kvm {path} && sudo chmod 660 {path} && sudo usermod -aG kvm {user}, and log in again \
                 (for good: a udev rule with KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\")"
            )
        }
    }
}

/// What brings a missing `/dev/kvm`, by the flag of the CPU.
#[must_use]
pub fn kvm_absent(path: &str, flag: Option<&str>, place: &Place) -> String {
    let module = match flag {
        Some("vmx") => "kvm_intel",
        Some(_) => "kvm_amd",
        None => return "enable virtualization in the firmware, or nested virtualization on the cloud instance".into(),
    };
    match place.is_in_container {
        true => format!(
            "start the container with --device {path} (on its host, where it is missing too: sudo modprobe {module})"
        ),
        false => format!("sudo modprobe {module}"),
    }
}

/// What lets this process make user namespaces.
#[must_use]
pub fn namespaces(sysctls: &UserNamespaces, place: &Place) -> String {
    if place.is_in_chroot {
        return "this process is in a chroot, in which the kernel makes no user namespaces (user_namespaces(7)): enter the tree by \
                pivot_root (systemd-nspawn, bwrap, a container) instead"
            .into();
    }
    let mut settings = Vec::new();
    if sysctls.max == Some(0) {
        settings.push("user.max_user_namespaces=10000");
    }
    if sysctls.unprivileged_clone == Some(0) && !place.is_root {
        settings.push("kernel.unprivileged_userns_clone=1");
    }
    if sysctls.apparmor_restricts.is_some_and(|value| value != 0) && !place.is_root {
        settings.push("kernel.apparmor_restrict_unprivileged_userns=0");
    }
    let mut remedy = match settings.is_empty() {
        true => String::new(),
        false => {
            let host = if place.is_in_container { "on the container's host: " } else { "" };
            format!(
                "allow user namespaces: {host}sudo sysctl -w {} (for good: a file in /etc/sysctl.d)",
                settings.join(" ")
            )
        }
    };
    if settings.contains(&"kernel.apparmor_restrict_unprivileged_userns=0") {
        remedy += ", or give this Python an AppArmor profile with the rule \"userns,\"";
    }
    if place.is_in_container {
        let options = "start the container with --security-opt seccomp=unconfined --security-opt apparmor=unconfined \
                       --security-opt systempaths=unconfined";
        return if remedy.is_empty() { options.into() } else { format!("{remedy}; {options}") };
    }
    match remedy.is_empty() {
        true => {
            "no sysctl denies user namespaces: a seccomp filter or a security module of this process does (systemd: \
                 RestrictNamespaces=no; SELinux, AppArmor: dmesg)"
                .into()
        }
        false => remedy,
    }
}

/// What gives each VM of root's a uid of its own.
#[must_use]
pub fn own_uid(place: &Place) -> String {
    match place.is_in_container {
        true => "start the container by root of its host, with --privileged".into(),
        false => "start this process as root of the host, with all its capabilities".into(),
    }
}

/// What lets this process make control groups, by what the host has: `v1`, `v2`, `hybrid` or `none`.
#[must_use]
pub fn cgroups(version: &str, place: &Place) -> String {
    let Place { user, .. } = place;
    match version {
        "none" if place.is_in_container => {
            "mount control groups in the container: --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup:rw".into()
        }
        "none" => "mount control groups: sudo mount -t cgroup2 none /sys/fs/cgroup".into(),
        _ if place.is_in_container => "start the container with a writable /sys/fs/cgroup, as root: --cgroupns=host -v \
                                       /sys/fs/cgroup:/sys/fs/cgroup:rw"
            .into(),
        _ if place.is_root => {
            "let this process make control groups (systemd: Delegate=yes in its unit), or name a group that it may divide in \
             config[\"cgroup_parent\"]"
                .into()
        }
        "v2" if place.has_systemd => {
            "start the process in a group of its own: systemd-run --user --scope -p Delegate=yes COMMAND".into()
        }
        "v2" => format!(
            "give {user} a group: sudo mkdir /sys/fs/cgroup/{user} && sudo chown -R {user} /sys/fs/cgroup/{user}, start the process in \
             it, and name it in config[\"cgroup_parent\"]"
        ),
        _ => "an ordinary user gets groups from cgroup v2 alone: boot with systemd.unified_cgroup_hierarchy=1, or run as root"
            .into(),
    }
}

impl Place {
    /// Reads the facts; nothing is changed.
    #[must_use]
    pub fn look() -> Self {
        let me = Uid::effective();
        Self {
            user: name_of(me),
            is_root: me.is_root(),
            is_in_container: privileges::is_in_container(),
            is_in_chroot: privileges::is_in_chroot(),
            // sd_booted(3).
            has_systemd: Path::new("/run/systemd/system").is_dir(),
        }
    }
}

impl Node {
    #[must_use]
    pub fn of(path: &Path, meta: &fs::Metadata) -> Self {
        let gid = Gid::from_raw(meta.gid());
        let group = Group::from_gid(gid).ok().flatten();
        let user = name_of(Uid::effective());
        let has_it = getgroups().is_ok_and(|groups| groups.contains(&gid)) || Gid::effective() == gid;
        let is_listed = !has_it && group.as_ref().is_some_and(|group| group.mem.contains(&user));
        Self {
            path: path.display().to_string(),
            mode: meta.mode() & 0o777,
            owner: name_of(Uid::from_raw(meta.uid())),
            gid: gid.as_raw(),
            group: group.map(|group| group.name),
            is_listed,
            has_kvm_group: Group::from_name("kvm").is_ok_and(|group| group.is_some()),
        }
    }
}

impl UserNamespaces {
    #[must_use]
    pub fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
        Self {
            max: read("/proc/sys/user/max_user_namespaces"),
            unprivileged_clone: read("/proc/sys/kernel/unprivileged_userns_clone"),
            apparmor_restricts: read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        }
    }
}

fn name_of(uid: Uid) -> String {
    User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ann() -> Place {
        Place { user: "ann".into(), is_root: false, is_in_container: false, is_in_chroot: false, has_systemd: true }
    }

    fn root() -> Place {
        Place { user: "root".into(), is_root: true, ..ann() }
    }

    fn in_container(place: Place) -> Place {
        Place { is_in_container: true, ..place }
    }

    fn node(mode: u32, gid: u32, group: Option<&str>) -> Node {
        Node {
            path: "/dev/kvm".into(),
            mode,
            owner: "root".into(),
            gid,
            group: group.map(str::to_owned),
            is_listed: false,
            has_kvm_group: true,
        }
    }

    #[test]
    fn test_kvm_denied_group_that_may_is_joined() {
        assert_eq!(kvm_denied(&node(0o660, 107, Some("virt")), &ann()), "sudo usermod -aG virt ann, and log in again");
        let listed = Node { is_listed: true, ..node(0o660, 107, Some("virt")) };
        assert!(kvm_denied(&listed, &ann()).ends_with("log in again (or: newgrp virt)"));
    }

    #[test]
    fn test_kvm_denied_group_that_may_not_or_has_no_name_is_changed() {
        let change = "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm && sudo usermod -aG kvm ann";
        for (mode, gid, group) in
            [(0o600, 107, Some("kvm")), (0o660, 0, Some("root")), (0o660, 107, None), (0o640, 107, Some("kvm"))]
        {
            let told = kvm_denied(&node(mode, gid, group), &ann());
            assert!(told.starts_with("no group may open it: sudo chgrp") && told.contains(change), "{told}");
        }
        let without = Node { has_kvm_group: false, ..node(0o600, 0, Some("root")) };
        assert!(kvm_denied(&without, &ann()).contains("sudo groupadd --system kvm && sudo chgrp kvm"));
    }

    #[test]
    fn test_kvm_denied_where_the_mode_lets_one_it_is_not_the_mode() {
        assert!(kvm_denied(&node(0o666, 0, Some("root")), &ann()).contains("security module"));
        assert!(kvm_denied(&node(0o600, 0, Some("root")), &root()).contains("security module"));
        let told = kvm_denied(&node(0o600, 0, Some("root")), &in_container(root()));
        assert!(told.starts_with("start the container with --device /dev/kvm"), "{told}");
    }

    #[test]
    fn test_kvm_denied_in_a_container_the_groups_number_is_added() {
        let told = kvm_denied(&node(0o660, 107, None), &in_container(ann()));
        assert_eq!(told, "start the container with --device /dev/kvm --group-add 107");
        assert!(kvm_denied(&node(0o600, 0, Some("root")), &in_container(ann())).contains("chmod 666"));
    }

    #[test]
    fn test_kvm_absent_module_is_the_cpus() {
        assert_eq!(kvm_absent("/dev/kvm", Some("vmx"), &ann()), "sudo modprobe kvm_intel");
        assert_eq!(kvm_absent("/dev/kvm", Some("svm"), &root()), "sudo modprobe kvm_amd");
        assert!(
            kvm_absent("/dev/kvm", Some("svm"), &in_container(root())).starts_with("start the container with --device")
        );
        assert!(kvm_absent("/dev/kvm", None, &in_container(root())).contains("firmware"));
    }

    #[test]
    fn test_namespaces_only_the_sysctls_that_deny_are_named() {
        let none = UserNamespaces { max: Some(9000), unprivileged_clone: Some(1), apparmor_restricts: Some(0) };
        let told = |sysctls: &UserNamespaces| namespaces(sysctls, &ann());
        assert!(told(&none).starts_with("no sysctl denies"), "{}", told(&none));
        let max = UserNamespaces { max: Some(0), ..none.clone() };
        assert!(told(&max).contains("sysctl -w user.max_user_namespaces=10000 (for good"), "{}", told(&max));
        let clone = UserNamespaces { unprivileged_clone: Some(0), ..none.clone() };
        assert!(told(&clone).contains("sysctl -w kernel.unprivileged_userns_clone=1 (for good"), "{}", told(&clone));
        let apparmor = UserNamespaces { apparmor_restricts: Some(1), ..none.clone() };
        assert!(
            told(&apparmor).contains("sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
            "{}",
            told(&apparmor)
        );
        assert!(told(&apparmor).contains("AppArmor profile with the rule \"userns,\""), "{}", told(&apparmor));
        // Root is asked for neither.
        let both = UserNamespaces { unprivileged_clone: Some(0), ..apparmor };
        assert!(namespaces(&both, &root()).starts_with("no sysctl denies"));
    }

    #[test]
    fn test_namespaces_container_and_chroot_have_ways_out_of_their_own() {
        let free = UserNamespaces::default();
        assert!(namespaces(&free, &in_container(ann()))
            .starts_with("start the container with --security-opt seccomp=unconfined"));
        let max = UserNamespaces { max: Some(0), ..free.clone() };
        let told = namespaces(&max, &in_container(root()));
        assert!(
            told.contains("on the container's host: sudo sysctl -w user.max") && told.contains("--security-opt"),
            "{told}"
        );
        assert!(namespaces(&free, &Place { is_in_chroot: true, ..root() }).contains("pivot_root"));
    }

    #[test]
    fn test_cgroups_remedy_fits_user_version_and_init() {
        let bare = Place { has_systemd: false, ..ann() };
        for (version, place, expected) in [
            ("v2", ann(), "systemd-run --user --scope -p Delegate=yes COMMAND"),
            ("v2", bare, "sudo mkdir /sys/fs/cgroup/ann && sudo chown -R ann /sys/fs/cgroup/ann"),
            ("v2", root(), "config[\"cgroup_parent\"]"),
            ("v1", ann(), "systemd.unified_cgroup_hierarchy=1"),
            ("hybrid", root(), "Delegate=yes in its unit"),
            ("v2", in_container(root()), "-v /sys/fs/cgroup:/sys/fs/cgroup:rw"),
            ("none", in_container(root()), "mount control groups in the container"),
            ("none", root(), "mount -t cgroup2 none /sys/fs/cgroup"),
        ] {
            let told = cgroups(version, &place);
            assert!(told.contains(expected), "{version} {place:?}: {told}");
        }
    }
}
