//! The guest's one network device: what the host says it is, and no more.

use std::ffi::c_char;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use microvm_protocol::identity::GuestNetwork;
use nix::sys::socket::{socket, AddressFamily, SockFlag, SockType};

const LOOPBACK: &str = "lo";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Programs expect the loopback, whether there is a network or not.
pub fn bring_up_loopback() -> Result<(), String> {
    Interface::open(LOOPBACK)?.up()
}

/// The device before this guest knows who it is, ready for that.
pub struct Device {
    interface: Interface,
    resolv_conf: File,
}

impl Device {
    /// Opens the device, if there is one. It is up, so that its queues are filled; without an address nothing leaves by
    /// it, and without IPv6, which the host would not let pass, it makes none up.
    pub fn open() -> Result<Option<Self>, String> {
        let Some(name) = find() else { return Ok(None) };
        let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        fs::write(&path, "1").map_err(|e| format!("{path}: {e}"))?;
        let interface = Interface::open(&name)?;
        interface.up()?;
        fs::create_dir_all("/etc").map_err(|e| format!("mkdir /etc: {e}"))?;
        // An image may have a link to a service's file here, which would be written in the service's place.
        if fs::symlink_metadata(RESOLV_CONF).is_ok_and(|meta| meta.is_symlink()) {
            fs::remove_file(RESOLV_CONF).map_err(|e| format!("{RESOLV_CONF}: {e}"))?;
        }
        let resolv_conf = File::create(RESOLV_CONF).map_err(|e| format!("{RESOLV_CONF}: {e}"))?;
        Ok(Some(Self { interface, resolv_conf }))
    }

    /// Takes on the network of one VM in the place of another's, of which nothing is left but sockets.
    pub fn rejoin(&self, network: &GuestNetwork) -> Result<(), String> {
        // Routes and neighbours go when a device goes down.
        self.interface.down()?;
        self.interface.up()?;
        self.resolv_conf.set_len(0).map_err(|e| format!("{RESOLV_CONF}: {e}"))?;
        self.join(network)
    }

    /// Takes on the network of one VM: before the session is accepted, so that a start says what is wrong with it.
    pub fn join(&self, network: &GuestNetwork) -> Result<(), String> {
        let (address, prefix) = parse_address(&network.address)?;
        self.interface.set_mac(parse_mac(&network.mac_address)?)?;
        self.interface.set_address(address, prefix)?;
        if let Some(gateway) = &network.gateway {
            let gateway = gateway.parse().map_err(|_| format!("gateway {gateway:?} is no IPv4 address"))?;
            self.interface.route_by(gateway)?;
        }
        let servers: String = network.dns_servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        self.resolv_conf.write_all_at(servers.as_bytes(), 0).map_err(|e| format!("{RESOLV_CONF}: {e}"))
    }
}

/// The name of the virtio network device.
fn find() -> Option<String> {
    let entries = fs::read_dir("/sys/class/net").ok()?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.into_iter().find(|name| name != LOOPBACK)
}

fn parse_address(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let (address, prefix) = text.split_once('/').ok_or_else(|| format!("address {text:?} has no prefix"))?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32);
    address.parse().ok().zip(prefix).ok_or_else(|| format!("{text:?} is no IPv4 address with a prefix"))
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let octets: Result<Vec<u8>, _> = text.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect();
    octets.ok().and_then(|octets| octets.try_into().ok()).ok_or_else(|| format!("{text:?} is no MAC address"))
}

/// One interface, and a socket to ask the kernel by; netdevice(7).
struct Interface {
    name: [c_char; libc::IFNAMSIZ],
    socket: OwnedFd,
}

impl Interface {
    fn open(name: &str) -> Result<Self, String> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|e| format!("{name}: socket: {e}"))?;
        let mut field = [0; libc::IFNAMSIZ];
        for (place, byte) in field.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *place = byte as c_char;
        }
        Ok(Self { name: field, socket })
    }

    fn shown(&self) -> String {
        self.name.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect()
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: all zeros is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name = self.name;
        request
    }

    fn ask(&self, what: &str, number: libc::Ioctl, request: &mut libc::ifreq) -> Result<(), String> {
        // SAFETY: the descriptor is open, and every number used here reads and writes one ifreq.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), number, &raw mut *request) } {
            0.. => Ok(()),
            _ => Err(format!("{}: {what}: {}", self.shown(), std::io::Error::last_os_error())),
        }
    }

    fn up(&self) -> Result<(), String> {
        self.change_flags(|flags| flags | libc::IFF_UP as libc::c_short)
    }

    fn down(&self) -> Result<(), String> {
        self.change_flags(|flags| flags & !(libc::IFF_UP as libc::c_short))
    }

    fn change_flags(&self, change: impl Fn(libc::c_short) -> libc::c_short) -> Result<(), String> {
        let mut request = self.request();
        self.ask("SIOCGIFFLAGS", libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = change(flags);
        self.ask("SIOCSIFFLAGS", libc::SIOCSIFFLAGS, &mut request)
    }

    /// If it has another one: a clone's device does. virtio-net takes a new one while it is up.
    fn set_mac(&self, mac: [u8; 6]) -> Result<(), String> {
        let mut request = self.request();
        self.ask("SIOCGIFHWADDR", libc::SIOCGIFHWADDR, &mut request)?;
        let wanted = mac.map(|octet| octet as c_char);
        // SAFETY: SIOCGIFHWADDR has filled in the address.
        let place = unsafe { &mut request.ifr_ifru.ifru_hwaddr.sa_data[..6] };
        if place == wanted {
            return Ok(());
        }
        place.copy_from_slice(&wanted);
        self.ask("SIOCSIFHWADDR", libc::SIOCSIFHWADDR, &mut request)
    }

    fn set_address(&self, address: Ipv4Addr, prefix: u8) -> Result<(), String> {
        let mut request = self.request();
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.ask("SIOCSIFADDR", libc::SIOCSIFADDR, &mut request)?;
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        request.ifr_ifru.ifru_netmask = socket_address(mask.into());
        self.ask("SIOCSIFNETMASK", libc::SIOCSIFNETMASK, &mut request)
    }

    /// A default route.
    fn route_by(&self, gateway: Ipv4Addr) -> Result<(), String> {
        // SAFETY: all zeros is a valid rtentry.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: the descriptor is open, and SIOCADDRT reads one rtentry.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT as libc::Ioctl, &raw const route) } {
            0.. => Ok(()),
            _ => Err(format!("route by {gateway}: {}", std::io::Error::last_os_error())),
        }
    }
}

/// A sockaddr_in in the place of a sockaddr.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // ip(7): the port, then the address, both in network byte order.
    for (place, octet) in data.iter_mut().skip(2).zip(address.octets()) {
        *place = octet as c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_address_and_mac_take_the_identitys_forms() {
        assert_eq!(parse_address("192.168.100.10/24"), Ok((Ipv4Addr::new(192, 168, 100, 10), 24)));
        assert_eq!(parse_mac("52:54:00:12:34:56"), Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    }

    #[test]
    fn test_parse_what_is_malformed_is_named() {
        for bad in ["10.0.0.1", "10.0.0.1/33", "10.0.0/8", "::1/64"] {
            assert!(parse_address(bad).unwrap_err().contains(bad), "{bad}");
        }
        assert!(parse_mac("52:54:00:12:34").is_err() && parse_mac("52:54:00:12:34:5g").is_err());
    }
}
