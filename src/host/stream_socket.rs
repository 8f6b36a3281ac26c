//! A connected socket whose two directions end apart, TCP or Unix, and the sockets that wait for such.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sys::socket::{recv, send, setsockopt, shutdown, sockopt, MsgFlags, Shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::fork::{self, ForkGuard};

/// Connections that the kernel holds for a listener until they are accepted; it takes net.core.somaxconn at most.
const BACKLOG: u32 = 1024;

fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` answers with the same open descriptor for as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// A connected socket. Dropped before [`StreamSocket::close`], TCP tells the peer that the connection broke (RST).
#[derive(Debug)]
pub struct StreamSocket {
    _fork_guard: ForkGuard,
    fd: AsyncFd<OwnedFd>,
}

impl StreamSocket {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { _fork_guard: fork::guard(&fd), fd: watch(fd, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// Takes over a connection that a listener accepted.
    ///
    /// # Errors
    /// What a system call failed with.
    pub fn accepted(stream: TcpStream) -> io::Result<Self> {
        // Each piece is sent as it came: the guest's side has joined what belongs together.
        stream.set_nodelay(true)?;
        let this = Self::new(OwnedFd::from(stream.into_std()?))?;
        this.set_linger(Some(0))?;
        Ok(this)
    }

    /// Two ends of a connection within this process: ours, and a blocking one to give away.
    ///
    /// # Errors
    /// What socketpair(2) failed with.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self::new(ours.into())?, theirs.into()))
    }

    /// The next bytes; 0 at their end. Cancellation-safe.
    ///
    /// # Errors
    /// What recv(2) failed with.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = |fd: &OwnedFd| recv(fd.as_raw_fd(), buffer, MsgFlags::empty()).map_err(io::Error::from);
        self.fd.async_io(Interest::READABLE, read).await
    }

    /// Writes all of `bytes`, as fast as the peer takes them.
    ///
    /// # Errors
    /// What send(2) failed with.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |fd: &OwnedFd| send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).map_err(io::Error::from);
            let written = self.fd.async_io(Interest::WRITABLE, write).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Tells the peer that nothing more comes; it may go on.
    ///
    /// # Errors
    /// What shutdown(2) failed with; not when the peer is gone.
    pub fn end_writing(&self) -> io::Result<()> {
        match shutdown(self.fd.as_raw_fd(), Shutdown::Write) {
            Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns when the peer neither writes nor reads any more, or both directions have ended.
    ///
    /// # Errors
    /// What a system call failed with.
    pub async fn hung_up(&self) -> io::Result<()> {
        // Its own entry in epoll: the writer's readiness is not to be cleared under it.
        let fd = self.fd.get_ref().try_clone()?;
        let _fork_guard = fork::guard(&fd);
        let watched = watch(fd, Interest::WRITABLE)?;
        loop {
            let mut ready = watched.writable().await?;
            if ready.ready().is_write_closed() {
                return Ok(());
            }
            ready.clear_ready_matching(Ready::WRITABLE);
        }
    }

    /// Ends the connection as one that is complete.
    ///
    /// # Errors
    /// What a system call failed with.
    pub fn close(self) -> io::Result<()> {
        self.set_linger(None)
    }

    fn set_linger(&self, seconds: Option<libc::c_int>) -> io::Result<()> {
        let linger = libc::linger { l_onoff: seconds.is_some().into(), l_linger: seconds.unwrap_or(0) };
        Ok(setsockopt(&self.fd.as_fd(), sockopt::Linger, &linger)?)
    }
}

/// A socket that waits for connections of TCP.
#[derive(Debug)]
pub struct Listener {
    _fork_guard: ForkGuard,
    listener: TcpListener,
}

impl Listener {
    /// Listens at `address`; with port 0 at one that is free.
    ///
    /// # Errors
    /// What a system call failed with.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A connection that ended a moment ago does not keep the port.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        Ok(Self { _fork_guard: fork::guard(&listener), listener })
    }

    /// Refuses from now on, also while it is held elsewhere.
    pub fn stop(&self) {
        // Not connected: it was stopped before.
        shutdown(self.listener.as_raw_fd(), Shutdown::Both).unwrap_or_default();
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What getsockname(2) failed with.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The next connection. Cancellation-safe.
    ///
    /// # Errors
    /// What a system call failed with, as when this process has no descriptor left.
    pub async fn accept(&self) -> io::Result<StreamSocket> {
        let (stream, _) = self.listener.accept().await?;
        StreamSocket::accepted(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::Duration;

    const SOON: Duration = Duration::from_secs(10);

    async fn tcp() -> (StreamSocket, std::net::TcpStream) {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let peer = std::net::TcpStream::connect(listener.address().unwrap()).unwrap();
        peer.set_read_timeout(Some(SOON)).unwrap();
        (listener.accept().await.unwrap(), peer)
    }

    #[tokio::test]
    async fn test_end_writing_leaves_the_other_direction_open() {
        let (socket, mut peer) = tcp().await;
        socket.write_all(b"all").await.unwrap();
        socket.end_writing().unwrap();
        let mut said = String::new();
        peer.read_to_string(&mut said).unwrap();
        peer.write_all(b"more").unwrap();
        let mut buffer = [0; 10];
        assert_eq!((said.as_str(), socket.read(&mut buffer).await.unwrap()), ("all", 4));
    }

    #[tokio::test]
    async fn test_drop_breaks_a_connection_and_close_ends_it() {
        let (socket, mut peer) = tcp().await;
        drop(socket);
        assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let (socket, mut peer) = tcp().await;
        socket.close().unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    }

    #[tokio::test]
    async fn test_hung_up_waits_for_a_peer_that_is_gone_and_not_for_one_that_has_said_all() {
        let (ours, theirs) = StreamSocket::pair().unwrap();
        let theirs = UnixStream::from(theirs);
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(ours.read(&mut [0]).await.unwrap(), 0);
        assert!(tokio::time::timeout(Duration::from_millis(50), ours.hung_up()).await.is_err());
        drop(theirs);
        tokio::time::timeout(SOON, ours.hung_up()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn test_bind_to_a_port_that_is_taken_fails_and_to_one_that_was_closed_does_not() {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().unwrap();
        assert_eq!(Listener::bind(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let _peer = std::net::TcpStream::connect(address).unwrap();
        drop((listener.accept().await.unwrap(), listener));
        Listener::bind(address).unwrap();
    }
}
