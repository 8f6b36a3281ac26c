//! Using up whatever there is.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::system::plain;
use crate::Orders;

/// Busy on more CPUs than it was given.
pub fn cpu(orders: &Orders) {
    let seconds = Duration::from_secs(orders.number("seconds").unsigned_abs());
    let begun = Instant::now();
    let spinners: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(move || {
                let mut sum = 0u64;
                while begun.elapsed() < seconds {
                    sum = std::hint::black_box(sum.wrapping_add(1));
                }
            })
        })
        .collect();
    for spinner in spinners {
        drop(spinner.join());
    }
    let mut used = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `used` outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut used) };
    let used = used.tv_sec as f64 + used.tv_nsec as f64 / 1e9;
    println!("CPU {:.4}", used / begun.elapsed().as_secs_f64());
}

/// Memory, touched MiB by MiB until somebody stops it.
pub fn memory(orders: &Orders) {
    let mut held: Vec<Vec<u8>> = Vec::new();
    for mib in 1..=orders.number("mib") {
        let mut piece: Vec<u8> = Vec::new();
        if piece.try_reserve_exact(1 << 20).is_err() {
            println!("REFUSED {mib}");
            break;
        }
        piece.resize(1 << 20, 1);
        held.push(piece);
        println!("TOUCHED {mib}");
    }
    println!("HELD {}", held.len());
}

/// Threads that sleep, until the kernel refuses one.
pub fn threads() {
    let mut count = 0;
    while count < 10_000 {
        match std::thread::Builder::new().stack_size(16 << 10).spawn(|| std::thread::sleep(Duration::from_secs(5))) {
            Ok(_) => count += 1,
            Err(error) => {
                println!("REFUSED {error}");
                break;
            }
        }
    }
    println!("THREADS {count}");
}

/// Processes: by every call that makes one.
pub fn forks() {
    for (name, number, first) in [
        ("fork", libc::SYS_fork, 0),
        ("vfork", libc::SYS_vfork, 0),
        ("clone", libc::SYS_clone, libc::SIGCHLD as usize),
        ("clone_vm", libc::SYS_clone, (libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD) as usize),
        ("clone3", libc::SYS_clone3, 0),
    ] {
        match plain(number, [first, 0, 0, 0, 0]) {
            // SAFETY: a child that should not be ends at once.
            Ok(0) => unsafe { libc::_exit(0) },
            Ok(child) => println!("FORKED {name} {child}"),
            Err(error) => println!("REFUSED {name} {error}"),
        }
    }
}

/// Descriptors, until the kernel refuses one.
pub fn files() {
    let mut held = Vec::new();
    while held.len() < 100_000 {
        match File::open("/dev/null") {
            Ok(file) => held.push(file),
            Err(error) => {
                println!("REFUSED {error}");
                break;
            }
        }
    }
    println!("FILES {}", held.len());
}

/// The disk's file, beyond its end.
pub fn disk(orders: &Orders) {
    // The kernel's answer is wanted, not its signal.
    // SAFETY: SIG_IGN runs no code.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let chunk = vec![1u8; 1 << 20];
    let file = match OpenOptions::new().write(true).open(&orders.disk) {
        Ok(file) => file,
        Err(error) => return println!("REFUSED open {error}"),
    };
    let mut at = 0;
    while at < 1 << 40 {
        match file.write_at(&chunk, at) {
            Ok(0) => break,
            Ok(length) => at += length as u64,
            Err(error) => {
                println!("REFUSED write {error}");
                break;
            }
        }
    }
    println!("DISK {at}");
    if let Err(error) = file.set_len(1 << 40) {
        println!("REFUSED grow {error}");
    }
    // In a file of its own, as far as one can be made.
    for folder in ["", "/vm", "/dev", "/image", "/tmp"] {
        match File::create(format!("{folder}/more")).and_then(|mut file| file.write_all(&chunk)) {
            Ok(()) => println!("WROTE {folder}/more"),
            Err(error) => println!("REFUSED {folder}/more {error}"),
        }
    }
}

/// The system calls of 32-bit programs, which a filter for 64-bit ones must not let by: 20 is getpid.
pub fn old_system_calls() {
    let answer: i32;
    // SAFETY: getpid takes nothing and changes nothing; the gate clobbers no other register.
    unsafe { std::arch::asm!("int 0x80", inlateout("eax") 20 => answer) };
    println!("INT80 {answer}");
}
