//! The two passes over the layers.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use crate::erofs::{self, BLOCK};
use crate::error::{Error, Problem, Result};
use crate::layout::{Layout, Place};
use crate::limits::Limits;
use crate::tar::{Entry, Kind, Reader};
use crate::tree::{Id, Node, Tree, ROOT};
use crate::unpack::Unpacked;

/// The layers of one image, the lowest first. Each is read twice.
pub trait Layers {
    fn count(&self) -> usize;

    /// As messages name it.
    fn name(&self, index: usize) -> String;

    /// The layer as it is stored.
    ///
    /// # Errors
    /// What opening says.
    fn open(&self, index: usize) -> io::Result<Box<dyn Read + '_>>;

    /// What stands between the layer's tar stream and its reader: the check of a digest, for one. It is read to its end.
    fn unpacked<'a>(&'a self, _index: usize, stream: Box<dyn Read + 'a>) -> Box<dyn Read + 'a> {
        stream
    }
}

/// Bytes of a file that [`build`] hands out at most.
const MAX_HANDED_OUT: u64 = 1 << 20;

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Of the file, holes among them.
    pub bytes: u64,
    pub inodes: u64,
    /// Of the regular files.
    pub content: u64,
    /// The content of the files that were asked for, by their paths: of those that are regular files of at most 1 MiB.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Writes the image of `layers` into an empty file, and hands out the content of the small files `asked` for by their paths
/// (`etc/passwd`; no link is followed). Blocking; a reader of [`Layers::open`]'s that fails ends it.
///
/// # Errors
/// [`Error`]; the file holds a part then, or nothing if the layers are to be blamed.
pub fn build(layers: &dyn Layers, output: &File, limits: &Limits, asked: &[&str]) -> Result<Summary> {
    let tree = read(layers, limits)?;
    let layout = Layout::of(&tree).map_err(Error::Write)?;
    let bytes = layout.blocks * BLOCK;
    output.set_len(bytes).map_err(Error::Write)?;
    write_metadata(&tree, &layout, output).map_err(Error::Write)?;
    let by_path = |path: &&str| Some((tree.find(path.as_bytes())?, (*path).to_owned()));
    let asked: BTreeMap<Id, String> = asked.iter().filter_map(by_path).collect();
    let writer = Writer { tree: &tree, layout: &layout, output, asked };
    let (content, files) = writer.write_content(layers, limits)?;
    Ok(Summary { bytes, inodes: layout.order.len() as u64, content, files })
}

/// What ends a pass.
enum Stop {
    Problem(Problem),
    Write(io::Error),
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl Stop {
    fn of(self, layer: String) -> Error {
        match self {
            Self::Problem(problem) => problem.of(layer),
            Self::Write(error) => Error::Write(error),
        }
    }
}

type Stream<'a> = Reader<Box<dyn Read + 'a>>;

fn open<'a>(layers: &'a dyn Layers, index: usize, limits: &Limits) -> Result<Stream<'a>, Problem> {
    let stream = Unpacked::new(layers.open(index)?, *limits)?;
    Ok(Reader::new(layers.unpacked(index, Box::new(stream))))
}

fn read(layers: &dyn Layers, limits: &Limits) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut used = Used::default();
    for layer in 0..layers.count() {
        let done = read_layer(layers, layer, &mut tree, &mut used, limits);
        done.map_err(|problem| problem.of(layers.name(layer)))?;
    }
    Ok(tree)
}

/// What the layers have taken of the limits.
#[derive(Default)]
struct Used {
    entries: u64,
    bytes: u64,
    metadata: u64,
}

impl Used {
    fn add(&mut self, entry: &Entry, limits: &Limits) -> Result<(), Problem> {
        self.entries += 1;
        let (content, target) = match &entry.kind {
            Kind::File { size } => (*size, 0),
            Kind::Symlink(target) => (0, target.len()),
            _ => (0, 0),
        };
        self.bytes = self.bytes.saturating_add(content);
        let names: usize = entry.path.iter().map(|part| part.len()).sum();
        let xattrs: usize = entry.meta.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.metadata += (names + target + xattrs) as u64;
        let over = |what: &str, limit: u64| {
            let text = format!("is one too many: the image would have over {limit} {what}, which is the limit");
            Err(Problem::entry(&entry.name(), text))
        };
        if self.entries > limits.entries {
            return over("entries", limits.entries);
        }
        if self.bytes > limits.bytes {
            return over("bytes in files", limits.bytes);
        }
        if self.metadata > limits.metadata {
            return over("bytes of names and attributes", limits.metadata);
        }
        Ok(())
    }
}

fn read_layer(
    layers: &dyn Layers,
    layer: usize,
    tree: &mut Tree,
    used: &mut Used,
    limits: &Limits,
) -> Result<(), Problem> {
    let number = u32::try_from(layer).unwrap_or(u32::MAX);
    let mut reader = open(layers, layer, limits)?;
    let mut index = 0;
    while let Some(entry) = reader.next_entry()? {
        used.add(&entry, limits)?;
        tree.apply(number, index, entry)?;
        index += 1;
    }
    reader.drain()
}

