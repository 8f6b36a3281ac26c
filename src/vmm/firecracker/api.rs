//! Firecracker's API, over the socket that it makes; and its counters, from the pipe into which it writes them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use libc::{SIGCONT, SIGSTOP};

use serde::Deserialize;
use tokio::io::BufReader;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::bodies;
use crate::error::Result;
use crate::host::process::Signals;
use crate::host::procfs;
use crate::host::socket_dir::SocketDir;
use crate::model::VmId;
use crate::vmm::error::ControlError;
use crate::vmm::http::{Call, Client};
use crate::vmm::line::{self, read_line};
use crate::vmm::rest::Rest;
use crate::vmm::{BoxFuture, DiskIo, LaunchPlan, Origin, VmmControl, CONTROL_DEADLINE};

/// How long it may take to load a kernel and make a machine; the start has a deadline of its own besides.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);
/// How long it may take to write a guest's memory.
const SAVE_DEADLINE: Duration = Duration::from_secs(60);

/// A line of counters has some ten kilobytes.
const MAX_LINE_BYTES: usize = 1 << 20;

/// What it says of a request that it refuses.
#[derive(Debug, Deserialize)]
struct Fault {
    fault_message: String,
}

/// The control of one Firecracker.
pub struct Api {
    rest: Rest,
    /// The folder for sockets, as the VMM finds it.
    folder: PathBuf,
    /// The requests that describe the machine.
    machine: Vec<Call>,
    /// What gives a clone's disk its limits.
    disk_limit: Option<Call>,
    /// Where a template's memory goes.
    ram: PathBuf,
    /// A clone that has never run is paused by the API, whatever pauses it later.
    is_loaded_only: AtomicBool,
    counters: Counters,
    /// Pauses it where its own pause is not to be used.
    stopper: Option<Stopper>,
}

/// Stops the process instead of the vCPUs: it leaves the vsock alone. The API sleeps, too.
struct Stopper {
    signals: Signals,
    stopped: AtomicBool,
}

/// Running totals. Each metrics line is a delta since the previous flush; Firecracker also flushes every 60 s, so the pipe
/// must be drained continuously.
struct Counters {
    totals: watch::Receiver<Totals>,
    reading: JoinHandle<()>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    lines: u64,
    sum: DiskIo,
}

impl Drop for Counters {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl Api {
    pub fn new(
        plan: &LaunchPlan,
        origin: &Origin,
        sockets: Arc<SocketDir>,
        folder: PathBuf,
        metrics: pipe::Receiver,
        signals: Option<Signals>,
        stops: bool,
    ) -> Self {
        let vm_id = plan.vm_id.clone();
        let (sender, totals) = watch::channel(Totals::default());
        let reading = tokio::spawn(read_counters(vm_id.clone(), metrics, sender, signals.clone()));
        Self {
            rest: Rest::new(vm_id, sockets, bodies::API, words),
            folder,
            machine: bodies::machine(plan),
            disk_limit: bodies::limit_disk(plan),
            ram: if let Origin::Record { ram } = origin { ram.clone() } else { PathBuf::new() },
            is_loaded_only: AtomicBool::new(false),
            counters: Counters { totals, reading },
            stopper: signals.filter(|_| stops).map(|signals| Stopper { signals, stopped: AtomicBool::new(false) }),
        }
    }
}

impl Stopper {
    async fn stop(&self) -> std::result::Result<(), ControlError> {
        self.signals.send(SIGSTOP);
        let stopped = async {
            // Only a parent is told when a process stops, and that is the jail's supervisor.
            while !self.signals.pid().is_some_and(procfs::is_stopped) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let done = tokio::time::timeout(CONTROL_DEADLINE, stopped).await;
        done.map_err(|_| ControlError::NotStopped(CONTROL_DEADLINE))?;
        self.stopped.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn go_on(&self) {
        self.signals.send(SIGCONT);
        self.stopped.store(false, Ordering::Relaxed);
    }
}

/// Firecracker's words in a refusal.
fn words(body: &[u8]) -> Option<String> {
    serde_json::from_slice::<Fault>(body).ok().map(|fault| fault.fault_message)
}

impl VmmControl for Api {
    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.rest.ask("connect", Call::get("/version")).await.map(drop) })
    }

