//! The way to a folder, each step of it on a descriptor.
//!
//! Architecture invariant: a step is taken only in a folder in which no other user can exchange what the step found: it
//! belongs to root or to this user, and no other user may write to it, or it is sticky. A link is followed only when it
//! belongs to root or to this user. After that, other users cannot make the path lead elsewhere.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{open, openat, readlinkat, OFlag};
use nix::sys::stat::{fstat, FileStat, Mode, SFlag};
use nix::unistd::geteuid;

use super::dir::{is_kind, make_in, Dir, Id};
use crate::error::Cause;
use crate::host::acl;

/// As many as the kernel follows.
const LINKS: u32 = 40;

/// Why a folder is not used, and the way out.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub cause: Cause,
    pub remedy: String,
}

impl Refusal {
    pub fn new(cause: impl Into<Cause>, remedy: impl Into<String>) -> Self {
        Self { cause: cause.into(), remedy: remedy.into() }
    }
}

/// A folder of this user's, closed to all others, and what it lies in.
#[derive(Debug)]
pub struct Found {
    pub dir: Dir,
    pub id: Id,
    pub above: Vec<Id>,
}

struct Step {
    fd: OwnedFd,
    path: PathBuf,
    stat: FileStat,
}

/// Opens the folder at an absolute path; `make`: also the missing ones on the way to it. `None` when it is not there.
pub fn to(path: &Path, make: bool) -> Result<Option<Found>, Refusal> {
    let Some(mut steps) = follow(path, make, false)? else { return Ok(None) };
    let above = steps.iter().rev().skip(1).map(|step| Id::of(&step.stat)).collect();
    let Some(last) = steps.pop() else { return Ok(None) };
    check_last(&last)?;
    let dir = Dir::from_fd(&last.fd, path.to_owned()).map_err(|error| cannot("open", &last.path, error))?;
    Ok(Some(Found { dir, id: Id::of(&last.stat), above }))
}

/// Opens (`O_PATH`) the socket at an absolute path, of root's or this user's, that no other user can exchange. `None` when it
/// is not there.
pub fn to_socket(path: &Path) -> Result<Option<OwnedFd>, Refusal> {
    to_socket_by(path, LINKS)
}

fn to_socket_by(path: &Path, links_left: u32) -> Result<Option<OwnedFd>, Refusal> {
    let no_socket = |path: &Path| Refusal::new(format!("{} is not a socket", path.display()), "name a VM's socket");
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Err(no_socket(path)) };
    let Some(steps) = follow(folder, false, true)? else { return Ok(None) };
    let Some(at) = steps.last() else { return Ok(None) };
    check_step(at)?;
    match step(at, name, false)? {
        Some(found) if is_kind(&found.stat, SFlag::S_IFSOCK) => Ok(Some(found.fd)),
        Some(link) if is_kind(&link.stat, SFlag::S_IFLNK) && links_left > 0 => {
            let target = readlinkat(&link.fd, "").map_err(|errno| cannot("read", &link.path, errno))?;
            to_socket_by(&folder.join(target), links_left - 1)
        }
        Some(found) => Err(no_socket(&found.path)),
        None => Ok(None),
    }
}

/// The folders from the root to the one at an absolute path, which may be a link where `takes_link`.
fn follow(path: &Path, make: bool, takes_link: bool) -> Result<Option<Vec<Step>>, Refusal> {
    let mut ahead: VecDeque<OsString> = names(path).collect();
    let mut steps = vec![root()?];
    let mut links = 0;
    while let Some(name) = ahead.pop_front() {
        if name == ".." {
            steps.truncate(steps.len().max(2) - 1);
            continue;
        }
        let Some(at) = steps.last() else { break };
        check_step(at)?;
        let Some(next) = step(at, &name, make)? else { return Ok(None) };
        if is_kind(&next.stat, SFlag::S_IFLNK) {
            links += 1;
            if (ahead.is_empty() && !takes_link) || links > LINKS {
                let reason = format!("{} is a symbolic link", next.path.display());
                return Err(Refusal::new(reason, "name the folder that it leads to"));
            }
            let target = readlinkat(&next.fd, "").map_err(|errno| cannot("read", &next.path, errno))?;
            let target = PathBuf::from(target);
            if target.is_absolute() {
                steps.truncate(1);
            }
            names(&target).collect::<Vec<_>>().into_iter().rev().for_each(|name| ahead.push_front(name));
        } else if is_kind(&next.stat, SFlag::S_IFDIR) {
            steps.push(next);
        } else {
            let reason = format!("{} is not a folder", next.path.display());
            return Err(Refusal::new(reason, "name a folder"));
        }
    }
    Ok(Some(steps))
}

