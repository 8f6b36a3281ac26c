//! The DNS relay of one segment: asks for its VM, and lets the VM go where the answers point before it hears them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::{AbortHandle, JoinSet};

use super::host_servers;
use crate::host::clock;
use crate::host::net::{Listening, Table};
use crate::net::{Pinned, Question, Relayed, Rules, Segment, Upstream, Verdict};

const DNS_PORT: u16 = 53;
/// A message over UDP; over TCP its length is a u16.
const MAX_MESSAGE: usize = 65_535;
/// Servers that are asked one after the other, and how often all of them; resolv.conf(5) has 3 and 2.
const MAX_SERVERS: usize = 3;
const ROUNDS: usize = 2;
const SERVER_DEADLINE: Duration = Duration::from_secs(2);
/// Questions of one VM that may be open at once; more over UDP are lost, as they might be on any network.
const MAX_QUESTIONS: usize = 64;
const MAX_CONNECTIONS: usize = 16;
/// How long a TCP connection may stay silent.
const IDLE: Duration = Duration::from_secs(10);
/// For how long an address is let pass at least and at most: programs keep what they learned, whatever its TTL.
const MIN_PIN_S: u32 = 60;
const MAX_PIN_S: u32 = 3600;

/// Relays until dropped.
#[derive(Debug)]
pub struct Relay {
    tasks: [AbortHandle; 2],
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Relay {
    /// Call on the runtime.
    pub fn start(
        listening: Listening,
        upstream: Upstream,
        segment: Arc<Segment>,
        rules: Rules,
        table: Arc<Table>,
    ) -> std::io::Result<Self> {
        let (udp, tcp) = (UdpSocket::from_std(listening.udp)?, TcpListener::from_std(listening.tcp)?);
        let pins = Mutex::new(Pins { restored: table.restored(), until: HashMap::new() });
        let asking = Arc::new(Asking { upstream, segment, rules, table, pins, slots: Semaphore::new(MAX_QUESTIONS) });
        let tasks = [
            tokio::spawn(serve_udp(Arc::new(udp), asking.clone())).abort_handle(),
            tokio::spawn(serve_tcp(tcp, asking)).abort_handle(),
        ];
        Ok(Self { tasks })
    }
}

/// What both transports share.
struct Asking {
    upstream: Upstream,
    segment: Arc<Segment>,
    rules: Rules,
    table: Arc<Table>,
    pins: Mutex<Pins>,
    slots: Semaphore,
}

/// Until when each address is let pass, as far as this side knows.
struct Pins {
    restored: u64,
    until: HashMap<Pinned, Instant>,
}

#[derive(Clone, Copy)]
enum Transport {
    Udp,
    Tcp,
}

async fn serve_udp(socket: Arc<UdpSocket>, asking: Arc<Asking>) {
    // Aborting this task drops the set, and with it every open question.
    let mut open = JoinSet::new();
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        while open.try_join_next().is_some() {}
        let (length, peer) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // An ICMP error of an earlier answer comes back this way, too.
                log::debug!("{}: DNS relay: {error}", asking.segment.tap.name);
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        if open.len() >= MAX_QUESTIONS {
            continue;
        }
        let (message, asking, socket) = (buffer[..length].to_vec(), asking.clone(), socket.clone());
        open.spawn(async move {
            if let Some(answer) = asking.answer(&message, Transport::Udp).await {
                if let Err(error) = socket.send_to(&answer, peer).await {
                    log::debug!("{}: DNS relay: {error}", asking.segment.tap.name);
                }
            }
        });
    }
}

