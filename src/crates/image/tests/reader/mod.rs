//! A reader of EROFS of its own, after the kernel's documentation: it shares no line with the writer.

use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub links: u32,
    /// File: content; symbolic link: target; device: its number.
    pub content: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Which inode.
    pub nid: u64,
}

pub struct Image<'a>(pub &'a [u8]);

impl Image<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn inode(&self, nid: u64) -> Found {
        let at = nid as usize * 32;
        assert!(at % 4096 + 64 <= 4096, "an inode lies in two blocks");
        let format = self.u16(at);
        assert_eq!(format & 1, 1, "an extended inode");
        let size = self.u64(at + 8) as usize;
        let count = self.u16(at + 2) as usize;
        let xattr_bytes = if count == 0 { 0 } else { 12 + 4 * (count - 1) };
        let mode = u32::from(self.u16(at + 4));
        let block = self.u32(at + 16) as usize * 4096;
        let behind = at + 64 + xattr_bytes;
        let content = match (mode & 0o170_000, format >> 1) {
            (0o020_000 | 0o060_000, _) => self.u32(at + 16).to_le_bytes().to_vec(),
            (_, 0) => self.0[block..block + size].to_vec(),
            (_, 2) => {
                let full = size / 4096 * 4096;
                assert!(behind % 4096 + (size - full) <= 4096, "a tail lies in two blocks");
                if mode & 0o170_000 == 0o120_000 {
                    assert_eq!(at / 4096, (behind + size - 1) / 4096, "a target is not in its inode's block");
                }
                [&self.0[block..block + full], &self.0[behind..behind + size - full]].concat()
            }
            (_, other) => panic!("layout {other}"),
        };
        let mut xattrs = BTreeMap::new();
        let mut next = at + 64 + 12;
        while next < behind {
            let (name, number, value) = (self.0[next] as usize, self.0[next + 1], self.u16(next + 2) as usize);
            let prefix: &[u8] = match number {
                1 => b"user.",
                2 => b"system.posix_acl_access",
                3 => b"system.posix_acl_default",
                4 => b"trusted.",
                6 => b"security.",
                other => panic!("prefix {other}"),
            };
            let start = next + 4;
            let full = [prefix, &self.0[start..start + name]].concat();
            xattrs.insert(full, self.0[start + name..start + name + value].to_vec());
            next = (start + name + value).next_multiple_of(4);
        }
        Found {
            mode,
            uid: self.u32(at + 24),
            gid: self.u32(at + 28),
            mtime: (self.u64(at + 32) as i64, self.u32(at + 40)),
            links: self.u32(at + 44),
            content,
            xattrs,
            nid,
        }
    }

    fn entries(&self, folder: &Found) -> Vec<(Vec<u8>, u64, u8)> {
        let mut found = Vec::new();
        for block in folder.content.chunks(4096) {
            let u16 = |at: usize| u16::from_le_bytes(block[at..at + 2].try_into().unwrap()) as usize;
            let count = u16(8) / 12;
            for index in 0..count {
                let at = index * 12;
                let end = if index + 1 < count { u16(at + 20) } else { block.len() };
                let name: Vec<u8> = block[u16(at + 8)..end].iter().copied().take_while(|byte| *byte != 0).collect();
                found.push((name, u64::from_le_bytes(block[at..at + 8].try_into().unwrap()), block[at + 10]));
            }
        }
        assert!(found.windows(2).all(|pair| pair[0].0 < pair[1].0), "names are not in order");
        found
    }

    /// All there is by path; the root's is empty.
    pub fn tree(&self) -> BTreeMap<Vec<u8>, Found> {
        assert_eq!(self.u32(1024), 0xE0F5_E1E2);
        assert_eq!(self.0.len(), self.u32(1024 + 36) as usize * 4096);
        let root = u64::from(self.u16(1024 + 14));
        let mut found = BTreeMap::new();
        let mut folders = vec![(Vec::new(), root, root)];
        while let Some((path, nid, parent)) = folders.pop() {
            let folder = self.inode(nid);
            for (name, child, kind) in self.entries(&folder) {
                match name.as_slice() {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        let inode = self.inode(child);
                        let types = [
                            (1, 0o100_000),
                            (2, 0o040_000),
                            (3, 0o020_000),
                            (4, 0o060_000),
                            (5, 0o010_000),
                            (7, 0o120_000),
                        ];
                        assert!(types.contains(&(kind, inode.mode & 0o170_000)), "type {kind}, mode {:o}", inode.mode);
                        let path = if path.is_empty() { name } else { [path.as_slice(), b"/", &name].concat() };
                        if kind == 2 {
                            folders.push((path, child, nid));
                        } else {
                            found.insert(path, inode);
                        }
                    }
                }
            }
            found.insert(path, folder);
        }
        assert_eq!(
            found.values().map(|found| found.nid).collect::<std::collections::BTreeSet<_>>().len() as u64,
            self.u64(1024 + 16)
        );
        found
    }
}
