//! The files that come with the package.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Cause, Error, Result};
use crate::host::binary;

/// The packaged guest, the launcher of its jail, and who cleans up after a process that was killed.
#[derive(Debug, Clone)]
pub struct GuestImage {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// A small ext4 file system that every VM's disk begins as.
    pub disk_template: PathBuf,
    pub launcher: PathBuf,
    /// Preloaded into a VMM that is forked for each VM.
    pub zygote: PathBuf,
    pub janitor: PathBuf,
    /// The QEMU of the package beside this one, where that is installed.
    pub qemu: Option<PathBuf>,
    /// The gateway of a user-mode network.
    pub usernet: PathBuf,
}

impl GuestImage {
    /// Names the files below `directory`; [`GuestImage::check`] says whether they are there.
    #[must_use]
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            kernel: directory.join("vmlinux"),
            initramfs: directory.join("initramfs.cpio"),
            disk_template: directory.join("disk.ext4"),
            launcher: directory.join("microvm-jail"),
            zygote: directory.join("libmicrovm_zygote.so"),
            janitor: directory.join("microvm-janitor"),
            qemu: None,
            usernet: directory.join("microvm-usernet"),
        }
    }

    /// # Errors
    /// [`Error::ImageUnreadable`] naming the file that is missing or, for the launcher, may not be executed.
    pub fn check(&self) -> Result<()> {
        let remedy = "the installation is not complete: install the package again";
        for path in [&self.kernel, &self.initramfs, &self.disk_template, &self.launcher] {
            let unreadable =
                |source: Cause| Error::ImageUnreadable { field: "package data", path: path.clone(), source };
            let missing = |error: io::Error| {
                let text = format!("{error}; {remedy}");
                unreadable(Cause::explained(error, text))
            };
            let meta = path.metadata().map_err(missing)?;
            if !meta.is_file() || meta.len() == 0 {
                return Err(unreadable(format!("it is empty or not a file; {remedy}").into()));
            }
        }
        if !binary::is_executable(&self.launcher) {
            let source = "the installer lost its execute permission: chmod +x it".into();
            return Err(Error::ImageUnreadable { field: "package data", path: self.launcher.clone(), source });
        }
        Ok(())
    }
}