async fn serve_tcp(listener: TcpListener, asking: Arc<Asking>) {
    let mut open = JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        if open.len() >= MAX_CONNECTIONS {
            open.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                let asking = asking.clone();
                open.spawn(async move {
                    let name = asking.segment.tap.name.clone();
                    if let Err(error) = serve_connection(stream, &asking).await {
                        log::debug!("{name}: DNS relay: {error}");
                    }
                });
            }
            Err(error) => {
                log::debug!("{}: DNS relay: {error}", asking.segment.tap.name);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(mut stream: TcpStream, asking: &Asking) -> std::io::Result<()> {
    loop {
        let message = tokio::time::timeout(IDLE, read_message(&mut stream)).await??;
        let Some(answer) = asking.answer(&message, Transport::Tcp).await else { return Ok(()) };
        tokio::time::timeout(IDLE, write_message(&mut stream, &answer)).await??;
    }
}

async fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| std::io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

impl Asking {
    /// What the VM hears, if anything.
    async fn answer(&self, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let question = match Verdict::on(message, &self.segment) {
            Verdict::Ask(question) => question,
            Verdict::Answer(answer) => return Some(answer),
            Verdict::Drop => return None,
        };
        let _slot = self.slots.acquire().await.ok()?;
        let Some(relayed) = self.ask(&question, transport).await else { return question.failed() };
        match self.pin(&relayed).await {
            Ok(()) => Some(relayed.message),
            Err(reason) => {
                log::warn!("{}: a name could not be let pass: {reason}", self.segment.tap.name);
                question.failed()
            }
        }
    }

    async fn ask(&self, question: &Question, transport: Transport) -> Option<Relayed> {
        let servers = match &self.upstream {
            Upstream::Given(servers) => servers.clone(),
            Upstream::Host => host_servers(),
        };
        for server in servers.iter().take(MAX_SERVERS).cycle().take(servers.len().min(MAX_SERVERS) * ROUNDS) {
            let server = SocketAddr::new(*server, DNS_PORT);
            let asked = match transport {
                Transport::Udp => tokio::time::timeout(SERVER_DEADLINE, ask_udp(question, server)).await,
                Transport::Tcp => tokio::time::timeout(SERVER_DEADLINE, ask_tcp(question, server)).await,
            };
            match asked {
                Ok(Ok(relayed)) => return Some(relayed),
                Ok(Err(error)) => log::debug!("{}: DNS server {server}: {error}", self.segment.tap.name),
                Err(_) => log::debug!("{}: DNS server {server} did not answer", self.segment.tap.name),
            }
        }
        None
    }

    async fn pin(&self, relayed: &Relayed) -> Result<(), String> {
        if relayed.pinned.is_empty() {
            return Ok(());
        }
        // Held while the rules change: the next answer with the same addresses must not overtake.
        let mut pins = self.pins.lock().await;
        let (now, restored) = (Instant::now(), self.table.restored());
        if pins.restored != restored {
            pins.until.clear();
            pins.restored = restored;
        }
        pins.until.retain(|_, until| *until > now);
        let needed = relayed.ttl_s.clamp(MIN_PIN_S, MAX_PIN_S);
        let lasts = |pinned: &Pinned| {
            pins.until.get(pinned).is_some_and(|until| *until >= now + Duration::from_secs(u64::from(needed)))
        };
        if relayed.pinned.iter().all(lasts) {
            return Ok(());
        }
        // Twice as long as needed, so that the next answers find it in place.
        let text = self.rules.pin(self.segment.tap.index, &relayed.pinned, needed * 2);
        let table = self.table.clone();
        let changed = tokio::task::spawn_blocking(move || table.change(&text)).await;
        changed.map_err(|error| error.to_string())?.map_err(|refusal| refusal.reason)?;
        let until = now + Duration::from_secs(u64::from(needed * 2));
        pins.until.extend(relayed.pinned.iter().map(|pinned| (*pinned, until)));
        Ok(())
    }
}

fn fresh_id() -> std::io::Result<u16> {
    clock::random().map(u16::from_ne_bytes).map_err(std::io::Error::other)
}

async fn ask_udp(question: &Question, server: SocketAddr) -> std::io::Result<Relayed> {
    let any = if server.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    // A port of its own for each question: an answer must know it, and the number.
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(server).await?;
    let id = fresh_id()?;
    socket.send(&question.asked_as(id)).await?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(relayed) = question.answered(id, &buffer[..length]) {
            return Ok(relayed);
        }
    }
}

async fn ask_tcp(question: &Question, server: SocketAddr) -> std::io::Result<Relayed> {
    let mut stream = TcpStream::connect(server).await?;
    let id = fresh_id()?;
    write_message(&mut stream, &question.asked_as(id)).await?;
    let answer = read_message(&mut stream).await?;
    question.answered(id, &answer).ok_or_else(|| std::io::Error::other("it answered something else"))
}
