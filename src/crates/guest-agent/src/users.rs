//! The users that programs run as: what passwd(5) says of them, and what they are given where it says nothing.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{chown, DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::sync::{Mutex, PoisonError};

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
const HOMES: &str = "/home";
const SHELL: &str = "/bin/sh";

/// A line of passwd(5), as far as a program is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub gid: u32,
    pub home: String,
    pub shell: String,
}

/// Two first programs of one user would each add a line.
static ADDING: Mutex<()> = Mutex::new(());

/// The user with this uid: the image's own, else one that is added to its passwd and group. The home is a folder that is
/// the user's own, or `/` where a full disk or a read-only image leaves no room for one.
pub fn of(uid: u32) -> User {
    let _guard = ADDING.lock().unwrap_or_else(PoisonError::into_inner);
    let passwd = read(PASSWD);
    let mut user = match find(&passwd, uid) {
        Some(user) => user,
        None => {
            let user = invent(&passwd, uid);
            let User { name, gid, home, shell } = &user;
            note(append(PASSWD, &passwd, &format!("{name}:x:{uid}:{gid}::{home}:{shell}")));
            let group = read(GROUP);
            if field(&group, 2, &gid.to_string()).is_none() {
                note(append(GROUP, &group, &format!("{name}:x:{gid}:")));
            }
            user
        }
    };
    if !is_own(&user.home, uid) {
        user.home = make_home(&user, uid).unwrap_or_else(|error| {
            note(Err(error));
            "/".into()
        });
    }
    user
}

/// A program without a name or a home runs all the same.
fn note(done: io::Result<()>) {
    if let Err(error) = done {
        eprintln!("microvm-agent: {error}");
    }
}

/// An image need not have the file.
fn read(path: &str) -> String {
    fs::read(path).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn append(path: &str, text: &str, line: &str) -> io::Result<()> {
    let start = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let file = OpenOptions::new().append(true).create(true).mode(0o644).open(path);
    // One write: who reads the file meanwhile sees all of the line or nothing.
    file.and_then(|mut file| file.write_all(format!("{start}{line}\n").as_bytes())).map_err(|error| named(path, &error))
}

fn named(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

/// The first line whose field number `place` is `value`.
fn field<'a>(text: &'a str, place: usize, value: &str) -> Option<&'a str> {
    text.lines().find(|line| line.split(':').nth(place) == Some(value))
}

fn find(passwd: &str, uid: u32) -> Option<User> {
    let fields: Vec<&str> = field(passwd, 2, &uid.to_string())?.split(':').collect();
    let [name, _, _, gid, _, home, shell, ..] = fields[..] else { return None };
    let shell = if shell.is_empty() { SHELL } else { shell };
    Some(User { name: name.into(), gid: gid.parse().ok()?, home: home.into(), shell: shell.into() })
}

fn invent(passwd: &str, uid: u32) -> User {
    let names = ["user", "uid", "microvm-user"].map(|word| format!("{word}{uid}"));
    let is_free = |name: &String| field(passwd, 0, name).is_none();
    let name = names.into_iter().find(is_free).unwrap_or_else(|| uid.to_string());
    User { home: format!("{HOMES}/{name}"), name, gid: uid, shell: SHELL.into() }
}

fn is_own(home: &str, uid: u32) -> bool {
    home != "/" && fs::metadata(home).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid)
}

fn make_home(user: &User, uid: u32) -> io::Result<String> {
    let name = if user.name.is_empty() || user.name.contains('/') { uid.to_string() } else { user.name.clone() };
    let home = format!("{HOMES}/{name}");
    fs::DirBuilder::new().recursive(true).mode(0o755).create(HOMES).map_err(|error| named(HOMES, &error))?;
    match fs::DirBuilder::new().mode(0o700).create(&home) {
        Ok(()) => chown(&home, Some(uid), Some(user.gid)).map_err(|error| named(&home, &error))?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists && is_own(&home, uid) => {}
        Err(error) => return Err(named(&home, &error)),
    }
    Ok(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nnode:x:1000:50::/home/node:\nodd:x:7\nuser5:x:6:6::/:/bin/sh\n";

    #[test]
    fn test_find_takes_the_images_own_user() {
        let node = User { name: "node".into(), gid: 50, home: "/home/node".into(), shell: SHELL.into() };
        assert_eq!(find(PASSWD, 1000), Some(node));
        assert_eq!((find(PASSWD, 100), find(PASSWD, 7)), (None, None));
    }

    #[test]
    fn test_invent_takes_a_name_that_is_free() {
        assert_eq!(invent(PASSWD, 1001).name, "user1001");
        assert_eq!(invent(PASSWD, 5).name, "uid5");
        assert_eq!(invent("", 5).home, "/home/user5");
    }

    #[test]
    fn test_append_begins_a_line_of_its_own() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let shown = file.path().to_str().unwrap();
        fs::write(&file, "a:x:1:1::/:").unwrap();
        append(shown, &read(shown), "b:x:2:2::/:").unwrap();
        append(shown, &read(shown), "c:x:3:3::/:").unwrap();
        assert_eq!(read(shown), "a:x:1:1::/:\nb:x:2:2::/:\nc:x:3:3::/:\n");
    }
}
