//! The mark of a folder that this program made, or was given empty: without it nothing in the folder is swept.

use std::io::{self, ErrorKind};

use super::dir::Dir;
use crate::host::clock;

/// The file that is the mark.
pub const FILE: &str = ".tw-microvm";
/// What [`Dir::write`] leaves of it when its process dies.
pub const DRAFT: &str = "..tw-microvm.draft";
const LIMIT: u64 = 4096;

/// What a marked folder is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `config["runtime_dir"]`.
    Runtime,
    /// `config["cache_dir"]`.
    Cache,
    /// The leases of uids, the same folder for all managers of root's.
    Leases,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Runtime, Self::Cache, Self::Leases];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Runtime => "runtime",
            Self::Cache => "cache",
            Self::Leases => "leases",
        }
    }

    /// What the user calls the folder.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::Runtime => "config[\"runtime_dir\"]",
            Self::Cache => "config[\"cache_dir\"]",
            Self::Leases => "the folder of leased uids",
        }
    }
}

/// What the mark says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    pub kind: Kind,
    /// 32 hexadecimal digits, random: which folder it is, whatever its path is.
    pub id: String,
}

/// Reads the mark; `None` when there is none.
pub fn read(dir: &Dir) -> io::Result<Option<Mark>> {
    match dir.read(FILE, LIMIT) {
        Ok(bytes) => {
            let mark = parse(&bytes).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "it is not a mark of ours"));
            mark.map(Some)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(bytes: &[u8]) -> Option<Mark> {
    let first = std::str::from_utf8(bytes).ok()?.lines().next()?;
    let mut words = first.strip_prefix("tw-microvm 1 ")?.split(' ');
    let (kind, id) = (words.next()?, words.next()?);
    let kind = Kind::ALL.into_iter().find(|known| known.as_str() == kind)?;
    let hex = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    hex.then(|| Mark { kind, id: id.to_owned() })
}

/// Marks a folder.
pub fn write(dir: &Dir, kind: Kind) -> io::Result<Mark> {
    let id = clock::hex(&clock::random::<16>().map_err(io::Error::other)?);
    let text = format!(
        "tw-microvm 1 {} {id}\nThis folder belongs to microvm_isolation, which removes what its VMs leave here.\n\
         Without this file, the folder is not used.\n",
        kind.as_str()
    );
    dir.write(FILE, text.as_bytes())?;
    Ok(Mark { kind, id })
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::Scratch;
    use super::*;

    #[test]
    fn test_a_mark_is_read_as_it_was_written_and_nothing_else_is_one() {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        assert_eq!(read(&dir).unwrap(), None);
        let mark = write(&dir, Kind::Cache).unwrap();
        assert_eq!(read(&dir).unwrap(), Some(mark));
        for other in ["", "tw-microvm 1 cache", "tw-microvm 1 other 00000000000000000000000000000000", "x\n"] {
            dir.write(FILE, other.as_bytes()).unwrap();
            assert_eq!(read(&dir).unwrap_err().kind(), ErrorKind::InvalidData, "{other:?}");
        }
    }
}
