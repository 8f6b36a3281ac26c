//! What a process has made of a private mapping: the pages that it wrote, without touching the others.
//!
//! Reading the whole mapping would make the kernel allocate every page that its file does not have. The page map (Linux,
//! Documentation/admin-guide/mm/pagemap.rst) tells which pages are the process's own; all others are the file's.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Of the file, or of memory shared with others.
const OF_FILE: u64 = 1 << 61;
/// Pages whose entries, and bytes, are read at once.
const BATCH: usize = 256;

/// A part of a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    addresses: Range<u64>,
    /// Where it begins in the file.
    offset: u64,
}

impl Part {
    fn length(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }
}

/// A private mapping in another process.
#[derive(Debug)]
pub struct ProcessMemory {
    parts: Vec<Part>,
    memory: File,
    pages: File,
}

impl ProcessMemory {
    /// Finds the one private mapping of `length` bytes in `pid`: of a memory file (memfd), or else of nothing.
    ///
    /// # Errors
    /// `NotFound` when there is none; `PermissionDenied` where this user may not look into the process.
    pub fn find(pid: i32, length: u64) -> io::Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let missing = || io::Error::new(ErrorKind::NotFound, format!("process {pid} has no memory of {length} bytes"));
        let parts = find_mapping(&maps, length).ok_or_else(missing)?;
        let (memory, pages) = (File::open(format!("/proc/{pid}/mem"))?, File::open(format!("/proc/{pid}/pagemap"))?);
        Ok(Self { parts, memory, pages })
    }

    /// Writes every page of the process's own to its place in `to`, which holds what the mapped file does, zeros if there is
    /// none; returns how many.
    ///
    /// # Errors
    /// What reading or writing says.
    pub fn copy_own_pages(&self, to: &File) -> io::Result<u64> {
        let mut copied = 0;
        let (mut entries, mut bytes) = ([0; BATCH * 8], vec![0; BATCH * PAGE as usize]);
        for part in &self.parts {
            let mut at = part.addresses.start;
            while at < part.addresses.end {
                let count = ((part.addresses.end - at) / PAGE).min(BATCH as u64) as usize;
                let entries = &mut entries[..count * 8];
                self.pages.read_exact_at(entries, at / PAGE * 8)?;
                for run in runs(entries) {
                    let (first, length) = (run.start as u64 * PAGE, (run.end - run.start) * PAGE as usize);
                    let bytes = &mut bytes[..length];
                    self.memory.read_exact_at(bytes, at + first)?;
                    to.write_all_at(bytes, part.offset + (at - part.addresses.start) + first)?;
                    copied += run.len() as u64;
                }
                at += count as u64 * PAGE;
            }
        }
        Ok(copied)
    }
}