    fn boot(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let patient = Client::new(BOOT_DEADLINE);
            for call in &self.machine {
                self.rest.ask_by(&patient, "configure", call.clone(), None).await?;
            }
            self.rest.ask_by(&patient, "boot", bodies::start(), None).await.map(drop)
        })
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            match &self.stopper {
                None => self.rest.ask("pause", bodies::pause()).await.map(drop),
                Some(stopper) => stopper.stop().await.map_err(|error| self.rest.failed("pause", error)),
            }
        })
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            match &self.stopper {
                Some(stopper) if !self.is_loaded_only.swap(false, Ordering::Relaxed) => {
                    stopper.go_on();
                    Ok(())
                }
                _ => self.rest.ask("resume", bodies::resume()).await.map(drop),
            }
        })
    }

    fn save(&self, state: OwnedFd) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let failed = |error: std::io::Error| self.rest.failed("save", error);
            if self.ram.as_os_str().is_empty() {
                return Err(self.rest.failed("save", ControlError::NoTemplate));
            }
            let mut written = self.rest.sockets.file(bodies::STATE)?;
            // This pause is for good: what the API's resume does to the vsock does not matter.
            self.rest.ask("save", bodies::pause()).await?;
            let patient = Client::new(SAVE_DEADLINE);
            self.rest.ask_by(&patient, "save", bodies::create_snapshot(&self.folder, &self.ram), None).await?;
            let mut state = File::from(state);
            std::io::copy(&mut written, &mut state).map(drop).map_err(failed)
        })
    }

    fn load(&self, state: OwnedFd, run: bool) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let failed = |error: std::io::Error| self.rest.failed("load", error);
            let mut given = self.rest.sockets.file(bodies::STATE)?;
            std::io::copy(&mut File::from(state), &mut given).map_err(failed)?;
            let at_once = run && self.disk_limit.is_none();
            self.is_loaded_only.store(!at_once, Ordering::Relaxed);
            self.rest.ask("load", bodies::load_snapshot(&self.folder, at_once)).await?;
            if let Some(limit) = &self.disk_limit {
                self.rest.ask("load", limit.clone()).await?;
            }
            if run && !at_once {
                self.resume().await?;
            }
            Ok(())
        })
    }

    fn quit(&self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { Ok(false) })
    }

    fn disk_io(&self) -> BoxFuture<'_, Result<DiskIo>> {
        Box::pin(async {
            let operation = "read the counters";
            let mut totals = self.counters.totals.clone();
            if self.stopper.as_ref().is_some_and(|stopper| stopper.stopped.load(Ordering::Relaxed)) {
                // Nothing moves meanwhile.
                return Ok(totals.borrow().sum);
            }
            let before = totals.borrow().lines;
            self.rest.ask(operation, bodies::flush_metrics()).await?;
            let sum =
                match tokio::time::timeout(CONTROL_DEADLINE, totals.wait_for(|totals| totals.lines > before)).await {
                    Ok(Ok(totals)) => Some(totals.sum),
                    Ok(Err(_)) | Err(_) => None,
                };
            sum.ok_or_else(|| self.rest.failed(operation, ControlError::NoCounters))
        })
    }
}

async fn read_counters(vm_id: VmId, metrics: pipe::Receiver, sender: watch::Sender<Totals>, signals: Option<Signals>) {
    let mut lines = BufReader::new(metrics);
    let mut line = Vec::new();
    loop {
        line.clear();
        match read_line(&mut lines, &mut line, MAX_LINE_BYTES).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) if line.len() > MAX_LINE_BYTES => {
                return line::end(&vm_id, "its counters", MAX_LINE_BYTES, signals.as_ref());
            }
            Err(error) => return log::warn!("{vm_id}: Firecracker's counters cannot be read: {error}"),
        }
        match added(&line) {
            Ok(more) => sender.send_modify(|totals| {
                totals.lines += 1;
                totals.sum.read_bytes += more.read_bytes;
                totals.sum.written_bytes += more.written_bytes;
                totals.sum.failed_writes += more.failed_writes;
            }),
            Err(error) => log::debug!("{vm_id}: {error}"),
        }
    }
}

