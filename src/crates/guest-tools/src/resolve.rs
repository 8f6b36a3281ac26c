//! Names of the network. glibc's resolver is no use here: in a static program it loads what the image's nsswitch.conf
//! names, made for another glibc.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use domain::base::iana::{Rcode, Rtype};
use domain::base::{Message, MessageBuilder, Name, ToName};
use domain::rdata::A;

const DNS_PORT: u16 = 53;
const MAX_MESSAGE: usize = 65_535;
/// resolv.conf(5): three servers, asked twice; each may take this long.
const MAX_SERVERS: usize = 3;
const ROUNDS: usize = 2;
const SERVER_DEADLINE: Duration = Duration::from_secs(3);

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unresolved {
    /// A server said so, or nobody can be asked.
    Failed(String),
    TimedOut,
}

/// The IPv4 addresses of `host`.
pub fn resolve(host: &str, deadline: Instant) -> Result<Vec<Ipv4Addr>, Unresolved> {
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    let listed = listed(&fs::read_to_string("/etc/hosts").unwrap_or_default(), host);
    if !listed.is_empty() {
        return Ok(listed);
    }
    let name: Name<Vec<u8>> = host.parse().map_err(|_| Unresolved::Failed(format!("{host:?} is no name")))?;
    let servers = servers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    if servers.is_empty() {
        return Err(Unresolved::Failed("/etc/resolv.conf names no server".into()));
    }
    let mut last = Unresolved::TimedOut;
    for server in servers.iter().cycle().take(servers.len() * ROUNDS) {
        let left = deadline.saturating_duration_since(Instant::now()).min(SERVER_DEADLINE);
        if left.is_zero() {
            return Err(Unresolved::TimedOut);
        }
        match ask(&name, SocketAddr::new(*server, DNS_PORT), left) {
            Ok(Said::Addresses(addresses)) if !addresses.is_empty() => return Ok(addresses),
            Ok(Said::Addresses(_)) => return Err(Unresolved::Failed(format!("{host} has no IPv4 address"))),
            Ok(Said::No(Rcode::NXDOMAIN)) => return Err(Unresolved::Failed(format!("there is no {host}"))),
            Ok(Said::No(rcode)) => last = Unresolved::Failed(format!("{server} answered {rcode}")),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => last = Unresolved::Failed(format!("{server}: {error}")),
        }
    }
    Err(last)
}

/// hosts(5).
fn listed(hosts: &str, name: &str) -> Vec<Ipv4Addr> {
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let address: Ipv4Addr = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    };
    lines.filter_map(address).collect()
}

fn servers(resolv_conf: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        words.next().filter(|_| is_server)?.parse().ok()
    };
    resolv_conf.lines().filter_map(server).take(MAX_SERVERS).collect()
}

/// What a server made of the question.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Addresses(Vec<Ipv4Addr>),
    No(Rcode),
}

fn ask(name: &Name<Vec<u8>>, server: SocketAddr, limit: Duration) -> io::Result<Said> {
    let id = u16::from_ne_bytes(random()?);
    let question = question(name, id)?;
    let any = if server.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(server)?;
    socket.send(&question)?;
    let until = Instant::now() + limit;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let length = socket.recv(&mut buffer)?;
        match read(name, id, buffer.get(..length).unwrap_or_default()) {
            Some((_, true)) => return ask_tcp(name, id, &question, server, left),
            Some((said, false)) => return Ok(said),
            None => {}
        }
    }
}

fn ask_tcp(name: &Name<Vec<u8>>, id: u16, question: &[u8], server: SocketAddr, limit: Duration) -> io::Result<Said> {
    let mut stream = TcpStream::connect_timeout(&server, limit)?;
    stream.set_read_timeout(Some(limit))?;
    let length = u16::try_from(question.len()).map_err(|_| ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_be_bytes(), question].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    read(name, id, &message).map(|(said, _)| said).ok_or_else(|| ErrorKind::InvalidData.into())
}

fn random() -> io::Result<[u8; 2]> {
    let mut bytes = [0; 2];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn question(name: &Name<Vec<u8>>, id: u16) -> io::Result<Vec<u8>> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(id);
    builder.header_mut().set_rd(true);
    let mut builder = builder.question();
    builder.push((name, Rtype::A)).map_err(|_| ErrorKind::InvalidInput)?;
    Ok(builder.finish())
}

/// The answer to our question, and whether it was cut; `None` when it is another's.
fn read(name: &Name<Vec<u8>>, id: u16, message: &[u8]) -> Option<(Said, bool)> {
    let message = Message::from_slice(message).ok()?;
    let header = message.header();
    let asked = message.sole_question().ok()?;
    if !header.qr() || header.id() != id || asked.qtype() != Rtype::A || !asked.qname().name_eq(name) {
        return None;
    }
    if header.rcode() != Rcode::NOERROR {
        return Some((Said::No(header.rcode()), false));
    }
    // A server that recurses follows the aliases itself: what it answers with is what the name stands for.
    let answers = message.answer().ok()?.limit_to_in::<A>();
    Some((Said::Addresses(answers.flatten().map(|record| record.data().addr()).collect()), header.tc()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name<Vec<u8>> {
        "example.com".parse().unwrap()
    }

    fn reply(rcode: Rcode, addresses: &[[u8; 4]]) -> Vec<u8> {
        let question = question(&name(), 7).unwrap();
        let mut builder =
            MessageBuilder::new_vec().start_answer(Message::from_slice(&question).unwrap(), rcode).unwrap();
        for [a, b, c, d] in addresses {
            builder.push((name(), 60, A::from_octets(*a, *b, *c, *d))).unwrap();
        }
        builder.finish()
    }

    #[test]
    fn test_read_takes_the_answer_to_its_own_question_alone() {
        let message = reply(Rcode::NOERROR, &[[192, 0, 2, 1]]);
        let address = Ipv4Addr::new(192, 0, 2, 1);
        assert_eq!(read(&name(), 7, &message), Some((Said::Addresses(vec![address]), false)));
        assert_eq!(read(&name(), 8, &message), None);
        assert_eq!(read(&"example.net".parse().unwrap(), 7, &message), None);
        assert_eq!(read(&name(), 7, &reply(Rcode::NXDOMAIN, &[])), Some((Said::No(Rcode::NXDOMAIN), false)));
    }

    #[test]
    fn test_listed_and_servers_pass_over_what_they_do_not_know() {
        let hosts = "127.0.0.1 localhost # me\n::1 db\n10.0.0.7 web db # 10.0.0.8 db\nbroken db\n";
        assert_eq!(listed(hosts, "DB"), [Ipv4Addr::new(10, 0, 0, 7)]);
        let conf = "search a\nnameserver 10.0.0.1\nnameserver nobody\nnameserver ::1\n";
        assert_eq!(servers(conf), ["10.0.0.1".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
    }
}
