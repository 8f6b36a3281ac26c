//! Files to and from the guest, in pieces; what is in memory is one window.

use std::time::Duration;

use crc32fast::Hasher;
use microvm_protocol::message::{Started, Transferred};
use microvm_protocol::mux::STDIN;

use super::error::SessionError;
use super::stream::{Next, Stream};
use crate::error::{Error, Result};

/// A file on its way to the guest. Dropped before [`Upload::finish`], a new file never appears there.
pub struct Upload {
    stream: Stream,
    path: String,
    sent: u64,
    /// How long the guest may take nothing.
    stall: Duration,
    checksum: Hasher,
}

impl Upload {
    /// # Errors
    /// [`Error::Guest`] when the file cannot be opened there, [`Error::ChannelTimeout`].
    pub async fn begin(stream: Stream, path: String, stall: Duration) -> Result<Self> {
        stream.started(stall).await?;
        Ok(Self { stream, path, sent: 0, stall, checksum: Hasher::new() })
    }

    /// Bytes that were sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// # Errors
    /// [`Error::Guest`] when the guest can write no more (its disk is full), [`Error::ChannelClosed`],
    /// [`Error::ChannelTimeout`] when it takes none for too long.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if !self.stream.send(STDIN, bytes, Some(self.stall)).await? {
            return Err(self.failure().await);
        }
        self.checksum.update(bytes);
        self.sent += bytes.len() as u64;
        Ok(())
    }

    async fn failure(&self) -> Error {
        match self.stream.within(self.stall, "the reason", self.stream.next::<Transferred>()).await {
            Err(error) => error,
            Ok(_) => Error::channel_closed(self.stream.vm_id(), SessionError::UploadEnded, true),
        }
    }

    /// Waits until the guest has the whole file in its place.
    ///
    /// # Errors
    /// As for [`Upload::write`], and [`Error::ChecksumMismatch`].
    pub async fn finish(self) -> Result<Transferred> {
        self.stream.finish(STDIN);
        loop {
            if let Next::End(there) = self.stream.within(self.stall, "the end", self.stream.next()).await? {
                return agree(
                    &self.stream,
                    self.path,
                    Transferred { bytes: self.sent, crc32: self.checksum.finalize() },
                    there,
                );
            }
        }
    }
}

/// A file on its way from the guest.
pub struct Download {
    stream: Stream,
    path: String,
    size: u64,
    mode: Option<u32>,
    received: u64,
    /// How long the guest may send nothing.
    stall: Duration,
    checksum: Hasher,
}

/// What came of a download.
pub enum Fetched {
    Bytes(Vec<u8>),
    Whole(Transferred),
}

impl Download {
    /// # Errors
    /// [`Error::Guest`] when the file cannot be opened there, [`Error::ChannelTimeout`].
    pub async fn begin(stream: Stream, path: String, stall: Duration) -> Result<Self> {
        let (size, mode) = match stream.started(stall).await? {
            Started::File { size, mode } => (size, mode),
            Started::Program { .. } | Started::Connection { .. } => (0, None),
        };
        Ok(Self { stream, path, size, mode, received: 0, stall, checksum: Hasher::new() })
    }

    /// The file's size when it was opened, as the guest says.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The permission bits of the guest's file, as the guest says.
    #[must_use]
    pub fn mode(&self) -> Option<u32> {
        self.mode
    }

    /// Bytes that came.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The next bytes, or the end.
    ///
    /// # Errors
    /// [`Error::Guest`], [`Error::ChannelClosed`], [`Error::ChannelTimeout`], [`Error::ChecksumMismatch`].
    pub async fn next(&mut self) -> Result<Fetched> {
        match self.stream.within(self.stall, "the next piece", self.stream.next()).await? {
            Next::Piece(piece) => {
                self.checksum.update(&piece.bytes);
                self.received += piece.bytes.len() as u64;
                Ok(Fetched::Bytes(piece.bytes))
            }
            Next::End(there) => {
                let here = Transferred { bytes: self.received, crc32: self.checksum.clone().finalize() };
                agree(&self.stream, self.path.clone(), here, there).map(Fetched::Whole)
            }
        }
    }
}

/// Both sides must have seen the same bytes.
fn agree(stream: &Stream, path: String, here: Transferred, there: Transferred) -> Result<Transferred> {
    if here == there {
        return Ok(here);
    }
    Err(Error::ChecksumMismatch { vm_id: stream.vm_id(), path, here: here.crc32, there: there.crc32 })
}
