//! Layers in, an image out, and what a reader of its own finds in it beside a model.
#![allow(clippy::unwrap_used)]

mod reader;

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Write};

use microvm_image::{build, Layers, Limits, Summary};
use proptest::prelude::*;
use reader::{Found, Image};
use tar::{Builder, EntryType, Header};

/// Layers in memory.
struct Stack(Vec<Vec<u8>>);

impl Layers for Stack {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn name(&self, index: usize) -> String {
        format!("layer {index}")
    }

    fn open(&self, index: usize) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(&self.0[index])))
    }
}

fn built(layers: Vec<Vec<u8>>) -> Result<(Vec<u8>, Summary), String> {
    built_within(layers, Limits::default())
}

fn built_within(layers: Vec<Vec<u8>>, limits: Limits) -> Result<(Vec<u8>, Summary), String> {
    let mut file = tempfile::tempfile().unwrap();
    let built =
        build(&Stack(layers), &file, &limits, &["etc/passwd", "etc/missing", "etc"]).map_err(|error| error.to_string());
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    match built {
        Ok(summary) => {
            assert_eq!(summary.bytes, bytes.len() as u64);
            check(&bytes);
            Ok((bytes, summary))
        }
        Err(error) => Err(error),
    }
}

/// What erofs-utils say of an image, where they are.
fn check(image: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    match std::process::Command::new("fsck.erofs").arg(file.path()).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound),
    }
}

fn tree(layers: Vec<Vec<u8>>) -> BTreeMap<Vec<u8>, Found> {
    Image(&built(layers).unwrap().0).tree()
}

fn refusal(layers: Vec<Vec<u8>>) -> String {
    built(layers).err().unwrap_or_else(|| "it was not refused".into())
}

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(1_000_000_000);
    header
}

fn layer(fill: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    fill(&mut builder);
    builder.into_inner().unwrap()
}

/// Whatever the name is: the tar crate refuses some.
fn raw(builder: &mut Builder<Vec<u8>>, name: &[u8], mut header: Header, content: &[u8]) {
    header.as_mut_bytes()[..name.len()].copy_from_slice(name);
    header.set_cksum();
    builder.append(&header, content).unwrap();
}

fn file(builder: &mut Builder<Vec<u8>>, name: &str, content: &[u8]) {
    builder.append_data(&mut header(EntryType::Regular, content.len() as u64), name, content).unwrap();
}

#[test]
fn test_sizes_around_blocks_and_tails_come_back() {
    let sizes = [0, 1, 100, 2048, 2049, 4031, 4032, 4033, 4095, 4096, 4097, 6144, 6145, 8192, 300_000, 300_001];
    let content = |size: usize| -> Vec<u8> { (0..size).map(|at| (at * 31 % 251) as u8).collect() };
    let tree = tree(vec![layer(|tar| sizes.iter().for_each(|size| file(tar, &format!("f{size}"), &content(*size))))]);
    for size in sizes {
        assert!(tree[format!("f{size}").as_bytes()].content == content(size), "{size}");
    }
}

