//! The files that are made for one VM: its drives, and what its VMM saves.

use std::fs::{File, OpenOptions, Permissions};
use std::io::Read;
use std::os::unix::fs::{fchown, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::error::{Error, Result};
use crate::host::{memfd, reflink};

/// The unit in which the template is copied; what is zero in it stays a hole.
const CHUNK: usize = 64 * 1024;
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Makes a file that this user alone may read and write, whatever the umask.
///
/// # Errors
/// What open(2) says, `AlreadyExists` among it.
pub fn create_private(path: &Path, options: &mut OpenOptions) -> std::io::Result<File> {
    let file = options.create_new(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Makes a drive of `size` bytes that reads as zeros, for `owner` alone; `None`: for this user.
///
/// # Errors
/// [`Error::Host`].
pub fn create_drive(path: &Path, size: u64, owner: Option<u32>) -> Result<File> {
    let make = || {
        let file = create_private(path, OpenOptions::new().read(true).write(true))?;
        file.set_len(size)?;
        owner.map_or(Ok(()), |owner| fchown(&file, Some(owner), None))?;
        Ok(file)
    };
    make().map_err(|error: std::io::Error| Error::host("create", path.display(), error))
}

/// Makes the file that a VMM saves its devices' state to. It is open for writing only: from the descriptors that QEMU is given
/// it takes none that can be read, too.
///
/// # Errors
/// [`Error::Host`].
pub fn create_state(path: &Path) -> Result<File> {
    create_private(path, OpenOptions::new().write(true)).map_err(|error| Error::host("create", path.display(), error))
}

/// Begins an empty disk with the template's file system; the agent grows that.
///
/// # Errors
/// [`Error::Host`].
pub fn write_disk(template: &Path, disk: &File) -> Result<()> {
    let mut source = File::open(template).map_err(|error| Error::host("open", template.display(), error))?;
    let failed = |error: std::io::Error| Error::host("write", "a disk", error);
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    loop {
        let length = source.read(&mut chunk).map_err(|error| Error::host("read", template.display(), error))?;
        if length == 0 {
            return Ok(());
        }
        if !ZEROS.starts_with(&chunk[..length]) {
            disk.write_all_at(&chunk[..length], at).map_err(failed)?;
        }
        at += length as u64;
    }
}

/// Fills an empty disk of the same size as another with what that holds: sharing its blocks where the file system can, else
/// block by block.
///
/// # Errors
/// What reading or writing says.
pub fn copy_disk(source: &File, disk: &File) -> std::io::Result<()> {
    let length = source.metadata()?.len();
    if reflink::share(source, disk).is_ok() {
        return Ok(());
    }
    let mut chunk = vec![0; CHUNK];
    for extent in memfd::data_extents(source, length)? {
        for at in extent.clone().step_by(CHUNK) {
            let wanted = usize::try_from(extent.end - at).unwrap_or(CHUNK).min(CHUNK);
            source.read_exact_at(&mut chunk[..wanted], at)?;
            disk.write_all_at(&chunk[..wanted], at)?;
        }
    }
    Ok(())
}

/// Writes the block that says who the guest is, also over another one; the VMM may have the drive open.
///
/// # Errors
/// [`Error::Host`].
pub fn write_config_drive(path: &Path, block: &[u8]) -> Result<()> {
    let drive = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path);
    let written = drive.and_then(|drive| drive.write_all_at(block, 0));
    written.map_err(|error| Error::host("write", path.display(), error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn test_write_disk_is_sparse_private_and_begins_with_the_template() {
        let dir = tempfile::tempdir().unwrap();
        let (template, disk) = (dir.path().join("template"), dir.path().join("disk"));
        let mut content = vec![0; 1 << 20];
        content[300_000] = 7;
        std::fs::write(&template, &content).unwrap();
        let file = create_drive(&disk, 64 << 20, None).unwrap();
        write_disk(&template, &file).unwrap();
        let meta = disk.metadata().unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (64 << 20, 0o600));
        assert!(meta.blocks() * 512 <= 2 * CHUNK as u64, "{} blocks", meta.blocks());
        let mut start = vec![0; content.len()];
        File::open(&disk).unwrap().read_exact_at(&mut start, 0).unwrap();
        assert!(start == content);
    }
}
