//! EROFS as the kernel reads it (Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h): extended inodes, contents that
//! are not compressed, extended attributes behind their inode, blocks of 4 KiB. All numbers are little-endian.

use std::collections::BTreeMap;

use crate::layout::Place;
use crate::tar::Meta;
use crate::tree::{Inode, Node};

pub const BLOCK: u64 = 4096;
/// An extended inode.
pub const INODE: u64 = 64;
/// Inodes are numbered by their places, in these.
pub const SLOT: u64 = 32;

const MAGIC: u32 = 0xE0F5_E1E2;
const SUPERBLOCK: usize = 1024;
/// The superblock has a checksum; inodes' times are those of the last change of content.
const COMPATIBLE: u32 = 1 | 2;
const IS_EXTENDED: u16 = 1;
const INLINE: u16 = 2 << 1;

/// A folder's entry without its name.
const DIRENT: u64 = 12;
const XATTR_HEADER: usize = 12;
/// The names of extended attributes begin with a number for what they mostly begin with.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

const REGULAR: u16 = 0o100_000;
const DIRECTORY: u16 = 0o040_000;
const SYMLINK: u16 = 0o120_000;
const CHAR: u16 = 0o020_000;
const BLOCK_DEVICE: u16 = 0o060_000;
const FIFO: u16 = 0o010_000;

type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// The file's first block.
pub fn superblock(root_at: u64, inodes: u64, blocks: u64) -> Vec<u8> {
    let mut block = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
    let mut put =
        |at: usize, bytes: &[u8]| block[SUPERBLOCK + at..SUPERBLOCK + at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &COMPATIBLE.to_le_bytes());
    put(12, &[12]);
    put(14, &u16::try_from(root_at / SLOT).unwrap_or_default().to_le_bytes());
    put(16, &inodes.to_le_bytes());
    put(36, &u32::try_from(blocks).unwrap_or_default().to_le_bytes());
    let sum = crc32c(&block[SUPERBLOCK..]);
    block[SUPERBLOCK + 4..SUPERBLOCK + 8].copy_from_slice(&sum.to_le_bytes());
    block
}

/// CRC-32C (Castagnoli) as the kernel uses it here: not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0x82F6_3B78 } else { 0 })
    })
}

