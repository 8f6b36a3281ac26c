//! The place between the loader and the VMM's `main`.

use std::convert::Infallible;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use microvm_jail::launcher::{self, Become, ExecImage, Failure};
use microvm_jail::Stage;
use nix::errno::Errno;

use crate::{exit, serve, title};

type Main = extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char) -> c_int;
type Hook = Option<extern "C" fn()>;
type StartMain = extern "C" fn(Main, c_int, *mut *mut c_char, Hook, Hook, Hook, *mut c_void) -> c_int;

/// What the loader has handed over.
struct Start {
    real: StartMain,
    main: Main,
    init: Hook,
    fini: Hook,
    loader_fini: Hook,
    stack_end: *mut c_void,
}

// SAFETY: it is read only, and its pointers are the program's own start, which is valid for as long as the process.
unsafe impl Send for Start {}
// SAFETY: as above.
unsafe impl Sync for Start {}

static START: OnceLock<Start> = OnceLock::new();

extern "C" {
    static mut environ: *mut *mut c_char;
}

/// glibc's start of a program, as its `_start` calls it (csu/libc-start.c); preloaded, this one comes first.
///
/// # Safety
/// Called once, by `_start`.
#[no_mangle]
pub unsafe extern "C" fn __libc_start_main(
    main: Main,
    argc: c_int,
    argv: *mut *mut c_char,
    init: Hook,
    fini: Hook,
    loader_fini: Hook,
    stack_end: *mut c_void,
) -> c_int {
    // SAFETY: a constant name; the handle is one of the loader's own.
    let real = unsafe { libc::dlsym(libc::RTLD_NEXT, c"__libc_start_main".as_ptr()) };
    if real.is_null() || !is_alone() {
        exit(1);
    }
    // SAFETY: glibc's function of that name has this type.
    let real = unsafe { std::mem::transmute::<*mut c_void, StartMain>(real) };
    // SAFETY: these are the kernel's, and the VMM's main gets others.
    unsafe { title::find(argc, argv) };
    let start = Start { real, main, init, fini, loader_fini, stack_end };
    if START.set(start).is_err() || serve().is_err() || show_launcher().is_err() {
        exit(1);
    }
    exit(launcher::run(Become { prepare, enter: enter_main }))
}

fn show_launcher() -> Result<(), Errno> {
    title::show(c"microvm-jail", &[c"microvm-jail"], &[] as &[&CStr])
}

/// Whether this process is what a fork copies as a whole: one thread, and no descriptor but the standard ones. A library
/// that has others by now could not do without them later.
fn is_alone() -> bool {
    let count = |path: &str| std::fs::read_dir(path).map(Iterator::count);
    // The listing itself has a descriptor.
    matches!((count("/proc/self/task"), count("/proc/self/fd")), (Ok(1), Ok(4)))
}

fn failed(what: &str) -> Failure {
    Failure::new(Stage::Exec, format!("the zygote: {what}"))
}

fn prepare(program: &ExecImage) -> Result<(), Failure> {
    // As execve(2) does: the process is its user's again (/proc/self/fd, by which QEMU opens its memory).
    nix::sys::prctl::set_dumpable(true).map_err(|errno| failed(errno.desc()))?;
    let name = program.argv.first().and_then(file_name).unwrap_or_default();
    title::show(&name, &program.argv, &program.env).map_err(|errno| failed(errno.desc()))
}

/// Goes on into the VMM's `main`, as a process that has just executed it.
fn enter_main(program: &ExecImage) -> Result<Infallible, Failure> {
    let start = START.get().ok_or_else(|| failed("it has not begun"))?;
    close_the_jails(program.first_free_fd);
    let argc = c_int::try_from(program.argv.len()).map_err(|_| failed("too many arguments"))?;
    let (argv, env) = (leak(&program.argv), leak(&program.env));
    // Each thread's own arena would grow by a page and a system call at a time, while the vCPU's translates code.
    // SAFETY: it sets a number.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let canary = fresh_canary().ok_or_else(|| failed("no entropy"))?;
    // SAFETY: one thread, and the C library reads the variable when it is asked next.
    unsafe { environ = env };
    // SAFETY: glibc keeps its stack protector's canary there (sysdeps/x86_64/nptl/tls.h); no function that has stored the
    // old one returns any more: from here on the way is out by exit.
    unsafe { std::arch::asm!("mov fs:[0x28], {}", in(reg) canary, options(nostack, preserves_flags)) };
    (start.real)(start.main, argc, argv, start.init, start.fini, start.loader_fini, start.stack_end);
    exit(1)
}

fn file_name(path: &CString) -> Option<CString> {
    let name = Path::new(std::ffi::OsStr::from_bytes(path.to_bytes())).file_name()?;
    CString::new(name.as_bytes()).ok()
}

/// Closes what exec would have: every descriptor that is close-on-exec. All of them are the jail's.
fn close_the_jails(first: i32) {
    for fd in 3..first {
        // SAFETY: plain numbers; what is closed here has owners that never run again.
        unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFD);
            if flags >= 0 && flags & libc::FD_CLOEXEC != 0 {
                libc::close(fd);
            }
        }
    }
    // SAFETY: as above.
    if unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) } != 0 {
        // Kernels before 5.9. The limit of open files was set by now, and is a VMM's.
        for fd in first..1024 {
            // SAFETY: as above.
            unsafe { libc::close(fd) };
        }
    }
}

/// The strings as C's array of them, for ever.
fn leak(strings: &[CString]) -> *mut *mut c_char {
    let end = std::iter::once(std::ptr::null_mut());
    let array: Vec<*mut c_char> = strings.iter().map(|string| string.clone().into_raw()).chain(end).collect();
    Box::leak(array.into_boxed_slice()).as_mut_ptr()
}

/// glibc's own has a zero as its lowest byte, which ends a string.
fn fresh_canary() -> Option<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is as long as said; GRND_NONBLOCK: a host that boots has other worries.
    let length = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    (length == 8).then(|| u64::from_le_bytes(bytes) << 8)
}
