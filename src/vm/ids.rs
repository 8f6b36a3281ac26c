//! Names that no other VM has, on the host and in the guest.

use crate::error::Result;
use crate::host::clock;
use crate::model::VmId;

/// A name that no other VM has; it begins with `kind`.
///
/// # Errors
/// [`Error::Host`].
pub fn new_id(kind: &str) -> Result<VmId> {
    VmId::parse(&format!("{kind}-{}", clock::hex(&clock::random::<6>()?)))
}

/// The names of a guest that it keeps for as long as it is the same VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    pub machine_id: [u8; 16],
    pub boot_id: [u8; 16],
}

impl Ids {
    pub fn generate() -> Result<Self> {
        Ok(Self { machine_id: clock::random()?, boot_id: clock::random()? })
    }
}
