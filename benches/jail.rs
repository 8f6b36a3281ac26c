//! What the jail costs: from the start of everything to QEMU's first word (its QMP greeting), bare and jailed, in one
//! run, in turns. Each row adds one thing to the row above it; the last is the whole jail. Then what the whole jail costs a
//! round trip: two guests without a session, one bare and one jailed, are asked for their HELLO again and again, in turns.
//!
//! Environment: MICROVM_BENCH_N (default 40; 50 times as many round trips), MICROVM_BENCH_JSON (a file to write).

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use microvm_isolation::host::binary;
use microvm_isolation::host::cgroup::{Device, Groups, Limits};
use microvm_isolation::host::process::Jailed;
use microvm_isolation::host::tsc;
use microvm_isolation::image::GuestImage;
use microvm_isolation::store::lease::Lease;
use microvm_isolation::vmm::{host_jail, JailPlan, QemuBinary};
use microvm_jail::{Access, Identity, LaunchSpec, Namespaces, Resource, Rlimit, Seccomp};
use microvm_protocol::handshake::Ask;
use microvm_protocol::identity::DRIVE_BYTES;
use serde_json::{json, Value};

type Failure = Box<dyn std::error::Error>;

/// QEMU as it starts for a VM, but for the machine: what is measured is over before there is one.
const ARGUMENTS: [&str; 10] = [
    "-M",
    "none",
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-chardev",
    "socket,id=qmp,fd=0",
    "-mon",
    "chardev=qmp,mode=control",
];
/// A guest that says HELLO, and has nothing but its port.
const GUEST: [&str; 18] = [
    "-M",
    "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on",
    "-accel",
    "tcg,tb-size=32",
    "-cpu",
    "max,erms=off,fsrm=off",
    "-m",
    "128M",
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-device",
    "virtio-serial-device",
    "-chardev",
    "socket,id=agent,fd=0",
    "-device",
    "virtserialport,chardev=agent,name=microvm.agent",
];
/// Any range will do: nobody else runs.
const UIDS: (u32, u32) = (2_000_000_000, 2_000_999_999);

#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
enum Step {
    Bare,
    Namespaces,
    Root,
    Landlock,
    Seccomp,
    Uid,
    Whole,
}

const STEPS: [(Step, &str); 7] = [
    (Step::Bare, "bare QEMU"),
    (Step::Namespaces, "launcher and namespaces"),
    (Step::Root, "+ a root of its own"),
    (Step::Landlock, "+ Landlock"),
    (Step::Seccomp, "+ seccomp"),
    (Step::Uid, "+ a uid of its own (root only)"),
    (Step::Whole, "+ limits and control groups: all"),
];

/// Milliseconds since `begun` to the first byte.
fn greeted(stream: &mut UnixStream, begun: Instant) -> Result<f64, Failure> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.read_exact(&mut [0])?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// QEMU without a jail, killed when dropped; its descriptor 0 is the other end of the stream.
struct Bare(Child, UnixStream);

impl Bare {
    fn launch(qemu: &Path, arguments: &[String]) -> Result<Self, Failure> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(qemu);
        command.args(arguments).stdin(Stdio::from(OwnedFd::from(theirs)));
        Ok(Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?, ours))
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            eprintln!("QEMU: {error}");
        }
    }
}

fn owned(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|argument| (*argument).to_owned()).collect()
}

fn bare(qemu: &Path) -> Result<f64, Failure> {
    let begun = Instant::now();
    let mut running = Bare::launch(qemu, &owned(&ARGUMENTS))?;
    greeted(&mut running.1, begun)
}

fn groups() -> Result<Groups, Failure> {
    let device = |minor| Device { major: 1, minor };
    let limits = Limits {
        cpu_quota_us: 110_000,
        cpu_period_us: 100_000,
        memory_bytes: 256 << 20,
        tasks: 81,
        devices: vec![device(3), device(9)],
        io: None,
    };
    Ok(Groups::create(&format!("bench-{}", std::process::id()), None, &limits)?)
}

