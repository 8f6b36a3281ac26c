//! One VM's network without privileges: a gateway in user space. Towards the VM it speaks Ethernet, ARP, IPv4, ICMP, UDP and
//! TCP; away from it are ordinary sockets of this process.
//!
//! ```text
//!   guest eth0 == VMM ==(stream of frames)== [ frame: who ]==[ policy: where to ]==+== tcp: smoltcp | socket
//!                                                                                  +== datagram     | socket
//!                                                                                  +== relay (DNS)  | socket
//! ```
//!
//! Architecture invariant: one thread, one loop, no file. The VMM and the guest behind it are hostile: whatever they send,
//! memory and sockets have a most, and nothing goes where [`policy`] does not let it. The core's `net` has the rules that a
//! tap's network holds as well.

mod chance;
pub mod datagram;
pub mod frame;
pub mod gateway;
pub mod out;
pub mod outward;
pub mod policy;
pub mod relay;
pub mod serve;
pub mod stream;
pub mod tcp;
