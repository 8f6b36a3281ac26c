//! The merged tree of the layers, without the files' content.
//!
//! Layers are applied the lowest first. Each name carries the layer that touched it last: a whiteout hides what lower
//! layers brought, never what its own layer brings, in whatever order a tar has the two.

use std::collections::{BTreeMap, HashSet};

use crate::error::Problem;
use crate::tar::{Entry, Kind, Meta};

/// The OCI image specification: "X was removed", and "all that this folder had was removed".
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What AUFS kept for itself.
const AUFS: &[u8] = b".wh..wh.";
/// What overlayfs keeps for itself: in a layer it would hide or move files once the guest lays its own layer over the image.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// The namespaces that Linux has; others are another system's.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
/// An inode has 64 KiB less its other parts for all of them: its blocks are found by 16 bits.
const MAX_XATTRS: usize = 60_000;

pub type Id = u32;
pub const ROOT: Id = 0;
type Result<T> = std::result::Result<T, Problem>;

#[derive(Debug)]
pub struct Inode {
    pub meta: Meta,
    pub node: Node,
    /// Names, but for a folder, which has one. 0: nothing leads to it any more.
    pub links: u32,
}

#[derive(Debug)]
pub enum Node {
    Directory(BTreeMap<Box<[u8]>, Name>),
    /// Its content is that of this entry of this layer.
    File {
        size: u64,
        layer: u32,
        entry: u32,
    },
    Symlink(Box<[u8]>),
    Device {
        is_char: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

#[derive(Debug, Clone, Copy)]
pub struct Name {
    pub inode: Id,
    /// That touched it last.
    layer: u32,
}

#[derive(Debug)]
pub struct Tree {
    pub inodes: Vec<Inode>,
    /// Folders that hold nothing of the layers below this one any more, so that no layer has them looked through twice.
    pruned: HashSet<Id>,
    pruned_layer: u32,
}

impl Tree {
    pub fn new() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        let root = Inode { meta, node: Node::Directory(BTreeMap::new()), links: 1 };
        Self { inodes: vec![root], pruned: HashSet::new(), pruned_layer: 0 }
    }

    /// Applies one entry; `index` is its number in its layer.
    pub fn apply(&mut self, layer: u32, index: u32, entry: Entry) -> Result<()> {
        let name = entry.name();
        let refused = |problem: &str| Problem::entry(&name, problem);
        let Entry { path, kind, mut meta, .. } = entry;
        keep_xattrs(&mut meta).map_err(|problem| refused(&problem))?;
        let Some((last, above)) = path.split_last() else {
            self.inodes[ROOT as usize].meta = meta;
            return Ok(());
        };
        if last.starts_with(WHITEOUT) && !last.starts_with(AUFS) {
            let hidden = &last[WHITEOUT.len()..];
            return match hidden {
                b"" | b"." | b".." => Err(refused("is a whiteout of nothing")),
                _ => self.white_out(above, hidden, layer),
            };
        }
        if last.as_ref() == OPAQUE {
            if let Some(folder) = self.find_directory(above) {
                self.touch(above, layer);
                self.prune(folder, layer);
            }
            return Ok(());
        }
        if last.starts_with(AUFS) {
            return Ok(());
        }
        if let Kind::HardLink(target) = &kind {
            return self.link(above, last, target, layer, &name);
        }
        let folder = self.make_parents(above, layer).map_err(refused)?;
        let old = self.children(folder).get(last).copied();
        let node = match kind {
            Kind::Directory => {
                if let Some(old) = old.filter(|old| self.is_directory(old.inode)) {
                    self.inodes[old.inode as usize].meta = meta;
                    self.children(folder).insert(last.clone(), Name { layer, ..old });
                    return Ok(());
                }
                Node::Directory(BTreeMap::new())
            }
            Kind::File { size } => Node::File { size, layer, entry: index },
            Kind::Symlink(target) => Node::Symlink(target),
            Kind::Device { is_char, major, minor } => Node::Device { is_char, major, minor },
            Kind::Fifo => Node::Fifo,
            Kind::HardLink(_) => return Ok(()),
        };
        self.unlink(folder, last);
        let inode = self.add(Inode { meta, node, links: 1 }).map_err(refused)?;
        self.children(folder).insert(last.clone(), Name { inode, layer });
        Ok(())
    }

    fn add(&mut self, inode: Inode) -> std::result::Result<Id, &'static str> {
        let id = Id::try_from(self.inodes.len()).map_err(|_| "is one entry too many")?;
        self.inodes.push(inode);
        Ok(id)
    }