/// All but the regular files that have content.
fn write_metadata(tree: &Tree, layout: &Layout, output: &File) -> io::Result<()> {
    for (number, id) in (1..).zip(&layout.order) {
        let (inode, place) = (&tree.inodes[*id as usize], &layout.places[*id as usize]);
        let content = match &inode.node {
            Node::File { .. } if place.size > 0 => continue,
            Node::Directory(_) => folder_content(tree, layout, *id),
            Node::Symlink(target) => target.to_vec(),
            _ => Vec::new(),
        };
        let in_blocks = usize::try_from(place.in_blocks()).unwrap_or_default();
        let mut bytes = erofs::inode(inode, place, number);
        bytes.extend(&content[in_blocks..]);
        output.write_all_at(&bytes, place.at)?;
        output.write_all_at(&content[..in_blocks], place.block * BLOCK)?;
    }
    let root = layout.places[ROOT as usize].at;
    output.write_all_at(&erofs::superblock(root, layout.order.len() as u64, layout.blocks), 0)
}

fn folder_content(tree: &Tree, layout: &Layout, id: Id) -> Vec<u8> {
    let place = |id: Id| layout.places[id as usize].at;
    let Node::Directory(children) = &tree.inodes[id as usize].node else { return Vec::new() };
    let mut entries: Vec<(&[u8], u64, u8)> = children
        .iter()
        .map(|(name, child)| {
            let kind = erofs::entry_type(&tree.inodes[child.inode as usize].node);
            (name.as_ref(), place(child.inode), kind)
        })
        .collect();
    let (own, parent) = (place(id), place(layout.places[id as usize].parent));
    entries.extend([(b".".as_slice(), own, 2), (b"..", parent, 2)]);
    entries.sort_unstable();
    erofs::directory(&entries)
}

/// The second pass.
struct Writer<'a> {
    tree: &'a Tree,
    layout: &'a Layout,
    output: &'a File,
    asked: BTreeMap<Id, String>,
}

impl Writer<'_> {
    /// The regular files that have content, from the layers that have it; returns its bytes, and what was asked for.
    fn write_content(&self, layers: &dyn Layers, limits: &Limits) -> Result<(u64, BTreeMap<String, Vec<u8>>)> {
        let mut wanted: Vec<BTreeMap<u32, (Id, u32)>> = vec![BTreeMap::new(); layers.count()];
        for (number, id) in (1..).zip(&self.layout.order) {
            if let Node::File { size: 1.., layer, entry } = self.tree.inodes[*id as usize].node {
                wanted[layer as usize].insert(entry, (*id, number));
            }
        }
        let (mut written, mut files) = (0, BTreeMap::new());
        for (layer, wanted) in wanted.iter().enumerate().filter(|(_, wanted)| !wanted.is_empty()) {
            let copied = self.copy_layer(layers, layer, wanted, limits, &mut files);
            written += copied.map_err(|stop| stop.of(layers.name(layer)))?;
        }
        Ok((written, files))
    }

    fn copy_layer(
        &self,
        layers: &dyn Layers,
        layer: usize,
        wanted: &BTreeMap<u32, (Id, u32)>,
        limits: &Limits,
        files: &mut BTreeMap<String, Vec<u8>>,
    ) -> Result<u64, Stop> {
        let mut reader = open(layers, layer, limits)?;
        let (mut index, mut copied, mut written) = (0, 0, 0);
        while let Some(entry) = reader.next_entry()? {
            if let Some((id, number)) = wanted.get(&index) {
                let place = &self.layout.places[*id as usize];
                if entry.kind != (Kind::File { size: place.size }) {
                    return Err(Problem::entry(&entry.name(), "changed while it was read").into());
                }
                let mut file: Option<&mut Vec<u8>> =
                    self.asked.get(id).filter(|_| place.size <= MAX_HANDED_OUT).map(|path| {
                        let content = files.entry(path.clone()).or_default();
                        content.resize(usize::try_from(place.size).unwrap_or_default(), 0);
                        content
                    });
                let header = erofs::inode(&self.tree.inodes[*id as usize], place, *number);
                self.copy_file(&mut reader, &entry, place, header, file.as_mut().map(|file| file.as_mut_slice()))?;
                written += place.size;
                copied += 1;
            }
            index += 1;
        }
        reader.drain()?;
        match copied == wanted.len() {
            true => Ok(written),
            false => Err(Problem::Layer("it changed while it was read".into()).into()),
        }
    }

    fn copy_file(
        &self,
        reader: &mut Stream,
        entry: &Entry,
        place: &Place,
        header: Vec<u8>,
        mut copy: Option<&mut [u8]>,
    ) -> Result<(), Stop> {
        let in_blocks = place.in_blocks();
        let mut tail = vec![0; usize::try_from(place.size - in_blocks).unwrap_or_default()];
        reader.content(entry, |offset, bytes| -> Result<(), Stop> {
            let left = usize::try_from(in_blocks.saturating_sub(offset)).unwrap_or(usize::MAX);
            let (block, rest) = bytes.split_at(left.min(bytes.len()));
            // What is zeros stays a hole of the file.
            if block.iter().any(|byte| *byte != 0) {
                self.output.write_all_at(block, place.block * BLOCK + offset).map_err(Stop::Write)?;
            }
            if !rest.is_empty() {
                let at = usize::try_from(offset + block.len() as u64 - in_blocks).unwrap_or_default();
                tail[at..at + rest.len()].copy_from_slice(rest);
            }
            if let Some(copy) = &mut copy {
                let at = usize::try_from(offset).unwrap_or_default();
                copy[at..at + bytes.len()].copy_from_slice(bytes);
            }
            Ok(())
        })?;
        let mut bytes = header;
        bytes.extend(tail);
        self.output.write_all_at(&bytes, place.at).map_err(Stop::Write)
    }
}
