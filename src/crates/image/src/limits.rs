//! What an image may hold.

/// Bounds on what strangers' layers may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of all regular files in all layers, holes among them.
    pub bytes: u64,
    /// In all layers.
    pub entries: u64,
    /// Of all names, link targets and extended attributes, which are held in memory.
    pub metadata: u64,
    /// How many bytes a compressed layer may become for each of its own, once it has become [`Limits::free`].
    pub ratio: u64,
    /// Bytes that a layer may become whatever its ratio.
    pub free: u64,
}

impl Default for Limits {
    fn default() -> Self {
        // A million of small files is an image that people have; ten are not. DEFLATE's best is 1032:1, real layers' 20:1.
        Self { bytes: 64 << 30, entries: 4_000_000, metadata: 1 << 30, ratio: 200, free: 1 << 30 }
    }
}
