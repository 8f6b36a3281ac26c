//! The core's heap, apart from that of the program that it is loaded into.
//!
//! The C library has up to eight heaps for each CPU, so that threads do not wait for each other, and a block stays in the
//! one it is from. A VM's session is served now by this thread, now by that, so all of them grew to the most that each had
//! ever held, in pieces, while what was in use did not grow. To have fewer is a setting of the whole process, which is not
//! ours to make. This heap can have two; its locks are taken before a fork and let go after it, on both sides.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static HEAP: Jemalloc = Jemalloc;

/// Two heaps for however many threads; pages that nobody has used for a second go back to the kernel.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static OPTIONS: &[u8; 30] = b"narenas:2,dirty_decay_ms:1000\0";