#[test]
fn test_every_type_owner_mode_time_and_attribute_comes_back() {
    let long = "n".repeat(255);
    let target = "t".repeat(4095);
    let tar = layer(|tar| {
        let mut directory = header(EntryType::Directory, 0);
        directory.set_mode(0o1777);
        tar.append_data(&mut directory, "./", io::empty()).unwrap();
        let mut setuid = header(EntryType::Regular, 3);
        setuid.set_mode(0o4755);
        setuid.set_uid(4_000_000_000);
        setuid.set_gid(70_000);
        tar.append_data(&mut setuid, "setuid", b"abc".as_slice()).unwrap();
        tar.append_link(&mut header(EntryType::Symlink, 0), "link", &target).unwrap();
        tar.append_link(&mut header(EntryType::Link, 0), "hard", "./setuid").unwrap();
        for (kind, name) in [(EntryType::Char, "char"), (EntryType::Block, "block"), (EntryType::Fifo, "fifo")] {
            let mut special = header(kind, 0);
            special.set_device_major(260).unwrap();
            special.set_device_minor(70_000).unwrap();
            tar.append_data(&mut special, name, io::empty()).unwrap();
        }
        tar.append_pax_extensions([
            ("mtime", b"-1.5".as_slice()),
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\n=\0\n"),
            ("SCHILY.xattr.user.empty", b""),
            ("SCHILY.xattr.com.apple.quarantine", b"x"),
            ("uid", b"99999"),
        ])
        .unwrap();
        file(tar, &format!("d/{long}"), b"long");
        raw(tar, b"/abs\xff\xfe//./x", header(EntryType::Regular, 1), b"y");
    });
    let tree = tree(vec![tar]);
    let found = |name: &str| &tree[name.as_bytes()];
    assert_eq!(found("").mode, 0o041_777);
    let setuid = found("setuid");
    assert_eq!((setuid.mode, setuid.uid, setuid.gid, setuid.links), (0o104_755, 4_000_000_000, 70_000, 2));
    assert_eq!(setuid, found("hard"));
    assert!(found("link").content == target.as_bytes() && found("link").mode == 0o120_644);
    let number = (70_000 & 0xff) | (260 << 8) | ((70_000 & !0xff) << 12);
    assert_eq!((found("char").content.clone(), found("char").mode), (u32::to_le_bytes(number).into(), 0o020_644));
    assert_eq!((found("block").mode, found("fifo").mode), (0o060_644, 0o010_644));
    let long = found(&format!("d/{long}"));
    assert_eq!((long.uid, long.gid, long.mtime), (99_999, 2, (-2, 500_000_000)));
    let xattrs = [(b"security.capability".to_vec(), b"\x01\0\0\x02\n=\0\n".to_vec()), (b"user.empty".to_vec(), vec![])];
    assert_eq!(long.xattrs, xattrs.into());
    assert_eq!((found("d").mode, found("d").links), (0o040_755, 2));
    assert_eq!(tree[b"abs\xff\xfe/x".as_slice()].content, b"y");
}

#[test]
fn test_gzip_zstd_and_plain_layers_make_the_same_image() {
    let plain = layer(|tar| (0..50).for_each(|n| file(tar, &format!("f{n}"), &vec![n; 5000])));
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
    let (head, tail) = plain.split_at(70_000);
    let skipped = b"\x5a\x2a\x4d\x18\x03\0\0\0abc".to_vec();
    let whole = built(vec![plain.clone()]).unwrap().0;
    let packed = [
        gzip(&plain),
        [gzip(head), gzip(tail)].concat(),
        zstd(&plain),
        [skipped.clone(), zstd(head), skipped.clone(), zstd(tail), skipped].concat(),
    ];
    for layer in packed {
        assert!(built(vec![layer.clone()]).unwrap().0 == whole);
        for cut in [layer.len() - 1, layer.len() / 2, 20] {
            let error = refusal(vec![layer[..cut].to_vec()]);
            assert!(error.starts_with("layer 0"), "{error}");
        }
    }
    for cut in [plain.len() - 1024, 70_000, 600, 512, 100, 0] {
        assert!(refusal(vec![plain[..cut].to_vec()]).contains("cut off"), "{cut}");
    }
    assert!(refusal(vec![b"BZh9".to_vec()]).contains("bzip2"));
}

#[test]
fn test_a_damaged_byte_of_a_compressed_layer_is_noticed() {
    let plain = layer(|tar| file(tar, "f", &vec![7; 100_000]));
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&plain).unwrap();
    let mut packed = encoder.finish().unwrap();
    let at = packed.len() - 6;
    packed[at] ^= 1;
    assert!(refusal(vec![packed]).contains("cannot be read"));
}

