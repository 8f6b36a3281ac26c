//! Fresh entropy for the guest's kernel.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

/// random(4): `RNDADDENTROPY` takes this structure.
#[repr(C)]
struct PoolInfo {
    entropy_count_bits: i32,
    size_bytes: i32,
    bytes: [u8; 32],
}

nix::ioctl_write_ptr_bad!(add_entropy, 0x4008_5203u32 as libc::c_ulong, PoolInfo);
nix::ioctl_none_bad!(reseed, 0x5207);

/// Credits `seed` and forces a reseed: writing to /dev/urandom would do neither.
pub fn credit(seed: &[u8; 32]) -> Result<(), String> {
    let device = OpenOptions::new().write(true).open("/dev/urandom").map_err(|e| format!("/dev/urandom: {e}"))?;
    let info = PoolInfo { entropy_count_bits: 256, size_bytes: 32, bytes: *seed };
    // SAFETY: the descriptor is open, and the structure is the one that the request reads.
    unsafe { add_entropy(device.as_raw_fd(), &info) }.map_err(|e| format!("RNDADDENTROPY: {e}"))?;
    // SAFETY: the request takes no argument.
    unsafe { reseed(device.as_raw_fd()) }.map_err(|e| format!("RNDRESEEDCRNG: {e}"))?;
    Ok(())
}
