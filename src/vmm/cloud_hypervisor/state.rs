//! What Cloud Hypervisor writes of a VM, and what a clone is given of it. Pure.
//!
//! It writes two files: the machine as it was made, which is JSON, and the state of its devices. A template keeps both in
//! one: the machine on a line of its own, then the state. The machine is changed for each clone, which is what a restore
//! goes by: it maps the template's memory for itself alone, and its disk has the limits of its own VM.

use microvm_protocol::identity::DISK_SERIAL;
use serde_json::Value;

use super::bodies::RAM_FD;
use crate::vmm::error::ControlError;
use crate::vmm::rest::rate_limiter;
use crate::vmm::LaunchPlan;

/// The names of the two.
pub const MACHINE: &str = "config.json";
pub const DEVICES: &str = "state.json";
/// No file of the two comes near.
pub const MAX_BYTES: u64 = 16 << 20;

/// The two in one.
///
/// # Errors
/// [`ControlError::NotJson`], when the machine is none.
pub fn pack(machine: &[u8], devices: &[u8]) -> Result<Vec<u8>, ControlError> {
    let machine: Value = serde_json::from_slice(machine).map_err(ControlError::not_json(MACHINE))?;
    Ok([machine.to_string().as_bytes(), b"\n", devices].concat())
}

/// The two again, for a clone as `plan` has it.
///
/// # Errors
/// [`ControlError::NotJson`], [`ControlError::Incomplete`], when it is not what [`pack`] made of such a machine.
pub fn unpack<'a>(packed: &'a [u8], plan: &LaunchPlan) -> Result<(Vec<u8>, &'a [u8]), ControlError> {
    let without = |part| move || ControlError::Incomplete { what: MACHINE.to_owned(), part };
    let end = packed.iter().position(|byte| *byte == b'\n').ok_or_else(without("end"))?;
    let mut machine: Value = serde_json::from_slice(&packed[..end]).map_err(ControlError::not_json(MACHINE))?;
    let zone = machine.pointer_mut("/memory/zones/0").and_then(Value::as_object_mut);
    let zone = zone.ok_or_else(without("memory zone"))?;
    zone.insert("file".into(), format!("/proc/self/fd/{RAM_FD}").into());
    zone.insert("shared".into(), false.into());
    // It would open the file, which a clone does not see.
    if let Some(payload) = machine.pointer_mut("/payload").and_then(Value::as_object_mut) {
        payload.remove("initramfs");
    }
    let mut disks = machine["disks"].as_array_mut().into_iter().flatten();
    let disk = disks.find(|disk| disk["id"] == DISK_SERIAL).and_then(Value::as_object_mut);
    let disk = disk.ok_or_else(without("disk"))?;
    let limiter = serde_json::to_value(rate_limiter(plan)).map_err(ControlError::not_json("the disk's limits"))?;
    disk.insert("rate_limiter_config".into(), limiter);
    Ok((machine.to_string().into_bytes(), &packed[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::testing::golden::plan;

    const MADE: &str = r#"{"memory": {"size": 0, "zones": [{"id": "ram", "file": "/vm/ram", "shared": true}]},
        "payload": {"kernel": "/image/kernel", "initramfs": "/image/initramfs"},
        "disks": [{"id": "config"}, {"id": "disk", "path": "/vm/disk"}]}"#;

    #[test]
    fn test_unpacked_machine_is_the_clones_own_and_the_rest_is_untouched() {
        let packed = pack(MADE.as_bytes(), b"{\n\x00").unwrap();
        let (machine, devices) = unpack(&packed, &plan()).unwrap();
        assert_eq!(devices, b"{\n\x00");
        let machine: Value = serde_json::from_slice(&machine).unwrap();
        assert_eq!(machine["memory"]["zones"][0]["file"], "/proc/self/fd/5");
        assert_eq!(machine["memory"]["zones"][0]["shared"], false);
        assert_eq!(machine["disks"][1]["rate_limiter_config"]["ops"]["size"], 500);
        assert_eq!(machine["disks"][1]["path"], "/vm/disk");
        assert_eq!(machine["payload"], serde_json::json!({"kernel": "/image/kernel"}));
        assert_eq!(machine["disks"][0], serde_json::json!({"id": "config"}));
    }

    #[test]
    fn test_clone_without_limits_has_none() {
        let unlimited = plan().without_disk_rates();
        let packed = pack(MADE.as_bytes(), b"").unwrap();
        let machine: Value = serde_json::from_slice(&unpack(&packed, &unlimited).unwrap().0).unwrap();
        assert_eq!(machine["disks"][1]["rate_limiter_config"], Value::Null);
    }

    #[test]
    fn test_what_is_no_state_is_refused_with_words() {
        let refusal = |packed: &[u8]| unpack(packed, &plan()).unwrap_err().to_string();
        assert!(pack(b"{", b"").unwrap_err().to_string().starts_with("config.json: "));
        assert_eq!(refusal(b"{}"), "config.json has no end");
        assert_eq!(refusal(b"{}\n"), "config.json has no memory zone");
    }
}
