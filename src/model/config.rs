//! The manager's configuration.

use std::net::Ipv4Addr;

use serde_json::{Map, Value};

use super::{policy, shapes, Backend, Grade, Ipv4Net, JailMode, Policies, PoolSpec, ResourceLimits, SpecPatch, VmSpec};
use crate::error::{Error, Result};

/// Private (RFC 1918), and not what the usual neighbours take: container engines, libvirt, Kubernetes, home routers.
const DEFAULT_RANGE: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 173, 0, 0), 16);

/// Every key that a manager's `config` may hold.
pub const CONFIG_KEYS: &[&str] = &[
    "max_vcpus",
    "max_memory_mb",
    "default_vcpu_count",
    "default_memory_mb",
    "default_disk_size_mb",
    "default_backend",
    "raise_on_error",
    "min_isolation",
    "jail",
    "uid_range",
    "cgroup_parent",
    "overcommit_memory",
    "runtime_dir",
    "pool",
    "prepare",
    "templates",
    "cache_dir",
    "cache_max_mb",
    "cache_max_age_days",
    "start_timeout_s",
    "command_timeout_s",
    "cleanup_interval_s",
    "health_interval_s",
    "health_misses",
    "policies",
    "network_range",
    "qemu_binary",
    "firecracker_binary",
    "cloud_hypervisor_binary",
];

/// A checked configuration; [`ManagerConfig::default`] is what an empty one means.
#[derive(Debug, Clone, PartialEq)]
pub struct ManagerConfig {
    pub max_vcpus: u64,
    pub max_memory_mb: u64,
    pub default_limits: ResourceLimits,
    pub default_backend: Option<Backend>,
    pub raise_on_error: bool,
    pub min_isolation: Option<Grade>,
    pub jail: JailMode,
    /// First and last uid for VMs, where root starts them.
    pub uid_range: (u32, u32),
    pub cgroup_parent: Option<String>,
    pub overcommit_memory: bool,
    pub runtime_dir: Option<String>,
    pub pool: Vec<PoolSpec>,
    /// VMs whose templates are made when the manager starts.
    pub prepare: Vec<VmSpec>,
    /// Whether VMs are clones of templates.
    pub templates: bool,
    pub cache_dir: Option<String>,
    pub cache_max_mb: u64,
    pub cache_max_age_days: u64,
    pub start_timeout_s: f64,
    pub command_timeout_s: f64,
    pub cleanup_interval_s: f64,
    /// How often each VM is looked at; `None`: only when somebody asks.
    pub health_interval_s: Option<f64>,
    /// How many looks in a row an agent may leave without a sign of life.
    pub health_misses: u64,
    pub policies: Policies,
    /// Where connected VMs get their addresses from.
    pub network_range: Ipv4Net,
    pub qemu_binary: Option<String>,
    pub firecracker_binary: Option<String>,
    pub cloud_hypervisor_binary: Option<String>,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            max_vcpus: 16,
            max_memory_mb: 8192,
            default_limits: ResourceLimits::default(),
            default_backend: None,
            raise_on_error: false,
            min_isolation: None,
            jail: JailMode::Default,
            uid_range: (2_000_000_000, 2_000_999_999),
            cgroup_parent: None,
            overcommit_memory: false,
            runtime_dir: None,
            pool: Vec::new(),
            prepare: Vec::new(),
            templates: true,
            cache_dir: None,
            cache_max_mb: 4096,
            cache_max_age_days: 30,
            start_timeout_s: 30.0,
            command_timeout_s: 30.0,
            cleanup_interval_s: 5.0,
            health_interval_s: Some(10.0),
            health_misses: 2,
            policies: Policies::new(),
            network_range: Ipv4Net::around(DEFAULT_RANGE.0, DEFAULT_RANGE.1).expect("the prefix is one of IPv4"),
            qemu_binary: None,
            firecracker_binary: None,
            cloud_hypervisor_binary: None,
        }
    }
}

