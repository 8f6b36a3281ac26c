//! The channel beside what it is made of: the raw transport and the bare cipher, in the same guest, in turns.
//!
//! Round trips: `raw echo` sends 64 bytes to a program in the guest that sends them back, on a second virtio-serial port;
//! `request` is a sealed `ping` through the core; `send_command` the same from Python (a VM of its own, of the same shape,
//! started as a user starts it). Throughput of 64 MiB: `raw` on the second port, `cipher` inside the guest, `upload` and
//! `download` of a file on the guest's disk. The share is that of 1 / (1/raw + 1/cipher).
//!
//! Environment: MICROVM_BENCH_N (round trips of each kind, default 3000), MICROVM_BENCH_PYTHON (an interpreter that has
//! the wheel; without it the Python rows are left out), MICROVM_BENCH_JSON (a file to write), MICROVM_BENCH_GUEST (the
//! helper for the guest, as `make bench` builds it).

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use microvm_isolation::channel::{Agent, Download, Fetched, Process, Upload};
use microvm_isolation::host::tsc;
use microvm_isolation::image::{self, GuestImage};
use microvm_isolation::model::VmId;
use microvm_protocol::identity::{Credentials, Identity, Key, DRIVE_BYTES};
use serde_json::{json, Value};
use tempfile::TempDir;

type Failure = Box<dyn std::error::Error>;

const ROUNDS: u64 = 5;
const BYTES: usize = 64 << 20;
const MEMORY_MB: u64 = 256;
const DEADLINE: Duration = Duration::from_secs(30);

/// A QEMU with a raw port beside the agent's, killed when dropped.
struct Bench {
    child: Child,
    /// The drives and the sockets; the folder is removed when the bench ends.
    _dir: TempDir,
    raw: UnixStream,
    agent: Agent,
    port: String,
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("QEMU: {error}");
        }
    }
}

