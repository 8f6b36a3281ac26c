//! What the backends' golden tests share.

use std::fmt::Write;

use crate::model::{ResourceLimits, VmId};
use crate::vmm::http::Call;
use crate::vmm::{Drive, JailPlan, LaunchPlan, Sockets};

/// A VM with everything but a network.
pub fn plan() -> LaunchPlan {
    let drive = |serial, path: &str, read_only| Drive { serial, path: path.into(), read_only, size: 0 };
    let limits = ResourceLimits {
        vcpu_count: 2,
        memory_mb: 1024,
        disk_bytes_per_s: Some(8 << 20),
        disk_ops_per_s: Some(500),
        ..ResourceLimits::default()
    };
    LaunchPlan {
        vm_id: VmId::parse("tab-1").unwrap(),
        limits,
        kernel: "/image/kernel".into(),
        initramfs: "/image/initramfs".into(),
        drives: vec![
            drive("config", "/vm/config", true),
            drive("disk", "/vm/disk", false),
            drive("rootfs", "/images/a,b.ext4", true),
        ],
        nic: None,
        sockets: Some(Sockets { host: "/host/run".into(), inside: "/run".into(), owner: None }),
        jail: JailPlan {
            launcher: "/data/microvm-jail".into(),
            own_root: true,
            no_proc: None,
            identity: None,
            files: Vec::new(),
            rlimits: Vec::new(),
            cgroup_procs: Vec::new(),
            audit: false,
            hands_tap: false,
        },
        zygotes: None,
    }
}

/// One argument a line, so that a change shows as a line. `MICROVM_BLESS=1` writes the file anew.
pub fn assert_golden(name: &str, args: &[String]) {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = args.join("\n") + "\n";
    if std::env::var_os("MICROVM_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{path}");
}

/// One call a line.
pub fn calls(calls: &[Call]) -> Vec<String> {
    let line = |call: &Call| {
        let mut line = format!("{} {}", call.method, call.path);
        if let Some(body) = &call.body {
            write!(line, " {}", String::from_utf8_lossy(body)).unwrap();
        }
        line
    };
    calls.iter().map(line).collect()
}