#[test]
fn test_sparse_files_of_all_formats_come_back() {
    let mut expected = vec![0; 100_000];
    expected[8192..8195].copy_from_slice(b"abc");
    expected[99_998..].copy_from_slice(b"yz");
    let pax = |records: &[(&str, &str)], stored: &[u8]| {
        layer(|tar| {
            tar.append_pax_extensions(records.iter().map(|(key, value)| (*key, value.as_bytes()))).unwrap();
            file(tar, "GNUSparseFile.0/s", stored);
        })
    };
    let old = layer(|tar| {
        let mut header = header(EntryType::GNUSparse, 5);
        header.as_mut_bytes()[..1].copy_from_slice(b"s");
        let octal = |number: u64| format!("{number:011o}\0");
        for (at, number) in [(386, 8192), (398, 3), (410, 99_998), (422, 2), (483, 100_000)] {
            header.as_mut_bytes()[at..at + 12].copy_from_slice(octal(number).as_bytes());
        }
        header.set_cksum();
        tar.append(&header, b"abcyz".as_slice()).unwrap();
    });
    let mut map = b"2\n8192\n3\n99998\n2\n".to_vec();
    map.resize(512, 0);
    let v1 = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "s"),
        ("GNU.sparse.realsize", "100000"),
    ];
    let v01 = [("GNU.sparse.name", "s"), ("GNU.sparse.size", "100000"), ("GNU.sparse.map", "8192,3,99998,2")];
    let v00 = [
        ("path", "s"),
        ("GNU.sparse.size", "100000"),
        ("GNU.sparse.offset", "8192"),
        ("GNU.sparse.numbytes", "3"),
        ("GNU.sparse.offset", "99998"),
        ("GNU.sparse.numbytes", "2"),
    ];
    let layers = [old, pax(&v1, &[map.as_slice(), b"abcyz"].concat()), pax(&v01, b"abcyz"), pax(&v00, b"abcyz")];
    for (format, layer) in layers.into_iter().enumerate() {
        assert!(tree(vec![layer])[b"s".as_slice()].content == expected, "{format}");
    }
    let contradictions = ["8192,3,8193,2", "8192,3,99999,2", "8192,3,99998,1", "8192", "x,1"];
    for map in contradictions {
        let records = [("GNU.sparse.name", "s"), ("GNU.sparse.size", "100000"), ("GNU.sparse.map", map)];
        assert!(refusal(vec![pax(&records, b"abcyz")]).contains("holes"), "{map}");
    }
}

#[test]
fn test_what_leads_out_or_cannot_be_is_refused_by_name() {
    let entry = |name: &[u8], kind: EntryType| layer(|tar| raw(tar, name, header(kind, 0), b""));
    let pax = |key: &str, value: &[u8]| {
        layer(|tar| {
            tar.append_pax_extensions([(key, value)]).unwrap();
            file(tar, "f", b"");
        })
    };
    let cases = [
        (entry(b"../x", EntryType::Regular), "leads out"),
        (entry(b"a/../../x", EntryType::Directory), "leads out"),
        (entry(b"./.", EntryType::Regular), "root"),
        (entry(b"x", EntryType::new(b'M')), "type 'M'"),
        (entry(b"x", EntryType::Symlink), "link to nothing"),
        (entry(b"x", EntryType::Link), "folder"),
        (pax("path", b"a\0b"), "NUL"),
        (pax("path", "n".repeat(256).as_bytes()), "256 bytes"),
        (pax("path", "n/".repeat(2500).as_bytes()), "5000 bytes"),
        (pax("uid", b"4294967295"), "uid 4294967295"),
        (pax("gid", b"-1"), "no number"),
        (pax("mtime", b"1.x"), "mtime"),
        (pax("SCHILY.xattr.user.x", &vec![0; 70_000]), "extended attribute"),
        (layer(|tar| raw(tar, b"x", header(EntryType::XHeader, 0), b"")), "ends after"),
    ];
    for (layer, expected) in cases {
        let error = refusal(vec![layer]);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let mut long = header(EntryType::XHeader, 1 << 40);
    long.set_cksum();
    assert!(refusal(vec![[long.as_bytes().to_vec(), vec![0; 2048]].concat()]).contains("extension header"));
}

#[test]
fn test_limits_name_the_entry_that_is_one_too_many() {
    let layers = || vec![layer(|tar| (0..10).for_each(|n| file(tar, &format!("f{n}"), &[1; 100])))];
    let limited = |limits| built_within(layers(), limits).unwrap_err();
    assert!(limited(Limits { entries: 3, ..Limits::default() }).contains("\"f3\""));
    assert!(limited(Limits { bytes: 450, ..Limits::default() }).contains("\"f4\""));
    assert!(limited(Limits { metadata: 12, ..Limits::default() }).contains("\"f6\""));
    let bomb = layer(|tar| file(tar, "zeros", &vec![0; 4 << 20]));
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&bomb).unwrap();
    let bomb = encoder.finish().unwrap();
    let limits = Limits { ratio: 100, free: 1 << 20, ..Limits::default() };
    assert!(built_within(vec![bomb.clone()], limits).unwrap_err().contains("100 times"));
    assert!(built(vec![bomb]).is_ok());
}

