//! Taps: interfaces whose other end is a descriptor.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{facts, Refusal};
use crate::error::Cause;
use crate::host::fork::{self, ForkGuard};

/// The clone device; tuntap.rst.
const DEVICE: &str = "/dev/net/tun";
/// linux/if_tun.h: `_IOW('T', 202, int)`, though it takes a `struct ifreq`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// linux/if_tun.h: `_IOW('T', 203, int)` and `_IOW('T', 204, int)`, with the number itself as argument.
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;

/// A tap that this process holds, and no child that it forks. One that it made vanishes with the last copy of the
/// descriptor.
#[derive(Debug)]
pub struct Tap {
    // Let go of before the descriptor is closed.
    _fork_guard: ForkGuard,
    pub fd: OwnedFd,
    pub name: String,
    pub index: u32,
    /// It was there before: somebody made it to last.
    pub existed: bool,
}

impl Tap {
    /// Takes the tap called `name`, or makes it; `%d` in the name becomes a number that is free. `headers`: a virtio
    /// header comes before each frame.
    ///
    /// # Errors
    /// The name is another interface's or the tap is held by someone; the process may not, or has no tun driver.
    pub fn open(name: &str, headers: bool) -> Result<Self, Refusal> {
        let existed = facts::index_of(name).is_some();
        let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
        let device = device.map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => Refusal::new(
                Cause::explained(error, format!("{DEVICE} may not be opened by this user")),
                "let every user open it, as is usual (chmod 666; what may be done with it is asked later), or run as root",
            ),
            _ => {
                let text = format!("{DEVICE}: {error}");
                let remedy = "load the driver (modprobe tun); in a container pass --device /dev/net/tun";
                Refusal::new(Cause::explained(error, text), remedy)
            }
        })?;
        // SAFETY: all zeros is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(Refusal::new(format!("{name:?} is too long for an interface"), "use at most 15 characters"));
        }
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte as libc::c_char;
        }
        let _fork_guard = fork::guard(&device);
        // Without a virtio header every frame from the guest is a plain one, which the host need not take apart.
        let headers = if headers { libc::IFF_VNET_HDR } else { 0 };
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | headers) as libc::c_short;
        // SAFETY: the descriptor is open, and the request reads and writes one ifreq.
        let set = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut request) };
        if set < 0 {
            let error = std::io::Error::last_os_error();
            let (text, remedy) = match error.raw_os_error() {
                Some(libc::EPERM) => {
                    return Err(Refusal::denied(Cause::explained(error, format!("tap {name:?}"))));
                }
                Some(libc::EBUSY) => (
                    format!("tap {name:?} is in use by another VM or process"),
                    "stop that one, or choose another tap_device".to_owned(),
                ),
                Some(libc::EINVAL) => (
                    format!("{name:?} exists and is no tap with one queue"),
                    format!("choose another tap_device, or make it anew: ip tuntap add dev {name} mode tap"),
                ),
                _ => (format!("tap {name:?}: {error}"), "choose another tap_device".to_owned()),
            };
            return Err(Refusal::new(Cause::explained(error, text), remedy));
        }
        let bytes: Vec<u8> = request.ifr_name.iter().map(|c| *c as u8).take_while(|byte| *byte != 0).collect();
        let name = String::from_utf8_lossy(&bytes).into_owned();
        let gone = || Refusal::new(format!("tap {name:?} vanished as soon as it was made"), "try again");
        let index = facts::index_of(&name).ok_or_else(gone)?;
        Ok(Self { _fork_guard, fd: device.into(), name, index, existed })
    }

    /// Lets a process of `owner` open this tap by its name once this descriptor is closed: it lasts until it is deleted.
    /// One that existed belongs to whom its maker said.
    ///
    /// # Errors
    /// ioctl(2)'s.
    pub fn hand_over(&self, owner: u32) -> std::io::Result<()> {
        if self.existed {
            return Ok(());
        }
        for (request, value) in [(TUNSETOWNER, libc::c_ulong::from(owner)), (TUNSETPERSIST, 1)] {
            // SAFETY: the descriptor is open, and both requests take a number.
            if unsafe { libc::ioctl(self.fd.as_raw_fd(), request, value) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    }
}
