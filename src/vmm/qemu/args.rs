//! A launch plan as QEMU's arguments. Pure.

use microvm_protocol::{IDENTITY_PORT_NAME, SERIAL_PORT_NAME};

use crate::vmm::{LaunchPlan, Nic, Origin, Plug};

/// The descriptors that QEMU finds its sockets, a template's memory and its end of the network at.
pub const AGENT_FD: i32 = 3;
pub const QMP_FD: i32 = 4;
pub const IDENTITY_FD: i32 = 5;
pub const RAM_FD: i32 = 6;
pub const NETWORK_FD: i32 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub fn as_str(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }
}

/// `tsc=reliable` spares the guest the watch over a clock that an emulator keeps; a reboot by triple fault ends QEMU.
const CMDLINE: &str = "console=ttyS0 quiet reboot=t panic=-1 tsc=reliable";

/// Under TCG the guest is told the frequency of its TSC, which is the host's: it finds no clock there to measure it by,
/// and would count ticks. The test for a broken timer interrupt takes 40 ms; KVM guests leave it out by themselves.
fn tcg_cmdline(tsc_khz: Option<u64>) -> String {
    match tsc_khz {
        Some(khz) => format!(" no_timer_check tsc_early_khz={khz}"),
        // Every vCPU would measure its delay loop for 0.3 s, and often fail to. Nothing but emulated devices waits on
        // such delays, so a value for 2.6 GHz (at HZ=100) serves any host.
        None => " no_timer_check lpj=26000000".into(),
    }
}

/// QemuOpts take a comma as the end of a value; two stand for one.
fn escape(path: &std::path::Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// QEMU's own filter of system calls, all of it: nothing obsolete, no change of privileges, no process, no scheduling.
pub const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What depends on this host and its QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    pub accelerator: Accelerator,
    /// The frequency of the CPU's counter, where the guest has to be told.
    pub tsc_khz: Option<u64>,
    /// Where QEMU's firmware is, when not where it was built to look.
    pub firmware: Option<&'static str>,
    /// Whether QEMU can filter its own system calls.
    pub sandbox: bool,
    /// Whether QEMU knows the CPU's flag `fsrm`: a release that does not refuses to be told of it.
    pub fsrm: bool,
}

/// Guest memory in a file: shared while a template is recorded in it, private (copy-on-write) in a clone.
fn memory(plan: &LaunchPlan, origin: &Origin) -> Option<String> {
    let (path, share) = match origin {
        Origin::Boot => return None,
        Origin::Record { ram } => (escape(ram), "on"),
        Origin::Clone { .. } => (format!("/proc/self/fd/{RAM_FD}"), "off"),
    };
    Some(format!("memory-backend-file,id=ram,size={}M,mem-path={path},share={share}", plan.limits.memory_mb))
}

/// What a NIC is plugged into; a hub without another port is nothing.
fn wire(plug: &Plug) -> String {
    match plug {
        Plug::Unplugged => "hubport,id=net,hubid=0".into(),
        Plug::Tap(_) => format!("tap,id=net,fd={NETWORK_FD}"),
        // `stream` frames alike, but came with 7.2 only.
        Plug::Stream(_) => format!("socket,id=net,fd={NETWORK_FD}"),
    }
}