    fn is_directory(&self, id: Id) -> bool {
        matches!(self.inodes[id as usize].node, Node::Directory(_))
    }

    /// Of an inode that is a folder.
    fn children(&mut self, id: Id) -> &mut BTreeMap<Box<[u8]>, Name> {
        match &mut self.inodes[id as usize].node {
            Node::Directory(children) => children,
            _ => unreachable!("a folder's id"),
        }
    }

    fn child(&self, folder: Id, name: &[u8]) -> Option<Name> {
        match &self.inodes[folder as usize].node {
            Node::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    /// The inode at a path whose parts are names.
    pub fn find(&self, path: &[u8]) -> Option<Id> {
        path.split(|byte| *byte == b'/').try_fold(ROOT, |folder, name| self.child(folder, name).map(|name| name.inode))
    }

    fn find_parts(&self, path: &[Box<[u8]>]) -> Option<Id> {
        path.iter().try_fold(ROOT, |folder, name| self.child(folder, name).map(|name| name.inode))
    }

    fn find_directory(&self, path: &[Box<[u8]>]) -> Option<Id> {
        self.find_parts(path).filter(|id| self.is_directory(*id))
    }

    /// A layer that changes something in a folder touches the folder.
    fn touch(&mut self, path: &[Box<[u8]>], layer: u32) {
        let mut folder = ROOT;
        for part in path {
            let Some(name) = self.children(folder).get_mut(part) else { return };
            name.layer = layer;
            folder = name.inode;
            if !self.is_directory(folder) {
                return;
            }
        }
    }

    /// The folder at a path, made where it is missing. What a lower layer has in its place gives way, as under overlayfs;
    /// within one layer that is a way to write through a link, and refused.
    fn make_parents(&mut self, path: &[Box<[u8]>], layer: u32) -> std::result::Result<Id, &'static str> {
        let mut folder = ROOT;
        for part in path {
            let found = self.child(folder, part);
            let inode = match found {
                Some(name) if self.is_directory(name.inode) => name.inode,
                Some(name) if name.layer == layer => return Err("lies below what is no folder in its own layer"),
                _ => {
                    self.unlink(folder, part);
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    self.add(Inode { meta, node: Node::Directory(BTreeMap::new()), links: 1 })?
                }
            };
            self.children(folder).insert(part.clone(), Name { inode, layer });
            folder = inode;
        }
        Ok(folder)
    }

    fn link(&mut self, above: &[Box<[u8]>], last: &[u8], target: &[Box<[u8]>], layer: u32, name: &[u8]) -> Result<()> {
        let shown = || String::from_utf8_lossy(&target.join(&b'/')).into_owned();
        let refused = |problem: String| Problem::entry(name, problem);
        let Some(inode) = self.find_parts(target) else {
            return Err(refused(format!("is a hard link to {:?}, which is not there", shown())));
        };
        if self.is_directory(inode) {
            return Err(refused(format!("is a hard link to the folder {:?}", shown())));
        }
        // Before anything is taken away: the new name may be a folder above the old one.
        self.inodes[inode as usize].links += 1;
        let folder = self.make_parents(above, layer).map_err(|problem| refused(problem.into()))?;
        self.unlink(folder, last);
        self.children(folder).insert(last.into(), Name { inode, layer });
        Ok(())
    }

    fn white_out(&mut self, above: &[Box<[u8]>], hidden: &[u8], layer: u32) -> Result<()> {
        let Some(folder) = self.find_directory(above) else { return Ok(()) };
        self.touch(above, layer);
        let Some(name) = self.child(folder, hidden) else { return Ok(()) };
        if name.layer < layer {
            self.unlink(folder, hidden);
        } else if self.is_directory(name.inode) {
            self.prune(name.inode, layer);
        }
        Ok(())
    }

    /// Takes from a folder all that its layer did not touch.
    fn prune(&mut self, folder: Id, layer: u32) {
        if self.pruned_layer != layer {
            self.pruned.clear();
            self.pruned_layer = layer;
        }
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            if !self.pruned.insert(folder) {
                continue;
            }
            let names: Vec<(Box<[u8]>, Name)> =
                self.children(folder).iter().map(|(part, name)| (part.clone(), *name)).collect();
            for (part, name) in names {
                if name.layer < layer {
                    self.unlink(folder, &part);
                } else if self.is_directory(name.inode) {
                    folders.push(name.inode);
                }
            }
        }
    }

