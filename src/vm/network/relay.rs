//! The DNS relay of one VM network: asks for its VM, and lets the VM go where the answers point before it hears them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::{AbortHandle, JoinSet};

use super::host_servers;
use crate::error::Cause;
use crate::host::clock;
use crate::host::net::{Listening, Table};
use crate::mutex::Mutex as StdMutex;
use crate::net::{Decision, Pinned, Question, Relayed, Rules, Transport, Upstream, VmNetwork, MAX_PINNED};

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

/// Changes of the rules (each runs `nft`) that one VM may cause: some at once, then one in each interval, which takes along
/// all that came meanwhile.
const CHANGES_AT_ONCE: u32 = 16;
const CHANGE_INTERVAL: Duration = Duration::from_millis(200);
/// How often one VM's relay may warn; the next warning says how many were left out.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

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

/// A bucket of tokens that fills itself.
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    most: u32,
    interval: Duration,
    since: Instant,
}

impl Bucket {
    fn full(most: u32, interval: Duration, now: Instant) -> Self {
        Self { tokens: most, most, interval, since: now }
    }

    /// Takes a token; else how long it is until there is one.
    fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.since).as_nanos() / self.interval.as_nanos();
        let fresh = u32::try_from(passed).unwrap_or(u32::MAX);
        // A full bucket does not save up: its time begins now.
        self.since = if fresh >= self.most - self.tokens { now } else { self.since + self.interval * fresh };
        self.tokens = self.tokens.saturating_add(fresh).min(self.most);
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                Ok(())
            }
            None => Err(self.interval.saturating_sub(now.saturating_duration_since(self.since))),
        }
    }
}

/// What a guest can cause to be logged, rationed.
#[derive(Debug)]
struct Warnings {
    bucket: Bucket,
    left_out: u64,
}

impl Warnings {
    fn new(now: Instant) -> Self {
        Self { bucket: Bucket::full(1, WARNING_INTERVAL, now), left_out: 0 }
    }

    /// Whether to warn now, and how many warnings were left out before this one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        match self.bucket.take(now) {
            Ok(()) => Some(std::mem::take(&mut self.left_out)),
            Err(_) => {
                self.left_out += 1;
                None
            }
        }
    }
}

impl Relay {
    /// Call on the runtime.
    pub fn start(
        listening: Listening,
        upstream: Upstream,
        vm_network: Arc<VmNetwork>,
        rules: Rules,
        table: Arc<Table>,
    ) -> std::io::Result<Self> {
        let (udp, tcp) = (UdpSocket::from_std(listening.udp)?, TcpListener::from_std(listening.tcp)?);
        let now = Instant::now();
        let changes = Bucket::full(CHANGES_AT_ONCE, CHANGE_INTERVAL, now);
        let pins = Mutex::new(Pins { restored: table.restored(), until: HashMap::new(), changes });
        let asking = Arc::new(Asking {
            upstream,
            vm_network,
            rules,
            table,
            pins,
            wanted: StdMutex::default(),
            warnings: StdMutex::new(Warnings::new(now)),
            slots: Semaphore::new(MAX_QUESTIONS),
        });
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
    vm_network: Arc<VmNetwork>,
    rules: Rules,
    table: Arc<Table>,
    pins: Mutex<Pins>,
    /// What the next change of the rules is to let pass, and for how many seconds at least.
    wanted: StdMutex<HashMap<Pinned, u32>>,
    warnings: StdMutex<Warnings>,
    slots: Semaphore,
}

/// Until when each address is let pass, as far as this side knows.
struct Pins {
    restored: u64,
    until: HashMap<Pinned, Instant>,
    changes: Bucket,
}

impl Pins {
    /// Forgets what is over, and what was lost with the rules.
    fn refresh(&mut self, now: Instant, restored: u64) {
        if self.restored != restored {
            self.until.clear();
            self.restored = restored;
        }
        self.until.retain(|_, until| *until > now);
    }

    fn hold(&self, pinned: &[Pinned], until: Instant) -> bool {
        pinned.iter().all(|pinned| self.until.get(pinned).is_some_and(|known| *known >= until))
    }

