//! A guest that the tests drive frame by frame, a tap, and what it takes to boot a real VM with either.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "each test takes what it needs")]

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, Once};

use microvm_isolation::channel::Agent;
use microvm_isolation::error::Result;
use microvm_isolation::image::{self, GuestImage};
use microvm_isolation::model::{Backend, ResourceLimits, VmId};
use microvm_isolation::vmm::{self, BackendRequest, Binaries, Drive, JailPlan, LaunchPlan, Launched, Origin};
use microvm_jail::{Access, Seccomp};
use microvm_protocol::frame::{Frame, Kind};
use microvm_protocol::handshake::GuestHandshake;
use microvm_protocol::identity::{Credentials, Identity, Key, CONFIG_SERIAL, DISK_SERIAL, DRIVE_BYTES};
use microvm_protocol::mux::{Incoming, Mux};
use microvm_protocol::record::Decoder;
use microvm_protocol::session::{Role, Session};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub const KEY: Key = Key([0x51; 32]);
pub const OTHER_KEY: Key = Key([0x52; 32]);
/// For the moment in which a jail is tried.
const UID: u32 = 2_000_000_000;

pub fn id(name: &str) -> VmId {
    VmId::parse(name).unwrap()
}

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collector;

impl log::Log for Collector {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.level() <= log::Level::Warn {
            LINES.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Collector).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
    });
}

/// Whether a warning about a VM holds a word.
pub fn logged(vm_id: &str, word: &str) -> bool {
    LINES.lock().unwrap().iter().any(|line| line.starts_with(&format!("{vm_id}: ")) && line.contains(word))
}

pub fn count_logged(vm_id: &str) -> usize {
    LINES.lock().unwrap().iter().filter(|line| line.starts_with(&format!("{vm_id}: "))).count()
}

/// One test after the other: some of them look at what the whole process holds.
pub async fn turn() -> tokio::sync::MutexGuard<'static, ()> {
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    TURN.lock().await
}

/// What this process holds.
pub fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

pub async fn all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    let mut done: Vec<Option<F::Output>> = pending.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, done) in pending.iter_mut().zip(&mut done).filter(|(_, done)| done.is_none()) {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(context) {
                *done = Some(output);
            }
        }
        if done.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done.into_iter().flatten().collect()
}

/// A frame to be sent: kind, LAST, id and payload. `None` is the one before once more, byte for byte.
pub type Attack = Option<(Kind, bool, u32, Vec<u8>)>;

/// A frame that a guest received.
pub struct ReceivedFrame {
    pub kind: Kind,
    pub id: u32,
    pub last: bool,
    pub payload: Vec<u8>,
}

pub struct Guest {
    pub stream: UnixStream,
    session: Session,
    decoder: Decoder,
}

/// Connects an agent to a guest that holds `key`; the guest is `None` when the host was refused.
pub async fn connect(name: &str, key: Key) -> (Result<Agent>, Option<Guest>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    listen();
    tokio::join!(agent(name, ours), Guest::shake_hands(theirs, credentials(name, key)))
}

/// The host's end, from HELLO to a session.
pub async fn agent(name: &str, mut stream: UnixStream) -> Result<Agent> {
    let hello = Agent::hello(&id(name), &mut stream).await?;
    Agent::connect(id(name), stream, credentials(name, KEY).of_peer(), &hello).await
}

/// A guest's; each VM has others.
fn credentials(name: &str, key: Key) -> Credentials {
    let secret = |salt: u8| {
        let mut bytes = [salt; 32];
        bytes.iter_mut().zip(name.bytes()).for_each(|(byte, of_name)| *byte ^= of_name);
        Key(bytes)
    };
    Credentials::agree(key, &secret(0x44), &secret(0x45))
}

