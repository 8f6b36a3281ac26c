//! Who a guest is, and the key by which it proves it: a block that it reads from a port or from its config drive.
//!
//! ```text
//!  0         8               12
//!  +---------+---------------+--------+-------+
//!  | magic   | length u32 BE | fields | zeros |      one block of 4096 bytes
//!  +---------+---------------+--------+-------+
//!  fields: key [32] | public key [32] | host's public key [32] | what they agree on [32] | seed [32]
//!          | machine id [16] | boot id [16] | max file handles u64 BE | max processes u64 BE | vm id: length u8, UTF-8 | host name: length u8, UTF-8 | network: length u16 BE, JSON; 0: none
//!          | 1 u8, only if the calls of the session before go on
//! ```
//! Not JSON as a whole: it is read at every start, by code that an emulated CPU then runs for the first time. A guest
//! ignores what follows the fields it knows, so that a frozen one understands a newer host. The host writes the block
//! before the OFFER, and wipes a drive once the session stands.

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::{secrets, ProtocolError};

const MAGIC: &[u8; 8] = b"TWMVCFG2";
const HEADER: usize = 12;
/// The size of the drive, in bytes: one page, which a guest reads past its caches.
pub const DRIVE_BYTES: usize = 4096;
/// The serial numbers by which the agent finds its drives (`/sys/block/*/serial`; at most 20 bytes).
pub const CONFIG_SERIAL: &str = "config";
pub const DISK_SERIAL: &str = "disk";
pub const ROOTFS_SERIAL: &str = "rootfs";

/// A pre-shared key of one VM; zeroed when dropped, never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop, PartialEq, Eq)]
pub struct Key(pub [u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// What one side proves in one handshake: the VM's key, and its half of an X25519 that the host carried out for both. A guest
/// has no entropy of its own that early, an emulated one would take milliseconds for it, and its host, which made the VM's
/// key, too, is no party to hide its secret from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    pub key: Key,
    pub public: [u8; 32],
    /// The other side's public key.
    pub peer: [u8; 32],
    /// What the two agree on.
    pub shared: Key,
}

impl Credentials {
    /// The guest's, of secrets that are forgotten.
    #[must_use]
    pub fn agree(key: Key, host: &Key, guest: &Key) -> Self {
        let (public, peer) = (secrets::public(guest), secrets::public(host));
        Self { key, public, peer, shared: secrets::shared(guest, peer) }
    }

    /// The other side's.
    #[must_use]
    pub fn of_peer(&self) -> Self {
        Self { key: self.key.clone(), public: self.peer, peer: self.public, shared: self.shared.clone() }
    }
}

/// What a guest is told before it does anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub credentials: Credentials,
    /// Fresh entropy from the host, credited to the guest's pool, then a reseed is forced.
    pub seed: Key,
    /// machine-id(5) and `/proc/sys/kernel/random/boot_id`, which a clone must not share with its template.
    pub machine_id: [u8; 16],
    pub boot_id: [u8; 16],
    pub max_file_handles: u64,
    pub max_processes: u64,
    pub vm_id: String,
    pub hostname: String,
    pub network: Option<GuestNetwork>,
    /// It is the guest that was frozen, and the calls of its session go on in the next one. In a clone, and in a
    /// guest that was suspended, no caller waits for them.
    pub keeps_calls: bool,
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
        let too_long = |_| ProtocolError::Malformed { what: "identity: a field is too long" };
        let mut drive = Vec::with_capacity(DRIVE_BYTES);
        drive.extend_from_slice(MAGIC);
        drive.extend_from_slice(&[0; 4]);
        for bytes in [
            &self.credentials.key.0[..],
            &self.credentials.public,
            &self.credentials.peer,
            &self.credentials.shared.0,
            &self.seed.0,
            &self.machine_id,
            &self.boot_id,
        ] {
            drive.extend_from_slice(bytes);
        }
        for number in [self.max_file_handles, self.max_processes] {
            drive.extend_from_slice(&number.to_be_bytes());
        }
        for text in [&self.vm_id, &self.hostname] {
            drive.push(u8::try_from(text.len()).map_err(too_long)?);
            drive.extend_from_slice(text.as_bytes());
        }
        let network = match &self.network {
            None => Vec::new(),
            Some(network) => {
                serde_json::to_vec(network).map_err(|_| ProtocolError::Malformed { what: "identity: network" })?
            }
        };
        drive.extend_from_slice(&u16::try_from(network.len()).map_err(too_long)?.to_be_bytes());
        drive.extend_from_slice(&network);
        drive.extend(self.keeps_calls.then_some(1));
        if drive.len() > DRIVE_BYTES {
            drive.zeroize();
            return Err(ProtocolError::Malformed { what: "identity: larger than the config drive" });
        }
        let length = u32::try_from(drive.len() - HEADER).map_err(too_long)?;
        drive[8..HEADER].copy_from_slice(&length.to_be_bytes());
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
        let mut fields = Fields(rest.get(..length).ok_or(malformed("config drive: length beyond its end"))?);
        Ok(Self {
            credentials: Credentials {
                key: Key(fields.array()?),
                public: fields.array()?,
                peer: fields.array()?,
                shared: Key(fields.array()?),
            },
            seed: Key(fields.array()?),
            machine_id: fields.array()?,
            boot_id: fields.array()?,
            max_file_handles: u64::from_be_bytes(fields.array()?),
            max_processes: u64::from_be_bytes(fields.array()?),
            vm_id: fields.text()?,
            hostname: fields.text()?,
            network: fields.network()?,
            keeps_calls: fields.0.first() == Some(&1),
        })
    }
}

