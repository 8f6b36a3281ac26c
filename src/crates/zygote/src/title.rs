//! What `ps` shows of this process: the memory of its first arguments, written over.

use std::ffi::{c_char, CStr};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::prctl;

static START: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());
static LENGTH: AtomicUsize = AtomicUsize::new(0);

/// Notes where the arguments are. The kernel shows the memory between the first one's first byte and the last one's
/// last, whatever is in it; the manager made the last one long.
///
/// # Safety
/// `argv` is the array of `argc` strings that the kernel gave to this process, and nobody else writes to them.
pub unsafe fn find(argc: i32, argv: *const *mut c_char) {
    let Some(last) = usize::try_from(argc).ok().and_then(|count| count.checked_sub(1)) else { return };
    // SAFETY: as the caller promises; the kernel lays them out one behind the other.
    let (first, last) = unsafe { (*argv, *argv.add(last)) };
    // SAFETY: a string of the kernel's.
    let length = unsafe { CStr::from_ptr(last) }.to_bytes_with_nul().len();
    START.store(first, Ordering::Relaxed);
    LENGTH.store(last as usize + length - first as usize, Ordering::Relaxed);
}

/// Shows `arguments`, as many as there is room for, and `name` as the command.
pub fn show(name: &CStr, arguments: impl Iterator<Item = impl AsRef<CStr>>) -> Result<(), Errno> {
    let (start, length) = (START.load(Ordering::Relaxed), LENGTH.load(Ordering::Relaxed));
    if !start.is_null() {
        // SAFETY: `find` was given this memory.
        let room = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), length) };
        room.fill(0);
        let text = arguments.flat_map(|argument| argument.as_ref().to_bytes_with_nul().to_vec());
        // The last byte stays zero: anything else would make the kernel look further.
        let end = length.saturating_sub(1);
        room.iter_mut().take(end).zip(text).for_each(|(byte, shown)| *byte = shown);
    }
    prctl::set_name(name)
}
