//! A launch plan as Cloud Hypervisor's arguments and requests. Pure.
//!
//! Architecture invariant: the API ignores fields that it does not know, so every body is a struct whose fields a test
//! holds against the API's description.

use std::path::Path;

use microvm_protocol::cmdline::Machine as GuestMachine;
use microvm_protocol::VSOCK_PORT;
use serde::Serialize;

use crate::vmm::http::Call;
use crate::vmm::rest::{rate_limiter, RateLimiter, GUEST_CID};
use crate::vmm::transport::VSOCK;
use crate::vmm::{Drive, LaunchPlan, Nic};

/// The descriptor at which it finds the listening socket of its API.
pub const API_FD: i32 = 3;
/// And at which it writes its events.
pub const EVENTS_FD: i32 = 4;
/// And at which a clone finds its template's memory.
pub const RAM_FD: i32 = 5;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

#[derive(Debug, Serialize)]
struct VmConfig<'a> {
    cpus: Cpus,
    memory: Memory<'a>,
    payload: Payload,
    disks: Vec<Disk<'a>>,
    rng: Rng,
    balloon: Balloon,
    serial: Console,
    console: Console,
    vsock: Vsock,
}

#[derive(Debug, Serialize)]
struct Cpus {
    boot_vcpus: u64,
    max_vcpus: u64,
    /// The guest gets no virtualization of its own.
    nested: bool,
}

#[derive(Debug, Serialize)]
struct Memory<'a> {
    /// In bytes, of what is in no zone.
    size: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    zones: Vec<Zone<'a>>,
}

#[derive(Debug, Serialize)]
struct Zone<'a> {
    id: &'static str,
    size: u64,
    file: &'a Path,
    shared: bool,
}

#[derive(Debug, Serialize)]
struct Payload {
    kernel: String,
    initramfs: String,
    cmdline: String,
}

/// `sparse` stays at its default, true, though it warns that it cannot make holes: `false` would fill the whole disk.
#[derive(Debug, Serialize)]
struct Disk<'a> {
    id: &'a str,
    serial: &'a str,
    path: String,
    readonly: bool,
    /// Never looked up in the file itself, which the guest writes: it could make a header there that names another file.
    image_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limiter_config: Option<RateLimiter>,
}

#[derive(Debug, Serialize)]
struct Rng {
    src: &'static str,
}

#[derive(Debug, Serialize)]
struct Balloon {
    size: u64,
    deflate_on_oom: bool,
    free_page_reporting: bool,
}

#[derive(Debug, Serialize)]
struct Console {
    mode: &'static str,
}

#[derive(Debug, Serialize)]
struct Vsock {
    cid: u32,
    socket: String,
}

#[derive(Debug, Serialize)]
struct Destination {
    destination_url: String,
}

#[derive(Debug, Serialize)]
struct Source {
    source_url: String,
}

/// The tap itself comes as a descriptor along with the request.
#[derive(Debug, Serialize)]
struct Net<'a> {
    id: &'static str,
    mac: &'a str,
    /// Frames as they are on the wire: the host's filter and its ifb see each.
    offload_tso: bool,
    offload_ufo: bool,
    offload_csum: bool,
}

/// The arguments.
pub fn arguments(program: &Path) -> Vec<String> {
    let (api, events) = (format!("fd={API_FD}"), format!("fd={EVENTS_FD}"));
    [&program.display().to_string(), "--api-socket", &api, "--event-monitor", &events].map(str::to_owned).into()
}

/// The requests that make the machine and then start it; what has descriptors goes between the two. `ram`: the file that
/// has the memory of a template.
pub fn machine(plan: &LaunchPlan, ram: Option<&Path>) -> [Call; 2] {
    let folder = plan.sockets.as_ref().map(|sockets| sockets.inside.clone()).unwrap_or_default();
    let guest = GuestMachine { vsock_port: Some(VSOCK_PORT), drives: Vec::new(), power_off: true };
    let config = VmConfig {
        cpus: Cpus { boot_vcpus: plan.limits.vcpu_count, max_vcpus: plan.limits.vcpu_count, nested: false },
        memory: match ram {
            None => Memory { size: plan.limits.memory_mb << 20, zones: Vec::new() },
            Some(file) => Memory {
                size: 0,
                zones: vec![Zone { id: "ram", size: plan.limits.memory_mb << 20, file, shared: true }],
            },
        },
        payload: Payload {
            kernel: plan.kernel.display().to_string(),
            initramfs: plan.initramfs.display().to_string(),
            cmdline: format!("{CMDLINE} {}", guest.to_cmdline()),
        },
        disks: plan.drives.iter().map(|drive| disk(drive, plan)).collect(),
        rng: Rng { src: "/dev/urandom" },
        // A clone's memory is the template's file, which it cannot give back: it would end at the first report.
        balloon: Balloon { size: 0, deflate_on_oom: true, free_page_reporting: ram.is_none() },
        serial: Console { mode: "Tty" },
        console: Console { mode: "Off" },
        vsock: Vsock { cid: GUEST_CID, socket: folder.join(VSOCK).display().to_string() },
    };
    [Call::put("/api/v1/vm.create", &config), Call::put_nothing("/api/v1/vm.boot")]
}

pub fn nic(nic: &Nic) -> Call {
    let net = Net { id: "net", mac: &nic.mac, offload_tso: false, offload_ufo: false, offload_csum: false };
    Call::put("/api/v1/vm.add-net", &net)
}

fn disk<'a>(drive: &'a Drive, plan: &LaunchPlan) -> Disk<'a> {
    Disk {
        id: drive.serial,
        serial: drive.serial,
        path: drive.path.display().to_string(),
        readonly: drive.read_only,
        image_type: "Raw",
        rate_limiter_config: if drive.read_only { None } else { rate_limiter(plan) },
    }
}

pub fn ping() -> Call {
    Call::get("/api/v1/vmm.ping")
}

pub fn pause() -> Call {
    Call::put_nothing("/api/v1/vm.pause")
}

pub fn resume() -> Call {
    Call::put_nothing("/api/v1/vm.resume")
}

/// Writes the state of a paused VM into `folder`; memory that is a file's stays there.
pub fn snapshot(folder: &Path) -> Call {
    Call::put("/api/v1/vm.snapshot", &Destination { destination_url: url(folder) })
}

/// Makes a paused VM of the state in `folder`.
pub fn restore(folder: &Path) -> Call {
    Call::put("/api/v1/vm.restore", &Source { source_url: url(folder) })
}

fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

pub fn counters() -> Call {
    Call::get("/api/v1/vm.counters")
}

pub fn shutdown() -> Call {
    Call::put_nothing("/api/v1/vmm.shutdown")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::testing::golden::{assert_golden, calls, plan};

    fn all() -> Vec<Call> {
        let rest = [nic(&Nic::unplugged()), ping(), pause(), resume(), counters(), shutdown()];
        let folder = Path::new("/run");
        let template = machine(&plan(), Some(Path::new(crate::vmm::RAM_PLACE))).into_iter().take(1);
        let template = template.chain([snapshot(folder), restore(folder)]);
        machine(&plan(), None).into_iter().chain(rest).chain(template).collect()
    }

    #[test]
    fn test_requests_are_golden() {
        assert_golden("cloud-hypervisor.requests", &calls(&all()));
    }

    #[test]
    fn test_arguments_are_golden() {
        assert_golden("cloud-hypervisor.args", &arguments(Path::new("/vmm/cloud-hypervisor")));
    }

    #[test]
    fn test_requests_are_valid_by_the_specification() {
        crate::vmm::testing::spec::assert_valid("cloud-hypervisor", &all());
    }
}