impl ManagerConfig {
    /// Reads a configuration that came as JSON-like data.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for an unknown key or a value out of range, [`Error::InvalidType`] for a value of the
    /// wrong type; each names the key, the value and what is allowed.
    pub fn from_json(config: &Map<String, Value>) -> Result<Self> {
        let mut out = Self::default();
        for (key, value) in config {
            match key.as_str() {
                "max_vcpus" => out.max_vcpus = whole(key, value, 1, 1 << 20)?,
                "max_memory_mb" => out.max_memory_mb = whole(key, value, 1, 1 << 32)?,
                "default_vcpu_count" => out.default_limits.vcpu_count = whole(key, value, 1, 32)?,
                "default_memory_mb" => out.default_limits.memory_mb = whole(key, value, 64, 1 << 20)?,
                "default_disk_size_mb" => out.default_limits.disk_size_mb = whole(key, value, 8, 1 << 20)?,
                "default_backend" => {
                    out.default_backend = match optional_text(key, value)? {
                        Some(name) => Some(rename(key, Backend::parse(&name))?),
                        None => None,
                    }
                }
                "raise_on_error" => out.raise_on_error = flag(key, value)?,
                "min_isolation" => {
                    out.min_isolation = match optional_text(key, value)? {
                        Some(name) => Some(Grade::parse(&name)?),
                        None => None,
                    }
                }
                "jail" => {
                    let name = value.as_str().ok_or_else(|| wrong_type(key, value, "a string"))?;
                    out.jail = rename(key, JailMode::parse(name))?;
                }
                "uid_range" => out.uid_range = uids(key, value)?,
                "cgroup_parent" => out.cgroup_parent = optional_text(key, value)?,
                "overcommit_memory" => out.overcommit_memory = flag(key, value)?,
                "runtime_dir" => out.runtime_dir = optional_text(key, value)?,
                // Their own defaults are other keys of this configuration: read below.
                "pool" | "prepare" => {}
                "templates" => out.templates = flag(key, value)?,
                "cache_dir" => out.cache_dir = optional_text(key, value)?,
                "cache_max_mb" => out.cache_max_mb = whole(key, value, 0, 1 << 32)?,
                "cache_max_age_days" => out.cache_max_age_days = whole(key, value, 0, 36_500)?,
                "start_timeout_s" => out.start_timeout_s = seconds(key, value)?,
                "command_timeout_s" => out.command_timeout_s = seconds(key, value)?,
                "cleanup_interval_s" => out.cleanup_interval_s = seconds(key, value)?,
                "health_interval_s" => {
                    out.health_interval_s = if value.is_null() { None } else { Some(seconds(key, value)?) }
                }
                "health_misses" => out.health_misses = whole(key, value, 0, 1000)?,
                "policies" => out.policies = policy::policies(key, value)?,
                "network_range" => out.network_range = private_range(key, value)?,
                "qemu_binary" => out.qemu_binary = optional_text(key, value)?,
                "firecracker_binary" => out.firecracker_binary = optional_text(key, value)?,
                "cloud_hypervisor_binary" => out.cloud_hypervisor_binary = optional_text(key, value)?,
                unknown => {
                    return Err(Error::InvalidValue {
                        field: "config".into(),
                        value: format!("{{{unknown:?}: ...}}"),
                        allowed: format!("the keys {}", CONFIG_KEYS.join(", ")),
                    })
                }
            }
        }
        let entries = |key: &str| config.get(key).map_or(Ok(Vec::new()), |value| shapes::entries(key, value));
        let defaults = out.defaults();
        for (name, entry) in entries("pool")? {
            out.pool.push(shapes::pool(&name, &entry, &defaults)?);
        }
        for (name, entry) in entries("prepare")? {
            out.prepare.push(shapes::vm(&name, &entry, &defaults)?);
        }
        Ok(out)
    }

    /// What a VM has that its maker leaves out.
    #[must_use]
    pub fn defaults(&self) -> SpecPatch {
        let limits = Some(self.default_limits.clone());
        SpecPatch { backend: self.default_backend, limits, ..SpecPatch::default() }
    }

    /// The binary that the configuration names for a backend.
    #[must_use]
    pub fn binary(&self, backend: Backend) -> Option<&str> {
        match backend {
            Backend::Qemu => self.qemu_binary.as_deref(),
            Backend::Firecracker => self.firecracker_binary.as_deref(),
            Backend::CloudHypervisor => self.cloud_hypervisor_binary.as_deref(),
        }
    }
}

/// `config["key"]`, or as it is when it is a part of something already.
fn field(key: &str) -> String {
    if key.starts_with("config[") {
        key.to_owned()
    } else {
        format!("config[{key:?}]")
    }
}

pub(super) fn wrong_type(key: &str, value: &Value, allowed: &str) -> Error {
    Error::InvalidType { field: field(key), value: value.to_string(), allowed: allowed.into() }
}

fn rename<T>(key: &str, result: Result<T>) -> Result<T> {
    result.map_err(|error| match error {
        Error::InvalidValue { value, allowed, .. } => Error::InvalidValue { field: field(key), value, allowed },
        other => other,
    })
}

fn flag(key: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| wrong_type(key, value, "True or False"))
}

