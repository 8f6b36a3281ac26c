//! A layer's bytes as the tar stream that they are: plain, or compressed with gzip or zstd.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::limits::Limits;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// RFC 8878: the last byte of a skippable frame's magic is 0x50 to 0x5f.
const SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
/// Formats that we refuse by name.
const OTHERS: [(&[u8], &str); 3] = [(b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip")];
const BUFFER: usize = 128 << 10;
/// What `zstd --long` uses by itself; a frame with a larger one would be held in memory.
const MAX_WINDOW: u64 = 128 << 20;

/// Counts what was read of the layer itself.
struct Counted<R> {
    inner: R,
    read: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

type Source<R> = BufReader<Counted<R>>;

enum Stream<R: Read> {
    Plain(Source<R>),
    Gzip(Box<MultiGzDecoder<Source<R>>>),
    Zstd(Box<Frames<R>>),
}

/// The tar stream in a layer.
pub struct Unpacked<R: Read> {
    stream: Stream<R>,
    packed: Rc<Cell<u64>>,
    unpacked: u64,
    limits: Limits,
}

impl<R: Read> Unpacked<R> {
    /// Looks at the first bytes.
    ///
    /// # Errors
    /// What reading says; `InvalidData` for another compression.
    pub fn new(layer: R, limits: Limits) -> io::Result<Self> {
        let packed = Rc::new(Cell::new(0));
        let mut source = BufReader::with_capacity(BUFFER, Counted { inner: layer, read: packed.clone() });
        let start = source.fill_buf()?;
        if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| start.starts_with(magic)) {
            return Err(invalid(format!("it is compressed with {name}; only gzip and zstd are read")));
        }
        let is_skippable = start.len() >= 4 && start[0] & 0xf0 == 0x50 && start[1..4] == SKIPPABLE;
        let stream = if start.starts_with(&GZIP) {
            Stream::Gzip(Box::new(MultiGzDecoder::new(source)))
        } else if start.starts_with(&ZSTD) || is_skippable {
            Stream::Zstd(Box::new(Frames::new(source)))
        } else {
            Stream::Plain(source)
        };
        Ok(Self { stream, packed, unpacked: 0, limits })
    }

    /// Bytes of the layer itself that were read.
    #[must_use]
    pub fn packed(&self) -> u64 {
        self.packed.get()
    }
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text.into())
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.stream {
            Stream::Plain(source) => return source.read(buffer),
            Stream::Gzip(decoder) => decoder.read(buffer)?,
            Stream::Zstd(frames) => frames.read(buffer)?,
        };
        self.unpacked += read as u64;
        let Limits { ratio, free, .. } = self.limits;
        let packed = self.packed.get();
        if self.unpacked > free && self.unpacked / ratio > packed {
            let text = format!("{packed} bytes of it became {}, over {ratio} times as many", self.unpacked);
            return Err(invalid(text));
        }
        Ok(read)
    }
}

/// A zstd stream is a sequence of frames, some of which are to be skipped.
struct Frames<R: Read> {
    source: Source<R>,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: Read> Frames<R> {
    fn new(source: Source<R>) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW);
        Self { source, decoder, in_frame: false }
    }

    /// Opens the next frame with content; `false` at the end.
    fn open(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let skipped = io::copy(&mut self.source.by_ref().take(length.into()), &mut io::sink())?;
                    if skipped < length.into() {
                        return Err(io::Error::new(ErrorKind::UnexpectedEof, "it ends within a zstd frame"));
                    }
                }
                Err(error) => return Err(invalid(format!("a zstd frame cannot be read: {error}"))),
            }
        }
        Ok(false)
    }

    fn close(&mut self) -> io::Result<()> {
        self.in_frame = false;
        let wanted = self.decoder.get_checksum_from_data();
        match wanted.is_some() && wanted != self.decoder.get_calculated_checksum() {
            true => Err(invalid("a zstd frame's checksum is wrong")),
            false => Ok(()),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.in_frame {
                if !self.open()? {
                    return Ok(0);
                }
                self.in_frame = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let decoded = self.decoder.decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1));
                decoded.map_err(|error| invalid(format!("a zstd frame cannot be read: {error}")))?;
            }
            let read = self.decoder.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            self.close()?;
        }
    }
}
