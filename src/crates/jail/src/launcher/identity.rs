//! Who the VMM is: its user, its user namespace, and the privileges that it does not have.
//!
//! Architecture invariant: after [`renounce`] no process of the jail holds a capability or can gain one, by whatever it
//! executes.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::{Identity, Layer, Stage};
use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::stat::{umask, Mode};
use nix::unistd::{getegid, geteuid, setgroups, setresgid, setresuid, Gid, Pid, Uid};

use super::confine::enter;
use super::failure::Failure;

/// A user namespace in which the current user is the only one and keeps its number.
pub fn enter_own_user_namespace() -> Result<(), Failure> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    enter(CloneFlags::CLONE_NEWUSER, Stage::UserNamespace, "user")?;
    write_maps("self", uid, gid)
}

/// Makes `uid` and `gid` the only user and group of a process's new user namespace, under the same numbers.
fn write_maps(process: &str, uid: u32, gid: u32) -> Result<(), Failure> {
    // The kernel takes gid_map from an ordinary user only once setgroups is denied (user_namespaces(7)).
    for (file, content) in
        [("setgroups", "deny".to_owned()), ("uid_map", format!("{uid} {uid} 1")), ("gid_map", format!("{gid} {gid} 1"))]
    {
        let path = format!("/proc/{process}/{file}");
        let written = OpenOptions::new().write(true).open(&path).and_then(|mut map| map.write_all(content.as_bytes()));
        written.map_err(|error| {
            Failure::io(Stage::UserNamespace, &error, format_args!("writing \"{content}\" to {path}"))
        })?;
    }
    Ok(())
}

/// C's half of the maps that only L, outside, may write: a byte from C says that the namespace is there, a byte from L
/// that the maps are written.
pub struct MapRequest {
    pub ready: File,
    pub written: File,
}

/// L's half.
pub struct MapService {
    pub ready: File,
    pub written: File,
}

pub fn map_by_launcher() -> Result<(MapRequest, MapService), Failure> {
    let pipe = || {
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|errno| Failure::errno(Stage::UserNamespace, errno, "making a pipe"))
    };
    let (ready_end, ready) = pipe()?;
    let (written, written_end) = pipe()?;
    Ok((
        MapRequest { ready: ready.into(), written: written.into() },
        MapService { ready: ready_end.into(), written: written_end.into() },
    ))
}

impl MapService {
    /// Waits for C's namespace and writes its maps. A C that failed before has reported that itself.
    pub fn serve(mut self, supervisor: Pid, identity: Identity) -> Result<(), Failure> {
        if self.ready.read_exact(&mut [0]).is_err() {
            return Ok(());
        }
        write_maps(&supervisor.to_string(), identity.uid, identity.gid)?;
        self.written.write_all(&[1]).map_err(|error| {
            Failure::io(Stage::UserNamespace, &error, "telling the supervisor that its maps are written")
        })
    }
}

/// Becomes the VM's user for good; `namespace` is the way to get a user namespace on the way there.
pub fn become_user(Identity { uid, gid }: Identity, namespace: Option<MapRequest>) -> Result<(), Failure> {
    let failed = |errno, what: &str| {
        let way_out = if errno == Errno::EPERM { " (only root may choose whom the VMM runs as)" } else { "" };
        Failure::errno(Stage::Identity, errno, format_args!("{what}{way_out}"))
    };
    // While that is still allowed: the namespace will deny it.
    setgroups(&[]).map_err(|errno| failed(errno, "dropping the supplementary groups"))?;
    if let Some(MapRequest { mut ready, mut written }) = namespace {
        enter(CloneFlags::CLONE_NEWUSER, Stage::UserNamespace, "user")?;
        ready
            .write_all(&[1])
            .and_then(|()| written.read_exact(&mut [0]))
            .map_err(|error| Failure::io(Stage::UserNamespace, &error, "waiting for the launcher to write the maps"))?;
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(|errno| failed(errno, &format!("setresgid {gid}")))?;
    setresuid(uid, uid, uid).map_err(|errno| failed(errno, &format!("setresuid {uid}")))
}

/// The kinds of namespaces that the kernel counts for each user namespace.
const COUNTED: [&str; 8] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"];

/// Allows no further namespaces in the user namespace that the caller is in and has every capability of. `proc` is the
/// host's `/proc`, which the VMM's root does not have.
pub fn forbid_namespaces(proc: Option<&OwnedFd>) -> Layer {
    let Some(proc) = proc else { return Layer::Missing("/proc was not there when the jail was made".into()) };
    // One lookup a file: the tables below sys/user are those of the caller's own namespace.
    let write = |kind: &str| -> Result<(), String> {
        let path = format!("sys/user/max_{kind}_namespaces");
        let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC;
        match nix::fcntl::openat(proc, path.as_str(), flags, Mode::empty()) {
            Ok(file) => File::from(file).write_all(b"0").map_err(|error| format!("{path}: {error}")),
            // Time namespaces came with 5.6.
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(format!("{path}: {}", errno.desc())),
        }
    };
    match COUNTED.into_iter().try_for_each(write) {
        Ok(()) => Layer::Given("user.max_*_namespaces are 0 in its user namespace".into()),
        Err(reason) => Layer::Missing(reason),
    }
}

/// The host's `/proc`, to be looked into after the root has changed.
pub fn open_proc() -> Option<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC;
    nix::fcntl::open(Path::new("/proc"), flags, Mode::empty()).ok()
}

