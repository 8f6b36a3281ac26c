//! How a guest gets its identity: apart from the transport on which it then proves that it has it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use microvm_protocol::identity::{Identity, CONFIG_SERIAL, DRIVE_BYTES};

use crate::error::{Error, Result};
use crate::image;

/// The way by which one guest gets its identity.
#[derive(Debug)]
pub enum IdentityDelivery {
    /// A second port beside the agent's. A port keeps no copy of what the guest has read.
    Port(UnixStream),
    /// The config drive, for a VMM without ports.
    Drive,
}

impl IdentityDelivery {
    /// The port where the VMM has one, else the config drive.
    #[must_use]
    pub fn by(port: Option<UnixStream>) -> Self {
        port.map_or(Self::Drive, Self::Port)
    }

    /// Delivers `identity`, which the guest reads when the OFFER comes; `dir` holds its drives.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn deliver(&self, identity: &Identity, dir: &Path) -> Result<()> {
        let mut block = identity.to_drive().map_err(|error| Error::host("encode", "an identity", error))?;
        let delivered = match self {
            Self::Port(port) => write(port, &block),
            Self::Drive => image::write_config_drive(&dir.join(CONFIG_SERIAL), &block),
        };
        block.fill(0);
        delivered
    }

    /// Delivers zeros of the same length, to a guest that warms up for its clones.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn warm_up(&self) -> Result<()> {
        match self {
            Self::Port(port) => write(port, &[0; DRIVE_BYTES]),
            // The drive is all zeros already.
            Self::Drive => Ok(()),
        }
    }

    /// Wipes the identity from the config drive.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn wipe(&self, dir: &Path) -> Result<()> {
        match self {
            Self::Port(_) => Ok(()),
            Self::Drive => image::write_config_drive(&dir.join(CONFIG_SERIAL), &[0; DRIVE_BYTES]),
        }
    }
}

fn write(mut port: &UnixStream, block: &[u8]) -> Result<()> {
    port.write_all(block).map_err(|error| Error::host("write", "the identity's port", error))
}
