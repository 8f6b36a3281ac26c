//! What a VM boots from: kernel, initramfs, disks, the config drive, templates.

mod checks;
mod data;
mod drives;
pub mod template;

pub use checks::{check_kernel, check_rootfs};
pub use data::GuestImage;
pub use drives::{copy_disk, create_drive, create_private, create_state, write_config_drive, write_disk};
