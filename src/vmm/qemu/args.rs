//! A launch plan as QEMU's arguments. Pure.

use crate::vmm::LaunchPlan;

/// The descriptors that QEMU finds its sockets at.
pub const AGENT_FD: i32 = 3;
pub const QMP_FD: i32 = 4;

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

/// Under TCG every further vCPU would measure its delay loop for 0.3 s, and often fail to. Nothing but emulated devices
/// waits on such delays, so a value for a TSC of 2.6 GHz (at HZ=100) serves any host. The test for a broken timer
/// interrupt takes 40 ms; KVM guests leave it out by themselves.
const TCG_CMDLINE: &str = " lpj=26000000 no_timer_check";

/// QemuOpts take a comma as the end of a value; two stand for one.
fn escape(path: &std::path::Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// QEMU's own filter of system calls, all of it: nothing obsolete, no change of privileges, no process, no scheduling.
pub const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What depends on the QEMU that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Where its firmware is, when not where it was built to look.
    pub firmware: Option<&'static str>,
    /// Whether it can filter its own system calls.
    pub sandbox: bool,
}

/// QEMU's arguments after `argv[0]`.
pub fn arguments(plan: &LaunchPlan, accelerator: Accelerator, options: Options) -> Vec<String> {
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
    let mut args: Vec<String> = [
        "-M",
        &format!("microvm,{timers},isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on"),
        "-accel",
        accel,
        "-cpu",
        if accelerator == Accelerator::Kvm { "host" } else { "max" },
        "-m",
        &format!("{}M", plan.memory_mib),
        "-smp",
        &plan.vcpu_count.to_string(),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-kernel",
        &plan.kernel.display().to_string(),
        "-initrd",
        &plan.initramfs.display().to_string(),
        "-append",
        &format!("{CMDLINE}{}", if accelerator == Accelerator::Tcg { TCG_CMDLINE } else { "" }),
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
        &format!("virtserialport,chardev=agent,name={}", microvm_protocol::SERIAL_PORT_NAME),
    ]
    .map(str::to_owned)
    .into();
    if let Some(firmware) = options.firmware {
        args.extend(["-L", firmware].map(str::to_owned));
    }
    if options.sandbox {
        args.extend(["-sandbox", SANDBOX].map(str::to_owned));
    }
    for drive in &plan.drives {
        let (serial, read_only) = (drive.serial, if drive.read_only { "on" } else { "off" });
        // Without werror=report a full host disk would stop the VM instead of failing the guest's write.
        let errors = if drive.read_only { "" } else { ",werror=report" };
        args.push("-drive".into());
        let throttle = if drive.read_only { String::new() } else { throttling(plan) };
        args.push(format!(
            "id={serial},if=none,format=raw,readonly={read_only}{errors}{throttle},file={}",
            escape(&drive.path)
        ));
        args.push("-device".into());
        args.push(format!("virtio-blk-device,drive={serial},serial={serial}"));
    }
    args
}

/// The block layer's own limits on bytes and operations, reads and writes together.
fn throttling(plan: &LaunchPlan) -> String {
    let option = |name: &str, value: Option<u64>| value.map(|n| format!(",throttling.{name}={n}")).unwrap_or_default();
    option("bps-total", plan.disk_bytes_per_s) + &option("iops-total", plan.disk_ops_per_s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VmId;
    use crate::vmm::{Drive, JailPlan};

    fn plan() -> LaunchPlan {
        let drive = |serial, path: &str, read_only| Drive { serial, path: path.into(), read_only };
        LaunchPlan {
            vm_id: VmId::parse("tab-1").unwrap(),
            vcpu_count: 2,
            memory_mib: 1024,
            kernel: "/image/kernel".into(),
            initramfs: "/image/initramfs".into(),
            drives: vec![
                drive("config", "/vm/config", true),
                drive("disk", "/vm/disk", false),
                drive("rootfs", "/images/a,b.ext4", true),
            ],
            disk_bytes_per_s: Some(8 << 20),
            disk_ops_per_s: Some(500),
            jail: JailPlan {
                launcher: "/data/microvm-jail".into(),
                own_root: true,
                identity: None,
                files: Vec::new(),
                rlimits: Vec::new(),
                cgroup_procs: Vec::new(),
                audit: false,
            },
        }
    }

    const OPTIONS: Options = Options { firmware: Some("/vmm/firmware"), sandbox: true };

    /// One argument a line, so that a change shows as a line. `MICROVM_BLESS=1` writes the file anew.
    fn assert_golden(name: &str, args: &[String]) {
        let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
        let text = args.join("\n") + "\n";
        if std::env::var_os("MICROVM_BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{path}");
    }

    #[test]
    fn test_arguments_under_tcg_are_golden() {
        assert_golden("qemu-tcg.args", &arguments(&plan(), Accelerator::Tcg, OPTIONS));
    }

    #[test]
    fn test_arguments_under_kvm_are_golden() {
        assert_golden("qemu-kvm.args", &arguments(&plan(), Accelerator::Kvm, OPTIONS));
    }
}