/// A session keyring of its own: the manager's user and session keyrings are out of the VMM's reach.
pub fn leave_keyring() -> Layer {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: keyctl(2) with a null name makes an anonymous keyring; no memory is handed over.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) };
    match Errno::result(joined) {
        Ok(_) => Layer::Given("a new anonymous session keyring".into()),
        Err(Errno::ENOSYS) => Layer::Missing("this kernel has no keyrings".into()),
        Err(errno) => Layer::Missing(format!("keyctl: {}", errno.desc())),
    }
}

/// capabilities(7): securebits, each with its lock. Uid 0 means nothing, a change of uid gives nothing back, ambient
/// capabilities cannot be raised.
const SECURE_BITS: libc::c_ulong = 0b1110_1111;
/// linux/capability.h: _LINUX_CAPABILITY_VERSION_3, two 32-bit words a set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Gives up every capability in every set, now and for whatever is executed later.
pub fn renounce() -> Result<(), Failure> {
    let failed = |errno, what: &str| Failure::errno(Stage::Privileges, errno, what);
    let may_change_sets = drop_bounding_set()?;
    if may_change_sets {
        // SAFETY: PR_SET_SECUREBITS takes one integer.
        let set = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0) };
        Errno::result(set).map_err(|errno| failed(errno, "PR_SET_SECUREBITS"))?;
    }
    // SAFETY: integers only.
    let cleared = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    match Errno::result(cleared) {
        // Ambient capabilities came with 4.3; older kernels have none to clear.
        Ok(_) | Err(Errno::EINVAL) => {}
        Err(errno) => return Err(failed(errno, "PR_CAP_AMBIENT_CLEAR_ALL")),
    }
    let header = [CAPABILITY_VERSION, 0];
    let none = [0u32; 6];
    // SAFETY: `header` is the kernel's struct of two words and `none` its two structs of three; both outlive the call.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    Errno::result(set).map_err(|errno| failed(errno, "capset"))?;
    prctl::set_no_new_privs().map_err(|errno| failed(errno, "PR_SET_NO_NEW_PRIVS"))?;
    // The supervisor has the VMM's uid: the VMM must not be able to trace it. Executing the VMM undoes this for the VMM.
    prctl::set_dumpable(false).map_err(|errno| failed(errno, "PR_SET_DUMPABLE"))?;
    umask(Mode::from_bits_truncate(0o077));
    Ok(())
}

/// Empties the bounding set; says whether the caller had the right to (it has no capabilities to bound otherwise).
fn drop_bounding_set() -> Result<bool, Failure> {
    // Up to the last one that this kernel knows, which may be more than any list of ours.
    for capability in 0.. {
        // SAFETY: PR_CAPBSET_DROP takes one integer.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) };
        match Errno::result(dropped) {
            Ok(_) => {}
            Err(Errno::EINVAL) => return Ok(true),
            Err(Errno::EPERM) => return Ok(false),
            Err(errno) => {
                let what = format!("dropping capability {capability} from the bounding set");
                return Err(Failure::errno(Stage::Privileges, errno, what));
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_secure_bits_have_every_lock() {
        // linux/securebits.h: a setting is an even bit, its lock the odd one above it.
        assert_eq!(SECURE_BITS & 0b1010_1010, 0b1010_1010);
        let keep_caps = 1 << 4;
        assert_eq!(SECURE_BITS & keep_caps, 0);
    }
}
