//! What the C library's heap of this process holds for later.

/// What it may keep: less is soon in use again, and asked of the kernel anew.
const KEPT_BYTES: usize = 8 << 20;

/// Gives memory that the heap holds but nobody uses back to the kernel, whole pages of it, when there is enough to be worth
/// it. A few milliseconds, in which threads that allocate may wait.
pub fn give_back() {
    // SAFETY: both look at the heap under its own locks.
    unsafe {
        if libc::mallinfo2().fordblks > KEPT_BYTES {
            libc::malloc_trim(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn is_resident(page: usize) -> bool {
        let mut state = 0u8;
        // SAFETY: a page of this process, and room for its one byte.
        let seen = unsafe { libc::mincore(page as *mut libc::c_void, 1, &raw mut state) };
        seen == 0 && state & 1 == 1
    }

    #[test]
    fn test_give_back_takes_pages_from_between_what_is_in_use() {
        // Below the size from which each has a mapping of its own, so that what is kept holds the heap's end.
        let (mut large, mut kept) = (Vec::new(), Vec::new());
        for _ in 0..512 {
            large.push(vec![1u8; 16 * PAGE]);
            kept.push(vec![1u8; 64]);
        }
        let pages: Vec<usize> = large.iter().map(|one| (one.as_ptr() as usize + PAGE).next_multiple_of(PAGE)).collect();
        let resident = || pages.iter().filter(|page| is_resident(**page)).count();
        drop(large);
        assert!(resident() > 500, "the heap keeps what is freed: {}", resident());
        give_back();
        // Other tests may have taken some meanwhile.
        assert!(resident() < 100, "{} of 512 are still there", resident());
        assert!(kept.iter().all(|one| one == &[1; 64]));
    }
}