    /// Takes a name away, with all below it.
    fn unlink(&mut self, folder: Id, name: &[u8]) {
        let mut gone: Vec<Id> = self.children(folder).remove(name).map(|name| name.inode).into_iter().collect();
        while let Some(id) = gone.pop() {
            let inode = &mut self.inodes[id as usize];
            inode.links -= 1;
            if inode.links > 0 {
                continue;
            }
            inode.meta.xattrs = BTreeMap::new();
            if let Node::Directory(children) = &mut inode.node {
                gone.extend(std::mem::take(children).into_values().map(|name| name.inode));
            }
        }
    }
}

/// Leaves out what is not Linux's, or would change how the guest's overlay reads the image.
fn keep_xattrs(meta: &mut Meta) -> std::result::Result<(), String> {
    meta.xattrs.retain(|name, _| {
        let is_known = NAMESPACES.iter().any(|space| name.starts_with(space) && name.len() > space.len());
        (is_known && !name.starts_with(OVERLAY)) || ACLS.contains(&name.as_ref())
    });
    let bytes: usize = meta.xattrs.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
    match bytes > MAX_XATTRS {
        true => Err(format!("has {bytes} bytes of extended attributes, over the limit of {MAX_XATTRS}")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(path: &str) -> Vec<Box<[u8]>> {
        path.split('/').filter(|part| !part.is_empty()).map(|part| part.as_bytes().into()).collect()
    }

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry::new(parts(path), kind)
    }

    /// A tree of layers, each of which is a list of words: `a/` a folder, `a` a file, `a=b` a hard link, `a>b` a symbolic one.
    fn tree(layers: &[&str]) -> Result<Tree> {
        let mut tree = Tree::new();
        for (layer, words) in (0..).zip(layers) {
            for (index, word) in (0..).zip(words.split_whitespace()) {
                let entry = match (word.split_once('='), word.split_once('>')) {
                    (Some((name, target)), _) => entry(name, Kind::HardLink(parts(target))),
                    (_, Some((name, target))) => entry(name, Kind::Symlink(target.as_bytes().into())),
                    _ if word.ends_with('/') => entry(word, Kind::Directory),
                    _ => entry(word, Kind::File { size: 1 }),
                };
                tree.apply(layer, index, entry)?;
            }
        }
        Ok(tree)
    }

    fn names(tree: &Tree) -> String {
        let mut found = Vec::new();
        let mut folders = vec![(ROOT, String::new())];
        while let Some((folder, path)) = folders.pop() {
            let Node::Directory(children) = &tree.inodes[folder as usize].node else { unreachable!() };
            for (part, name) in children {
                let path = format!("{path}{}", String::from_utf8_lossy(part));
                let inode = &tree.inodes[name.inode as usize];
                match &inode.node {
                    Node::Directory(_) => {
                        found.push(format!("{path}/"));
                        folders.push((name.inode, format!("{path}/")));
                    }
                    Node::File { layer, .. } => found.push(format!("{path}:{layer}x{}", inode.links)),
                    Node::Symlink(_) => found.push(format!("{path}>")),
                    _ => found.push(path),
                }
            }
        }
        found.sort();
        found.join(" ")
    }

    fn merged(layers: &[&str]) -> String {
        names(&tree(layers).unwrap())
    }

    #[test]
    fn test_an_upper_layer_hides_what_it_replaces() {
        assert_eq!(merged(&["a b/ b/c", "a b/d"]), "a:1x1 b/ b/c:0x1 b/d:1x1");
        assert_eq!(merged(&["b/ b/c", "b"]), "b:1x1");
        assert_eq!(merged(&["b", "b/c"]), "b/ b/c:1x1");
        assert_eq!(merged(&["b>x x/", "b/c"]), "b/ b/c:1x1 x/");
        assert_eq!(merged(&["a a/ a"]), "a:0x1");
    }

    #[test]
    fn test_whiteouts_hide_lower_layers_and_not_their_own() {
        assert_eq!(merged(&["a b/c", ".wh.a .wh.b .wh.nothing no/.wh.x"]), "");
        assert_eq!(merged(&["a b/c", "a .wh.a b/d .wh.b"]), "a:1x1 b/ b/d:1x1");
        assert_eq!(merged(&["a b/c", ".wh.a a .wh.b b/d"]), "a:1x1 b/ b/d:1x1");
        assert_eq!(merged(&["a", ".wh.a", "a"]), "a:2x1");
    }

    #[test]
    fn test_opaque_folders_keep_only_their_own_layer() {
        for layer in ["b/ b/.wh..wh..opq b/d/e", "b/ b/d/e b/.wh..wh..opq"] {
            assert_eq!(merged(&["b/c b/d/f", layer]), "b/ b/d/ b/d/e:1x1", "{layer}");
        }
        assert_eq!(merged(&["b/c", "b/.wh..wh..opq", "b/d"]), "b/ b/d:2x1");
        assert_eq!(merged(&["b/.wh..wh.plnk b/.wh..wh.aufs"]), "");
    }

    #[test]
    fn test_hard_links_share_what_an_upper_layer_takes_one_name_of() {
        assert_eq!(merged(&["a b=a", "c=a .wh.a"]), "b:0x2 c:0x2");
        assert_eq!(merged(&["a b=a", "a"]), "a:1x1 b:0x1");
        assert_eq!(merged(&["d/a", "d=d/a"]), "d:0x1");
        assert_eq!(merged(&["a a=a"]), "a:0x1");
        assert_eq!(merged(&["s>x t=s"]), "s> t>");
    }

    #[test]
    fn test_what_would_be_written_through_a_link_is_refused() {
        for layer in ["s>/etc s/passwd", "s s/x", "s>d d/ s/x=d", "h=nothing", "d/ h=d", ".wh."] {
            assert!(matches!(tree(&[layer]), Err(Problem::Entry { .. })), "{layer}");
        }
    }

    #[test]
    fn test_xattrs_of_other_systems_and_of_overlayfs_are_left_out() {
        let mut meta = Meta::default();
        for name in ["user.a", "user.", "security.capability", "trusted.overlay.opaque", "com.apple.x", "trusted.b"] {
            meta.xattrs.insert(name.as_bytes().into(), b"v".as_slice().into());
        }
        keep_xattrs(&mut meta).unwrap();
        let kept: Vec<_> = meta.xattrs.keys().map(|name| String::from_utf8_lossy(name)).collect();
        assert_eq!(kept, ["security.capability", "trusted.b", "user.a"]);
        meta.xattrs.insert(b"user.long".as_slice().into(), vec![0; MAX_XATTRS].into());
        assert!(keep_xattrs(&mut meta).is_err());
    }
}
