//! Container images as one read-only file system: a stack of layers becomes one EROFS file.
//!
//! Architecture invariant: every byte of a layer is hostile. Nothing of one is made on the host's file system, whatever its
//! names, types and owners say: the only file that is written is the image, by offsets that this crate worked out. All that is
//! held in memory is bounded by [`Limits`].
//!
//! ```text
//!   layers (tar, gzip, zstd)        first pass                    second pass
//!   unpack.rs -> tar.rs     ->      tree.rs: names and metadata   layout.rs gives each inode and file its place,
//!                                   as overlayfs merges them      erofs.rs writes it while the layers are read again
//! ```
//! The first pass reads all layers, the lowest first, and keeps no file's content. So all is checked before a byte is
//! written, what an upper layer hides takes no space, and the same layers make the same file.

#![forbid(unsafe_code)]

mod build;
mod erofs;
mod error;
mod layout;
mod limits;
pub mod tar;
mod tree;
pub mod unpack;

pub use build::{build, Layers, Summary};
pub use error::{Error, Result};
pub use limits::Limits;
