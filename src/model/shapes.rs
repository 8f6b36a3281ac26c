//! The configuration's lists of VMs that are made ready ahead of time: `pool` and `prepare`.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::config::{optional_text, whole, wrong_type};
use super::{IsolationType, PoolSpec, PoolTier, SpecPatch, VmSpec};
use crate::error::{Error, Result};

const SHAPE_KEYS: &str = "vcpu_count, memory_mb, disk_size_mb, network_bandwidth_mbps, max_file_handles, \
                          max_processes, disk_bytes_per_s, disk_ops_per_s, kernel_path, rootfs_path";
/// More VMs than that do not fit any host that this runs on.
const MAX_SIZE: u64 = 4096;

/// The entries of a list, each with its name for messages; one entry may stand for a list of one.
pub fn entries(key: &str, value: &Value) -> Result<Vec<(String, Map<String, Value>)>> {
    let allowed = "a dict or a list of dicts";
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Object(entry) => Ok(vec![(format!("config[{key:?}]"), entry.clone())]),
        Value::Array(items) => {
            let entry = |(index, item): (usize, &Value)| {
                let name = format!("config[{key:?}][{index}]");
                match item {
                    Value::Object(entry) => Ok((name, entry.clone())),
                    other => Err(wrong_type(&name, other, "a dict")),
                }
            };
            items.iter().enumerate().map(entry).collect()
        }
        other => Err(wrong_type(key, other, allowed)),
    }
}

/// A VM; what it leaves out is as in `defaults`.
pub fn vm(name: &str, entry: &Map<String, Value>, defaults: &SpecPatch) -> Result<VmSpec> {
    read(name, entry, defaults, |key, _| Err(unknown(name, key, SHAPE_KEYS)))
}

/// A VM, and how many like it are kept warm.
pub fn pool(name: &str, entry: &Map<String, Value>, defaults: &SpecPatch) -> Result<PoolSpec> {
    let (mut size, mut tier) = (None, PoolTier::Ready);
    let vm = read(name, entry, defaults, |key, value| {
        let field = format!("{name}[{key:?}]");
        match key {
            "size" => size = Some(whole(&field, value, 1, MAX_SIZE)?),
            "form" => tier = read_tier(&field, value)?,
            _ => return Err(unknown(name, key, &format!("size, form, {SHAPE_KEYS}"))),
        }
        Ok(())
    })?;
    let size = size.ok_or_else(|| Error::InvalidValue {
        field: name.into(),
        value: Value::Object(entry.clone()).to_string(),
        allowed: "it must say its \"size\": how many VMs are kept warm".into(),
    })?;
    Ok(PoolSpec { vm, size: usize::try_from(size).unwrap_or(usize::MAX), tier })
}

fn read(
    name: &str,
    entry: &Map<String, Value>,
    defaults: &SpecPatch,
    mut other: impl FnMut(&str, &Value) -> Result<()>,
) -> Result<VmSpec> {
    // Whoever takes one says what it is for.
    let mut vm = VmSpec::new(IsolationType::BrowserTab, defaults.clone());
    for (key, value) in entry {
        let field = format!("{name}[{key:?}]");
        let number = |into: &mut u64| whole(&field, value, 0, u64::MAX).map(|number| *into = number);
        match key.as_str() {
            "vcpu_count" => number(&mut vm.limits.vcpu_count)?,
            "memory_mb" => number(&mut vm.limits.memory_mb)?,
            "disk_size_mb" => number(&mut vm.limits.disk_size_mb)?,
            "network_bandwidth_mbps" => number(&mut vm.limits.network_bandwidth_mbps)?,
            "max_file_handles" => number(&mut vm.limits.max_file_handles)?,
            "max_processes" => number(&mut vm.limits.max_processes)?,
            "disk_bytes_per_s" => rate(&field, value, &mut vm.limits.disk_bytes_per_s)?,
            "disk_ops_per_s" => rate(&field, value, &mut vm.limits.disk_ops_per_s)?,
            "kernel_path" => vm.image.kernel_path = optional_text(&field, value)?.map(PathBuf::from),
            "rootfs_path" => vm.image.rootfs_path = optional_text(&field, value)?.map(PathBuf::from),
            key => other(key, value)?,
        }
    }
    vm.limits.check().map_err(|error| match error {
        Error::InvalidValue { field, value, allowed } => {
            Error::InvalidValue { field: format!("{name}[{field:?}]"), value, allowed }
        }
        other => other,
    })?;
    Ok(vm)
}

fn rate(field: &str, value: &Value, into: &mut Option<u64>) -> Result<()> {
    *into = if value.is_null() { None } else { Some(whole(field, value, 0, u64::MAX)?) };
    Ok(())
}

fn read_tier(field: &str, value: &Value) -> Result<PoolTier> {
    let names = PoolTier::ALL.map(PoolTier::as_str).join(", ");
    let text = value.as_str().ok_or_else(|| wrong_type(field, value, &format!("one of {names}")))?;
    PoolTier::ALL.into_iter().find(|tier| tier.as_str() == text.to_ascii_lowercase()).ok_or_else(|| {
        Error::InvalidValue { field: field.into(), value: format!("{text:?}"), allowed: format!("one of {names}") }
    })
}

fn unknown(name: &str, key: &str, allowed: &str) -> Error {
    let value = format!("{{{key:?}: ...}}");
    Error::InvalidValue { field: name.into(), value, allowed: format!("the keys {allowed}") }
}

#[cfg(test)]
mod tests {
    use super::super::ManagerConfig;
    use super::*;
    use serde_json::json;

    fn read(config: Value) -> std::result::Result<ManagerConfig, String> {
        ManagerConfig::from_json(config.as_object().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn test_pool_leaves_the_rest_to_the_defaults() {
        let config = read(json!({"pool": {"size": 3, "memory_mb": 128}, "default_disk_size_mb": 64})).unwrap();
        let [pool] = &config.pool[..] else { panic!() };
        assert_eq!((pool.size, pool.tier), (3, PoolTier::Ready));
        assert_eq!((pool.vm.limits.memory_mb, pool.vm.limits.disk_size_mb), (128, 64));
    }

    #[test]
    fn test_lists_of_shapes_malformed_are_named() {
        for (config, expected) in [
            (json!({"pool": 3}), "config[\"pool\"] must be a dict or a list of dicts"),
            (json!({"pool": [3]}), "config[\"pool\"][0] must be a dict"),
            (json!({"pool": {}}), "\"size\""),
            (json!({"pool": {"size": 0}}), "config[\"pool\"][\"size\"]=0"),
            (json!({"pool": {"size": 1, "form": "warm"}}), "blank, restored, ready"),
            (json!({"pool": {"size": 1, "memory_mb": 1}}), "config[\"pool\"][\"memory_mb\"]=1"),
            (json!({"prepare": [{"size": 1}]}), "config[\"prepare\"][0]"),
        ] {
            let message = read(config).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }
}