impl Bench {
    async fn launch(image: &GuestImage) -> Result<Self, Failure> {
        let dir = tempfile::tempdir()?;
        let credentials = Credentials::agree(Key([0x42; 32]), &Key([1; 32]), &Key([2; 32]));
        let identity = Identity {
            credentials: credentials.clone(),
            seed: Key([3; 32]),
            machine_id: [4; 16],
            boot_id: [5; 16],
            max_file_handles: 1024,
            max_processes: 128,
            vm_id: "bench".into(),
            hostname: "bench".into(),
            network: None,
            keeps_calls: false,
        };
        image::create_drive(&dir.path().join("config"), DRIVE_BYTES as u64, None)?;
        image::write_config_drive(&dir.path().join("config"), &identity.to_drive()?)?;
        let disk = image::create_drive(&dir.path().join("disk"), 1 << 30, None)?;
        image::write_disk(&image.disk_template, &disk)?;
        let listen = |name: &str| UnixListener::bind(dir.path().join(name));
        let (agent, raw) = (listen("agent")?, listen("raw")?);
        let chardev = |name: &str| format!("socket,id={name},path={}", dir.path().join(name).display());
        let drive = |name: &str, only: &str| {
            format!("id={name},if=none,format=raw,readonly={only},file={}", dir.path().join(name).display())
        };
        let tsc = tsc::frequency_khz().map_or_else(String::new, |khz| format!(" tsc_early_khz={khz}"));
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on",
            ])
            .args([
                "-accel",
                "tcg,tb-size=32",
                "-cpu",
                "max,erms=off,fsrm=off",
                "-smp",
                "1",
                "-m",
                &format!("{MEMORY_MB}M"),
            ])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "null"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initramfs)
            .args(["-append", &format!("console=ttyS0 quiet reboot=t panic=-1 tsc=reliable no_timer_check{tsc}")])
            .args(["-device", "virtio-serial-device", "-chardev", &chardev("agent"), "-chardev", &chardev("raw")])
            .args(["-device", "virtserialport,chardev=agent,name=microvm.agent"])
            .args(["-device", "virtserialport,chardev=raw,name=bench.raw"])
            .args(["-drive", &drive("config", "on"), "-device", "virtio-blk-device,drive=config,serial=config"])
            .args(["-drive", &drive("disk", "off"), "-device", "virtio-blk-device,drive=disk,serial=disk"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let (agent_stream, (raw, _)) = (agent.accept()?.0, raw.accept()?);
        agent_stream.set_nonblocking(true)?;
        let mut stream = tokio::net::UnixStream::from_std(agent_stream)?;
        let vm_id = VmId::parse("bench")?;
        let hello = Agent::hello(&vm_id, &mut stream).await?;
        let agent = Agent::connect(vm_id, stream, credentials.of_peer(), &hello).await?;
        let mut bench = Self { child, _dir: dir, raw, agent, port: String::new() };
        let find =
            "for p in /sys/class/virtio-ports/*; do [ \"$(cat $p/name)\" = bench.raw ] && echo /dev/${p##*/}; done";
        bench.port = bench.shell(find).await?.trim().to_owned();
        Ok(bench)
    }

    async fn shell(&self, script: &str) -> Result<String, Failure> {
        let params = json!({"program": "/bin/sh", "args": ["-c", script], "timeout": 300});
        let answer = serde_json::to_value(self.agent.request("exec", params, Duration::from_secs(300)).await?)?;
        match (&answer["result"]["exit_code"], &answer["result"]["stdout"]) {
            (Value::Number(code), Value::String(said)) if code.as_u64() == Some(0) => Ok(said.clone()),
            _ => Err(format!("{script}: {answer}").into()),
        }
    }

    async fn helper(&self, mode: &str, bytes: usize) -> Result<Process, Failure> {
        let params = json!({"program": "/data/helper", "args": [mode, self.port, bytes.to_string()]});
        Ok(Process::start(self.agent.open("stream", params, DEADLINE).await?, DEADLINE).await?)
    }

    async fn upload(&self, bytes: &[u8], path: &str, mode: u32) -> Result<(), Failure> {
        let stream = self.agent.open("upload", json!({"path": path, "mode": mode}), DEADLINE).await?;
        let mut upload = Upload::begin(stream, path.to_owned(), DEADLINE).await?;
        for piece in bytes.chunks(256 * 1024) {
            upload.write(piece).await?;
        }
        upload.finish().await?;
        Ok(())
    }

    async fn download(&self, path: &str) -> Result<u64, Failure> {
        let stream = self.agent.open("download", json!({"path": path}), DEADLINE).await?;
        let mut download = Download::begin(stream, path.to_owned(), DEADLINE).await?;
        loop {
            if let Fetched::Whole(done) = download.next().await? {
                return Ok(done.bytes);
            }
        }
    }

    /// Microseconds of each raw round trip.
    fn echo(&mut self, n: u64) -> Result<Vec<f64>, Failure> {
        let mut bytes = [7; 64];
        timed(n, || {
            self.raw.write_all(&bytes)?;
            self.raw.read_exact(&mut bytes)?;
            Ok(())
        })
    }

    /// MiB/s of the raw port to the guest and from it.
    async fn raw_throughput(&mut self) -> Result<(f64, f64), Failure> {
        let zeros = vec![0; 64 * 1024];
        let sink = self.helper("sink", BYTES).await?;
        let begun = Instant::now();
        for _ in 0..BYTES / zeros.len() {
            self.raw.write_all(&zeros)?;
        }
        self.raw.read_exact(&mut [0])?;
        let down = mib_per_s(begun);
        while sink.next().await?.is_some() {}
        let source = self.helper("source", BYTES).await?;
        let mut buffer = zeros;
        self.raw.read_exact(&mut buffer[..1])?;
        let (begun, mut left) = (Instant::now(), BYTES - 1);
        while left > 0 {
            let length = left.min(buffer.len());
            left -= self.raw.read(&mut buffer[..length])?;
        }
        let up = mib_per_s(begun);
        while source.next().await?.is_some() {}
        Ok((down, up))
    }
}

