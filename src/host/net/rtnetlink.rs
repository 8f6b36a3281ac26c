//! rtnetlink(7): the kernel is asked about links, addresses and routes, and told to change them, in typed messages; what it
//! refuses it says by errno.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    NetlinkBuffer, NetlinkMessage, NetlinkPayload, NlasIterator, Parseable, NLMSG_DONE, NLMSG_ERROR, NLM_F_ACK,
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkHeader, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::sys::socket::{recv, send, socket, AddressFamily as Family, MsgFlags, SockFlag, SockProtocol, SockType};

use super::Refusal;

/// A message with the flags that say what is to happen when the thing is there already.
pub type Change = NetlinkMessage<RouteNetlinkMessage>;

/// The kernel sends at most 32 KiB at once.
const BUFFER: usize = 64 * 1024;
const NLMSG_ALIGN: usize = 4;
/// How often a list is asked for that changes while it is read.
const TRIES: usize = 16;
/// What the kernel answers about something that is gone already.
const GONE: [Errno; 4] = [Errno::ENODEV, Errno::ESRCH, Errno::ENOENT, Errno::EADDRNOTAVAIL];

/// An index that no interface has.
const NOBODY: u32 = i32::MAX as u32;

/// A change that the kernel did not make.
#[derive(Debug, thiserror::Error)]
#[error("the kernel does not {change}: {errno}")]
pub struct Rejected {
    change: String,
    #[source]
    pub errno: Errno,
}

impl From<Rejected> for Refusal {
    fn from(rejected: Rejected) -> Self {
        let remedy = match rejected.errno {
            Errno::EPERM | Errno::EACCES => return Refusal::denied(rejected),
            Errno::EOPNOTSUPP => "load the driver (modprobe ifb)",
            Errno::EBUSY | Errno::EEXIST => "look at who uses it (ip address, ip route)",
            _ => "look at the interface, and at the limits of this process (ulimit -a)",
        };
        Refusal::new(rejected, remedy)
    }
}

/// An interface, as far as it is asked for here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub group: u32,
    /// The bridge or the like that it belongs to, by its index.
    pub master: Option<u32>,
    pub is_up: bool,
    /// It is up, and there is somebody at its other end.
    pub has_carrier: bool,
}

/// Makes the changes in their order, up to the first that is refused.
///
/// # Errors
/// The change that was not made, and why.
pub fn apply(changes: &[Change]) -> Result<(), Rejected> {
    changes.iter().try_for_each(|change| {
        exchange(change.clone(), NLM_F_ACK).map(drop).map_err(|errno| Rejected { change: describe(change), errno })
    })
}

/// Makes all changes that can be made, and logs why others could not, unless what they are about is gone.
pub fn apply_all(changes: &[Change]) {
    for rejected in changes.iter().filter_map(|change| apply(std::slice::from_ref(change)).err()) {
        if !GONE.contains(&rejected.errno) {
            log::warn!("the network was not cleaned up: {rejected}");
        }
    }
}

/// Whether the kernel lets this process change no interface here: it asks for the right before it looks for the interface.
pub(super) fn is_denied() -> bool {
    let mut nobody = LinkMessage::default();
    nobody.header.index = NOBODY;
    exchange(RouteNetlinkMessage::SetLink(nobody).into(), NLM_F_ACK) == Err(Errno::EPERM)
}

/// Every interface: none that exists all the while is left out.
///
/// # Errors
/// `EINTR`: the interfaces change faster than they can be read. Others are the kernel's.
pub fn links() -> nix::Result<Vec<Link>> {
    let answers = list(&RouteNetlinkMessage::GetLink(LinkMessage::default()).into())?;
    answers.iter().map(|payload| parse_link(payload).ok_or(Errno::EPROTO)).collect()
}