/// Everything that a start does for the jail, up to `step`; `arguments` names what QEMU is shown besides.
fn launch(
    binary: &Path,
    qemu: &QemuBinary,
    launcher: &Path,
    step: Step,
    arguments: impl FnOnce(&mut JailPlan) -> Result<Vec<String>, Failure>,
) -> Result<(Jailed, UnixStream), Failure> {
    let (ours, theirs) = UnixStream::pair()?;
    let host = host_jail(launcher, UIDS.0, Seccomp::AllowList)?;
    let lease = if step >= Step::Uid && host.own_uid() { Some(Lease::take(UIDS.0, UIDS.1)?) } else { None };
    let identity = lease.as_ref().map(|lease| Identity { uid: lease.uid(), gid: lease.uid() });
    let groups = if step >= Step::Whole { Some(groups()?) } else { None };
    let mut plan = JailPlan::new(launcher, &host, identity, &[])?;
    let shown = qemu.show(&mut plan, false)?;
    if let Some(groups) = &groups {
        plan.cgroup_procs = groups.procs();
        plan.rlimits = vec![Rlimit::both(Resource::Nofile, 200), Rlimit::both(Resource::Core, 0)];
    }
    let own_root = step >= Step::Root && host.own_root();
    let (program, env) = if own_root { (shown.program, shown.env) } else { (binary.to_owned(), Vec::new()) };
    let firmware = shown.firmware.filter(|_| own_root).map_or(Vec::new(), |firmware| owned(&["-L", firmware]));
    let argv = [vec![program.display().to_string()], firmware, arguments(&mut plan)?].concat();
    let whole = plan.spec(argv, env, if step >= Step::Seccomp { Seccomp::AllowList } else { Seccomp::None });
    let spec = LaunchSpec {
        fds: vec![0],
        namespaces: Namespaces::ALL,
        new_root: own_root,
        files: if own_root { whole.files.clone() } else { Vec::new() },
        landlock: step >= Step::Landlock,
        ..whole
    };
    Ok((Jailed::launch(launcher, &spec, &[theirs.as_fd()], Box::new((groups, lease)))?, ours))
}

async fn jailed(binary: &Path, qemu: &QemuBinary, launcher: &Path, step: Step) -> Result<f64, Failure> {
    let begun = Instant::now();
    let (jailed, mut ours) = launch(binary, qemu, launcher, step, |_| Ok(owned(&ARGUMENTS)))?;
    let elapsed = tokio::task::block_in_place(|| greeted(&mut ours, begun));
    jailed.kill();
    jailed.reaped().await;
    elapsed.map_err(|error| format!("{step:?}: {error}").into())
}

/// Waits for a HELLO.
fn hear(stream: &mut UnixStream) -> Result<(), Failure> {
    match stream.read(&mut [0; 256])? {
        0 => Err("QEMU ended".into()),
        _ => Ok(()),
    }
}