/// A Python process with a VM of its own, told over its stdin what to measure.
struct Python {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Python {
    fn start(python: &Path) -> Result<Self, Failure> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/channel_python.py");
        let mut command = Command::new(python);
        command.arg(script).arg(MEMORY_MB.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let answers = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        Ok(Self { child, answers })
    }

    fn ask(&mut self, question: &str) -> Result<Vec<f64>, Failure> {
        let stdin = self.child.stdin.as_mut().ok_or("no stdin")?;
        writeln!(stdin, "{question}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    fn end(mut self) -> Result<(), Failure> {
        drop(self.child.stdin.take());
        self.child.wait()?;
        Ok(())
    }
}

fn timed(n: u64, mut act: impl FnMut() -> Result<(), Failure>) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::new();
    for _ in 0..n {
        let begun = Instant::now();
        act()?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

fn mib_per_s(begun: Instant) -> f64 {
    BYTES as f64 / (1 << 20) as f64 / begun.elapsed().as_secs_f64()
}

fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(((share * sorted.len() as f64).ceil() as usize).saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[derive(Default)]
struct Figures {
    echo: Vec<f64>,
    request: Vec<f64>,
    send_command: Vec<f64>,
    raw: [Vec<f64>; 2],
    cipher: [Vec<f64>; 2],
    small: [Vec<f64>; 2],
    file: [Vec<f64>; 2],
    python: [Vec<f64>; 2],
}

async fn measure(bench: &mut Bench, python: &mut Option<Python>, n: u64) -> Result<Figures, Failure> {
    let mut all = Figures::default();
    let content: Vec<u8> = (0..BYTES).map(|at| ((at * 2_654_435_761) >> 7) as u8).collect();
    for round in 0..=ROUNDS {
        let echo = bench.helper("echo", 0).await?;
        let raw = bench.echo(n / ROUNDS)?;
        let mut request = Vec::new();
        for _ in 0..n / ROUNDS {
            let begun = Instant::now();
            bench.agent.request("ping", Value::Null, DEADLINE).await?;
            request.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        echo.kill();
        let python_latency = python.as_mut().map(|p| p.ask(&format!("ping {}", n / ROUNDS))).transpose()?;
        let (down, up) = bench.raw_throughput().await?;
        let cipher = bench.shell(&format!("/data/helper cipher {}", BYTES / 4)).await?;
        let figures: Vec<f64> = cipher.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        let &[size, count, seal, open, _, small_count, small_seal, small_open] = figures.as_slice() else {
            return Err(cipher.into());
        };
        let begun = Instant::now();
        bench.upload(&content, "/data/file", 0o600).await?;
        let upload = mib_per_s(begun);
        let begun = Instant::now();
        assert_eq!(bench.download("/data/file").await?, BYTES as u64);
        let download = mib_per_s(begun);
        let python_files = python.as_mut().map(|python| python.ask("files")).transpose()?;
        if round == 0 {
            // Caches and translations are warm from here on.
            continue;
        }
        all.echo.extend(raw);
        all.request.extend(request);
        all.send_command.extend(python_latency.into_iter().flatten());
        let mib = size * count / f64::from(1 << 20);
        for (way, figure) in [(&mut all.raw, [down, up]), (&mut all.cipher, [mib / open, mib / seal])] {
            way.iter_mut().zip(figure).for_each(|(all, figure)| all.push(figure));
        }
        let small = [1e6 * small_open / small_count, 1e6 * small_seal / small_count];
        all.small.iter_mut().zip(small).for_each(|(all, figure)| all.push(figure));
        all.file.iter_mut().zip([upload, download]).for_each(|(all, figure)| all.push(figure));
        all.python.iter_mut().zip(python_files.unwrap_or_default()).for_each(|(all, figure)| all.push(figure));
    }
    Ok(all)
}

fn report(all: &Figures) -> Value {
    let mut rows = Vec::new();
    println!("round trips, microseconds (QEMU microvm on TCG, {MEMORY_MB} MiB, 1 vCPU)");
    println!("{:<34} {:>6} {:>8} {:>8} {:>8} {:>7} {:>7}", "", "n", "p50", "p95", "p99", "p50/raw", "p99/raw");
    let [base50, base99] = [0.5, 0.99].map(|share| percentile(&all.echo, share));
    let latencies = [
        ("raw echo", &all.echo),
        ("request, from Rust", &all.request),
        ("send_command, from Python", &all.send_command),
    ];
    for (name, values) in latencies.into_iter().filter(|(_, values)| !values.is_empty()) {
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| percentile(values, share));
        let (r50, r99) = (p50 / base50, p99 / base99);
        println!("{name:<34} {:>6} {p50:>8.1} {p95:>8.1} {p99:>8.1} {r50:>7.2} {r99:>7.2}", values.len());
        rows.push(json!({"name": name, "n": values.len(), "p50_us": p50, "p95_us": p95, "p99_us": p99}));
    }
    println!("\n64 MiB, MiB/s, median of {ROUNDS}{:>22} {:>12}", "to the guest", "from it");
    let medians = |figures: &[Vec<f64>; 2]| [percentile(&figures[0], 0.5), percentile(&figures[1], 0.5)];
    let (raw, cipher) = (medians(&all.raw), medians(&all.cipher));
    let bound = [0, 1].map(|way: usize| 1.0 / (1.0 / raw[way] + 1.0 / cipher[way]));
    let mut line = |name: &str, figures: [f64; 2], shares: bool| {
        let share =
            |way: usize| if shares { format!(" ({:.0} %)", 100.0 * figures[way] / bound[way]) } else { String::new() };
        println!("{name:<40} {:>8.1}{:<8} {:>8.1}{}", figures[0], share(0), figures[1], share(1));
        rows.push(json!({"name": name, "n": ROUNDS, "to_guest_mib_s": figures[0], "from_guest_mib_s": figures[1]}));
    };
    line("raw transport", raw, false);
    line("cipher in the guest", cipher, false);
    line("both together, 1 / (1/raw + 1/cipher)", bound, false);
    line("upload, download from Rust", medians(&all.file), true);
    if !all.python[0].is_empty() {
        line("upload, download from Python", medians(&all.python), true);
    }
    let small = medians(&all.small);
    println!("\ncipher in the guest, one record of 64 bytes: open {:.1} us, seal {:.1} us", small[0], small[1]);
    json!({"memory_mb": MEMORY_MB, "rows": rows, "cipher_64_bytes_us": {"open": small[0], "seal": small[1]}})
}

fn main() -> Result<(), Failure> {
    let n = std::env::var("MICROVM_BENCH_N").ok().and_then(|text| text.parse().ok()).unwrap_or(3000);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let image = GuestImage::in_directory(&root.join("python/thirstys_waterfall/security/microvm_isolation/_data"));
    image.check()?;
    let helper = std::env::var("MICROVM_BENCH_GUEST").map_err(|_| "MICROVM_BENCH_GUEST: run `make bench`")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut python =
        std::env::var_os("MICROVM_BENCH_PYTHON").map(|path| Python::start(Path::new(&path))).transpose()?;
    let figures = runtime.block_on(async {
        let mut bench = Bench::launch(&image).await?;
        bench.upload(&std::fs::read(helper)?, "/data/helper", 0o755).await?;
        measure(&mut bench, &mut python, n).await
    });
    python.map_or(Ok(()), Python::end)?;
    let document = report(&figures?);
    if let Some(path) = std::env::var_os("MICROVM_BENCH_JSON") {
        std::fs::write(path, serde_json::to_vec_pretty(&document)?)?;
    }
    Ok(())
}