#[test]
fn test_small_files_that_are_asked_for_are_handed_out() {
    let etc = |content: &[u8]| layer(|tar| file(tar, "etc/passwd", content));
    let summary = built(vec![etc(b"below"), etc(&[7; 5000])]).unwrap().1;
    assert_eq!(summary.files, [("etc/passwd".to_owned(), vec![7; 5000])].into());
    assert_eq!(summary.content, 5000);
}

#[test]
fn test_folders_of_many_blocks_keep_their_order() {
    let names: Vec<String> = (0..5000).map(|n| format!("{}{n}", ["!", "-", "A", "z", "\u{e9}"][n % 5])).collect();
    let tree = tree(vec![layer(|tar| names.iter().for_each(|name| file(tar, &format!("d/{name}"), b"")))]);
    assert_eq!(tree.len(), 5002);
}

#[derive(Debug, Clone)]
enum Op {
    Directory(u32),
    File(u32, Vec<u8>),
    Symlink(String),
    Link(String),
    WhiteOut,
    Opaque,
}

fn ops() -> impl Strategy<Value = Vec<Vec<(String, Op)>>> {
    let path = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|parts| parts.join("/"));
    let content = prop_oneof![
        Just(vec![]),
        prop::collection::vec(any::<u8>(), 1..100),
        prop::collection::vec(any::<u8>(), 4000..9000)
    ];
    let op = prop_oneof![
        3 => (0_u32..0o10000).prop_map(Op::Directory),
        4 => (0_u32..0o10000, content).prop_map(|(mode, content)| Op::File(mode, content)),
        1 => "[a-z]{1,50}(/[a-z]{1,99}){0,3}".prop_map(Op::Symlink),
        2 => path.clone().prop_map(Op::Link),
        2 => Just(Op::WhiteOut),
        1 => Just(Op::Opaque),
    ];
    prop::collection::vec(prop::collection::vec((path, op), 0..12), 1..5)
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Directory(u32),
    File(u32, Vec<u8>),
    Symlink(String),
}

/// A path's node and the inode that it shares.
type Model = BTreeMap<String, (Node, usize)>;

