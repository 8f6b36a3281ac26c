//! QMP, over the socket that QEMU was born with (QEMU Machine Protocol specification).

use std::os::fd::OwnedFd;

use serde_json::{json, Value};
use tokio::io::{AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::error::{Cause, Error, Result};
use crate::host::process::Signals;
use crate::host::rights::send_with;
use crate::model::VmId;
use crate::vmm::error::ControlError;
use crate::vmm::line::{self, read_line};
use crate::vmm::{BoxFuture, DiskIo, VmmControl, CONTROL_DEADLINE};

/// The name under which QEMU keeps the descriptor of a template's device state.
const STATE: &str = "s";
/// The set that holds it, for a QEMU that takes files only.
const STATE_SET: u32 = 1;

/// Answers are some kilobytes.
const MAX_LINE_BYTES: usize = 1 << 20;

type Outcome<T> = std::result::Result<T, ControlError>;

/// One QMP connection; commands go one after the other.
#[derive(Debug)]
pub struct Qmp {
    vm_id: VmId,
    line: Mutex<Line>,
    restore: Restore,
    /// Ends a VMM that says more than it may.
    signals: Option<Signals>,
}

/// How QEMU takes the device state that it restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restore {
    /// From a named descriptor.
    Fd,
    /// From a file in a set of descriptors.
    FdSet,
}

#[derive(Debug)]
struct Line {
    stream: BufReader<UnixStream>,
    negotiated: bool,
    next_id: u64,
    /// A line read so far: a command that hit its deadline leaves the rest to the next one.
    partial: Vec<u8>,
}

impl Qmp {
    pub fn new(vm_id: VmId, stream: UnixStream, restore: Restore, signals: Option<Signals>) -> Self {
        let line = Line { stream: BufReader::new(stream), negotiated: false, next_id: 0, partial: Vec::new() };
        Self { vm_id, line: Mutex::new(line), restore, signals }
    }

    /// Runs `work` on the negotiated line, at most [`CONTROL_DEADLINE`].
    async fn on_line<T>(&self, operation: &'static str, work: impl AsyncFnOnce(&mut Line) -> Outcome<T>) -> Result<T> {
        let asked = async {
            let mut line = self.line.lock().await;
            let done = work(&mut line).await;
            if line.partial.len() > MAX_LINE_BYTES {
                line::end(&self.vm_id, "QMP", MAX_LINE_BYTES, self.signals.as_ref());
            }
            done
        };
        let answer = tokio::time::timeout(CONTROL_DEADLINE, asked).await;
        answer.unwrap_or(Err(ControlError::NoAnswer(CONTROL_DEADLINE))).map_err(|error| {
            let source = match error {
                ControlError::Refused(_) | ControlError::NotTransferred => error.into(),
                error => {
                    let text = format!("QMP: {error}");
                    Cause::explained(error, text)
                }
            };
            Error::Vmm { vm_id: self.vm_id.clone(), operation, source }
        })
    }

    async fn execute(&self, command: &'static str) -> Result<Value> {
        self.on_line(command, async |line| line.command(command, Value::Null).await).await
    }
}

impl Line {
    async fn command(&mut self, command: &str, arguments: Value) -> Outcome<Value> {
        self.commands([(command, arguments)], None).await
    }

    /// Runs commands one after the other, the first that needs it with `fd`; returns the last one's answer. They are sent
    /// at once: each answer waited for would be two more wake-ups. Where one fails, those behind it run all the same.
    async fn commands<const N: usize>(&mut self, commands: [(&str, Value); N], fd: Option<&OwnedFd>) -> Outcome<Value> {
        self.commands_and(commands, fd, |_| {}).await
    }

    /// As [`Line::commands`]; `hear` gets the events that come meanwhile.
    async fn commands_and<const N: usize>(
        &mut self,
        commands: [(&str, Value); N],
        fd: Option<&OwnedFd>,
        mut hear: impl FnMut(&Value),
    ) -> Outcome<Value> {
        let negotiation = (!self.negotiated).then_some(("qmp_capabilities", Value::Null));
        let first = self.next_id + 1;
        let commands = negotiation.into_iter().chain(commands);
        let text: String = commands.map(|(name, arguments)| self.request(name, arguments)).collect();
        self.negotiated = true;
        self.send(&text, fd).await?;
        let mut last = Value::Null;
        for id in first..=self.next_id {
            last = self.answer(id, &mut hear).await?;
        }
        Ok(last)
    }