/// What is left of the fields.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    const CUT: ProtocolError = ProtocolError::Malformed { what: "config drive: its fields end too early" };

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (array, rest) = self.0.split_first_chunk::<N>().ok_or(Self::CUT)?;
        self.0 = rest;
        Ok(*array)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], ProtocolError> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(Self::CUT)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, ProtocolError> {
        let [length] = self.array()?;
        let bytes = self.bytes(usize::from(length))?;
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned).map_err(|_| ProtocolError::Malformed { what: "config drive: a name is not UTF-8" })
    }

    fn network(&mut self) -> Result<Option<GuestNetwork>, ProtocolError> {
        let length = usize::from(u16::from_be_bytes(self.array()?));
        let json = self.bytes(length)?;
        if json.is_empty() {
            return Ok(None);
        }
        let network = serde_json::from_slice(json);
        network.map(Some).map_err(|_| ProtocolError::Malformed { what: "config drive: its network" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity() -> Identity {
        Identity {
            credentials: Credentials::agree(Key([7; 32]), &Key([8; 32]), &Key([6; 32])),
            seed: Key([9; 32]),
            machine_id: [1; 16],
            boot_id: [2; 16],
            max_file_handles: 1024,
            max_processes: 128,
            vm_id: "tab-1".into(),
            hostname: "tab-1".into(),
            network: None,
            keeps_calls: false,
        }
    }

    #[test]
    fn test_drive_round_trip_is_identity() {
        let network = GuestNetwork {
            mac_address: "52:54:00:12:34:56".into(),
            address: "192.168.100.10/24".into(),
            gateway: Some("192.168.100.1".into()),
            dns_servers: vec!["8.8.8.8".into()],
        };
        for (network, keeps_calls) in [(None, false), (None, true), (Some(network), true)] {
            let identity = Identity { network, keeps_calls, ..identity() };
            let drive = identity.to_drive().unwrap();
            assert_eq!(drive.len(), DRIVE_BYTES);
            assert_eq!(Identity::from_drive(&drive).unwrap(), identity);
        }
    }

    #[test]
    fn test_drive_with_fields_of_a_newer_host_is_understood() {
        let mut drive = identity().to_drive().unwrap();
        drive[11] += 20;
        assert_eq!(Identity::from_drive(&drive).unwrap(), identity());
    }

    #[test]
    fn test_drive_wiped_is_refused() {
        assert!(Identity::from_drive(&vec![0; DRIVE_BYTES]).is_err());
        assert!(Identity::from_drive(b"TWMVCFG2\xff\xff\xff\xff").is_err());
    }

    #[test]
    fn test_credentials_of_both_sides_are_one_diffie_hellman() {
        let (host, guest) = (Key([8; 32]), Key([6; 32]));
        let guests = Credentials::agree(Key([7; 32]), &host, &guest);
        let hosts = guests.of_peer();
        assert_eq!((guests.public, hosts.public), (secrets::public(&guest), secrets::public(&host)));
        assert_eq!(hosts.shared, secrets::shared(&host, guests.public));
        assert_eq!(hosts.of_peer(), guests);
        assert_ne!(Credentials::agree(Key([7; 32]), &host, &Key([5; 32])).shared, guests.shared);
    }

    #[test]
    fn test_key_debug_shows_no_byte() {
        assert_eq!(format!("{:?}", Key([7; 32])), "Key(..)");
    }

    proptest! {
        #[test]
        fn test_drive_any_bytes_never_panic(length in 0u32..200, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let drive = [&MAGIC[..], &length.to_be_bytes(), &bytes].concat();
            prop_assert!(Identity::from_drive(&drive).is_ok() || Identity::from_drive(&drive).is_err());
        }
    }
}