/// The pages next to each other that are the process's own, by their entries in the page map.
fn runs(entries: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, entry) in entries.chunks_exact(8).enumerate() {
        let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
        if entry & (PRESENT | SWAPPED) == 0 || entry & OF_FILE != 0 {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == index => last.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

/// The parts of the private mapping that covers a memory file from its beginning for `length` bytes; else the anonymous
/// mapping of exactly that length. Two of a kind would leave open which is meant.
fn find_mapping(maps: &str, length: u64) -> Option<Vec<Part>> {
    let mut files: Vec<(&str, Vec<Part>)> = Vec::new();
    let mut anonymous = Vec::new();
    for line in maps.lines() {
        // proc_pid_maps(5): address, perms, offset, dev, inode, pathname.
        let fields: Vec<&str> = line.split_whitespace().take(6).collect();
        let [addresses, "rw-p", offset, _, inode, path @ ..] = &fields[..] else { continue };
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = addresses.split_once('-')?;
        let part = Part { addresses: hex(start)?..hex(end)?, offset: hex(offset)? };
        match path {
            [] if part.length() == length => anonymous.push(vec![part]),
            [path] if path.starts_with("/memfd:") => match files.iter_mut().find(|(known, _)| known == inode) {
                Some((_, parts)) => parts.push(part),
                None => files.push((inode, vec![part])),
            },
            _ => {}
        }
    }
    let whole = |(_, mut parts): (&str, Vec<Part>)| {
        parts.sort_by_key(|part| part.offset);
        let end = parts.iter().try_fold(0, |at, part| (part.offset == at).then_some(at + part.length()));
        (end == Some(length)).then_some(parts)
    };
    let mut of_files: Vec<_> = files.into_iter().filter_map(whole).collect();
    match (of_files.len(), anonymous.len()) {
        (1, _) => of_files.pop(),
        (0, 1) => anonymous.pop(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::memfd;
    use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
    use std::num::NonZeroUsize;

    #[test]
    fn test_copy_own_pages_are_those_written_and_no_page_of_the_file_is_made() {
        const LENGTH: u64 = 64 * PAGE;
        let file = memfd::sealed("ram", LENGTH, |file| file.write_all_at(&[1; 2 * PAGE as usize], 3 * PAGE)).unwrap();
        let size = NonZeroUsize::new(LENGTH as usize).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh private mapping that nothing else refers to, of pages that the file has.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_PRIVATE, &file, 0) }.unwrap();
        for page in [3, 40, 41] {
            // SAFETY: within the mapping.
            unsafe { start.as_ptr().cast::<u8>().add(page * PAGE as usize + 7).write(page as u8) };
        }
        // SAFETY: within the mapping; read, so that a page of the file's is present, too.
        assert_eq!(unsafe { start.as_ptr().cast::<u8>().add(4 * PAGE as usize).read() }, 1);
        let copy = tempfile::tempfile().unwrap();
        copy.set_len(LENGTH).unwrap();
        let memory = ProcessMemory::find(std::process::id() as i32, LENGTH).unwrap();
        assert_eq!(memory.copy_own_pages(&copy).unwrap(), 3);
        // SAFETY: the mapping made above, which nothing uses any more.
        unsafe { munmap(start, LENGTH as usize) }.unwrap();
        let byte = |at: u64| {
            let mut byte = [0];
            copy.read_exact_at(&mut byte, at).unwrap();
            byte[0]
        };
        assert_eq!(
            [byte(3 * PAGE + 7), byte(3 * PAGE), byte(4 * PAGE), byte(40 * PAGE + 7), byte(41 * PAGE + 7)],
            [3, 1, 0, 40, 41]
        );
        // Those that were touched; none for having been looked at.
        let made = memfd::data_extents(&File::from(file), LENGTH).unwrap();
        assert_eq!(made, [3 * PAGE..5 * PAGE, 40 * PAGE..42 * PAGE]);
    }

    #[test]
    fn test_find_mapping_joins_its_parts_and_wants_one() {
        let line = |range: &str, perms: &str, offset: &str, inode: u32| {
            format!("{range} {perms} {offset} 00:01 {inode}                 /memfd:ram (deleted)\n")
        };
        let two = line("2000-4000", "rw-p", "00001000", 7) + &line("1000-2000", "rw-p", "00000000", 7);
        let parts = find_mapping(&two, 0x3000).unwrap();
        assert_eq!(parts[0], Part { addresses: 0x1000..0x2000, offset: 0 });
        assert_eq!(parts[1], Part { addresses: 0x2000..0x4000, offset: 0x1000 });
        assert_eq!(find_mapping(&two, 0x2000), None);
        assert_eq!(find_mapping(&line("1000-4000", "rw-s", "00000000", 7), 0x3000), None);
        let another = line("8000-b000", "rw-p", "00000000", 8);
        assert_eq!(find_mapping(&(two + &another), 0x3000), None);
        let nothing = "1000-4000 rw-p 00000000 00:00 0 \n4000-7000 ---p 00000000 00:00 0 \n";
        let both = format!("nonsense\n{nothing}{another}");
        assert_eq!(find_mapping(&both, 0x3000).unwrap()[0].addresses, 0x8000..0xb000);
        assert_eq!(find_mapping(nothing, 0x3000).unwrap()[0].addresses, 0x1000..0x4000);
        assert_eq!(find_mapping(&nothing.repeat(2), 0x3000), None);
        assert_eq!(find_mapping("1000-4000 rw-p 00000000 00:00 0 [heap]\n", 0x3000), None);
    }

    #[test]
    fn test_runs_leave_out_what_is_the_files_or_nobodys() {
        let entries: Vec<u8> =
            [PRESENT, SWAPPED, PRESENT | OF_FILE, 0, PRESENT].iter().flat_map(|e| e.to_ne_bytes()).collect();
        assert_eq!(runs(&entries), [0..2, 4..5]);
    }
}