    /// QEMU 7.2 reads its monitor byte by byte, so it is kept short.
    fn request(&mut self, command: &str, arguments: Value) -> String {
        self.next_id += 1;
        let mut request = json!({"execute": command, "id": self.next_id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        request.to_string() + "\n"
    }

    async fn send(&mut self, text: &str, fd: Option<&OwnedFd>) -> Outcome<()> {
        let stream = self.stream.get_mut();
        let sent = match fd {
            None => stream.write_all(text.as_bytes()).await,
            Some(fd) => {
                let first = stream.async_io(Interest::WRITABLE, || send_with(stream, text.as_bytes(), fd)).await;
                match first {
                    Ok(length) => stream.write_all(text.as_bytes().get(length..).unwrap_or_default()).await,
                    Err(error) => Err(error),
                }
            }
        };
        Ok(sent?)
    }

    async fn answer(&mut self, id: u64, mut hear: impl FnMut(&Value)) -> Outcome<Value> {
        // The greeting, events and late answers have another id or none.
        let is_it = |line: &Value| line.get("id").and_then(Value::as_u64) == Some(id);
        let answer = self.line_with(|line| is_it(line) || (hear(line), false).1).await?;
        match (answer.get("return"), answer.get("error")) {
            (Some(value), _) => Ok(value.clone()),
            (None, Some(error)) => {
                let words = error.get("desc").and_then(Value::as_str).unwrap_or("unknown QMP error");
                Err(ControlError::Refused(words.to_owned()))
            }
            (None, None) => Err(ControlError::Incomplete { what: answer.to_string(), part: "return or error" }),
        }
    }

    /// Waits for the end of an incoming migration.
    async fn migrated(&mut self) -> Outcome<()> {
        let status = |line: &Value| match (line["event"].as_str(), line["data"]["status"].as_str()) {
            (Some("MIGRATION"), Some(status @ ("completed" | "failed"))) => Some(status == "completed"),
            _ => None,
        };
        let end = self.line_with(|line| status(line).is_some()).await?;
        match status(&end) {
            Some(true) => Ok(()),
            _ => Err(ControlError::NotTransferred),
        }
    }

    async fn line_with(&mut self, mut wanted: impl FnMut(&Value) -> bool) -> Outcome<Value> {
        loop {
            if !read_line(&mut self.stream, &mut self.partial, MAX_LINE_BYTES).await? {
                return Err(ControlError::Closed);
            }
            let line: Value = serde_json::from_slice(&self.partial).map_err(ControlError::not_json("its answer"))?;
            self.partial.clear();
            if wanted(&line) {
                return Ok(line);
            }
        }
    }
}

impl VmmControl for Qmp {
    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.on_line("connect", async |line| line.commands([], None).await.map(drop)))
    }

    fn boot(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.execute("stop").await.map(drop) })
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.execute("cont").await.map(drop) })
    }

    /// The one command that writes the devices without the memory (QEMU QMP Reference Manual): Xen has nothing to do with
    /// it. Not `live`: this VM goes on with its drives.
    fn save(&self, state: OwnedFd) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.on_line("save", async move |line| {
            line.command("stop", Value::Null).await?;
            let set = line.commands([("add-fd", json!({}))], Some(&state)).await?["fdset-id"].clone();
            let arguments = json!({"filename": format!("/dev/fdset/{set}"), "live": false});
            let saved = line.command("xen-save-devices-state", arguments).await;
            line.command("remove-fd", json!({"fdset-id": set})).await?;
            saved.map(drop)
        }))
    }

    fn load(&self, state: OwnedFd, run: bool) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.on_line("load", async move |line| {
            let (give, uri) = match self.restore {
                Restore::Fd => (("getfd", json!({"fdname": STATE})), format!("fd:{STATE}")),
                Restore::FdSet => (("add-fd", json!({"fdset-id": STATE_SET})), format!("file:/dev/fdset/{STATE_SET}")),
            };
            let incoming = ("migrate-incoming", json!({"uri": uri}));
            if run {
                // Said before the state is there, `cont` has the VM run from the moment that it is. Nobody may talk to the
                // guest before: an interrupt that comes while the devices are loaded is lost. A state that cannot be loaded
                // is the end of QEMU.
                let is_resume = |line: &Value| line["event"] == "RESUME";
                let mut runs = false;
                let commands = [give, incoming, ("cont", Value::Null)];
                line.commands_and(commands, Some(&state), |line| runs |= is_resume(line)).await?;
                match runs {
                    true => Ok(()),
                    false => line.line_with(is_resume).await.map(drop),
                }
            } else {
                let events = json!({"capabilities": [{"capability": "events", "state": true}]});
                line.commands([("migrate-set-capabilities", events), give, incoming], Some(&state)).await?;
                line.migrated().await
            }
        }))
    }

    fn quit(&self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { self.execute("quit").await.map(|_| true) })
    }

    fn disk_io(&self) -> BoxFuture<'_, Result<DiskIo>> {
        Box::pin(async { Ok(sum_block_stats(&self.execute("query-blockstats").await?)) })
    }

    fn why_stopped(&self) -> BoxFuture<'_, Result<Option<String>>> {
        Box::pin(async { Ok(why_stopped(&self.execute("query-status").await?)) })
    }
}