fn names(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

fn cannot(what: &str, path: &Path, cause: impl Into<Cause>) -> Refusal {
    let cause = cause.into();
    let text = format!("{} cannot be {what}: {cause}", path.display(), what = past(what));
    Refusal::new(Cause::explained(cause, text), "name another folder")
}

fn cannot_make(path: &Path, errno: Errno) -> Refusal {
    let refusal = cannot("make", path, errno);
    match errno {
        Errno::EROFS => Refusal {
            remedy:
                "name a folder that can be written, or let the default one be: docker run --tmpfs /tmp, or systemd's \
                     CacheDirectory=tw-microvm with CacheDirectoryMode=0700"
                    .into(),
            ..refusal
        },
        _ => refusal,
    }
}

fn past(what: &str) -> &str {
    match what {
        "make" => "made",
        "open" => "opened",
        other => other,
    }
}

fn root() -> Result<Step, Refusal> {
    let path = PathBuf::from("/");
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let fd = open(&path, flags, Mode::empty()).map_err(|errno| cannot("open", &path, errno))?;
    let stat = fstat(&fd).map_err(|errno| cannot("open", &path, errno))?;
    Ok(Step { fd, path, stat })
}

fn step(at: &Step, name: &OsStr, make: bool) -> Result<Option<Step>, Refusal> {
    let path = at.path.join(name);
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let look = || openat(&at.fd, name, flags, Mode::empty());
    let fd = match look() {
        Err(Errno::ENOENT) if !make => return Ok(None),
        Err(Errno::ENOENT) => {
            make_in(&at.fd, name).map_err(|errno| cannot_make(&path, errno))?;
            look()
        }
        found => found,
    };
    let fd = fd.map_err(|errno| cannot("open", &path, errno))?;
    let stat = fstat(&fd).map_err(|errno| cannot("open", &path, errno))?;
    if !is_trusted(stat.st_uid) {
        let reason = format!("{} belongs to uid {}, who can exchange it at any time", path.display(), stat.st_uid);
        return Err(Refusal::new(reason, "name a folder that lies in folders of root's and of this user's alone"));
    }
    Ok(Some(Step { fd, path, stat }))
}

/// Whether nobody but root and this user decides what the names in a folder stand for.
fn check_step(step: &Step) -> Result<(), Refusal> {
    let mode = step.stat.st_mode;
    let sticky = mode & libc::S_ISVTX != 0;
    let others = mode & 0o002 != 0 || (mode & 0o020 != 0 && !is_private_group(step));
    if sticky || !others {
        return Ok(());
    }
    let path = step.path.display();
    let reason = format!("other users may write to {path} (mode {:o})", mode & 0o7777);
    Err(Refusal::new(reason, format!("chmod go-w {path}, or name a folder elsewhere")))
}

/// Whether it is this user's alone.
fn check_last(step: &Step) -> Result<(), Refusal> {
    let (own, mode, path) = (geteuid().as_raw(), step.stat.st_mode, step.path.display());
    if step.stat.st_uid != own {
        let reason = format!("{path} belongs to uid {}, and this process runs as uid {own}", step.stat.st_uid);
        return Err(Refusal::new(reason, "name a folder of this user's, or one that is not there yet"));
    }
    if mode & 0o077 != 0 {
        let reason = format!("{path} has mode {:o} and must be closed to other users", mode & 0o777);
        return Err(Refusal::new(reason, format!("chmod 700 {path}")));
    }
    Ok(())
}

/// Root, this user, or, in a user namespace, an owner from outside of it, such as the host's root for `/`.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw() || is_from_outside(uid)
}

/// user_namespaces(7): the kernel shows an owner that has no uid here as the overflow uid.
fn is_from_outside(uid: u32) -> bool {
    let overflow = fs::read_to_string("/proc/sys/kernel/overflowuid").unwrap_or_default();
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    overflow.trim().parse() == Ok(uid) && !map.is_empty() && !has(&map, uid)
}

/// Whether a user namespace's map gives it a uid.
fn has(map: &str, uid: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().unwrap_or(0));
        let (first, _, count) = (numbers.next(), numbers.next(), numbers.next());
        first.zip(count).is_some_and(|(first, count)| (first..first + count).contains(&u64::from(uid)))
    })
}

/// Whether the group that may write has the folder's owner in it and no other user (Debian and Fedora give each user such a
/// group). With an access list the group's bits stand for others as well.
fn is_private_group(step: &Step) -> bool {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let (uid, gid) = (step.stat.st_uid, step.stat.st_gid);
    is_alone(&read("/etc/passwd"), &read("/etc/group"), uid, gid) && !acl::is_set(&step.fd)
}

