//! The config drive: who a guest is, and the key by which it proves it.
//!
//! ```text
//!  0         8               12
//!  +---------+---------------+------+-------+
//!  | magic   | length u32 BE | JSON | zeros |      a whole number of 512-byte sectors
//!  +---------+---------------+------+-------+
//! ```
//! The host writes it before the VMM starts and wipes it once the session stands.

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::ProtocolError;

const MAGIC: &[u8; 8] = b"TWMVCFG1";
const HEADER: usize = 12;
/// The size of the drive, in bytes; the identity fits with room to spare.
pub const DRIVE_BYTES: usize = 16 * 1024;
/// The serial numbers by which the agent finds its drives (`/sys/block/*/serial`; at most 20 bytes).
pub const CONFIG_SERIAL: &str = "config";
pub const DISK_SERIAL: &str = "disk";
pub const ROOTFS_SERIAL: &str = "rootfs";

/// A pre-shared key of one VM; zeroed when dropped, never printed.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop, PartialEq, Eq)]
pub struct Key(pub [u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// What a guest is told before it does anything else.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub key: Key,
    /// Fresh entropy from the host, credited to the guest's pool, then a reseed is forced.
    pub seed: Key,
    pub vm_id: String,
    pub hostname: String,
    /// 32 lower-case hexadecimal digits, as in machine-id(5).
    pub machine_id: String,
    /// The host's wall clock when the drive was written, Unix nanoseconds.
    pub unix_time_ns: u64,
    pub disk: bool,
    pub rootfs: bool,
    pub max_file_handles: u64,
    pub max_processes: u64,
    pub network: Option<GuestNetwork>,
}

/// How the agent configures the one NIC.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct GuestNetwork {
    pub mac_address: String,
    /// Address and prefix, as in `192.168.100.10/24`.
    pub address: String,
    pub gateway: Option<String>,
    pub dns_servers: Vec<String>,
}

impl Identity {
    /// The drive's content, [`DRIVE_BYTES`] long.
    ///
    /// # Errors
    /// [`ProtocolError::Malformed`] when the identity does not fit the drive.
    pub fn to_drive(&self) -> Result<Vec<u8>, ProtocolError> {
        let mut json = serde_json::to_vec(self).map_err(|_| ProtocolError::Malformed { what: "identity" })?;
        if HEADER + json.len() > DRIVE_BYTES {
            return Err(ProtocolError::Malformed { what: "identity: larger than the config drive" });
        }
        let mut drive = Vec::with_capacity(DRIVE_BYTES);
        drive.extend_from_slice(MAGIC);
        drive.extend_from_slice(&(json.len() as u32).to_be_bytes());
        drive.extend_from_slice(&json);
        json.zeroize();
        drive.resize(DRIVE_BYTES, 0);
        Ok(drive)
    }

    /// # Errors
    /// [`ProtocolError::Malformed`].
    pub fn from_drive(drive: &[u8]) -> Result<Self, ProtocolError> {
        let malformed = |what| ProtocolError::Malformed { what };
        let (header, rest) = drive.split_first_chunk::<HEADER>().ok_or(malformed("config drive: too short"))?;
        if &header[..8] != MAGIC {
            return Err(malformed("config drive: wrong magic"));
        }
        let length = u32::from_be_bytes([header[8], header[9], header[10], header[11]]) as usize;
        let json = rest.get(..length).ok_or(malformed("config drive: length beyond its end"))?;
        serde_json::from_slice(json).map_err(|_| malformed("config drive: not an identity"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            key: Key([7; 32]),
            seed: Key([9; 32]),
            vm_id: "tab-1".into(),
            hostname: "tab-1".into(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            unix_time_ns: 1,
            disk: true,
            rootfs: false,
            max_file_handles: 1024,
            max_processes: 128,
            network: None,
        }
    }

    #[test]
    fn test_drive_round_trip_is_identity() {
        let drive = identity().to_drive().unwrap();
        assert_eq!(drive.len(), DRIVE_BYTES);
        assert_eq!(Identity::from_drive(&drive).unwrap(), identity());
    }

    #[test]
    fn test_drive_wiped_is_refused() {
        assert!(Identity::from_drive(&vec![0; DRIVE_BYTES]).is_err());
        assert!(Identity::from_drive(b"TWMVCFG1\xff\xff\xff\xff").is_err());
    }

    #[test]
    fn test_key_debug_shows_no_byte() {
        assert_eq!(format!("{:?}", Key([7; 32])), "Key(..)");
    }
}