/// Peers that do not know what to prove.
pub fn no_key() -> Vec<(&'static str, Vec<u8>)> {
    listen();
    let noise: Vec<u8> = (0..100_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let hello = GuestHandshake::new(false).unwrap().hello().unwrap();
    let accept = [&[0, 65, 3][..], &[0x77; 64]].concat();
    vec![
        ("no-key-noise", noise),
        ("no-key-silence", vec![]),
        ("no-key-half", hello[..5].to_vec()),
        ("no-key-accept", accept.clone()),
        ("no-key-forged", [hello.clone(), accept].concat()),
        ("no-key-hellos", hello.repeat(1000)),
        ("no-key-future", vec![0, 8, 1, b'T', b'W', b'M', b'V', 9, 9, 0]),
        ("no-key-order", vec![0, 8, 1, b'T', b'W', b'M', b'V', 9, 1, 0]),
    ]
}

impl Guest {
    async fn shake_hands(mut stream: UnixStream, credentials: Credentials) -> Option<Self> {
        let handshake = GuestHandshake::new(false).unwrap();
        stream.write_all(&handshake.hello().unwrap()).await.unwrap();
        let mut decoder = Decoder::default();
        let offer = loop {
            if let Some(record) = decoder.next_record().unwrap() {
                break record.to_vec();
            }
            let length = stream.read(decoder.space()).await.unwrap();
            decoder.filled(length);
        };
        // Dropping the stream is how a guest refuses.
        let offered = handshake.receive(&offer, &credentials).ok()?;
        let (accept, session) = offered.accept(b"{\"guest\":\"ready\"}").unwrap();
        stream.write_all(&accept).await.unwrap();
        Some(Self { stream, session, decoder })
    }

    /// What a guest said in a session with one question, to be said again.
    pub async fn record(name: &str, stream: UnixStream, host: impl Future<Output = Agent>) -> Vec<u8> {
        let (relay, guest_end) = UnixStream::pair().unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let relayed = tokio::spawn(relay_bytes(relay, stream, said.clone(), Arc::default()));
        let (agent, guest) = tokio::join!(host, Guest::shake_hands(guest_end, credentials(name, KEY)));
        let mut guest = guest.unwrap();
        let (answered, ()) = tokio::join!(
            agent.request("ping", serde_json::Value::Null, std::time::Duration::from_secs(20)),
            guest.answer(b"{\"status\":\"ok\",\"result\":1}")
        );
        answered.unwrap();
        relayed.abort();
        let said = said.lock().unwrap().clone();
        said
    }

    pub fn seal(&mut self, frame: &Frame<'_>, out: &mut Vec<u8>) {
        let mut plain = Vec::new();
        frame.encode(&mut plain);
        self.session.seal(&plain, out).unwrap();
    }

    /// Bytes as they are. The host may have hung up: that is what some tests wait for.
    pub async fn write(&mut self, bytes: &[u8]) {
        let written = tokio::time::timeout(std::time::Duration::from_secs(20), self.stream.write_all(bytes)).await;
        drop(written.expect("the host reads or hangs up"));
    }

    pub async fn say(&mut self, kind: Kind, last: bool, id: u32, payload: &[u8]) {
        let mut sealed = Vec::new();
        self.seal(&Frame { kind, last, id, payload }, &mut sealed);
        self.write(&sealed).await;
    }

    /// Says these frames.
    pub async fn attack(&mut self, frames: &[Attack]) {
        let mut sealed = Vec::new();
        for frame in frames {
            if let Some((kind, last, id, payload)) = frame {
                sealed.clear();
                self.seal(&Frame { kind: *kind, last: *last, id: *id, payload }, &mut sealed);
            }
            let bytes = sealed.clone();
            self.write(&bytes).await;
        }
    }

    async fn next_plain(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(record) = self.decoder.next_record().unwrap() {
                return Some(self.session.open(record).unwrap().to_vec());
            }
            match self.stream.read(self.decoder.space()).await {
                Ok(0) | Err(_) => return None,
                Ok(length) => self.decoder.filled(length),
            }
        }
    }

    /// The next frame.
    pub async fn hear(&mut self) -> ReceivedFrame {
        let plain = self.next_plain().await.expect("the host says something");
        let frame = Frame::decode(&plain).unwrap();
        ReceivedFrame { kind: frame.kind, id: frame.id, last: frame.last, payload: frame.payload.to_vec() }
    }

    pub async fn hear_for_ever(&mut self) {
        while self.next_plain().await.is_some() {}
    }

    /// Answers the next request, in as many frames as it takes.
    pub async fn answer(&mut self, body: &[u8]) {
        let asked = self.hear().await.id;
        let mut mux = Mux::new(Role::Guest);
        let mut question = Vec::new();
        Frame { kind: Kind::Request, last: true, id: asked, payload: b"{}" }.encode(&mut question);
        mux.receive(&question).unwrap();
        mux.respond(asked, body.to_vec()).unwrap();
        self.flush(&mut mux).await;
    }

    async fn flush(&mut self, mux: &mut Mux) {
        let (mut plain, mut sealed) = (Vec::new(), Vec::new());
        while mux.next_frame(&mut plain) {
            sealed.clear();
            self.session.seal(&plain, &mut sealed).unwrap();
            self.write(&sealed.clone()).await;
        }
    }

    /// Answers each request with itself.
    pub async fn echo_for_ever(&mut self) {
        let mut mux = Mux::new(Role::Guest);
        while let Some(plain) = self.next_plain().await {
            if let Some(Incoming::Request { id, body }) = mux.receive(&plain).unwrap() {
                let answer = [b"{\"status\":\"ok\",\"result\":", &body[..], b"}"].concat();
                mux.respond(id, answer).unwrap();
            }
            self.flush(&mut mux).await;
        }
    }
}