fn is_alone(passwd: &str, group: &str, uid: u32, gid: u32) -> bool {
    let rows = |text: &str| {
        let rows = text.lines().map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>());
        rows.filter(|row| row.len() >= 4).collect::<Vec<_>>()
    };
    let (users, groups) = (rows(passwd), rows(group));
    let number = |row: &[String], at: usize| row[at].parse::<u32>().ok();
    let Some(owner) = users.iter().find(|row| number(row, 2) == Some(uid)) else { return false };
    let Some(named) = groups.iter().find(|row| number(row, 2) == Some(gid)) else { return false };
    let strangers = users.iter().any(|row| number(row, 3) == Some(gid) && number(row, 2) != Some(uid));
    let members = named[3].split(',').filter(|name| !name.is_empty());
    number(owner, 3) == Some(gid) && !strangers && members.into_iter().all(|name| name == owner[0])
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::Scratch;
    use super::*;
    use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn test_what_is_missing_is_made_private_or_not_at_all() {
        let scratch = Scratch::new();
        let path = scratch.path().join("a/b");
        assert!(to(&path, false).unwrap().is_none());
        let found = to(&path, true).unwrap().unwrap();
        assert_eq!(found.dir.path(), path);
        for made in ["a", "a/b"] {
            assert_eq!(scratch.path().join(made).metadata().unwrap().mode() & 0o777, 0o700);
        }
        let parent = to(&scratch.path().join("a"), false).unwrap().unwrap();
        assert!(found.above.contains(&parent.id) && !parent.above.contains(&found.id));
    }

    #[test]
    fn test_a_folder_in_which_others_may_write_is_no_way() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("open")).unwrap();
        for (bits, taken) in [(0o777, false), (0o702, false), (0o1777, true), (0o755, true)] {
            mode(&scratch.path().join("open"), bits);
            let found = to(&scratch.path().join("open/base"), true);
            assert_eq!(found.is_ok(), taken, "{bits:o} {found:?}");
        }
        mode(&scratch.path().join("open"), 0o777);
        let refusal = to(&scratch.path().join("open/base"), false).unwrap_err();
        assert!(
            refusal.cause.to_string().contains("open (mode 777)") && refusal.remedy.contains("chmod go-w"),
            "{refusal:?}"
        );
    }

    #[test]
    fn test_links_are_followed_on_the_way_and_refused_at_its_end() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("real")).unwrap();
        mode(&scratch.path().join("real"), 0o700);
        symlink("real", scratch.path().join("link")).unwrap();
        symlink(scratch.path().join("link"), scratch.path().join("far")).unwrap();
        assert!(to(&scratch.path().join("far/base"), true).unwrap().is_some());
        assert!(to(&scratch.path().join("far/../real/./base"), false).unwrap().is_some());
        assert!(to(&scratch.path().join("link"), true).unwrap_err().cause.to_string().contains("symbolic link"));
        symlink("loop", scratch.path().join("loop")).unwrap();
        assert!(to(&scratch.path().join("loop/base"), true).unwrap_err().cause.to_string().contains("symbolic link"));
    }

    #[test]
    fn test_a_socket_is_reached_where_no_other_user_can_exchange_what_leads_to_it() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("own")).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(scratch.path().join("own/sock")).unwrap();
        symlink("own", scratch.path().join("link")).unwrap();
        symlink("own/sock", scratch.path().join("other")).unwrap();
        symlink("round", scratch.path().join("round")).unwrap();
        for path in ["own/sock", "link/sock", "other"] {
            assert!(to_socket(&scratch.path().join(path)).unwrap().is_some(), "{path}");
        }
        assert!(to_socket(&scratch.path().join("own/none")).unwrap().is_none());
        for path in ["own", "round"] {
            assert!(
                to_socket(&scratch.path().join(path)).unwrap_err().cause.to_string().contains("not a socket"),
                "{path}"
            );
        }
        mode(&scratch.path().join("own"), 0o777);
        assert!(to_socket(&scratch.path().join("own/sock"))
            .unwrap_err()
            .cause
            .to_string()
            .contains("other users may write"));
    }

    #[test]
    fn test_the_folder_itself_must_be_closed() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path().join("base")).unwrap();
        mode(&scratch.path().join("base"), 0o755);
        let refusal = to(&scratch.path().join("base"), true).unwrap_err();
        assert!(refusal.cause.to_string().contains("755") && refusal.remedy.contains("chmod 700"), "{refusal:?}");
        fs::write(scratch.path().join("file"), b"").unwrap();
        assert!(to(&scratch.path().join("file"), true).unwrap_err().cause.to_string().contains("not a folder"));
        assert!(to(&scratch.path().join("file/base"), true).unwrap_err().cause.to_string().contains("not a folder"));
    }

    #[test]
    fn test_a_private_group_has_its_user_alone() {
        let passwd = "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:\nbob:x:1001:1001::/home/bob:\n";
        let alone = |group: &str, uid, gid| is_alone(passwd, group, uid, gid);
        assert!(alone("ann:x:1000:\n", 1000, 1000) && alone("ann:x:1000:ann\n", 1000, 1000));
        assert!(alone("root:x:0:\n", 0, 0));
        assert!(!alone("ann:x:1000:bob\n", 1000, 1000) && !alone("root:x:0:ann\n", 0, 0));
        assert!(!alone("users:x:100:ann\n", 1000, 100) && !alone("", 1000, 1000));
        let shared = "ann:x:1000:1000::/h:\nbob:x:1001:1000::/h:\n";
        assert!(!is_alone(shared, "ann:x:1000:\n", 1000, 1000));
    }

    #[test]
    fn test_owners_from_outside_a_user_namespace_are_told_by_its_map() {
        assert!(has("         0          0 4294967295\n", 65534) && !has("0 1000 1\n", 65534));
        assert!(!has("0 1000 1\n1 100000 65533\n", 65534) && has("0 1000 1\n1 100000 65536\n", 65534));
    }
}