/// Microseconds from the question to the guest's HELLO.
fn hello(stream: &mut UnixStream, again: &[u8]) -> Result<f64, Failure> {
    let begun = Instant::now();
    stream.write_all(again)?;
    hear(stream)?;
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

/// Round trips to a bare guest and to a jailed one.
async fn round_trips(binary: &Path, qemu: &QemuBinary, image: &GuestImage, n: usize) -> Result<[Vec<f64>; 2], Failure> {
    let tsc = tsc::frequency_khz().map_or_else(String::new, |khz| format!(" tsc_early_khz={khz}"));
    let append = format!("quiet panic=-1 tsc=reliable no_timer_check{tsc}");
    let arguments = |kernel: &Path, initramfs: &Path, config: &Path| {
        let (kernel, initramfs) = (kernel.display().to_string(), initramfs.display().to_string());
        let drive = format!("id=config,if=none,format=raw,readonly=on,file={}", config.display());
        let files = ["-kernel", &kernel, "-initrd", &initramfs, "-append", &append, "-drive", &drive];
        [owned(&GUEST), owned(&files), owned(&["-device", "virtio-blk-device,drive=config,serial=config"])].concat()
    };
    // It says nothing, and may be read by everyone.
    let mut config = tempfile::Builder::new().permissions(Permissions::from_mode(0o644)).tempfile()?;
    config.write_all(&[0; DRIVE_BYTES])?;
    let mut bare = Bare::launch(binary, &arguments(&image.kernel, &image.initramfs, config.path()))?;
    let (jailed, mut stream) = launch(binary, qemu, &image.launcher, Step::Whole, |plan| {
        let kernel = plan.show("kernel", &image.kernel, "/vm/kernel", Access::Read)?;
        let initramfs = plan.show("initramfs", &image.initramfs, "/vm/initramfs", Access::Read)?;
        let config = plan.show("config", config.path(), "/vm/config", Access::Read)?;
        Ok(arguments(&kernel, &initramfs, &config))
    })?;
    let measured = tokio::task::block_in_place(|| {
        let again = Ask::Again.encode()?;
        for stream in [&mut bare.1, &mut stream] {
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            // The first HELLO is said unasked.
            hear(stream)?;
        }
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..n + 100 {
            let both = [hello(&mut bare.1, &again)?, hello(&mut stream, &again)?];
            // The first ones translate the guest's code.
            times.iter_mut().zip(both).filter(|_| round >= 100).for_each(|(times, time)| times.push(time));
        }
        Ok(times)
    });
    jailed.kill();
    jailed.reaped().await;
    measured
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let index = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Prints rows beside their first one.
fn table<'a>(title: &str, unit: &str, rows: impl Iterator<Item = (&'a str, Vec<f64>)>) -> Vec<Value> {
    println!("{title}, {unit}");
    println!("{:<34} {:>5} {:>8} {:>8} {:>8} {:>8}", "", "n", "p50", "p95", "p99", "+bare");
    let mut base = None;
    let shown = rows.map(|(name, mut times)| {
        times.sort_by(f64::total_cmp);
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| percentile(&times, share));
        let more = p50 - *base.get_or_insert(p50);
        println!("{name:<34} {:>5} {p50:>8.1} {p95:>8.1} {p99:>8.1} {more:>8.1}", times.len());
        json!({"name": name, "unit": unit, "n": times.len(), "p50": p50, "p95": p95, "p99": p99})
    });
    shown.collect()
}

fn main() -> Result<(), Failure> {
    let n = std::env::var("MICROVM_BENCH_N").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/thirstys_waterfall/security/microvm_isolation/_data");
    let image = GuestImage::in_directory(&data);
    image.check()?;
    let path: PathBuf = binary::find("qemu-system-x86_64", std::env::var_os("PATH").as_deref()).ok_or("no QEMU")?;
    let qemu = QemuBinary::inspect(&path)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); STEPS.len()];
    for round in 0..=n {
        for ((step, _), times) in STEPS.iter().zip(&mut times) {
            let elapsed = match step {
                Step::Bare => bare(&path)?,
                step => runtime.block_on(async { jailed(&path, &qemu, &image.launcher, *step).await })?,
            };
            // The first of each only warms the caches.
            times.extend((round > 0).then_some(elapsed));
        }
    }
    let round_trips = runtime.block_on(round_trips(&path, &qemu, &image, 50 * n))?;
    let mut rows = table("QEMU's first word", "ms", STEPS.iter().map(|(_, name)| *name).zip(times));
    let names = ["bare QEMU, a guest's HELLO", "the whole jail"].into_iter();
    rows.extend(table("round trip without a session", "us", names.zip(round_trips)));
    if let Some(path) = std::env::var_os("MICROVM_BENCH_JSON") {
        std::fs::write(path, serde_json::to_vec_pretty(&json!({"rows": rows}))?)?;
    }
    Ok(())
}
