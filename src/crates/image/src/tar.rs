//! A tar stream as entries: ustar, GNU and PAX, with long names, sparse files and extended attributes.
//!
//! The `tar` crate holds whatever an extension header says in memory, and splits PAX records at line feeds, which the values of
//! extended attributes may hold. Here each has a cap, and PAX records are read by their lengths.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};

use crate::error::Problem;

const BLOCK: usize = 512;
/// Of a PAX header or a long name; extended attributes are 64 KiB each at most.
const MAX_EXTENSION: u64 = 1 << 20;
/// Segments of a sparse file.
const MAX_SEGMENTS: usize = 1 << 17;
/// As the kernel has them (linux/limits.h); a path is counted without its NUL.
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4095;
const MAX_XATTR: usize = 65_535;
const BUFFER: usize = 128 << 10;

/// What an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    File {
        size: u64,
    },
    Directory,
    Symlink(Box<[u8]>),
    /// The name that it shares an inode with.
    HardLink(Vec<Box<[u8]>>),
    Device {
        is_char: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// One entry; its path is clean: no `.`, no `..`, no empty component, and none at all for the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: Vec<Box<[u8]>>,
    pub kind: Kind,
    pub meta: Meta,
    /// Where the stored bytes of a sparse file belong; `None`: one after the other.
    segments: Option<Vec<(u64, u64)>>,
}

/// An inode's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Without the type.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime_s: i64,
    pub mtime_ns: u32,
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

impl Entry {
    #[cfg(test)]
    pub(crate) fn new(path: Vec<Box<[u8]>>, kind: Kind) -> Self {
        Self { path, kind, meta: Meta::default(), segments: None }
    }

    /// As it is called in messages.
    #[must_use]
    pub fn name(&self) -> Vec<u8> {
        self.path.join(&b'/')
    }
}

/// What extension headers say of the next entry.
#[derive(Debug, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// GNU.sparse.offset and GNU.sparse.numbytes, which are repeated.
    segments: Vec<u64>,
}

impl Extensions {
    fn number(&self, key: &[u8]) -> Option<&[u8]> {
        self.records.get(key).map(Vec::as_slice)
    }
}

/// Reads the entries of one layer.
pub struct Reader<R> {
    stream: R,
    /// Of the current entry: stored bytes that were not read, and the zeros after them.
    left: u64,
    padding: u64,
    is_done: bool,
}

type Result<T> = std::result::Result<T, Problem>;

impl<R: Read> Reader<R> {
    pub fn new(stream: R) -> Self {
        Self { stream, left: 0, padding: 0, is_done: false }
    }

    /// The next entry, after what is left of this one.
    ///
    /// # Errors
    /// [`Problem`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        let mut has_extensions = false;
        loop {
            self.skip(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let Some(header) = self.header()? else {
                return match has_extensions {
                    true => Err(Problem::Layer("it ends after an extension header".into())),
                    false => Ok(None),
                };
            };
            self.set_size(header.size()?);
            match header.kind() {
                b'L' => extensions.path = Some(until_nul(&self.extension()?).to_vec()),
                b'K' => extensions.link = Some(until_nul(&self.extension()?).to_vec()),
                b'x' => {
                    let text = self.extension()?;
                    read_records(&text, &mut extensions)?;
                }
                // A comment (git), an old vendor's header, a volume's label.
                b'g' => drop(self.extension()?),
                b'X' | b'V' => continue,
                _ => return self.entry(&header, extensions).map(Some),
            }
            has_extensions = true;
        }
    }

    fn set_size(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// The next header that is not zeros; `None` after the end's mark.
    fn header(&mut self) -> Result<Option<Header>> {
        if self.is_done {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        match self.stream.read_exact(&mut block) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(Problem::Layer("it is cut off: there is no end-of-archive mark (512 zeros)".into()))
            }
            Err(error) => return Err(error.into()),
        }
        if block.iter().all(|byte| *byte == 0) {
            self.is_done = true;
            return Ok(None);
        }
        let header = Header(block);
        header.check().map(|()| Some(header))
    }