/// The interface with this index.
///
/// # Errors
/// `ENODEV`: there is none.
pub fn link(index: u32) -> nix::Result<Link> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let answers = exchange(RouteNetlinkMessage::GetLink(message).into(), NLM_F_ACK)?;
    answers.iter().find_map(|payload| parse_link(payload)).ok_or(Errno::EPROTO)
}

/// What removes the IPv4 addresses of an interface that are valid on its wire alone.
///
/// # Errors
/// The kernel's.
pub fn without_link_addresses(index: u32) -> nix::Result<Vec<Change>> {
    let mut question = AddressMessage::default();
    question.header.family = AddressFamily::Inet;
    let answers = list(&RouteNetlinkMessage::GetAddress(question).into())?;
    let addresses = answers.iter().filter_map(|payload| AddressMessage::parse(payload).ok());
    let ours = addresses.filter(|address| address.header.index == index && address.header.scope == AddressScope::Link);
    Ok(ours.map(|address| RouteNetlinkMessage::DelAddress(address).into()).collect())
}

/// The whole of a list, as it was at one time.
fn list(question: &Change) -> nix::Result<Vec<Vec<u8>>> {
    let mut answers = Err(Errno::EINTR);
    for _ in 0..TRIES {
        answers = exchange(question.clone(), NLM_F_DUMP);
        if answers != Err(Errno::EINTR) {
            break;
        }
    }
    answers
}

/// Sends one message and gives the payloads of the answers. The kernel has acted and answered by the time that send(2)
/// comes back, and it goes on with a list at each recv(2), so nothing here waits.
pub(super) fn exchange(message: Change, flags: u16) -> nix::Result<Vec<Vec<u8>>> {
    exchange_on(&open()?, message, flags)
}

/// A socket for questions.
pub(super) fn open() -> nix::Result<OwnedFd> {
    socket(Family::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
}

/// As [`exchange`], on a socket that has no answers left from before.
pub(super) fn exchange_on(socket: &OwnedFd, mut message: Change, flags: u16) -> nix::Result<Vec<Vec<u8>>> {
    message.header.flags |= NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
    let mut answers = Vec::new();
    while !receive(socket, &mut answers)? {}
    Ok(answers)
}

/// Reads what one recv(2) gives; whether that was the last of it.
fn receive(socket: &OwnedFd, answers: &mut Vec<Vec<u8>>) -> nix::Result<bool> {
    let mut buffer = vec![0; BUFFER];
    let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
    let mut rest = buffer.get(..length).ok_or(Errno::EPROTO)?;
    while !rest.is_empty() {
        let frame = NetlinkBuffer::new_checked(rest).map_err(|_| Errno::EPROTO)?;
        if frame.flags() & NLM_F_DUMP_INTR != 0 {
            return Err(Errno::EINTR);
        }
        match frame.message_type() {
            // Both begin with a negative errno, or 0.
            NLMSG_ERROR | NLMSG_DONE => {
                let code = frame.payload().first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return if code == 0 { Ok(true) } else { Err(Errno::from_raw(code.saturating_neg())) };
            }
            _ => answers.push(frame.payload().to_vec()),
        }
        rest = rest.get((frame.length() as usize).next_multiple_of(NLMSG_ALIGN)..).unwrap_or_default();
    }
    Ok(false)
}

/// Reads the attributes that are asked for alone: an interface of a kind that no crate knows is an interface, too.
fn parse_link(payload: &[u8]) -> Option<Link> {
    let header = LinkHeader::parse(payload).ok()?;
    let (is_up, has_carrier) = (header.flags.contains(LinkFlags::Up), header.flags.contains(LinkFlags::LowerUp));
    let mut link = Link { index: header.index, name: String::new(), group: 0, master: None, is_up, has_carrier };
    for attribute in NlasIterator::new(payload.get(size_of::<libc::ifinfomsg>()..)?) {
        let attribute = attribute.ok()?;
        let value = attribute.value();
        let number = || value.first_chunk().map(|number| u32::from_ne_bytes(*number));
        match attribute.kind() {
            libc::IFLA_IFNAME => link.name = CStr::from_bytes_until_nul(value).ok()?.to_string_lossy().into_owned(),
            libc::IFLA_MASTER => link.master = number(),
            libc::IFLA_GROUP => link.group = number()?,
            _ => {}
        }
    }
    Some(link)
}

/// A change in words that come after "to".
fn describe(change: &Change) -> String {
    let NetlinkPayload::InnerMessage(message) = &change.payload else { return "answer".to_owned() };
    match message {
        RouteNetlinkMessage::NewLink(link) => format!("make interface {}", link_name(link)),
        RouteNetlinkMessage::SetLink(link) => format!("set interface {}", link_name(link)),
        RouteNetlinkMessage::DelLink(link) => format!("delete interface {}", link_name(link)),
        RouteNetlinkMessage::NewAddress(address) => format!("add address {}", address_of(address)),
        RouteNetlinkMessage::DelAddress(address) => format!("delete address {}", address_of(address)),
        RouteNetlinkMessage::NewNeighbour(neighbour) => format!("set neighbour {}", neighbour_of(neighbour)),
        RouteNetlinkMessage::NewRoute(route) => format!("add a route to {}", destination_of(route)),
        other => format!("take message {}", other.message_type()),
    }
}

fn link_name(link: &LinkMessage) -> String {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_else(|| link.header.index.to_string())
}

fn address_of(message: &AddressMessage) -> String {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(address.to_string()),
        _ => None,
    });
    address.unwrap_or_default()
}

