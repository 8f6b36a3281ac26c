//! What one VM's processes may cost this host, worked out from the limits that were asked for. Pure.

use super::ResourceLimits;

/// The kernel's usual period: long enough to be cheap, short enough that a throttled VM still answers.
pub const CPU_PERIOD_US: u64 = 100_000;
/// What a VMM's own threads may use of one CPU, in per cent, beyond one CPU for each vCPU.
pub const VMM_CPU_PERCENT: u64 = 10;
/// Threads beside the vCPUs: QEMU's main loop and RCU thread, and at most 64 workers of its block layer; the
/// supervisor, and room for the moment in which workers come and go.
const VMM_TASKS: u64 = 80;
/// QEMU holds about 30 descriptors; each vCPU adds a few.
const VMM_FILES: u64 = 192;
const FILES_PER_VCPU: u64 = 8;
/// With fewer it does not start.
const LEAST_FILES: u64 = 64;
/// The largest file that a VMM may write is its disk; a file system's last block may stick out.
const FILE_SLACK: u64 = 64 * 1024;
/// The stacks of threads count as data before they are touched, 8 MiB each.
const STACK_BYTES: u64 = 8 << 20;
/// What a VMM maps beside its data: the guest's memory, shared while a template is made, and its code and libraries.
const CODE_BYTES: u64 = 512 << 20;
const MIB: u64 = 1 << 20;

/// Limits on all processes of one VM together (`cpu_*`, `memory_bytes`, `tasks`) and on its VMM's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub cpu_quota_us: u64,
    pub memory_bytes: u64,
    pub tasks: u64,
    /// RLIMIT_NOFILE.
    pub open_files: u64,
    pub least_open_files: u64,
    /// RLIMIT_FSIZE.
    pub file_bytes: u64,
    /// RLIMIT_DATA: a bound on memory that holds without cgroups, too, if coarser.
    pub data_bytes: u64,
    /// RLIMIT_STACK of each thread.
    pub stack_bytes: u64,
    /// The address space that all of this takes at most.
    pub address_bytes: u64,
}

impl Budget {
    /// `overhead_mib` is what the VMM was measured to need beyond the guest's memory.
    #[must_use]
    pub fn of(limits: &ResourceLimits, overhead_mib: u64) -> Self {
        let tasks = limits.vcpu_count + VMM_TASKS;
        let memory_bytes = (limits.memory_mb + overhead_mib) * MIB;
        let data_bytes = memory_bytes + tasks * STACK_BYTES;
        Self {
            cpu_quota_us: limits.vcpu_count * CPU_PERIOD_US + CPU_PERIOD_US * VMM_CPU_PERCENT / 100,
            memory_bytes,
            tasks,
            open_files: VMM_FILES + FILES_PER_VCPU * limits.vcpu_count,
            least_open_files: LEAST_FILES + FILES_PER_VCPU * limits.vcpu_count,
            file_bytes: limits.disk_size_mb * MIB + FILE_SLACK,
            data_bytes,
            stack_bytes: STACK_BYTES,
            address_bytes: data_bytes + limits.memory_mb * MIB + CODE_BYTES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_budget_of_the_defaults_is_this() {
        let budget = Budget::of(&ResourceLimits::default(), 128);
        assert_eq!((budget.cpu_quota_us, budget.memory_bytes), (110_000, 640 << 20));
        assert_eq!((budget.tasks, budget.open_files), (81, 200));
        assert_eq!(budget.file_bytes, (1024 << 20) + 65536);
        assert!(budget.data_bytes > budget.memory_bytes);
    }
}
