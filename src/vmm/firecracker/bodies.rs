//! A launch plan as Firecracker's arguments and requests. Pure.

use std::path::Path;

use microvm_protocol::cmdline::Machine as GuestMachine;
use microvm_protocol::identity::DISK_SERIAL;
use microvm_protocol::VSOCK_PORT;
use serde::Serialize;

use crate::vmm::http::Call;
use crate::vmm::rest::{rate_limiter, RateLimiter, GUEST_CID};
use crate::vmm::transport::VSOCK;
use crate::vmm::{Drive, LaunchPlan, Nic};

/// Names in the folder for sockets.
pub const API: &str = "api";
pub const METRICS: &str = "metrics";
pub const STATE: &str = "state";
/// The descriptor at which a clone finds its template's memory.
pub const RAM_FD: i32 = 3;
/// A reboot by the keyboard controller is what ends Firecracker; there is no PCI bus to look at.
const CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1 pci=off";

#[derive(Debug, Serialize)]
struct MachineConfiguration {
    vcpu_count: u64,
    mem_size_mib: u64,
}

#[derive(Debug, Serialize)]
struct BootSource {
    kernel_image_path: String,
    initrd_path: String,
    boot_args: String,
}

#[derive(Debug, Serialize)]
struct DriveBody<'a> {
    drive_id: &'a str,
    path_on_host: String,
    is_root_device: bool,
    is_read_only: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limiter: Option<RateLimiter>,
}

#[derive(Debug, Serialize)]
struct Vsock {
    guest_cid: u32,
    uds_path: String,
}

#[derive(Debug, Serialize)]
struct NetworkInterface<'a> {
    iface_id: &'static str,
    guest_mac: &'a str,
    host_dev_name: &'a str,
}

#[derive(Debug, Serialize)]
struct Balloon {
    amount_mib: u64,
    deflate_on_oom: bool,
}

#[derive(Debug, Serialize)]
struct Entropy {}

#[derive(Debug, Serialize)]
struct PartialDrive {
    drive_id: &'static str,
    rate_limiter: RateLimiter,
}

#[derive(Debug, Serialize)]
struct SnapshotCreate {
    /// Without tracking of writes, all pages that were ever touched: the others stay holes.
    snapshot_type: &'static str,
    snapshot_path: String,
    mem_file_path: String,
}

#[derive(Debug, Serialize)]
struct SnapshotLoad {
    snapshot_path: String,
    mem_backend: MemoryBackend,
    resume_vm: bool,
}

#[derive(Debug, Serialize)]
struct MemoryBackend {
    backend_type: &'static str,
    backend_path: String,
}

#[derive(Debug, Serialize)]
struct Action {
    action_type: &'static str,
}

#[derive(Debug, Serialize)]
struct Vm {
    state: &'static str,
}

/// The arguments; `folder` is where it makes its sockets.
pub fn arguments(program: &Path, folder: &Path) -> Vec<String> {
    let inside = |name: &str| folder.join(name).display().to_string();
    let (api, metrics) = (inside(API), inside(METRICS));
    let arguments = ["--api-sock", &api, "--metrics-path", &metrics, "--level", "Warning"];
    std::iter::once(program.display().to_string()).chain(arguments.map(str::to_owned)).collect()
}

/// The requests that describe the machine, in the order in which they are sent.
pub fn machine(plan: &LaunchPlan) -> Vec<Call> {
    let folder = plan.sockets.as_ref().map(|sockets| sockets.inside.clone()).unwrap_or_default();
    let guest = GuestMachine {
        vsock_port: Some(VSOCK_PORT),
        drives: plan.drives.iter().map(|drive| drive.serial.to_owned()).collect(),
        power_off: false,
    };
    let boot = BootSource {
        kernel_image_path: plan.kernel.display().to_string(),
        initrd_path: plan.initramfs.display().to_string(),
        boot_args: format!("{CMDLINE} {}", guest.to_cmdline()),
    };
    let mut calls = vec![
        Call::put(
            "/machine-config",
            &MachineConfiguration { vcpu_count: plan.limits.vcpu_count, mem_size_mib: plan.limits.memory_mb },
        ),
        Call::put("/boot-source", &boot),
    ];
    for drive in &plan.drives {
        let rate_limiter = if drive.read_only { None } else { rate_limiter(plan) };
        calls.push(Call::put(drive_path(drive), &body(drive, rate_limiter)));
    }
    if let Some(Nic { mac, plug }) = &plan.nic {
        let host_dev_name = plug.tap().map_or("", |tap| &tap.name);
        let body = NetworkInterface { iface_id: "net", guest_mac: mac, host_dev_name };
        calls.push(Call::put("/network-interfaces/net", &body));
    }
    let uds_path = folder.join(VSOCK).display().to_string();
    calls.push(Call::put("/vsock", &Vsock { guest_cid: GUEST_CID, uds_path }));
    calls.push(Call::put("/entropy", &Entropy {}));
    // Empty: it is there for the memory that the host may one day want back.
    calls.push(Call::put("/balloon", &Balloon { amount_mib: 0, deflate_on_oom: true }));
    calls
}

