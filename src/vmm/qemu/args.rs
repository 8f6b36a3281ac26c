//! A launch plan as QEMU's arguments. Pure.

use crate::vmm::LaunchPlan;

/// The descriptors that QEMU finds its sockets and its tap at.
pub const AGENT_FD: i32 = 3;
pub const QMP_FD: i32 = 4;
pub const TAP_FD: i32 = 5;

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

/// QEMU's arguments after `argv[0]`.
pub fn arguments(plan: &LaunchPlan, accelerator: Accelerator) -> Vec<String> {
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
    for drive in &plan.drives {
        let (serial, read_only) = (drive.serial, if drive.read_only { "on" } else { "off" });
        // Without werror=report a full host disk would stop the VM instead of failing the guest's write.
        let errors = if drive.read_only { "" } else { ",werror=report" };
        args.push("-drive".into());
        args.push(format!("id={serial},if=none,format=raw,readonly={read_only}{errors},file={}", escape(&drive.path)));
        args.push("-device".into());
        args.push(format!("virtio-blk-device,drive={serial},serial={serial}"));
    }
    if let Some(nic) = &plan.nic {
        args.push("-netdev".into());
        args.push(format!("tap,id=net,fd={TAP_FD}"));
        args.push("-device".into());
        args.push(format!("virtio-net-device,netdev=net,mac={}", nic.mac));
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VmId;
    use crate::vmm::{Drive, Nic};

    fn plan() -> LaunchPlan {
        let drive = |serial, path: &str, read_only| Drive { serial, path: path.into(), read_only };
        LaunchPlan {
            vm_id: VmId::parse("tab-1").unwrap(),
            vcpu_count: 2,
            memory_mib: 1024,
            kernel: "/data/vmlinux".into(),
            initramfs: "/data/initramfs.cpio".into(),
            drives: vec![
                drive("config", "/run/x/tab-1/config", true),
                drive("disk", "/run/x/tab-1/disk", false),
                drive("rootfs", "/images/a,b.ext4", true),
            ],
            nic: None,
            launcher: "/data/microvm-jail".into(),
        }
    }

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
        assert_golden("qemu-tcg.args", &arguments(&plan(), Accelerator::Tcg));
    }

    #[test]
    fn test_arguments_under_kvm_are_golden() {
        assert_golden("qemu-kvm.args", &arguments(&plan(), Accelerator::Kvm));
    }

    #[test]
    fn test_arguments_with_a_nic_are_golden() {
        let tap = std::fs::File::open("/dev/null").unwrap().into();
        let plan = LaunchPlan { nic: Some(Nic::new("52:54:00:12:34:56".into(), tap)), ..plan() };
        assert_golden("qemu-nic.args", &arguments(&plan, Accelerator::Tcg));
    }
}