    /// Reads on to the end of the stream, so that its checksums and digests are checked.
    ///
    /// # Errors
    /// [`Problem::Read`].
    pub fn drain(&mut self) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        while self.stream.read(&mut buffer)? > 0 {}
        Ok(())
    }

    fn skip(&mut self, length: u64) -> Result<()> {
        let skipped = std::io::copy(&mut self.stream.by_ref().take(length), &mut std::io::sink())?;
        match skipped == length {
            true => Ok(()),
            false => Err(Problem::Layer("it is cut off within an entry".into())),
        }
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.stream.read_exact(buffer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Problem::Layer("it is cut off within an entry".into()),
            _ => Problem::Read(error),
        })
    }

    fn extension(&mut self) -> Result<Vec<u8>> {
        if self.left > MAX_EXTENSION {
            let text = format!("an extension header has {} bytes, over the limit of {MAX_EXTENSION}", self.left);
            return Err(Problem::Layer(text));
        }
        let mut text = vec![0; usize::try_from(self.left).unwrap_or_default()];
        self.read_exact(&mut text)?;
        self.left = 0;
        Ok(text)
    }

    fn entry(&mut self, header: &Header, mut extensions: Extensions) -> Result<Entry> {
        let sparse_name = extensions.records.remove(b"GNU.sparse.name".as_slice());
        let records_path = extensions.records.remove(b"path".as_slice());
        let path = sparse_name.or(records_path).or(extensions.path.take()).unwrap_or_else(|| header.path());
        let refused = |problem: String| Problem::entry(&path, problem);
        let number = |key: &[u8], of_header: Result<u64>| match extensions.number(key) {
            Some(text) => decimal(text)
                .ok_or_else(|| refused(format!("has a PAX {} that is no number", String::from_utf8_lossy(key)))),
            None => of_header.map_err(|error| match error {
                Problem::Layer(problem) => refused(problem),
                other => other,
            }),
        };
        let owner = |key: &[u8], of_header| {
            let id = number(key, of_header)?;
            // 4294967295 is no user (setuid(2)).
            u32::try_from(id)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| refused(format!("has {} {id}, which Linux does not have", String::from_utf8_lossy(key))))
        };
        let (uid, gid) = (owner(b"uid", header.uid())?, owner(b"gid", header.gid())?);
        let (mtime_s, mtime_ns) = match extensions.number(b"mtime") {
            Some(text) => timestamp(text).ok_or_else(|| refused("has a PAX mtime that is no number".into()))?,
            None => (header.mtime(), 0),
        };
        let mode = u16::try_from(header.mode()? & 0o7777).unwrap_or_default();
        let size = number(b"size", header.size())?;
        let link = extensions.records.remove(b"linkpath".as_slice()).or(extensions.link.take());
        let link = link.unwrap_or_else(|| header.link());
        let mut stored = size;
        let mut segments = None;
        let is_directory_name = path.ends_with(b"/");
        let kind = match header.kind() {
            b'0' | 0 | b'7' if !is_directory_name => Kind::File { size },
            b'S' => {
                self.set_size(size);
                let map = self.old_sparse(header).map_err(|error| named(error, &path))?;
                let real = map.0;
                segments = Some(map.1);
                Kind::File { size: real }
            }
            b'1' => {
                Kind::HardLink(clean(&link).map_err(|text| refused(format!("is a hard link to a name that {text}")))?)
            }
            b'2' => Kind::Symlink(symlink_target(&link).map_err(refused)?),
            b'3' | b'4' => {
                let (major, minor) = (header.number(329, 8)?, header.number(337, 8)?);
                let fits = |number: u64, bits: u32| u32::try_from(number).ok().filter(|number| *number < 1 << bits);
                let (Some(major), Some(minor)) = (fits(major, 12), fits(minor, 20)) else {
                    return Err(refused(format!("is a device {major}:{minor}, which Linux does not have")));
                };
                Kind::Device { is_char: header.kind() == b'3', major, minor }
            }
            b'5' | b'D' | b'0' | 0 | b'7' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(refused(format!("has the type {:?}, which is not known", char::from(other)))),
        };
        let has_content = matches!(kind, Kind::File { .. }) || header.kind() == b'D';
        if !has_content {
            // As Go's reader, which Docker's is: whatever the size says, these have none.
            stored = 0;
        }
        if header.kind() != b'S' {
            self.set_size(stored);
        }
        let mut entry = Entry {
            path: clean(&path).map_err(refused)?,
            kind,
            meta: Meta { mode, uid, gid, mtime_s, mtime_ns, xattrs: BTreeMap::new() },
            segments,
        };
        if entry.path.is_empty() && entry.kind != Kind::Directory {
            return Err(refused("is the root, which must be a folder".into()));
        }
        self.pax_sparse(&mut entry, &extensions).map_err(|error| named(error, &path))?;
        for (key, value) in extensions.records {
            let Some(name) = key.strip_prefix(b"SCHILY.xattr.") else { continue };
            if name.len() > MAX_NAME || value.len() > MAX_XATTR || name.contains(&0) {
                return Err(refused(format!("has an extended attribute of {} bytes, over Linux's limit", value.len())));
            }
            entry.meta.xattrs.insert(name.into(), value.into());
        }
        Ok(entry)
    }

    /// The map of GNU's old format: four segments in the header, more in blocks after it.
    fn old_sparse(&mut self, header: &Header) -> Result<(u64, Vec<(u64, u64)>)> {
        let real = header.number(483, 12)?;
        let mut segments = Vec::new();
        let mut add = |block: &Header, from: usize, count: usize| -> Result<()> {
            for index in 0..count {
                let at = from + index * 24;
                let (offset, length) = (block.number(at, 12)?, block.number(at + 12, 12)?);
                if length > 0 {
                    segments.push((offset, length));
                }
            }
            if segments.len() > MAX_SEGMENTS {
                return Err(Problem::Layer("has more holes than any file".into()));
            }
            Ok(())
        };
        add(header, 386, 4)?;
        let mut has_more = header.0[482] != 0;
        while has_more {
            let mut block = Header([0; BLOCK]);
            self.read_exact(&mut block.0)?;
            add(&block, 0, 21)?;
            has_more = block.0[504] != 0;
        }
        check_segments(&segments, real, self.left)?;
        Ok((real, segments))
    }

    /// The maps of PAX: 0.0 and 0.1 in the header, 1.0 before the content.
    fn pax_sparse(&mut self, entry: &mut Entry, extensions: &Extensions) -> Result<()> {
        let is_1_0 = extensions.number(b"GNU.sparse.major") == Some(b"1".as_slice());
        let real = extensions.number(b"GNU.sparse.realsize").or(extensions.number(b"GNU.sparse.size"));
        let (Some(real), Kind::File { size }) = (real, &mut entry.kind) else { return Ok(()) };
        let bad = || Problem::Layer("has a map of its holes that cannot be read".into());
        let real = decimal(real).ok_or_else(bad)?;
        let numbers = match extensions.number(b"GNU.sparse.map") {
            _ if is_1_0 => self.leading_numbers()?,
            Some(b"") => Vec::new(),
            Some(map) => {
                let numbers = map.split(|byte| *byte == b',').map(decimal).collect::<Option<Vec<u64>>>();
                numbers.ok_or_else(bad)?
            }
            None => extensions.segments.clone(),
        };
        if numbers.len() % 2 != 0 || numbers.len() / 2 > MAX_SEGMENTS {
            return Err(bad());
        }
        let pairs = numbers.chunks(2).map(|pair| (pair[0], pair[1])).filter(|(_, length)| *length > 0);
        let segments: Vec<(u64, u64)> = pairs.collect();
        check_segments(&segments, real, self.left)?;
        (*size, entry.segments) = (real, Some(segments));
        Ok(())
    }

    /// PAX 1.0: a count, then offset and length of each segment, one decimal a line, padded to a block.
    fn leading_numbers(&mut self) -> Result<Vec<u64>> {
        let bad = || Problem::Layer("has a map of its holes that cannot be read".into());
        let (mut numbers, mut digits, mut wanted) = (Vec::new(), Vec::new(), None);
        while wanted.is_none_or(|wanted| numbers.len() < wanted) {
            if self.left < BLOCK as u64 {
                return Err(bad());
            }
            let mut block = [0; BLOCK];
            self.read_exact(&mut block)?;
            self.left -= BLOCK as u64;
            for byte in block {
                if wanted.is_some_and(|wanted| numbers.len() == wanted) {
                    break;
                }
                if byte != b'\n' {
                    digits.push(byte);
                    if digits.len() > 20 {
                        return Err(bad());
                    }
                    continue;
                }
                let number = decimal(&digits).ok_or_else(bad)?;
                digits.clear();
                match wanted {
                    Some(_) => numbers.push(number),
                    None => {
                        let count = usize::try_from(number).ok().filter(|count| *count <= MAX_SEGMENTS);
                        wanted = Some(count.ok_or_else(bad)? * 2);
                    }
                }
            }
        }
        Ok(numbers)
    }

    /// Hands the content of the current entry to `take`, with the place in the file of each piece; what it is not given is zeros.
    ///
    /// # Errors
    /// [`Problem`], and what `take` says.
    pub fn content<E: From<Problem>>(
        &mut self,
        entry: &Entry,
        mut take: impl FnMut(u64, &[u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let whole = [(0, self.left)];
        let segments = entry.segments.as_deref().unwrap_or(&whole);
        let mut buffer = vec![0; BUFFER.min(usize::try_from(self.left).unwrap_or(BUFFER))];
        for (offset, length) in segments {
            let mut done = 0;
            while done < *length {
                let wanted = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
                self.read_exact(&mut buffer[..wanted])?;
                self.left -= wanted as u64;
                take(offset + done, &buffer[..wanted])?;
                done += wanted as u64;
            }
        }
        Ok(())
    }
}

fn named(error: Problem, path: &[u8]) -> Problem {
    match error {
        Problem::Layer(problem) => Problem::entry(path, problem),
        other => other,
    }
}

/// In order, apart, within the file, and as many bytes as are stored.
fn check_segments(segments: &[(u64, u64)], real: u64, stored: u64) -> Result<()> {
    let (mut end, mut sum) = (0, 0_u64);
    for (offset, length) in segments {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= real);
        end = next.ok_or_else(|| Problem::Layer("has a map of its holes that contradicts itself".into()))?;
        sum += length;
    }
    match sum == stored {
        true => Ok(()),
        false => Err(Problem::Layer(format!("has {stored} bytes stored, and {sum} in the map of its holes"))),
    }
}

