//! What the jail costs: from the start of everything to QEMU's first word (its QMP greeting), bare and jailed, in one
//! run, in turns. Each row adds one thing to the row above it; the last is the whole jail.
//!
//! Environment: MICROVM_BENCH_N (default 40), MICROVM_BENCH_JSON (a file to write).

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use microvm_isolation::host::binary;
use microvm_isolation::host::cgroup::{Device, Groups, Limits};
use microvm_isolation::host::lease::Lease;
use microvm_isolation::host::process::Jailed;
use microvm_isolation::image::GuestImage;
use microvm_isolation::vmm::{host_jail, JailPlan, QemuProgram};
use microvm_jail::{Identity, LaunchSpec, Namespaces, Resource, Rlimit, Seccomp};
use serde_json::json;

type Failure = Box<dyn std::error::Error>;

/// QEMU as it starts for a VM, but for the machine: what is measured is over before there is one.
const ARGUMENTS: [&str; 8] = [
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-chardev",
    "socket,id=qmp,fd=0",
    "-mon",
    "chardev=qmp,mode=control",
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

fn bare(qemu: &Path) -> Result<f64, Failure> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let begun = Instant::now();
    let mut command = Command::new(qemu);
    command.args(["-M", "none"]).args(ARGUMENTS).stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    drop(command);
    let elapsed = greeted(&mut ours, begun);
    child.kill()?;
    child.wait()?;
    elapsed
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

/// Everything that a start does for the jail, up to `step`.
async fn jailed(binary: &Path, qemu: &QemuProgram, launcher: &Path, step: Step) -> Result<f64, Failure> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let host = host_jail(launcher, UIDS.0)?;
    let begun = Instant::now();
    let leases = std::env::temp_dir().join("microvm-bench-uids");
    let lease = if step >= Step::Uid && host.own_uid() { Some(Lease::take(&leases, UIDS.0, UIDS.1)?) } else { None };
    let identity = lease.as_ref().map(|lease| Identity { uid: lease.uid(), gid: lease.uid() });
    let groups = if step >= Step::Whole { Some(groups()?) } else { None };
    let mut plan = JailPlan::new(launcher, &host, identity, &[])?;
    let shown = qemu.show(&mut plan)?;
    if let Some(groups) = &groups {
        plan.cgroup_procs = groups.procs();
        plan.rlimits = vec![Rlimit::both(Resource::Nofile, 200), Rlimit::both(Resource::Core, 0)];
    }
    let own_root = step >= Step::Root && host.own_root();
    let (program, env) = if own_root { (shown.program, shown.env) } else { (binary.to_owned(), Vec::new()) };
    let program = program.display().to_string();
    let argv = [program].into_iter().chain(["-M", "none"].into_iter().chain(ARGUMENTS).map(str::to_owned)).collect();
    let whole = plan.spec(argv, env, if step >= Step::Seccomp { Seccomp::AllowList } else { Seccomp::None });
    let spec = LaunchSpec {
        fds: vec![0],
        namespaces: Namespaces::ALL,
        new_root: own_root,
        files: if own_root { whole.files.clone() } else { Vec::new() },
        landlock: step >= Step::Landlock,
        ..whole
    };
    let jailed = Jailed::launch(launcher, &spec, &[theirs.as_fd()], Box::new((groups, lease)))?;
    drop(theirs);
    let elapsed = tokio::task::block_in_place(|| greeted(&mut ours, begun));
    jailed.kill();
    jailed.reaped().await;
    elapsed.map_err(|error| format!("{step:?}: {error}").into())
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let index = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<(), Failure> {
    let n = std::env::var("MICROVM_BENCH_N").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/thirstys_waterfall/security/microvm_isolation/_data");
    let image = GuestImage::in_directory(&data);
    image.check()?;
    let path: PathBuf = binary::find("qemu-system-x86_64", std::env::var_os("PATH").as_deref()).ok_or("no QEMU")?;
    let qemu = QemuProgram::inspect(&path)?;
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
    println!("QEMU's first word, milliseconds");
    println!("{:<34} {:>4} {:>8} {:>8} {:>8} {:>8}", "", "n", "p50", "p95", "p99", "+bare");
    let mut rows = Vec::new();
    let mut base = f64::NAN;
    for ((step, name), times) in STEPS.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| percentile(times, share));
        base = if *step == Step::Bare { p50 } else { base };
        println!("{name:<34} {:>4} {p50:>8.1} {p95:>8.1} {p99:>8.1} {:>8.1}", times.len(), p50 - base);
        rows.push(json!({"name": name, "n": times.len(), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}));
    }
    if let Some(path) = std::env::var_os("MICROVM_BENCH_JSON") {
        std::fs::write(path, serde_json::to_vec_pretty(&json!({"rows": rows}))?)?;
    }
    Ok(())
}
