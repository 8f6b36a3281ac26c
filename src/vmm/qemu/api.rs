//! QMP, over the socket that QEMU was born with (QEMU Machine Protocol specification).

use serde_json::{json, Value};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::error::{Error, Result};
use crate::model::VmId;
use crate::vmm::{BoxFuture, Control, DiskIo, CONTROL_DEADLINE};

/// One QMP connection; commands go one after the other.
#[derive(Debug)]
pub struct Qmp {
    vm_id: VmId,
    line: Mutex<Line>,
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
    pub fn new(vm_id: VmId, stream: UnixStream) -> Self {
        let line = Line { stream: BufReader::new(stream), negotiated: false, next_id: 0, partial: Vec::new() };
        Self { vm_id, line: Mutex::new(line) }
    }

    async fn execute(&self, command: &'static str) -> Result<Value> {
        let failed = |reason: String| Error::Vmm { vm_id: self.vm_id.clone(), operation: command, reason };
        let exchange = async {
            let mut line = self.line.lock().await;
            if !line.negotiated {
                line.command("qmp_capabilities").await?;
                line.negotiated = true;
            }
            line.command(command).await
        };
        match tokio::time::timeout(CONTROL_DEADLINE, exchange).await {
            Ok(answer) => answer.map_err(failed),
            Err(_) => Err(failed(format!("QMP did not answer within {} s", CONTROL_DEADLINE.as_secs()))),
        }
    }
}

impl Line {
    async fn command(&mut self, command: &str) -> std::result::Result<Value, String> {
        self.next_id += 1;
        let id = self.next_id;
        let mut request = json!({"execute": command, "id": id}).to_string();
        request.push('\n');
        self.stream.get_mut().write_all(request.as_bytes()).await.map_err(|e| format!("QMP: {e}"))?;
        loop {
            let read = self.stream.read_until(b'\n', &mut self.partial).await.map_err(|e| format!("QMP: {e}"))?;
            if read == 0 {
                return Err("QMP: the VMM closed the connection".into());
            }
            let answer: Value = serde_json::from_slice(&self.partial).map_err(|e| format!("QMP: {e}"))?;
            self.partial.clear();
            // The greeting, events and late answers have another id or none.
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                continue;
            }
            return match (answer.get("return"), answer.get("error")) {
                (Some(value), _) => Ok(value.clone()),
                (None, Some(error)) => {
                    Err(error.get("desc").and_then(Value::as_str).unwrap_or("unknown QMP error").to_owned())
                }
                (None, None) => Err(format!("QMP: neither return nor error in {answer}")),
            };
        }
    }
}

impl Control for Qmp {
    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.execute("stop").await.map(drop) })
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.execute("cont").await.map(drop) })
    }

    fn quit(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.execute("quit").await.map(drop) })
    }

    fn disk_io(&self) -> BoxFuture<'_, Result<DiskIo>> {
        Box::pin(async { Ok(sum_block_stats(&self.execute("query-blockstats").await?)) })
    }
}

fn sum_block_stats(answer: &Value) -> DiskIo {
    let mut sum = DiskIo::default();
    for device in answer.as_array().into_iter().flatten() {
        let bytes = |field: &str| device["stats"][field].as_u64().unwrap_or(0);
        sum.read_bytes += bytes("rd_bytes");
        sum.written_bytes += bytes("wr_bytes");
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

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
        Qmp::new(VmId::parse("vm").unwrap(), ours)
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

    #[test]
    fn test_sum_block_stats_adds_all_drives() {
        let answer = json!([{"stats": {"rd_bytes": 1, "wr_bytes": 2}}, {"stats": {"rd_bytes": 10}}]);
        assert_eq!(sum_block_stats(&answer), DiskIo { read_bytes: 11, written_bytes: 2 });
    }
}
