//! What programs find beside the mounts: links, folders, sysctls and limits as systemd and container engines give them
//! (docs/guest.md).

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;

use nix::mount::{mount, MsFlags};
use nix::sys::resource::{setrlimit, Resource, RLIM_INFINITY};

use crate::boot::DATA;

/// The OCI runtime specification's default symbolic links.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Docker lets every user open low ports and send echo requests; systemd protects links and files in folders like /tmp.
const SYSCTLS: [(&str, &str); 6] = [
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("fs/protected_symlinks", "1"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "1"),
];

/// Folders that a root file system has; an image may lack them.
const FOLDERS: [(&str, u32); 6] = [
    ("/root", 0o700),
    ("/home", 0o755),
    ("/var/tmp", 0o1777),
    ("/var/log", 0o755),
    ("/var/lib", 0o755),
    ("/run/lock", 0o1777),
];

/// Those of them that lie on the disk where there is no image: what is written there is not the VM's memory.
const ON_DISK: [(&str, &str); 3] = [("/root", "root"), ("/home", "home"), ("/var/tmp", "tmp")];

/// The largest that a program may be given (fs.nr_open).
const MAX_FILES: u64 = 1 << 20;

/// For the agent itself: a stream has about six.
const AGENT_FILES: u64 = 4096;

fn failed(what: &str) -> impl Fn(io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// What is the kernel's: before any image is entered.
pub fn prepare_kernel() -> Result<(), String> {
    for (target, link) in LINKS {
        symlink(target, link).map_err(failed(link))?;
    }
    for (name, value) in SYSCTLS {
        let path = format!("/proc/sys/{name}");
        fs::write(&path, value).map_err(failed(&path))?;
    }
    // A program's limits are set after it has become another user, who may only lower them.
    setrlimit(Resource::RLIMIT_NOFILE, AGENT_FILES, MAX_FILES).map_err(|e| format!("RLIMIT_NOFILE: {e}"))?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).map_err(|e| format!("RLIMIT_NPROC: {e}"))
}

/// Every user may write to the disk, as to /tmp. Ours is made so: nothing is written to it at each boot.
pub fn open_disk() -> Result<(), String> {
    let mode = fs::metadata(DATA).map_err(failed(DATA))?.permissions().mode();
    if mode & 0o7777 == 0o1777 {
        return Ok(());
    }
    fs::set_permissions(DATA, fs::Permissions::from_mode(0o1777)).map_err(failed(DATA))
}

/// The folders of the root file system, our own or an image's, whose own are left as they are.
pub fn prepare_folders() -> Result<(), String> {
    FOLDERS.into_iter().try_for_each(|(path, mode)| make_folder(path, mode).map_err(failed(path)))
}

/// Lays the folders of our own root that users write to on the disk.
pub fn move_to_disk() -> Result<(), String> {
    let hidden = format!("{DATA}/.system");
    make_folder(&hidden, 0o755).map_err(failed(&hidden))?;
    for (path, name) in ON_DISK {
        let place = format!("{hidden}/{name}");
        let mode = fs::metadata(path).map_err(failed(path))?.permissions().mode();
        make_folder(&place, mode & 0o7777).map_err(failed(&place))?;
        mount(Some(place.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|e| format!("bind {path}: {e}"))?;
    }
    Ok(())
}

fn make_folder(path: &str, mode: u32) -> io::Result<()> {
    if let Some(parent) = Path::new(path).parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(mode)),
        // A folder, or an image's link to one.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_make_folder_leaves_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mode) =
            (dir.path().join("a/b"), |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777);
        make_folder(path.to_str().unwrap(), 0o1777).unwrap();
        assert_eq!(mode(&path), 0o1777);
        make_folder(path.to_str().unwrap(), 0o700).unwrap();
        assert_eq!(mode(&path), 0o1777);
    }
}