fn neighbour_of(message: &NeighbourMessage) -> String {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(address.to_string()),
        _ => None,
    });
    address.unwrap_or_default()
}

fn destination_of(message: &RouteMessage) -> String {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(address.to_string()),
        _ => None,
    });
    address.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delete(index: u32) -> Change {
        let mut message = LinkMessage::default();
        message.header.index = index;
        RouteNetlinkMessage::DelLink(message).into()
    }

    #[test]
    fn test_links_know_the_loopback_by_both_ways() {
        let all = links().unwrap();
        let loopback = all.iter().find(|link| link.name == "lo").unwrap();
        assert_eq!(link(loopback.index).unwrap(), *loopback);
        assert_eq!((loopback.group, loopback.master), (0, None));
    }

    #[test]
    fn test_link_without_an_interface_is_enodev() {
        assert_eq!(link(NOBODY), Err(Errno::ENODEV));
    }

    #[test]
    fn test_apply_what_is_refused_has_its_errno_and_says_what_it_was() {
        let rejected = apply(&[delete(NOBODY)]).unwrap_err();
        // The kernel asks for the right first.
        assert!([Errno::ENODEV, Errno::EPERM].contains(&rejected.errno), "{rejected}");
        assert!(rejected.to_string().contains("delete interface 2147483647"), "{rejected}");
    }

    #[test]
    fn test_refusal_without_the_right_tells_how_to_get_it() {
        let rejected = Rejected { change: "make interface tw-ifb-7".into(), errno: Errno::EPERM };
        let refusal = Refusal::from(rejected);
        assert_eq!(refusal.remedy, super::super::PRIVILEGE_REMEDY);
        assert_eq!(refusal.cause.errno(), Some(Errno::EPERM));
    }

    #[test]
    fn test_is_denied_as_soon_as_the_right_is_gone() {
        let (before, after) = std::thread::spawn(|| {
            let before = is_denied();
            // capset(2): the header has the version of the interface and a thread, 0 for this one; then come three sets, in
            // halves.
            let (header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
            // SAFETY: both are of the lengths that this version reads. It concerns this thread alone, which is about to end.
            let dropped = unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const none) };
            assert_eq!(dropped, 0);
            (before, is_denied())
        })
        .join()
        .unwrap();
        assert!(!before || !crate::host::privileges::probe().net_admin);
        assert!(after);
    }
}
