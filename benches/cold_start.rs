//! Cold start beside the bare VMM: the same kernel, initramfs, memory and drives, in one run, in turns.
//!
//! `bare`: from the spawn of QEMU to the agent's first byte. `start()`: all of ours, until the agent is ready: files,
//! jail, boot, handshake, entropy, clock, disk. `first answer`: `start()` and one command.
//!
//! Environment: MICROVM_BENCH_N (default 20), MICROVM_BENCH_MEMORY_MB (128), MICROVM_BENCH_JSON (a file to write).

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use microvm_isolation::image::GuestImage;
use microvm_isolation::manager::{CreateRequest, Manager};
use microvm_isolation::model::{IsolationType, ManagerConfig, ResourceLimits};
use serde_json::{json, Value};

type Failure = Box<dyn std::error::Error>;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Milliseconds from the spawn of an unjailed QEMU to the first byte on the agent's port.
fn bare(image: &GuestImage, memory_mb: u64, dir: &Path) -> Result<f64, Failure> {
    let socket = dir.join("agent");
    let drive = |name: &str| format!("id={name},if=none,format=raw,file={}", dir.join(name).display());
    let listener = UnixListener::bind(&socket)?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on"])
        .args(["-accel", "tcg,tb-size=32", "-cpu", "max", "-smp", "1", "-m", &format!("{memory_mb}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initramfs)
        .args([
            "-append",
            "console=ttyS0 quiet reboot=t panic=-1 tsc=reliable lpj=26000000 no_timer_check",
            "-serial",
            "stdio",
        ])
        .args(["-chardev", &format!("socket,id=agent,path={}", socket.display()), "-device", "virtio-serial-device"])
        .args(["-device", "virtserialport,chardev=agent,name=microvm.agent"])
        .args(["-drive", &drive("config"), "-device", "virtio-blk-device,drive=config,serial=config"])
        .args(["-drive", &drive("disk"), "-device", "virtio-blk-device,drive=disk,serial=disk"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let begun = Instant::now();
    let mut child = command.spawn()?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let read = stream.read_exact(&mut [0]);
    let elapsed = begun.elapsed();
    child.kill()?;
    child.wait()?;
    std::fs::remove_file(&socket)?;
    read?;
    Ok(elapsed.as_secs_f64() * 1e3)
}

/// Milliseconds of `start()`, and of `start()` with one command after it.
async fn ours(manager: &Manager, memory_mb: u64) -> Result<(f64, f64), Failure> {
    let vm = manager.create(CreateRequest {
        isolation_type: IsolationType::BrowserTab,
        limits: Some(ResourceLimits { memory_mb, ..ResourceLimits::default() }),
        backend: None,
        network: None,
        vm_id: None,
        kernel_path: None,
        rootfs_path: None,
    })?;
    let begun = Instant::now();
    vm.start().await?;
    let started = begun.elapsed();
    vm.command("ping", Value::Null, None).await?;
    let answered = begun.elapsed();
    manager.destroy(vm.id().as_str()).await?;
    Ok((started.as_secs_f64() * 1e3, answered.as_secs_f64() * 1e3))
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let index = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<(), Failure> {
    let (n, memory_mb) = (number("MICROVM_BENCH_N", 20), number("MICROVM_BENCH_MEMORY_MB", 128));
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/thirstys_waterfall/security/microvm_isolation/_data");
    let image = GuestImage::in_directory(&data);
    image.check()?;
    let dir: PathBuf = std::env::temp_dir().join(format!("microvm-bench-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("config"), vec![0; 16 * 1024])?;
    let disk = std::fs::File::create(dir.join("disk"))?;
    disk.set_len(1 << 30)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (mut bares, mut starts, mut answers) = (Vec::new(), Vec::new(), Vec::new());
    let outcome: Result<(), Failure> = runtime.block_on(async {
        let manager = Manager::new(ManagerConfig::default(), image.clone());
        // One of each first: caches warm for both.
        bare(&image, memory_mb, &dir)?;
        ours(&manager, memory_mb).await?;
        for _ in 0..n {
            bares.push(bare(&image, memory_mb, &dir)?);
            let (started, answered) = ours(&manager, memory_mb).await?;
            starts.push(started);
            answers.push(answered);
        }
        Ok(())
    });
    std::fs::remove_dir_all(&dir)?;
    outcome?;
    println!("cold start, {memory_mb} MiB, 1 vCPU, QEMU microvm on TCG, milliseconds");
    println!("{:<34} {:>4} {:>8} {:>8} {:>8}", "", "n", "p50", "p95", "p99");
    let mut rows = Vec::new();
    for (name, values) in [
        ("bare QEMU, spawn to first byte", &mut bares),
        ("start() returned", &mut starts),
        ("start() and first answer", &mut answers),
    ] {
        values.sort_by(f64::total_cmp);
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| percentile(values, share));
        println!("{name:<34} {:>4} {p50:>8.1} {p95:>8.1} {p99:>8.1}", values.len());
        rows.push(json!({"name": name, "n": values.len(), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}));
    }
    println!("start() / bare, p50: {:.2}", percentile(&starts, 0.5) / percentile(&bares, 0.5));
    if let Some(path) = std::env::var_os("MICROVM_BENCH_JSON") {
        std::fs::write(path, serde_json::to_vec_pretty(&json!({"memory_mb": memory_mb, "rows": rows}))?)?;
    }
    Ok(())
}