/// QEMU's arguments after `argv[0]`.
pub fn arguments(plan: &LaunchPlan, origin: &Origin, host: Host) -> Vec<String> {
    let accelerator = host.accelerator;
    // With acpi=on, or without pit and pic, boots under TCG hang while the guest calibrates its timers.
    let timers = match accelerator {
        Accelerator::Tcg => "acpi=off,pit=on,pic=on,rtc=on",
        Accelerator::Kvm => "acpi=off,pit=off,pic=off,rtc=on",
    };
    let accel = match accelerator {
        // The default translation cache would cost hundreds of MiB for each VM.
        Accelerator::Tcg => "tcg,tb-size=32",
        Accelerator::Kvm => "kvm",
    };
    let cpu = match accelerator {
        // A guest that is told of fast string instructions (ERMS) copies and clears by them, a byte at a time where they
        // are emulated: 250 MiB/s, an eighth of what the instructions for whole words do. Linux takes FSRM to imply
        // ERMS: with FSRM alone (TCG has it since QEMU 8) its memmove() never ends for short lengths.
        Accelerator::Tcg if host.fsrm => "max,erms=off,fsrm=off",
        Accelerator::Tcg => "max,erms=off",
        Accelerator::Kvm => "host",
    };
    let memory = memory(plan, origin);
    let backend = if memory.is_some() { ",memory-backend=ram" } else { "" };
    let mut args: Vec<String> = [
        "-M",
        &format!("microvm,{timers},isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on{backend}"),
        "-accel",
        accel,
        "-cpu",
        cpu,
        "-m",
        &format!("{}M", plan.limits.memory_mb),
        "-smp",
        &plan.limits.vcpu_count.to_string(),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        // What `xen-save-devices-state` writes has no such section.
        "-global",
        "migration.send-configuration=off",
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
        "-chardev",
        &format!("socket,id=qmp,fd={QMP_FD}"),
        "-mon",
        "chardev=qmp,mode=control",
        "-chardev",
        &format!("socket,id=agent,fd={AGENT_FD}"),
        "-device",
        "virtio-serial-device",
        "-device",
        &format!("virtserialport,chardev=agent,name={SERIAL_PORT_NAME}"),
        "-chardev",
        &format!("socket,id=identity,fd={IDENTITY_FD}"),
        "-device",
        &format!("virtserialport,chardev=identity,name={IDENTITY_PORT_NAME}"),
    ]
    .map(str::to_owned)
    .into();
    if let Some(firmware) = host.firmware {
        args.extend(["-L", firmware].map(str::to_owned));
    }
    if host.sandbox {
        args.extend(["-sandbox", SANDBOX].map(str::to_owned));
    }
    if let Some(memory) = memory {
        args.extend(["-object".into(), memory]);
    }
    if matches!(origin, Origin::Clone { .. }) {
        // The kernel is in the memory already; reading the files would take time and 25 MiB of each clone's own.
        args.extend(["-S", "-incoming", "defer"].map(str::to_owned));
    } else {
        let more = if accelerator == Accelerator::Tcg { tcg_cmdline(host.tsc_khz) } else { String::new() };
        let cmdline = format!("{CMDLINE}{more}");
        let (kernel, initramfs) = (plan.kernel.display().to_string(), plan.initramfs.display().to_string());
        args.extend(["-kernel".into(), kernel, "-initrd".into(), initramfs, "-append".into(), cmdline]);
    }
    for drive in &plan.drives {
        let (serial, read_only) = (drive.serial, if drive.read_only { "on" } else { "off" });
        // Without werror=report a full host disk would stop the VM instead of failing the guest's write.
        // discard=unmap: what the guest's fstrim frees is punched out of the file.
        let written = if drive.read_only { "" } else { ",werror=report,discard=unmap" };
        args.push("-drive".into());
        let throttle = if drive.read_only { String::new() } else { throttling(plan) };
        args.push(format!(
            "id={serial},if=none,format=raw,readonly={read_only}{written}{throttle},file={}",
            escape(&drive.path)
        ));
        args.push("-device".into());
        args.push(format!("virtio-blk-device,drive={serial},serial={serial}"));
    }
    if let Some(Nic { mac, plug }) = &plan.nic {
        let device = format!("virtio-net-device,netdev=net,mac={mac}");
        args.extend(["-netdev".into(), wire(plug), "-device".into(), device]);
    }
    args
}

/// The block layer's own limits on bytes and operations, reads and writes together.
fn throttling(plan: &LaunchPlan) -> String {
    let option = |name: &str, value: Option<u64>| value.map(|n| format!(",throttling.{name}={n}")).unwrap_or_default();
    option("bps-total", plan.limits.disk_bytes_per_s) + &option("iops-total", plan.limits.disk_ops_per_s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::testing::golden::{assert_golden, plan};

    const HOST: Host = Host {
        accelerator: Accelerator::Tcg,
        tsc_khz: Some(2_595_120),
        firmware: Some("/vmm/firmware"),
        sandbox: true,
        fsrm: true,
    };

    #[test]
    fn test_arguments_under_tcg_are_golden() {
        assert_golden("qemu-tcg.args", &arguments(&plan(), &Origin::Boot, HOST));
    }

    #[test]
    fn test_arguments_of_a_recording_are_golden() {
        let origin = Origin::Record { ram: "/vm/a,b/ram".into() };
        assert_golden("qemu-tcg-record.args", &arguments(&plan(), &origin, HOST));
    }

    #[test]
    fn test_arguments_of_a_clone_are_golden() {
        let ram = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let origin = Origin::Clone { ram };
        assert_golden("qemu-tcg-clone.args", &arguments(&plan(), &origin, HOST));
    }

    #[test]
    fn test_arguments_under_kvm_are_golden() {
        assert_golden(
            "qemu-kvm.args",
            &arguments(&plan(), &Origin::Boot, Host { accelerator: Accelerator::Kvm, ..HOST }),
        );
    }

    #[test]
    fn test_arguments_with_a_nic_are_golden() {
        let plan = LaunchPlan { nic: Some(Nic::unplugged()), ..plan() };
        assert_golden(
            "qemu-nic.args",
            &arguments(
                &plan,
                &Origin::Boot,
                Host { tsc_khz: None, firmware: None, sandbox: false, fsrm: false, ..HOST },
            ),
        );
        let stream = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        assert_eq!(wire(&Plug::Stream(stream)), "socket,id=net,fd=7");
    }
}
