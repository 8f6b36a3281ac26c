//! Files of the caller's, looked at before anything is launched.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Cause, Error, Result};
use crate::host::elf::Elf;

/// The note that holds the PVH entry point, and its owner (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN: &[u8] = b"Xen";
/// fs/erofs/erofs_fs.h; the features are files in chunks, without which there are no holes.
const EROFS_MAGIC: u32 = 0xE0F5_E1E2;
const EROFS_FEATURES: u32 = 4;

fn unreadable(field: &'static str, path: &Path, cause: impl Into<Cause>) -> Error {
    Error::ImageUnreadable { field, path: path.to_owned(), source: cause.into() }
}

fn open(field: &'static str, path: &Path) -> Result<(File, u64)> {
    // Looked at before it is opened: opening a FIFO would wait for a writer.
    let meta = path.metadata().map_err(|error| unreadable(field, path, error))?;
    if !meta.is_file() {
        return Err(unreadable(field, path, "it is not a regular file"));
    }
    let file = File::open(path).map_err(|error| unreadable(field, path, error))?;
    Ok((file, meta.len()))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

/// Accepts an uncompressed x86-64 ELF kernel with a PVH entry, which all three VMMs boot.
///
/// # Errors
/// [`Error::ImageUnreadable`], or [`Error::ImageInvalid`] saying what it is instead.
pub fn check_kernel(path: &Path) -> Result<()> {
    let invalid =
        |reason: &str| Error::ImageInvalid { field: "kernel_path", path: path.to_owned(), reason: reason.into() };
    let (file, _) = open("kernel_path", path)?;
    let mut header = Vec::new();
    (&file).take(1024).read_to_end(&mut header).map_err(|error| unreadable("kernel_path", path, error))?;
    if header.get(0x202..0x206) == Some(b"HdrS") {
        return Err(invalid(
            "it is a compressed bzImage; give the uncompressed vmlinux (scripts/extract-vmlinux makes it)",
        ));
    }
    if !header.starts_with(b"\x7fELF") {
        return Err(invalid("it is not an ELF file; give an uncompressed x86-64 vmlinux"));
    }
    let kernel = Elf::read(file).ok().filter(Elf::is_of_this_machine);
    let kernel = kernel.ok_or_else(|| invalid("it is an ELF file of another machine than x86-64"))?;
    match kernel.has_note(XEN, XEN_ELFNOTE_PHYS32_ENTRY) {
        Ok(true) => Ok(()),
        Ok(false) => Err(invalid("it has no PVH entry point; build it with CONFIG_PVH=y")),
        Err(error) => Err(invalid(&error.to_string())),
    }
}

/// Accepts an ext4 or EROFS image that is whole, by its superblock.
///
/// # Errors
/// [`Error::ImageUnreadable`], or [`Error::ImageInvalid`] saying what is wrong with it.
pub fn check_rootfs(path: &Path) -> Result<()> {
    let invalid = |reason: String| Error::ImageInvalid { field: "rootfs_path", path: path.to_owned(), reason };
    let (file, size) = open("rootfs_path", path)?;
    let mut superblock = [0; 1024];
    if file.read_exact_at(&mut superblock, 1024).is_err() {
        return Err(invalid(format!("it has {size} bytes, too few for an ext4 or EROFS image")));
    }
    let needed = match le32(&superblock, 0) == EROFS_MAGIC {
        true => erofs_bytes(&superblock),
        false => ext4_bytes(&superblock),
    };
    let needed = needed.map_err(|reason| invalid(reason.into()))?;
    if needed > size {
        return Err(invalid(format!("it is cut off: the file system has {needed} bytes, the file {size}")));
    }
    Ok(())
}

fn ext4_bytes(superblock: &[u8]) -> std::result::Result<u64, &'static str> {
    if superblock.get(56..58) != Some(&0xEF53_u16.to_le_bytes()) {
        return Err(
            "it is neither an ext4 nor an EROFS image; make one with mkfs.ext4 or mkfs.erofs on a plain file, without \
                    partitions, or give a container image by image=",
        );
    }
    let block_log = le32(superblock, 24);
    let blocks = u64::from(le32(superblock, 4));
    if block_log > 6 || blocks == 0 || le32(superblock, 40) == 0 {
        return Err("its ext4 superblock is damaged; run fsck.ext4 on it");
    }
    Ok(blocks << (10 + block_log))
}

/// As the guest's kernel mounts it: blocks of 4 KiB, and nothing that needs a feature beyond those of [`EROFS_FEATURES`].
fn erofs_bytes(superblock: &[u8]) -> std::result::Result<u64, &'static str> {
    if superblock[12] != 12 {
        return Err("its blocks are not of 4096 bytes; make it with mkfs.erofs -b 4096");
    }
    if le32(superblock, 80) & !EROFS_FEATURES != 0 {
        return Err("it is compressed, which the guest's kernel does not read; make it with mkfs.erofs without -z");
    }
    Ok(u64::from(le32(superblock, 36)) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tempfile::NamedTempFile;

    fn file(content: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
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
            assert!(reason(check_kernel(file(&content).path())).contains(expected), "{name}");
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
        assert!(reason(check_rootfs(file(&image).path())).contains("cut off"));
    }

    #[test]
    fn test_check_rootfs_takes_erofs_that_the_guest_can_mount() {
        let mut image = vec![0; 8192];
        image[1024..1028].copy_from_slice(&EROFS_MAGIC.to_le_bytes());
        image[1024 + 12] = 12;
        image[1024 + 36] = 2;
        check_rootfs(file(&image).path()).unwrap();
        for (at, value, expected) in [(36, 3, "cut off"), (12, 9, "4096"), (80, 1, "compressed")] {
            let mut image = image.clone();
            image[1024 + at] = value;
            assert!(reason(check_rootfs(file(&image).path())).contains(expected), "{expected}");
        }
    }
}