fn drive_path(drive: &Drive) -> String {
    format!("/drives/{}", drive.serial)
}

fn body(drive: &Drive, rate_limiter: Option<RateLimiter>) -> DriveBody<'_> {
    DriveBody {
        drive_id: drive.serial,
        path_on_host: drive.path.display().to_string(),
        is_root_device: false,
        is_read_only: drive.read_only,
        rate_limiter,
    }
}

/// Gives a clone's disk the limits of its VM; its template has none.
pub fn limit_disk(plan: &LaunchPlan) -> Option<Call> {
    let rate_limiter = rate_limiter(plan)?;
    Some(Call::patch(format!("/drives/{DISK_SERIAL}"), &PartialDrive { drive_id: DISK_SERIAL, rate_limiter }))
}

/// Writes the state of a paused VM into `folder`, and its memory into `ram`.
pub fn create_snapshot(folder: &Path, ram: &Path) -> Call {
    let snapshot_path = folder.join(STATE).display().to_string();
    let mem_file_path = ram.display().to_string();
    Call::put("/snapshot/create", &SnapshotCreate { snapshot_type: "Diff", snapshot_path, mem_file_path })
}

/// Restores a VM from the state in `folder` and the memory at [`RAM_FD`].
pub fn load_snapshot(folder: &Path, resume_vm: bool) -> Call {
    let snapshot_path = folder.join(STATE).display().to_string();
    let mem_backend = MemoryBackend { backend_type: "File", backend_path: format!("/proc/self/fd/{RAM_FD}") };
    Call::put("/snapshot/load", &SnapshotLoad { snapshot_path, mem_backend, resume_vm })
}

pub fn start() -> Call {
    Call::put("/actions", &Action { action_type: "InstanceStart" })
}

pub fn flush_metrics() -> Call {
    Call::put("/actions", &Action { action_type: "FlushMetrics" })
}

pub fn pause() -> Call {
    Call::patch("/vm", &Vm { state: "Paused" })
}

pub fn resume() -> Call {
    Call::patch("/vm", &Vm { state: "Resumed" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::testing::golden::{assert_golden, calls, plan};

    fn all() -> Vec<Call> {
        let connected = LaunchPlan { nic: Some(Nic::unplugged()), ..plan() };
        let folder = Path::new("/run");
        let template = [create_snapshot(folder, Path::new(crate::vmm::RAM_PLACE)), load_snapshot(folder, true)];
        let rest = [start(), pause(), resume(), flush_metrics(), limit_disk(&plan()).unwrap()];
        machine(&connected).into_iter().chain(rest).chain(template).collect()
    }

    #[test]
    fn test_requests_of_a_machine_are_golden() {
        assert_golden("firecracker.requests", &calls(&all()));
    }

    #[test]
    fn test_requests_without_limits_have_no_rate_limiter() {
        let unlimited = plan().without_disk_rates();
        assert!(!calls(&machine(&unlimited)).join("\n").contains("rate_limiter"));
    }

    #[test]
    fn test_arguments_are_golden() {
        assert_golden("firecracker.args", &arguments(Path::new("/vmm/firecracker"), Path::new("/run")));
    }

    #[test]
    fn test_requests_are_valid_by_the_specification() {
        crate::vmm::testing::spec::assert_valid("firecracker", &all());
    }
}