fn is_below(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

/// What a layer does to the model, as the specification has it: first it hides, then it adds.
fn merge(model: &mut Model, ops: &[(String, Op)], next: &mut usize) {
    for (path, op) in ops {
        let is_folder = matches!(model.get(path), Some((Node::Directory(_), _)));
        match op {
            Op::WhiteOut => model.retain(|other, _| other != path && !is_below(other, path)),
            Op::Opaque if is_folder => model.retain(|other, _| !is_below(other, path)),
            _ => {}
        }
    }
    for (path, op) in ops {
        let shared = match op {
            Op::Link(target) => Some(model[target].clone()),
            _ => None,
        };
        let node = match op {
            Op::WhiteOut | Op::Opaque => continue,
            Op::Directory(mode) => Node::Directory(*mode),
            Op::File(mode, content) => Node::File(*mode, content.clone()),
            Op::Symlink(target) => Node::Symlink(target.clone()),
            Op::Link(_) => shared.as_ref().unwrap().0.clone(),
        };
        for parent in parents(path) {
            if !matches!(model.get(parent), Some((Node::Directory(_), _))) {
                *next += 1;
                model.insert(parent.into(), (Node::Directory(0o755), *next));
            }
        }
        if !matches!(node, Node::Directory(_)) {
            model.retain(|other, _| !is_below(other, path));
        }
        *next += 1;
        model.insert(path.clone(), (node, shared.map_or(*next, |(_, inode)| inode)));
    }
}

/// The operations of one layer that do not contradict each other.
fn consistent(model: &Model, ops: &[(String, Op)]) -> Vec<(String, Op)> {
    let mut kept: Vec<(String, Op)> = Vec::new();
    let hides = |op: &Op| matches!(op, Op::WhiteOut | Op::Opaque);
    let mut sorted: Vec<&(String, Op)> = ops.iter().collect();
    sorted.sort_by_key(|(_, op)| !hides(op));
    for (path, op) in sorted {
        let is_free = |(other, there): &(String, Op)| {
            let near = other == path || is_below(path, other) || is_below(other, path);
            let folders = [op, there].map(|op| matches!(op, Op::Directory(_)));
            match (op, there) {
                (Op::WhiteOut, _) | (_, Op::WhiteOut) => !near,
                (Op::Opaque, Op::Opaque) => !near,
                (_, Op::Opaque) => other != path || folders[0],
                _ if other == path => false,
                _ if is_below(path, other) => folders[1],
                _ if is_below(other, path) => folders[0],
                _ => true,
            }
        };
        if !kept.iter().all(is_free) {
            continue;
        }
        if let Op::Link(target) = op {
            // A target that is a lower layer's, or its own.
            let mut so_far = model.clone();
            merge(&mut so_far, &kept, &mut 1_000_000);
            let is_file = matches!(so_far.get(target), Some((Node::File(..) | Node::Symlink(_), _)));
            if !is_file || is_below(target, path) || is_below(path, target) || target == path {
                continue;
            }
        }
        kept.push((path.clone(), op.clone()));
    }
    kept
}

fn to_tar(ops: &[(String, Op)]) -> Vec<u8> {
    layer(|tar| {
        for (path, op) in ops {
            let (above, name) =
                path.rsplit_once('/').map_or((String::new(), path.as_str()), |(a, n)| (format!("{a}/"), n));
            let mut own = header(EntryType::Regular, 0);
            match op {
                Op::WhiteOut => file(tar, &format!("{above}.wh.{name}"), b""),
                Op::Opaque => file(tar, &format!("{path}/.wh..wh..opq"), b""),
                Op::Directory(mode) => {
                    own.set_entry_type(EntryType::Directory);
                    own.set_mode(*mode);
                    tar.append_data(&mut own, path, io::empty()).unwrap();
                }
                Op::File(mode, content) => {
                    own.set_mode(*mode);
                    own.set_size(content.len() as u64);
                    tar.append_data(&mut own, path, content.as_slice()).unwrap();
                }
                Op::Symlink(target) => {
                    own.set_entry_type(EntryType::Symlink);
                    tar.append_link(&mut own, path, target).unwrap();
                }
                Op::Link(target) => {
                    own.set_entry_type(EntryType::Link);
                    tar.append_link(&mut own, path, target).unwrap();
                }
            }
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn test_random_layers_come_back_as_the_model_merges_them(layers in ops()) {
        let (mut model, mut next, mut tars) = (Model::new(), 0, Vec::new());
        for ops in &layers {
            let ops = consistent(&model, ops);
            merge(&mut model, &ops, &mut next);
            tars.push(to_tar(&ops));
        }
        let (image, _) = built(tars.clone()).unwrap();
        let mut tree = Image(&image).tree();
        tree.remove(b"".as_slice());
        let names: Vec<String> = tree.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        prop_assert_eq!(names, model.keys().cloned().collect::<Vec<_>>());
        let mut inodes = BTreeMap::new();
        for (path, (node, inode)) in &model {
            let found = &tree[path.as_bytes()];
            let (mode, content) = match node {
                Node::Directory(mode) => (0o040_000 | mode, found.content.clone()),
                Node::File(mode, content) => (0o100_000 | mode, content.clone()),
                Node::Symlink(target) => (0o120_644, target.clone().into_bytes()),
            };
            prop_assert_eq!(found.mode, mode, "{}", path);
            prop_assert!(found.content == content, "{}", path);
            prop_assert_eq!(*inodes.entry(*inode).or_insert(found.nid), found.nid, "{}", path);
            if !matches!(node, Node::Directory(_)) {
                let links = model.values().filter(|(_, other)| other == inode).count();
                prop_assert_eq!(found.links as usize, links, "{}", path);
            }
        }
        prop_assert!(built(tars).unwrap().0 == image, "the same layers make another file");
    }
}
