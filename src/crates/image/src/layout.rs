//! Where everything stands in the file.
//!
//! ```text
//! block 0     the superblock, at byte 1024
//! block 1 ..  inodes, folder by folder from the root: 64 bytes, extended attributes, and the tail of small content
//! then        blocks of folders, then blocks of files, in the order of their inodes
//! ```

use std::io;

use crate::erofs::{directory_size, xattr_size, BLOCK, INODE, SLOT};
use crate::tree::{Id, Node, Tree, ROOT};

/// A longer tail gets a block of its own rather than leave more than half of an inodes' block empty.
const LONG_TAIL: u64 = BLOCK / 2;

/// Where an inode stands and its content.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    /// The inode's own byte; 0: it is in no folder any more.
    pub at: u64,
    /// Bytes of its content.
    pub size: u64,
    /// The first block of its content, but for the tail.
    pub block: u64,
    /// Whether what is left over from whole blocks stands behind the inode.
    pub is_inline: bool,
    /// The folder that it was found in first.
    pub parent: Id,
    /// Names; for a folder, its own, `.`, and `..` of those in it.
    pub links: u32,
}

impl Place {
    /// Bytes that stand in blocks.
    pub fn in_blocks(&self) -> u64 {
        if self.is_inline {
            self.size / BLOCK * BLOCK
        } else {
            self.size
        }
    }

    fn blocks(&self) -> u64 {
        self.in_blocks().div_ceil(BLOCK)
    }
}

#[derive(Debug)]
pub struct Layout {
    /// The inodes of the image, the root first, those of one folder together.
    pub order: Vec<Id>,
    /// By inode.
    pub places: Vec<Place>,
    pub blocks: u64,
}

impl Layout {
    pub fn of(tree: &Tree) -> io::Result<Self> {
        let mut places = vec![Place::default(); tree.inodes.len()];
        let order = order(tree, &mut places);
        let mut end = BLOCK;
        for id in &order {
            place(tree, *id, &mut places[*id as usize], &mut end);
        }
        let mut blocks = end.div_ceil(BLOCK);
        for wants_folders in [true, false] {
            for id in &order {
                let is_folder = matches!(tree.inodes[*id as usize].node, Node::Directory(_));
                let place = &mut places[*id as usize];
                if is_folder == wants_folders && place.blocks() > 0 {
                    place.block = blocks;
                    blocks += place.blocks();
                }
            }
        }
        if u32::try_from(blocks).is_err() {
            return Err(io::Error::other(format!("it would have {blocks} blocks, more than EROFS numbers")));
        }
        Ok(Self { order, places, blocks })
    }
}

/// Breadth first, by name: what is looked up together stands together.
fn order(tree: &Tree, places: &mut [Place]) -> Vec<Id> {
    let mut order = vec![ROOT];
    let mut next = 0;
    while let Some(folder) = order.get(next).copied() {
        next += 1;
        let Node::Directory(children) = &tree.inodes[folder as usize].node else { continue };
        let mut folders = 0;
        for name in children.values() {
            let inode = &tree.inodes[name.inode as usize];
            let place = &mut places[name.inode as usize];
            folders += u32::from(matches!(inode.node, Node::Directory(_)));
            if place.links == 0 {
                place.links = inode.links;
                place.parent = folder;
                order.push(name.inode);
            }
        }
        places[folder as usize].links = 2 + folders;
    }
    order
}

fn place(tree: &Tree, id: Id, place: &mut Place, end: &mut u64) {
    let inode = &tree.inodes[id as usize];
    place.size = match &inode.node {
        Node::Directory(children) => directory_size(children.keys().map(AsRef::as_ref)),
        Node::File { size, .. } => *size,
        Node::Symlink(target) => target.len() as u64,
        Node::Device { .. } | Node::Fifo => 0,
    };
    let fixed = INODE + xattr_size(&inode.meta.xattrs);
    let tail = place.size % BLOCK;
    let start = end.next_multiple_of(SLOT);
    let left = BLOCK - start % BLOCK;
    let next = start.next_multiple_of(BLOCK);
    (place.at, place.is_inline) = if tail > 0 && fixed + tail <= left {
        (start, true)
    } else if tail > 0 && tail <= LONG_TAIL && fixed + tail <= BLOCK {
        (next, true)
    } else if fixed > left && (left < INODE || fixed <= BLOCK) {
        (next, false)
    } else {
        (start, false)
    };
    *end = place.at + fixed + if place.is_inline { tail } else { 0 };
}
