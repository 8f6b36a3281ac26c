//! Cloud Hypervisor's API, over the socket that it was born with.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::bodies;
use super::state::{pack, unpack, DEVICES, MACHINE, MAX_BYTES};
use crate::error::Result;
use crate::host::net::Tap;
use crate::host::socket_dir::SocketDir;
use crate::mutex::Mutex;
use crate::vmm::error::ControlError;
use crate::vmm::http::{Call, Client};
use crate::vmm::rest::Rest;
use crate::vmm::{BoxFuture, DiskIo, LaunchPlan, Origin, VmmControl};

/// The API's name in the folder for sockets.
pub const API: &str = "api";
/// How long it may take to load a kernel and make a machine; the start has a deadline of its own besides.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);
/// How long it may take to write what its devices are at.
const SAVE_DEADLINE: Duration = Duration::from_secs(60);
/// What a counter says before anything was counted.
const NOTHING: u64 = u64::MAX;

/// The control of one Cloud Hypervisor.
pub struct Api {
    rest: Rest,
    /// The folder for sockets, as the VMM finds it.
    folder: PathBuf,
    /// The requests that make the machine and start it.
    machine: [Call; 2],
    /// What plugs it into its network, and the tap, until it is the VMM's alone.
    nic: Mutex<Option<(Call, Arc<Tap>)>>,
    plan: LaunchPlan,
}

impl Api {
    pub fn new(plan: &LaunchPlan, origin: &Origin, sockets: Arc<SocketDir>, folder: PathBuf) -> Self {
        let ram = if let Origin::Record { ram } = origin { Some(ram.as_path()) } else { None };
        let nic = plan.nic.as_ref().and_then(|nic| Some((bodies::nic(nic), nic.plug.tap()?.clone())));
        Self {
            rest: Rest::new(plan.vm_id.clone(), sockets, API, words),
            folder,
            machine: bodies::machine(plan, ram),
            nic: Mutex::new(nic),
            // The tap is the VMM's alone once it has it.
            plan: LaunchPlan { nic: None, ..plan.clone() },
        }
    }
}

/// Cloud Hypervisor's words in a refusal, outermost first.
fn words(body: &[u8]) -> Option<String> {
    let chain = serde_json::from_slice::<Vec<String>>(body).ok()?;
    (!chain.is_empty()).then(|| chain.join(": "))
}

impl VmmControl for Api {
    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.rest.ask("connect", bodies::ping()).await.map(drop) })
    }

    fn boot(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let [create, start] = self.machine.clone();
            let patient = Client::new(BOOT_DEADLINE);
            self.rest.ask_by(&patient, "create", create, None).await?;
            let nic = self.nic.lock().take();
            if let Some((call, tap)) = nic {
                let fd = tap.fd.try_clone().map_err(|error| self.rest.failed("connect", error))?;
                self.rest.ask_by(&patient, "connect", call, Some(fd)).await?;
            }
            self.rest.ask_by(&patient, "boot", start, None).await.map(drop)
        })
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.rest.ask("pause", bodies::pause()).await.map(drop) })
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.rest.ask("resume", bodies::resume()).await.map(drop) })
    }

    fn save(&self, state: OwnedFd) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let patient = Client::new(SAVE_DEADLINE);
            self.rest.ask("save", bodies::pause()).await?;
            self.rest.ask_by(&patient, "save", bodies::snapshot(&self.folder), None).await?;
            let read = |name| self.rest.sockets.read(name, MAX_BYTES);
            let packed = pack(&read(MACHINE)?, &read(DEVICES)?).map_err(|error| self.rest.failed("save", error))?;
            File::from(state).write_all(&packed).map_err(|error| self.rest.failed("save", error))
        })
    }

    fn load(&self, state: OwnedFd, run: bool) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let io_failed = |error: std::io::Error| self.rest.failed("load", error);
            let mut packed = Vec::new();
            File::from(state).read_to_end(&mut packed).map_err(io_failed)?;
            let (machine, devices) = unpack(&packed, &self.plan).map_err(|error| self.rest.failed("load", error))?;
            self.rest.sockets.file(MACHINE)?.write_all(&machine).map_err(io_failed)?;
            self.rest.sockets.file(DEVICES)?.write_all(devices).map_err(io_failed)?;
            self.rest.ask("load", bodies::restore(&self.folder)).await?;
            if run {
                self.resume().await?;
            }
            Ok(())
        })
    }

    fn quit(&self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { self.rest.ask("quit", bodies::shutdown()).await.map(|_| true) })
    }

    fn disk_io(&self) -> BoxFuture<'_, Result<DiskIo>> {
        Box::pin(async {
            let operation = "read the counters";
            let answer = self.rest.ask(operation, bodies::counters()).await?;
            sum(&answer.body).map_err(|error| self.rest.failed(operation, error))
        })
    }
}

/// What the drives moved: of all devices, they alone count bytes that are read.
fn sum(body: &[u8]) -> std::result::Result<DiskIo, ControlError> {
    let devices: HashMap<String, HashMap<String, u64>> =
        serde_json::from_slice(body).map_err(ControlError::not_json("the counters"))?;
    let total = |field: &str| {
        let values = devices.values().filter_map(|counters| counters.get(field).copied());
        values.filter(|value| *value != NOTHING).fold(0u64, u64::saturating_add)
    };
    // It counts no failures.
    Ok(DiskIo { read_bytes: total("read_bytes"), written_bytes: total("write_bytes"), failed_writes: 0 })
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
    fn test_refusal_is_the_whole_chain_in_its_words() {
        let body = r#"["Error from API","The VM could not be paused","Invalid transition"]"#;
        assert_eq!(
            refusal(&answer(500, body), words),
            "Error from API: The VM could not be paused: Invalid transition"
        );
        assert_eq!(refusal(&answer(404, ""), words), "404 Not Found: ");
        assert_eq!(refusal(&answer(400, "[]"), words), "400 Bad Request: []");
    }

    #[test]
    fn test_sum_adds_drives_and_leaves_out_what_was_never_counted() {
        let body = br#"{"disk": {"read_bytes": 5, "write_bytes": 7, "read_latency_min": 18446744073709551615},
            "config": {"read_bytes": 1, "write_bytes": 18446744073709551615}, "net": {"rx_bytes": 3}}"#;
        assert_eq!(sum(body).unwrap(), DiskIo { read_bytes: 6, written_bytes: 7, failed_writes: 0 });
        assert!(sum(b"[]").is_err());
    }

    fn api(fake: &Fake) -> Api {
        Api::new(&plan(), &Origin::Boot, fake.sockets.clone(), "/run".into())
    }

    #[tokio::test]
    async fn test_refused_boot_keeps_the_whole_chain() {
        let chain = r#"["The VM could not boot","Cannot load the kernel into memory","Invalid ELF magic number"]"#;
        let fake = Fake::serve(vec![Does::Answers(204, ""), Does::Answers(500, chain)]);
        let text = api(&fake).boot().await.unwrap_err().to_string();
        let expected = "PUT /api/v1/vm.boot: The VM could not boot: Cannot load the kernel into memory: Invalid ELF";
        assert!(text.contains(expected), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn test_api_that_sleeps_is_given_up_and_asked_anew() {
        let fake = Fake::serve(vec![Does::HangsUp, Does::Sleeps]);
        let api = api(&fake);
        assert!(api.resume().await.is_err());
        assert!(api.quit().await.unwrap_err().to_string().contains("no answer within 5 s"));
    }
}