/// A path without what leads nowhere. What leads up is refused: no tar that is meant well has it.
fn clean(path: &[u8]) -> std::result::Result<Vec<Box<[u8]>>, String> {
    if path.contains(&0) {
        return Err("has a NUL in it".into());
    }
    if path.len() > MAX_PATH {
        return Err(format!("has {} bytes, over Linux's limit of {MAX_PATH}", path.len()));
    }
    let mut parts: Vec<Box<[u8]>> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("leads out by \"..\"".into()),
            _ if part.len() > MAX_NAME => {
                return Err(format!("has a name of {} bytes, over Linux's limit of {MAX_NAME}", part.len()))
            }
            _ => parts.push(part.into()),
        }
    }
    Ok(parts)
}

fn symlink_target(target: &[u8]) -> std::result::Result<Box<[u8]>, String> {
    if target.is_empty() || target.contains(&0) {
        return Err("is a symbolic link to nothing".into());
    }
    if target.len() > MAX_PATH {
        return Err(format!("is a symbolic link with {} bytes, over Linux's limit of {MAX_PATH}", target.len()));
    }
    Ok(target.into())
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok()
}

/// Seconds since 1970 with a fraction, also before.
fn timestamp(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (is_negative, text) = text.strip_prefix('-').map_or((false, text), |text| (true, text));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds = i64::try_from(decimal(whole.as_bytes())?).ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    match (is_negative, nanos) {
        (false, _) => Some((seconds, nanos)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some((-seconds - 1, 1_000_000_000 - nanos)),
    }
}

/// POSIX pax: `LENGTH KEY=VALUE\n`, the length that of the whole record.
fn read_records(text: &[u8], into: &mut Extensions) -> Result<()> {
    let bad = || Problem::Layer("a PAX header cannot be read".into());
    let mut rest = text;
    while !rest.is_empty() {
        let space = rest.iter().take(20).position(|byte| *byte == b' ').ok_or_else(bad)?;
        let length = decimal(&rest[..space]).and_then(|length| usize::try_from(length).ok()).ok_or_else(bad)?;
        let record = rest.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(bad)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
            if into.segments.len() / 2 >= MAX_SEGMENTS {
                return Err(Problem::Layer("a PAX header has more holes than any file".into()));
            }
            into.segments.push(decimal(value).ok_or_else(bad)?);
        } else if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") && key != b"GNU.sparse.map" {
            // As if it had never been said.
            into.records.remove(key);
        } else {
            into.records.insert(key.to_vec(), value.to_vec());
        }
        rest = &rest[length..];
    }
    Ok(())
}