type Tape = Arc<Mutex<Vec<u8>>>;

/// Carries bytes between the guest's end and the host's, and keeps a copy of each direction.
async fn relay_bytes(guest: UnixStream, host: UnixStream, from_guest: Tape, from_host: Tape) {
    let ((mut guest_out, mut guest_in), (mut host_out, mut host_in)) = (guest.into_split(), host.into_split());
    let carry = |tape: Tape| {
        move |bytes: &[u8]| {
            tape.lock().unwrap().extend_from_slice(bytes);
        }
    };
    let (to_host, to_guest) = (carry(from_guest), carry(from_host));
    let up = async {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = guest_out.read(&mut buffer).await {
            to_host(&buffer[..length]);
            if host_in.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    };
    let down = async {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = host_out.read(&mut buffer).await {
            to_guest(&buffer[..length]);
            if guest_in.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(up, down);
}

pub fn looks_random(bytes: &[u8]) -> bool {
    let mut counts = [0u32; 256];
    bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let expected = bytes.len() as f64 / 256.0;
    // Text or zeros would put most bytes on few values.
    counts.iter().all(|count| f64::from(*count) < 16.0 + 6.0 * expected)
}

pub fn image() -> GuestImage {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/thirstys_waterfall/security/microvm_isolation/_data");
    GuestImage::in_directory(&data)
}

/// Launches QEMU as the core does, with the key on its config drive.
fn launch(name: &str, image: &GuestImage) -> (Launched, TempDir) {
    listen();
    image.check().expect("the guest is built: make guest jail");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let identity = Identity {
        credentials: credentials(name, KEY),
        seed: OTHER_KEY,
        machine_id: [1; 16],
        boot_id: [2; 16],
        max_file_handles: 1024,
        max_processes: 128,
        vm_id: name.into(),
        hostname: name.into(),
        network: None,
        keeps_calls: false,
    };
    let mut jail =
        JailPlan::new(&image.launcher, &vmm::host_jail(&image.launcher, UID, Seccomp::AllowList).unwrap(), None, &[])
            .unwrap();
    let mut drive = |serial: &'static str, size: u64, access: Access| {
        let file = image::create_drive(&path(serial), size, None).unwrap();
        if serial == DISK_SERIAL {
            image::write_disk(&image.disk_template, &file).unwrap();
        }
        let path = jail.show(serial, &path(serial), &format!("/vm/{serial}"), access).unwrap();
        Drive { serial, path, read_only: access == Access::Read, size }
    };
    let drives =
        vec![drive(CONFIG_SERIAL, DRIVE_BYTES as u64, Access::Read), drive(DISK_SERIAL, 64 << 20, Access::Write)];
    image::write_config_drive(&path(CONFIG_SERIAL), &identity.to_drive().unwrap()).unwrap();
    let plan = LaunchPlan {
        vm_id: id(name),
        limits: ResourceLimits { memory_mb: 128, ..ResourceLimits::default() },
        kernel: jail.show("kernel", &image.kernel, "/image/kernel", Access::Read).unwrap(),
        initramfs: jail.show("initramfs", &image.initramfs, "/image/initramfs", Access::Read).unwrap(),
        drives,
        nic: None,
        sockets: None,
        jail,
        zygotes: None,
    };
    let request = BackendRequest { backend: Some(Backend::Qemu), min_isolation: None, vcpu_count: 1 };
    let selection = vmm::select(&plan.vm_id, &request, &Binaries::default()).expect("QEMU is installed");
    (selection.vmm.launch(&plan, &Origin::Boot, Box::new(())).unwrap(), folder)
}

/// A real VM with a tap between QEMU and the agent's host end.
pub struct Tapped {
    pub agent: Agent,
    to_guest: Tape,
    to_host: Tape,
    _launched: microvm_isolation::host::process::Jailed,
    _folder: TempDir,
}

impl Tapped {
    pub async fn launch(name: &str, image: &GuestImage) -> Self {
        let (launched, folder) = launch(name, image);
        let guest = launched.agent.open().await.unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (to_guest, to_host) = (Tape::default(), Tape::default());
        tokio::spawn(relay_bytes(guest, theirs, to_host.clone(), to_guest.clone()));
        let agent = agent(name, ours).await.unwrap();
        Self { agent, to_guest, to_host, _launched: launched.jailed, _folder: folder }
    }

    /// What went to the guest and what came from it.
    pub fn tapped(&self) -> (Vec<u8>, Vec<u8>) {
        (self.to_guest.lock().unwrap().clone(), self.to_host.lock().unwrap().clone())
    }
}

pub async fn launch_untapped(name: &str, image: &GuestImage) -> Result<Agent> {
    let (launched, _folder) = launch(name, image);
    agent(name, launched.agent.open().await?).await
}

/// An image whose PID 1 is a hostile script.
pub struct HostileImage {
    pub image: GuestImage,
    _folder: TempDir,
}

/// The initramfs is ours with another /init behind it: of two files of one name the kernel keeps the later.
pub fn hostile_image(script: &str) -> HostileImage {
    let folder = tempfile::tempdir().unwrap();
    let mut image = image();
    let init = format!(
        "#!/bin/sh\nmount -t devtmpfs dev /dev\nmount -t sysfs sys /sys\nwhile [ -z \"$port\" ]; do\n\
         for p in /sys/class/virtio-ports/*; do [ \"$(cat $p/name)\" = microvm.agent ] && port=/dev/${{p##*/}}; done\n\
         done\n{script}\nsleep 1000\n"
    );
    let mut archive = std::fs::read(&image.initramfs).unwrap();
    archive.extend(cpio("init", 0o100_755, init.as_bytes()));
    archive.extend(cpio("TRAILER!!!", 0, b""));
    image.initramfs = folder.path().join("initramfs.cpio");
    std::fs::write(&image.initramfs, archive).unwrap();
    HostileImage { image, _folder: folder }
}

/// One file of an archive in the newc format (cpio(5)).
fn cpio(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let mut out = b"070701".to_vec();
    let sizes = [content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    for field in [0, mode, 0, 0, 1, 0].into_iter().chain(sizes) {
        out.extend(format!("{field:08x}").bytes());
    }
    let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(4), 0);
    out.extend(name.bytes().chain([0]));
    pad(&mut out);
    out.extend(content);
    pad(&mut out);
    out
}
