//! System calls by number, so that no library's checks come before the kernel's.

use std::ffi::CString;
use std::io::Error;

/// A call's answer: `Ok` with what it returned, or the error.
pub type Answer = Result<i64, Error>;

/// A call with integers and pointers to memory that outlives it.
///
/// # Safety
/// Pointers among `arguments` must be what the call expects; this program passes none that own memory.
pub unsafe fn call(number: i64, arguments: [usize; 6]) -> Answer {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: as the caller promises.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if answer < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// A call with integers alone.
pub fn plain<const N: usize>(number: i64, arguments: [usize; N]) -> Answer {
    let mut all = [0; 6];
    all.iter_mut().zip(arguments).for_each(|(slot, argument)| *slot = argument);
    // SAFETY: no pointers: the kernel checks addresses that are none.
    unsafe { call(number, all) }
}

/// A NUL-terminated copy, leaked: the program ends soon.
pub fn text(value: &str) -> usize {
    CString::new(value).unwrap_or_default().into_raw() as usize
}

/// A buffer that lives as long as the program.
pub fn buffer<T>(value: T) -> usize {
    Box::into_raw(Box::new(value)) as usize
}

/// Runs `attack` in a child where there can be one, so that an attack that works harms nothing here.
pub fn aside(attack: impl Fn() -> Answer) -> Answer {
    // SAFETY: the program has one thread while it probes.
    match unsafe { libc::fork() } {
        0 => {
            let code = match attack() {
                Ok(_) => 0,
                Err(error) => error.raw_os_error().unwrap_or(255),
            };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        -1 => attack(),
        child => {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            unsafe { libc::waitpid(child, &mut status, 0) };
            match libc::WEXITSTATUS(status) {
                0 if libc::WIFEXITED(status) => Ok(0),
                code => Err(Error::from_raw_os_error(code)),
            }
        }
    }
}
