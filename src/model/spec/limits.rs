//! How much one VM may have.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One VM's limits, in the units of the public API (`mb` is MiB: what the VMMs take).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceLimits {
    pub vcpu_count: u64,
    pub memory_mb: u64,
    pub disk_size_mb: u64,
    pub network_bandwidth_mbps: u64,
    pub max_file_handles: u64,
    pub max_processes: u64,
    /// Bytes and operations per second of the VM's disks; `None`: as fast as they are.
    pub disk_bytes_per_s: Option<u64>,
    pub disk_ops_per_s: Option<u64>,
}

impl Default for ResourceLimits {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            memory_mb: 512,
            disk_size_mb: 1024,
            network_bandwidth_mbps: 100,
            max_file_handles: 1024,
            max_processes: 128,
            disk_bytes_per_s: None,
            disk_ops_per_s: None,
        }
    }
}

impl fmt::Display for ResourceLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu_count, memory_mb, disk_size_mb, .. } = self;
        let cpus = if *vcpu_count == 1 { "vCPU" } else { "vCPUs" };
        write!(f, "{vcpu_count} {cpus}, {memory_mb} MiB of memory, {disk_size_mb} MiB of disk")
    }
}

impl ResourceLimits {
    /// The same with a disk as fast as it is.
    #[must_use]
    pub fn without_disk_rates(&self) -> Self {
        Self { disk_bytes_per_s: None, disk_ops_per_s: None, ..self.clone() }
    }

    /// Field, lowest, highest, why. The guest kernel has `NR_CPUS=32`, which is also Firecracker's limit; below 64 MiB
    /// the guest has no room for programs; the disk's file system is made 8 MiB large and grown.
    const RANGES: [(&'static str, u64, u64); 6] = [
        ("vcpu_count", 1, 32),
        ("memory_mb", 64, 1 << 20),
        ("disk_size_mb", 8, 1 << 20),
        ("network_bandwidth_mbps", 1, 100_000),
        ("max_file_handles", 16, 1 << 20),
        ("max_processes", 1, 1 << 20),
    ];

    /// # Errors
    /// [`Error::InvalidValue`] naming the first field out of range.
    pub fn check(&self) -> Result<()> {
        let values = [
            self.vcpu_count,
            self.memory_mb,
            self.disk_size_mb,
            self.network_bandwidth_mbps,
            self.max_file_handles,
            self.max_processes,
        ];
        for ((field, low, high), value) in Self::RANGES.into_iter().zip(values) {
            Self::check_range(field, value, low, high)?;
        }
        // Below these a guest could not even boot from its disk in time.
        let rates =
            [("disk_bytes_per_s", self.disk_bytes_per_s, 64 << 10), ("disk_ops_per_s", self.disk_ops_per_s, 10)];
        for (field, value, low) in rates {
            value.map_or(Ok(()), |value| Self::check_range(field, value, low, 1 << 40))?;
        }
        Ok(())
    }

    fn check_range(field: &str, value: u64, low: u64, high: u64) -> Result<()> {
        if (low..=high).contains(&value) {
            return Ok(());
        }
        Err(Error::InvalidValue {
            field: field.into(),
            value: value.to_string(),
            allowed: format!("a whole number from {low} to {high}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_check_defaults_pass() {
        ResourceLimits::default().check().unwrap();
    }

    #[test]
    fn test_check_out_of_range_names_field_value_and_range() {
        let limits = ResourceLimits { vcpu_count: 0, ..Default::default() };
        assert_eq!(limits.check().unwrap_err().to_string(), "vcpu_count=0 is not allowed: a whole number from 1 to 32");
    }
}
