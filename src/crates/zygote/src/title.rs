//! What `/proc` shows of this process: the memory of its first arguments and its first environment, written over.

use std::ffi::{c_char, CStr};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::prctl;

/// Memory that holds strings of the kernel's, one behind the other, and is shown whatever is in it.
struct Area {
    start: AtomicPtr<c_char>,
    bytes: AtomicUsize,
}

static ARGUMENTS: Area = Area::nowhere();
static ENVIRONMENT: Area = Area::nowhere();

impl Area {
    const fn nowhere() -> Self {
        Self { start: AtomicPtr::new(std::ptr::null_mut()), bytes: AtomicUsize::new(0) }
    }

    /// # Safety
    /// `strings` is an array of the kernel's that ends with a null pointer, and nobody else writes to what is in it.
    unsafe fn find(&self, strings: *const *mut c_char) {
        // SAFETY: as the caller promises.
        let count = (0..).take_while(|index| !unsafe { *strings.add(*index) }.is_null()).count();
        let Some(last) = count.checked_sub(1) else { return };
        // SAFETY: both are in the array.
        let (first, last) = unsafe { (*strings, *strings.add(last)) };
        // SAFETY: a string of the kernel's.
        let length = unsafe { CStr::from_ptr(last) }.to_bytes_with_nul().len();
        self.start.store(first, Ordering::Relaxed);
        self.bytes.store(last as usize + length - first as usize, Ordering::Relaxed);
    }

    /// Writes as many of the strings as there is room for, and zeros behind them.
    fn show(&self, strings: impl Iterator<Item = impl AsRef<CStr>>) {
        let (start, bytes) = (self.start.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        if start.is_null() {
            return;
        }
        // SAFETY: `find` was given this memory.
        let room = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), bytes) };
        room.fill(0);
        let text = strings.flat_map(|string| string.as_ref().to_bytes_with_nul().to_vec());
        // The last byte stays zero: anything else would make the kernel look further.
        let end = bytes.saturating_sub(1);
        room.iter_mut().take(end).zip(text).for_each(|(byte, shown)| *byte = shown);
    }
}

/// Notes where they are. The manager made the last argument long.
///
/// # Safety
/// `argv` is the array of `argc` strings that the kernel gave to this process, with the environment's behind it, and
/// nobody else writes to them.
pub unsafe fn find(argc: i32, argv: *const *mut c_char) {
    let Ok(count) = usize::try_from(argc) else { return };
    // SAFETY: as the caller promises; a null pointer is between the two.
    unsafe {
        ARGUMENTS.find(argv);
        ENVIRONMENT.find(argv.add(count + 1));
    }
}

/// Shows this process as `name` with these arguments and this environment.
pub fn show(name: &CStr, arguments: &[impl AsRef<CStr>], environment: &[impl AsRef<CStr>]) -> Result<(), Errno> {
    ARGUMENTS.show(arguments.iter());
    ENVIRONMENT.show(environment.iter());
    prctl::set_name(name)
}