/// The drives' part of a line: `block` is the sum over `block_ID`.
fn added(line: &[u8]) -> std::result::Result<DiskIo, ControlError> {
    #[derive(Deserialize)]
    struct Line {
        block: Block,
    }
    #[derive(Deserialize)]
    struct Block {
        read_bytes: u64,
        write_bytes: u64,
        /// What ended in an error of the host's, too.
        invalid_reqs_count: u64,
    }
    let Line { block } = serde_json::from_slice(line).map_err(ControlError::not_json("the counters"))?;
    let Block { read_bytes, write_bytes: written_bytes, invalid_reqs_count: failed_writes } = block;
    Ok(DiskIo { read_bytes, written_bytes, failed_writes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::http::Answer;
    use crate::vmm::rest::refusal;
    use crate::vmm::testing::fake::{Does, Fake};
    use crate::vmm::testing::golden::plan;
    use hyper::StatusCode;

    fn answer(status: u16, body: &'static str) -> Answer {
        Answer { status: StatusCode::from_u16(status).unwrap(), body: body.into() }
    }

    #[test]
    fn test_refusal_is_in_firecrackers_words() {
        let body = r#"{"fault_message":"The requested operation is not supported after starting the microVM."}"#;
        assert!(refusal(&answer(400, body), words).starts_with("The requested operation is not supported"));
        assert_eq!(refusal(&answer(500, "gone"), words), "500 Internal Server Error: gone");
    }

    #[test]
    fn test_added_takes_the_sum_over_drives() {
        let line =
            br#"{"block":{"read_bytes":10,"write_bytes":3,"invalid_reqs_count":1},"block_disk":{"read_bytes":10},"x":{}}"#;
        assert_eq!(added(line).unwrap(), DiskIo { read_bytes: 10, written_bytes: 3, failed_writes: 1 });
        assert!(added(b"{}").unwrap_err().to_string().contains("block"));
    }

    fn api(fake: &Fake) -> Api {
        let metrics = fake.sockets.pipe(bodies::METRICS).unwrap();
        Api::new(&plan(), &Origin::Boot, fake.sockets.clone(), "/run".into(), metrics, None, false)
    }

    #[tokio::test]
    async fn test_refused_boot_names_the_request_and_keeps_the_words() {
        let fault = r#"{"fault_message":"The kernel file cannot be opened: No such file or directory (os error 2)"}"#;
        let fake = Fake::serve(vec![Does::Answers(204, ""), Does::Answers(400, fault)]);
        let error = api(&fake).boot().await.unwrap_err();
        assert_eq!(error.code(), "vmm_error");
        let text = error.to_string();
        assert!(text.contains("PUT /boot-source: The kernel file cannot be opened"), "{text}");
    }

    #[tokio::test]
    async fn test_api_that_goes_in_the_middle_is_an_error_and_is_asked_anew() {
        let fake = Fake::serve(vec![Does::HangsUp, Does::Answers(204, "")]);
        let api = api(&fake);
        assert!(api.pause().await.unwrap_err().to_string().contains("PATCH /vm"));
        api.resume().await.unwrap();
    }

    #[tokio::test]
    async fn test_counters_without_an_end_are_read_up_to_a_limit() {
        let fake = Fake::serve(vec![]);
        let (api, pipe) = (api(&fake), fake.path().join(bodies::METRICS));
        let mut pipe = pipe::OpenOptions::new().open_sender(pipe).unwrap();
        let mut sent = 0;
        // Fails once the reader has given up.
        while let Ok(length) = tokio::io::AsyncWriteExt::write(&mut pipe, &[b'x'; 65_536]).await {
            sent += length;
            assert!(sent < 4 * MAX_LINE_BYTES);
        }
        assert!(sent > MAX_LINE_BYTES);
        drop(api);
    }

    #[tokio::test]
    async fn test_counters_that_never_come_are_an_error() {
        let fake = Fake::serve(vec![Does::Answers(204, ""), Does::Answers(204, "")]);
        let api = api(&fake);
        let line = "{\"block\":{\"read_bytes\":7,\"write_bytes\":1,\"invalid_reqs_count\":0}}\n";
        let pipe = fake.path().join(bodies::METRICS);
        let (read, ()) = tokio::join!(api.disk_io(), async {
            let mut pipe = pipe::OpenOptions::new().open_sender(&pipe).unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut pipe, line.as_bytes()).await.unwrap();
        });
        assert_eq!(read.unwrap().read_bytes, 7);
        tokio::time::pause();
        assert!(api.disk_io().await.unwrap_err().to_string().contains("counters"));
    }
}