/// A header's block (POSIX ustar; GNU's has other fields in the place of the prefix).
struct Header([u8; BLOCK]);

impl Header {
    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn check(&self) -> Result<()> {
        let wanted = self.number(148, 8)?;
        let sum = |add: fn(u8) -> i64| -> i64 {
            let blanked = |(at, byte): (usize, &u8)| if (148..156).contains(&at) { b' ' } else { *byte };
            self.0.iter().enumerate().map(blanked).map(add).sum()
        };
        // Old tars added up signed bytes.
        let sums = [sum(i64::from), sum(|byte| i64::from(byte.cast_signed()))];
        match i64::try_from(wanted).is_ok_and(|wanted| sums.contains(&wanted)) {
            true => Ok(()),
            false => Err(Problem::Layer("it is no tar archive, or damaged: the checksum of a header is wrong".into())),
        }
    }

    /// Octal digits, or GNU's base 256.
    fn number(&self, at: usize, length: usize) -> Result<u64> {
        let field = &self.0[at..at + length];
        let bad = || Problem::Layer(format!("has a field that is no number: {}", field.escape_ascii()));
        if field[0] & 0x80 != 0 {
            if field[0] & 0x40 != 0 {
                return Err(Problem::Layer("has a negative number".into()));
            }
            let first = u64::from(field[0] & 0x3f);
            return field[1..]
                .iter()
                .try_fold(first, |sum, byte| sum.checked_mul(256).map(|sum| sum | u64::from(*byte)).ok_or_else(bad));
        }
        let text = field.iter().copied().skip_while(|byte| *byte == b' ');
        let digits: Vec<u8> = text.take_while(|byte| *byte != 0 && *byte != b' ').collect();
        digits.iter().try_fold(0_u64, |sum, digit| match digit {
            b'0'..=b'7' => sum.checked_mul(8).map(|sum| sum + u64::from(digit - b'0')).ok_or_else(bad),
            _ => Err(bad()),
        })
    }

    fn size(&self) -> Result<u64> {
        self.number(124, 12)
    }

    fn mode(&self) -> Result<u64> {
        self.number(100, 8)
    }

    fn uid(&self) -> Result<u64> {
        self.number(108, 8)
    }

    fn gid(&self) -> Result<u64> {
        self.number(116, 8)
    }

    /// A time before 1970 in base 256 is negative.
    fn mtime(&self) -> i64 {
        let field = &self.0[136..148];
        if field[0] & 0x80 == 0 {
            return self.number(136, 12).ok().and_then(|number| i64::try_from(number).ok()).unwrap_or_default();
        }
        let low: [u8; 8] = field[4..].try_into().unwrap_or_default();
        i64::from_be_bytes(low)
    }

    fn link(&self) -> Vec<u8> {
        until_nul(&self.0[157..257]).to_vec()
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        let is_ustar = &self.0[257..263] == b"ustar\0";
        let prefix = match &self.0[508..] == b"tar\0" {
            // Schilling's tar has times after a shorter prefix.
            true => until_nul(&self.0[345..476]),
            false => until_nul(&self.0[345..500]),
        };
        match is_ustar && !prefix.is_empty() {
            true => [prefix, b"/", name].concat(),
            false => name.to_vec(),
        }
    }
}
