//! Files of the caller's, looked at before anything is launched.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};

/// elf(5): `e_machine` of x86-64, the program header of a note.
const EM_X86_64: u16 = 62;
const PT_NOTE: u32 = 4;
/// The note that holds the PVH entry point (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Notes of a kernel are a few hundred bytes; a longer segment is not read further.
const MAX_NOTES: u64 = 1 << 20;

fn open(field: &'static str, path: &Path) -> Result<(File, u64)> {
    let unreadable = |reason: String| Error::ImageUnreadable { field, path: path.to_owned(), reason };
    // Looked at before it is opened: opening a FIFO would wait for a writer.
    let meta = path.metadata().map_err(|error| unreadable(error.to_string()))?;
    if !meta.is_file() {
        return Err(unreadable("it is not a regular file".into()));
    }
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    Ok((file, meta.len()))
}

fn le<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    le(bytes, at).map_or(0, u16::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    le(bytes, at).map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    le(bytes, at).map_or(0, u64::from_le_bytes)
}

/// Accepts an uncompressed x86-64 ELF kernel with a PVH entry, which all three VMMs boot.
///
/// # Errors
/// [`Error::ImageUnreadable`], or [`Error::ImageInvalid`] saying what it is instead.
pub fn check_kernel(path: &Path) -> Result<()> {
    let invalid =
        |reason: &str| Error::ImageInvalid { field: "kernel_path", path: path.to_owned(), reason: reason.into() };
    let (file, size) = open("kernel_path", path)?;
    let mut header = Vec::new();
    (&file).take(1024).read_to_end(&mut header).map_err(|error| invalid(&error.to_string()))?;
    if header.get(0x202..0x206) == Some(b"HdrS") {
        return Err(invalid(
            "it is a compressed bzImage; give the uncompressed vmlinux (scripts/extract-vmlinux makes it)",
        ));
    }
    if header.get(..4) != Some(b"\x7fELF") {
        return Err(invalid("it is not an ELF file; give an uncompressed x86-64 vmlinux"));
    }
    if header.get(4..6) != Some(&[2, 1]) || le16(&header, 18) != EM_X86_64 {
        return Err(invalid("it is an ELF file of another machine than x86-64"));
    }
    let (table, entry_size, count) = (le64(&header, 32), u64::from(le16(&header, 54)), u64::from(le16(&header, 56)));
    for index in 0..count {
        let mut entry = [0; 56];
        let read = table.checked_add(index * entry_size).map(|at| file.read_exact_at(&mut entry, at));
        if !matches!(read, Some(Ok(()))) {
            return Err(invalid("it is cut off: its program headers are missing"));
        }
        let (offset, length) = (le64(&entry, 8), le64(&entry, 32));
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(invalid("it is cut off: a segment ends behind the end of the file"));
        }
        if le32(&entry, 0) == PT_NOTE {
            let mut notes = vec![0; usize::try_from(length.min(MAX_NOTES)).unwrap_or(0)];
            file.read_exact_at(&mut notes, offset).map_err(|error| invalid(&error.to_string()))?;
            if has_pvh_note(&notes) {
                return Ok(());
            }
        }
    }
    Err(invalid("it has no PVH entry point; build it with CONFIG_PVH=y"))
}

fn has_pvh_note(mut notes: &[u8]) -> bool {
    let aligned = |length: u32| (length as usize).checked_next_multiple_of(4).unwrap_or(usize::MAX);
    while notes.len() >= 12 {
        let (name, desc, kind) = (aligned(le32(notes, 0)), aligned(le32(notes, 4)), le32(notes, 8));
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") {
            return true;
        }
        let next = 12usize.saturating_add(name).saturating_add(desc);
        notes = notes.get(next..).unwrap_or_default();
    }
    false
}

/// Accepts an ext4 image that is whole, by its superblock.
///
/// # Errors
/// [`Error::ImageUnreadable`], or [`Error::ImageInvalid`] saying what is wrong with it.
pub fn check_rootfs(path: &Path) -> Result<()> {
    let invalid = |reason: String| Error::ImageInvalid { field: "rootfs_path", path: path.to_owned(), reason };
    let (file, size) = open("rootfs_path", path)?;
    let mut superblock = [0; 1024];
    if file.read_exact_at(&mut superblock, 1024).is_err() {
        return Err(invalid(format!("it has {size} bytes, too few for an ext4 image")));
    }
    if le16(&superblock, 56) != 0xEF53 {
        return Err(invalid(
            "it is not an ext4 image; make one with mkfs.ext4 on a plain file, without partitions".into(),
        ));
    }
    let block_log = le32(&superblock, 24);
    let blocks = u64::from(le32(&superblock, 4));
    if block_log > 6 || blocks == 0 || le32(&superblock, 40) == 0 {
        return Err(invalid("its ext4 superblock is damaged; run fsck.ext4 on it".into()));
    }
    let needed = blocks << (10 + block_log);
    if needed > size {
        return Err(invalid(format!("it is cut off: the file system has {needed} bytes, the file {size}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn file(name: &str, content: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("image-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        path
    }

    fn reason(result: Result<()>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn test_check_kernel_what_is_no_kernel_is_named() {
        let cases: [(&str, Vec<u8>, &str); 4] = [
            ("text", b"hello".to_vec(), "not an ELF"),
            ("arm", [b"\x7fELF\x02\x01".to_vec(), vec![0; 100]].concat(), "another machine"),
            ("bz", [vec![0; 0x202], b"HdrS".to_vec()].concat(), "bzImage"),
            ("empty", vec![], "not an ELF"),
        ];
        for (name, content, expected) in cases {
            let path = file(name, &content);
            assert!(reason(check_kernel(&path)).contains(expected), "{name}");
            std::fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn test_check_kernel_this_program_has_no_pvh_entry() {
        assert!(reason(check_kernel(&std::env::current_exe().unwrap())).contains("CONFIG_PVH"));
    }

    #[test]
    fn test_check_missing_and_directory_are_unreadable() {
        assert_eq!(check_kernel(Path::new("/nowhere/vmlinux")).unwrap_err().code(), "image_unreadable");
        assert_eq!(check_rootfs(Path::new("/")).unwrap_err().code(), "image_unreadable");
    }

    #[test]
    fn test_check_rootfs_truncated_is_named() {
        let mut image = vec![0; 4096];
        image[1024 + 56..1024 + 58].copy_from_slice(&0xEF53u16.to_le_bytes());
        image[1024 + 4] = 200;
        image[1024 + 40] = 16;
        let path = file("cut", &image);
        assert!(reason(check_rootfs(&path)).contains("cut off"));
        std::fs::remove_file(path).unwrap();
    }
}