pub(super) fn whole(key: &str, value: &Value, low: u64, high: u64) -> Result<u64> {
    let allowed = format!("a whole number from {low} to {high}");
    if !value.is_i64() && !value.is_u64() {
        return Err(wrong_type(key, value, &allowed));
    }
    value.as_u64().filter(|n| (low..=high).contains(n)).ok_or_else(|| Error::InvalidValue {
        field: field(key),
        value: value.to_string(),
        allowed,
    })
}

/// Uid 0 is root, and 2^32 - 1 stands for "no change" in the kernel.
fn uids(key: &str, value: &Value) -> Result<(u32, u32)> {
    let allowed = "a list of two uids from 1 to 4294967294, the first and the last";
    let ends = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let [first, last] = ends else { return Err(wrong_type(key, value, allowed)) };
    let (first, last) = (whole(key, first, 1, 4_294_967_294)?, whole(key, last, 1, 4_294_967_294)?);
    match (u32::try_from(first), u32::try_from(last)) {
        (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
        _ => Err(Error::InvalidValue {
            field: format!("config[{key:?}]"),
            value: value.to_string(),
            allowed: allowed.into(),
        }),
    }
}

pub(super) fn seconds(key: &str, value: &Value) -> Result<f64> {
    let allowed = "a number of seconds above 0, at most 86400";
    let number = value.as_f64().ok_or_else(|| wrong_type(key, value, allowed))?;
    if number > 0.0 && number <= 86_400.0 {
        return Ok(number);
    }
    Err(Error::InvalidValue { field: field(key), value: value.to_string(), allowed: allowed.into() })
}

/// A network of addresses that nobody has on the Internet (RFC 1918, RFC 6598, RFC 2544), large enough for one VM.
fn private_range(key: &str, value: &Value) -> Result<Ipv4Net> {
    let allowed = "an IPv4 network inside 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 100.64.0.0/10 or 198.18.0.0/15, \
                   with a prefix of at most 30";
    let text = value.as_str().ok_or_else(|| wrong_type(key, value, "a string"))?;
    let private = [
        ([10, 0, 0, 0], 8),
        ([172, 16, 0, 0], 12),
        ([192, 168, 0, 0], 16),
        ([100, 64, 0, 0], 10),
        ([198, 18, 0, 0], 15),
    ];
    let inside = |net: &Ipv4Net| {
        let wider = private.into_iter().filter_map(|(base, prefix)| Ipv4Net::around(base.into(), prefix));
        net.prefix() <= 30 && wider.into_iter().any(|wide| wide.prefix() <= net.prefix() && wide.contains(net.first()))
    };
    Ipv4Net::parse(text).filter(inside).ok_or_else(|| Error::InvalidValue {
        field: field(key),
        value: format!("{text:?}"),
        allowed: allowed.into(),
    })
}

pub(super) fn optional_text(key: &str, value: &Value) -> Result<Option<String>> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        other => Err(wrong_type(key, other, "a string or None")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<ManagerConfig> {
        ManagerConfig::from_json(value.as_object().unwrap())
    }

    #[test]
    fn test_from_json_empty_is_the_default() {
        assert_eq!(read(json!({})).unwrap(), ManagerConfig::default());
    }

    #[test]
    fn test_from_json_every_listed_key_is_known() {
        for key in CONFIG_KEYS {
            let error = read(json!({*key: [1]})).unwrap_err();
            assert!(matches!(error, Error::InvalidType { .. }), "{key}: {error}");
        }
    }

    #[test]
    fn test_from_json_unknown_key_is_named() {
        let message = read(json!({"max_cpus": 3})).unwrap_err().to_string();
        assert!(message.contains("max_cpus") && message.contains("max_vcpus"), "{message}");
    }

    #[test]
    fn test_from_json_range_must_be_private_and_hold_a_vm() {
        for good in ["10.0.0.0/8", "192.168.7.0/24", "198.18.0.0/15", "100.64.0.0/30"] {
            assert_eq!(read(json!({"network_range": good})).unwrap().network_range.to_string(), good);
        }
        for bad in ["8.8.0.0/16", "10.0.0.0/31", "10.0.0.0", "10.0.0.1/16", "0.0.0.0/0", "172.0.0.0/8", "fd00::/8", ""]
        {
            let message = read(json!({"network_range": bad})).unwrap_err().to_string();
            assert!(message.contains("network_range") && message.contains(bad), "{message}");
        }
    }

    #[test]
    fn test_from_json_bool_is_no_number() {
        assert!(matches!(read(json!({"max_vcpus": true})), Err(Error::InvalidType { .. })));
        assert!(matches!(read(json!({"max_vcpus": 0})), Err(Error::InvalidValue { .. })));
    }
}