    fn have_room(&self, pinned: &[Pinned]) -> bool {
        let new = pinned.iter().filter(|pinned| !self.until.contains_key(pinned)).count();
        self.until.len() + new <= MAX_PINNED
    }
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
                log::debug!("{}: DNS relay: {error}", asking.vm_network.tap.name);
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
                    log::debug!("{}: DNS relay: {error}", asking.vm_network.tap.name);
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
                    let name = asking.vm_network.tap.name.clone();
                    if let Err(error) = serve_connection(stream, &asking).await {
                        log::debug!("{name}: DNS relay: {error}");
                    }
                });
            }
            Err(error) => {
                log::debug!("{}: DNS relay: {error}", asking.vm_network.tap.name);
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
        let question = match Decision::on(message, self.vm_network.egress.as_deref()) {
            Decision::Ask(question) => question,
            Decision::Answer(answer) => return Some(answer),
            Decision::Drop => return None,
        };
        let _slot = self.slots.acquire().await.ok()?;
        let Some(relayed) = self.ask(&question, transport).await else { return question.failed() };
        if let Some(address) = relayed.withheld {
            let name = question.name();
            self.warn(&format!("{name} stands for {address}, a private address that its allow-list does not name"));
        }
        match self.pin(&relayed).await {
            Ok(()) => Some(relayed.message),
            Err(reason) => {
                self.warn(&format!("{} could not be let pass: {reason}", question.name()));
                question.failed()
            }
        }
    }

    /// Warns, but not as often as a guest likes.
    fn warn(&self, what: &str) {
        let admitted = self.warnings.lock().admit(Instant::now());
        let tap = &self.vm_network.tap.name;
        match admitted {
            Some(0) => log::warn!("{tap}: {what}"),
            Some(more) => log::warn!("{tap}: {what} ({more} such warnings were left out)"),
            None => log::debug!("{tap}: {what}"),
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
                Ok(Err(error)) => log::debug!("{}: DNS server {server}: {error}", self.vm_network.tap.name),
                Err(_) => log::debug!("{}: DNS server {server} did not answer", self.vm_network.tap.name),
            }
        }
        None
    }

    async fn pin(&self, relayed: &Relayed) -> Result<(), Cause> {
        if relayed.pinned.is_empty() {
            return Ok(());
        }
        let needed = relayed.ttl_s.clamp(MIN_PIN_S, MAX_PIN_S);
        self.want(&relayed.pinned, needed);
        // Held while the rules change: the next answer with the same addresses must not overtake.
        let mut pins = self.pins.lock().await;
        loop {
            let now = Instant::now();
            pins.refresh(now, self.table.restored());
            if pins.hold(&relayed.pinned, now + Duration::from_secs(u64::from(needed))) {
                return Ok(());
            }
            if !pins.have_room(&relayed.pinned) {
                self.wanted.lock().retain(|pinned, _| !relayed.pinned.contains(pinned));
                let held = pins.until.len();
                return Err(format!("its names stand for {held} addresses already, the most that may be").into());
            }
            match pins.changes.take(now) {
                Ok(()) => return self.change(&mut pins, relayed, needed).await,
                Err(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    fn want(&self, pinned: &[Pinned], seconds: u32) {
        let mut wanted = self.wanted.lock();
        for pinned in pinned {
            let longest = wanted.entry(*pinned).or_default();
            *longest = seconds.max(*longest);
        }
    }

    /// Lets pass what `relayed` needs, and in the same change what others wait for, as far as there is room.
    async fn change(&self, pins: &mut Pins, relayed: &Relayed, needed: u32) -> Result<(), Cause> {
        let others = std::mem::take(&mut *self.wanted.lock());
        let mut all: HashMap<Pinned, u32> = relayed.pinned.iter().map(|pinned| (*pinned, needed)).collect();
        let mut room = MAX_PINNED.saturating_sub(pins.until.len() + all.len());
        for (pinned, seconds) in others {
            let known = pins.until.contains_key(&pinned) || all.contains_key(&pinned);
            if known || room > 0 {
                room -= usize::from(!known);
                let longest = all.entry(pinned).or_default();
                *longest = seconds.max(*longest);
            }
        }
        // Twice as long as needed, so that the next answers find it in place.
        let all: Vec<(Pinned, u32)> = all.into_iter().map(|(pinned, needed)| (pinned, needed * 2)).collect();
        let text = self.rules.pin(self.vm_network.tap.index, &all);
        let (table, begun) = (self.table.clone(), Instant::now());
        let changed = tokio::task::spawn_blocking(move || table.change(&text)).await;
        changed?.map_err(|refusal| refusal.cause)?;
        pins.until.extend(all.iter().map(|(pinned, lasts)| (*pinned, begun + Duration::from_secs(u64::from(*lasts)))));
        Ok(())
    }
}

fn fresh_id() -> std::io::Result<u16> {
    clock::random().map(u16::from_ne_bytes).map_err(std::io::Error::other)
}

fn message(question: &Question, id: u16) -> std::io::Result<Vec<u8>> {
    question.asked_as(id).ok_or_else(|| std::io::ErrorKind::InvalidInput.into())
}

async fn ask_udp(question: &Question, server: SocketAddr) -> std::io::Result<Relayed> {
    let any = if server.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    // A port of its own for each question: an answer must know it, and the number.
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(server).await?;
    let id = fresh_id()?;
    socket.send(&message(question, id)?).await?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(relayed) = question.answered(id, &buffer[..length], Transport::Udp) {
            return Ok(relayed);
        }
    }
}

async fn ask_tcp(question: &Question, server: SocketAddr) -> std::io::Result<Relayed> {
    let mut stream = TcpStream::connect(server).await?;
    let id = fresh_id()?;
    write_message(&mut stream, &message(question, id)?).await?;
    let answer = read_message(&mut stream).await?;
    question.answered(id, &answer, Transport::Tcp).ok_or_else(|| std::io::Error::other("it answered something else"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_bucket_gives_what_is_in_it_then_one_in_each_interval() {
        let (interval, start) = (Duration::from_secs(1), Instant::now());
        let mut bucket = Bucket::full(3, interval, start);
        let after = |tenths: u32| start + interval * tenths / 10;
        assert_eq!([0, 1, 2].map(|tenths| bucket.take(after(tenths)).is_ok()), [true; 3]);
        assert_eq!(bucket.take(after(3)), Err(Duration::from_millis(700)));
        assert_eq!([10, 11, 20, 29].map(|tenths| bucket.take(after(tenths)).is_ok()), [true, false, true, false]);
        // However long it rests, it holds no more than that.
        assert_eq!([9000, 9001, 9002, 9003].map(|t| bucket.take(after(t)).is_ok()), [true, true, true, false]);
    }

    #[test]
    fn test_warnings_say_how_many_were_left_out() {
        let start = Instant::now();
        let mut warnings = Warnings::new(start);
        assert_eq!(warnings.admit(start), Some(0));
        assert!((1..=544).all(|n| warnings.admit(start + Duration::from_millis(n)).is_none()));
        assert_eq!(warnings.admit(start + WARNING_INTERVAL), Some(544));
        assert_eq!(warnings.admit(start + WARNING_INTERVAL), None);
        assert_eq!(warnings.admit(start + WARNING_INTERVAL * 2), Some(1));
    }

    #[test]
    fn test_pins_have_room_for_what_is_known_and_for_no_more_than_the_most() {
        let now = Instant::now();
        let pinned = |n: usize| Pinned { address: Ipv4Addr::from(u32::try_from(n).unwrap()), port: None };
        let changes = Bucket::full(1, CHANGE_INTERVAL, now);
        let until = (0..MAX_PINNED).map(|n| (pinned(n), now + Duration::from_secs(n as u64))).collect();
        let mut pins = Pins { restored: 0, until, changes };
        assert!(pins.have_room(&[pinned(5)]) && !pins.have_room(&[pinned(5), pinned(MAX_PINNED)]));
        pins.refresh(now + Duration::from_secs(1), 0);
        assert!(pins.have_room(&[pinned(MAX_PINNED), pinned(0)]));
        assert!(pins.hold(&[pinned(7)], now + Duration::from_secs(7)));
        assert!(!pins.hold(&[pinned(7), pinned(MAX_PINNED)], now));
        pins.refresh(now, 1);
        assert!(pins.until.is_empty());
    }
}