/// The QMP reference's `StatusInfo`.
fn why_stopped(status: &Value) -> Option<String> {
    let is_running = status["running"].as_bool().unwrap_or(true);
    (!is_running).then(|| status["status"].as_str().unwrap_or("stopped").to_owned())
}

fn sum_block_stats(answer: &Value) -> DiskIo {
    let mut sum = DiskIo::default();
    for device in answer.as_array().into_iter().flatten() {
        let number = |field: &str| device["stats"][field].as_u64().unwrap_or(0);
        sum.read_bytes += number("rd_bytes");
        sum.written_bytes += number("wr_bytes");
        sum.failed_writes += number("failed_wr_operations");
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::testing::golden::assert_golden;
    use tokio::io::AsyncBufReadExt;

    /// A peer that greets, then answers each command with the given lines (`ID` stands for the command's id).
    fn scripted(answers: Vec<&'static str>) -> Qmp {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let mut peer = BufReader::new(theirs);
            peer.get_mut().write_all(b"{\"QMP\": {}}\n").await.unwrap();
            for answer in std::iter::once("{\"return\": {}, \"id\": ID}").chain(answers) {
                let mut request = String::new();
                peer.read_line(&mut request).await.unwrap();
                let id = serde_json::from_str::<Value>(&request).unwrap()["id"].to_string();
                peer.get_mut().write_all((answer.replace("ID", &id) + "\n").as_bytes()).await.unwrap();
            }
        });
        Qmp::new(VmId::parse("vm").unwrap(), ours, Restore::Fd, None)
    }

    #[tokio::test]
    async fn test_execute_skips_events_before_the_answer() {
        let qmp = scripted(vec!["{\"event\": \"STOP\"}\n{\"return\": {}, \"id\": ID}"]);
        qmp.pause().await.unwrap();
    }

    #[tokio::test]
    async fn test_execute_error_keeps_the_vmms_words() {
        let qmp = scripted(vec!["{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}, \"id\": ID}"]);
        assert!(qmp.resume().await.unwrap_err().to_string().contains("no such thing"));
    }

    #[tokio::test]
    async fn test_execute_closed_in_the_middle_is_an_error() {
        let qmp = scripted(vec![]);
        assert_eq!(qmp.pause().await.unwrap_err().code(), "vmm_error");
    }

    #[tokio::test(start_paused = true)]
    async fn test_line_without_an_end_is_read_up_to_a_limit_across_commands() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flooding = tokio::spawn(async move {
            let mut sent = 0;
            while let Ok(length) = theirs.write(&[b'x'; 65_536]).await {
                sent += length;
            }
            sent
        });
        let qmp = Qmp::new(VmId::parse("vm").unwrap(), ours, Restore::Fd, None);
        for _ in 0..20 {
            let said = qmp.disk_io().await.unwrap_err().to_string();
            assert!(said.contains("over 1048576 bytes"), "{said}");
        }
        assert!(qmp.line.lock().await.partial.capacity() <= 4 * MAX_LINE_BYTES);
        drop(qmp);
        // What a socket holds besides.
        assert!(flooding.await.unwrap() < 4 * MAX_LINE_BYTES);
    }

    #[tokio::test]
    async fn test_line_that_comes_in_pieces_goes_on_after_a_deadline() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut stream = BufReader::new(ours);
        let mut partial = Vec::new();
        theirs.write_all(b"{\"event\":").await.unwrap();
        let soon = std::time::Duration::from_millis(20);
        tokio::time::timeout(soon, read_line(&mut stream, &mut partial, 100)).await.unwrap_err();
        theirs.write_all(b" 1}\n{").await.unwrap();
        assert!(read_line(&mut stream, &mut partial, 100).await.unwrap());
        assert_eq!(partial, b"{\"event\": 1}\n");
    }

    #[tokio::test]
    async fn test_load_waits_until_the_vm_runs_whenever_that_is_said() {
        let answer = "{\"return\": {}, \"id\": ID}";
        let resume = "{\"event\": \"RESUME\"}";
        let state = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        // Loaded before `cont` is looked at, and after.
        for last in [format!("{resume}\n{answer}"), format!("{answer}\n{resume}")] {
            let qmp = scripted(vec![answer, answer, last.leak()]);
            qmp.load(state(), true).await.unwrap();
        }
        let qmp = scripted(vec![answer, answer, answer]);
        assert!(qmp.load(state(), true).await.unwrap_err().to_string().contains("closed the connection"));
    }

    /// What a QEMU would be told, which answers everything as one does where all is well.
    async fn told(say: impl AsyncFnOnce(&Qmp)) -> Vec<String> {
        told_by(Restore::Fd, say).await
    }

    async fn told_by(restore: Restore, say: impl AsyncFnOnce(&Qmp)) -> Vec<String> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hearing = tokio::spawn(async move {
            let (mut lines, mut peer) = (Vec::new(), BufReader::new(theirs));
            peer.get_mut().write_all(b"{\"QMP\": {}}\n").await.unwrap();
            loop {
                let mut line = String::new();
                if peer.read_line(&mut line).await.unwrap() == 0 {
                    return lines;
                }
                let command: Value = serde_json::from_str(&line).unwrap();
                let (answer, event) = match command["execute"].as_str().unwrap() {
                    "add-fd" => (json!({"fdset-id": 0, "fd": 9}), None),
                    "migrate-incoming" => {
                        (json!({}), Some(json!({"event": "MIGRATION", "data": {"status": "completed"}})))
                    }
                    "cont" => (json!({}), Some(json!({"event": "RESUME"}))),
                    _ => (json!({}), None),
                };
                let answer = json!({"return": answer, "id": command["id"]});
                let event = event.map(|event| format!("{event}\n")).unwrap_or_default();
                peer.get_mut().write_all(format!("{answer}\n{event}").as_bytes()).await.unwrap();
                lines.push(line.trim_end().to_owned());
            }
        });
        say(&Qmp::new(VmId::parse("vm").unwrap(), ours, restore, None)).await;
        hearing.await.unwrap()
    }

    #[tokio::test]
    async fn test_commands_are_golden() {
        let state = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut lines = vec!["# a clone that runs at once".to_owned()];
        lines.extend(told(async |qmp| qmp.load(state(), true).await.unwrap()).await);
        lines.push("# a clone that waits".into());
        lines.extend(told(async |qmp| qmp.load(state(), false).await.unwrap()).await);
        lines.push("# the same of a QEMU that takes files only".into());
        lines.extend(told_by(Restore::FdSet, async |qmp| qmp.load(state(), true).await.unwrap()).await);
        lines.extend(told_by(Restore::FdSet, async |qmp| qmp.load(state(), false).await.unwrap()).await);
        lines.push("# a template is recorded".into());
        lines.extend(told(async |qmp| qmp.save(state()).await.unwrap()).await);
        lines.push("# a life".into());
        let life = async |qmp: &Qmp| {
            qmp.connect().await.unwrap();
            qmp.pause().await.unwrap();
            qmp.resume().await.unwrap();
            qmp.disk_io().await.unwrap();
            qmp.why_stopped().await.unwrap();
            assert!(qmp.quit().await.unwrap());
        };
        lines.extend(told(life).await);
        assert_golden("qemu.commands", &lines);
    }

    #[test]
    fn test_why_stopped_is_the_vmms_word() {
        let of = |status: Value| why_stopped(&status);
        assert_eq!(of(json!({"status": "running", "running": true, "singlestep": false})), None);
        assert_eq!(of(json!({"status": "io-error", "running": false})), Some("io-error".into()));
    }

    #[test]
    fn test_sum_block_stats_adds_all_drives() {
        let answer =
            json!([{"stats": {"rd_bytes": 1, "wr_bytes": 2}}, {"stats": {"rd_bytes": 10, "failed_wr_operations": 3}}]);
        assert_eq!(sum_block_stats(&answer), DiskIo { read_bytes: 11, written_bytes: 2, failed_writes: 3 });
    }
}