/// An inode and its extended attributes; `number` is its own, for systems of 32 bits.
pub fn inode(inode: &Inode, place: &Place, number: u32) -> Vec<u8> {
    let Meta { mode, uid, gid, mtime_s, mtime_ns, xattrs } = &inode.meta;
    let block_or_device = match &inode.node {
        Node::Device { major, minor, .. } => (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        _ => u32::try_from(place.block).unwrap_or_default(),
    };
    let xattrs = encode_xattrs(xattrs);
    let count = if xattrs.is_empty() { 0 } else { 1 + (xattrs.len() - XATTR_HEADER) / 4 };
    let format = IS_EXTENDED | if place.is_inline { INLINE } else { 0 };
    let mut bytes = Vec::with_capacity(64 + xattrs.len());
    bytes.extend(format.to_le_bytes());
    bytes.extend(u16::try_from(count).unwrap_or_default().to_le_bytes());
    bytes.extend((mode_type(&inode.node) | mode).to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(place.size.to_le_bytes());
    bytes.extend(block_or_device.to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend(uid.to_le_bytes());
    bytes.extend(gid.to_le_bytes());
    bytes.extend(mtime_s.to_le_bytes());
    bytes.extend(mtime_ns.to_le_bytes());
    bytes.extend(place.links.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(xattrs);
    bytes
}

fn mode_type(node: &Node) -> u16 {
    match node {
        Node::Directory(_) => DIRECTORY,
        Node::File { .. } => REGULAR,
        Node::Symlink(_) => SYMLINK,
        Node::Device { is_char: true, .. } => CHAR,
        Node::Device { is_char: false, .. } => BLOCK_DEVICE,
        Node::Fifo => FIFO,
    }
}

/// As a folder's entry has it.
pub fn entry_type(node: &Node) -> u8 {
    match node {
        Node::File { .. } => 1,
        Node::Directory(_) => 2,
        Node::Device { is_char: true, .. } => 3,
        Node::Device { is_char: false, .. } => 4,
        Node::Fifo => 5,
        Node::Symlink(_) => 7,
    }
}

/// Bytes of an inode's extended attributes.
pub fn xattr_size(xattrs: &Xattrs) -> u64 {
    if xattrs.is_empty() {
        return 0;
    }
    let sizes = xattrs.iter().map(|(name, value)| (4 + suffix(name).1.len() + value.len()).next_multiple_of(4));
    (XATTR_HEADER + sizes.sum::<usize>()) as u64
}

fn suffix(name: &[u8]) -> (u8, &[u8]) {
    let known = PREFIXES.iter().find_map(|(prefix, number)| Some((*number, name.strip_prefix(*prefix)?)));
    known.unwrap_or((0, name))
}

fn encode_xattrs(xattrs: &Xattrs) -> Vec<u8> {
    if xattrs.is_empty() {
        return Vec::new();
    }
    let mut bytes = vec![0; XATTR_HEADER];
    for (name, value) in xattrs {
        let (number, name) = suffix(name);
        bytes.extend([u8::try_from(name.len()).unwrap_or_default(), number]);
        bytes.extend(u16::try_from(value.len()).unwrap_or_default().to_le_bytes());
        bytes.extend(name);
        bytes.extend(value.iter());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Bytes of a folder with these names: blocks are filled one after the other, and no entry lies in two.
pub fn directory_size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    // The kernel searches, so `.` and `..` stand where their bytes put them.
    let dots = [b".".as_slice(), b".."];
    let mut names = names.peekable();
    let mut dots = dots.into_iter().peekable();
    let (mut blocks, mut used) = (0, 0);
    loop {
        let takes_dot = match (names.peek(), dots.peek()) {
            (Some(name), Some(dot)) => dot < name,
            (None, Some(_)) => true,
            (_, None) => false,
        };
        let Some(name) = (if takes_dot { dots.next() } else { names.next() }) else { break };
        let size = DIRENT + name.len() as u64;
        if used + size > BLOCK {
            (blocks, used) = (blocks + 1, 0);
        }
        used += size;
    }
    blocks * BLOCK + used
}

/// A folder's content: of each block first the entries, then the names. `entries` are sorted by name: with place and type.
pub fn directory(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |(name, ..): &&(&[u8], u64, u8)| {
            used += DIRENT + name.len() as u64;
            used <= BLOCK
        };
        let count = rest.iter().take_while(fits).count();
        let (block, others) = rest.split_at(count);
        let mut at = count * usize::try_from(DIRENT).unwrap_or_default();
        for (name, place, kind) in block {
            bytes.extend((place / SLOT).to_le_bytes());
            bytes.extend(u16::try_from(at).unwrap_or_default().to_le_bytes());
            bytes.extend([*kind, 0]);
            at += name.len();
        }
        block.iter().for_each(|(name, ..)| bytes.extend(*name));
        rest = others;
        if !rest.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(usize::try_from(BLOCK).unwrap_or(1)), 0);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_crc32c_is_castagnolis() {
        // RFC 3720, B.4: of "123456789" it is e3069283, inverted at the end.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn test_a_folder_is_as_large_as_it_is_counted() {
        for count in [0, 1, 30, 200, 3000] {
            let mut names: Vec<Vec<u8>> =
                (0..count).map(|n| format!("{n:x}").repeat(n % 40 + 1).into_bytes()).collect();
            names.push(b"!".to_vec());
            names.sort();
            names.dedup();
            let size = directory_size(names.iter().map(Vec::as_slice));
            let mut entries: Vec<(&[u8], u64, u8)> = names.iter().map(|name| (name.as_slice(), 64, 1)).collect();
            entries.extend([(b".".as_slice(), 32, 2), (b"..", 32, 2)]);
            entries.sort_unstable();
            assert_eq!(directory(&entries).len() as u64, size, "{count}");
        }
    }

    #[test]
    fn test_extended_attributes_are_as_large_as_they_are_counted() {
        let pairs = [("user.a", "1"), ("security.capability", "12345"), ("system.posix_acl_access", "x")];
        let xattrs: Xattrs =
            pairs.iter().map(|(name, value)| (name.as_bytes().into(), value.as_bytes().into())).collect();
        assert_eq!(encode_xattrs(&xattrs).len() as u64, xattr_size(&xattrs));
        assert_eq!(xattr_size(&Xattrs::new()), 0);
    }
}
