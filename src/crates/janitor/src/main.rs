//! Waits for the end of the process that started it, and removes what that leaves of its VMs.

fn main() {
    if let Err(error) = microvm_isolation::vm::janitor::serve() {
        eprintln!("microvm-janitor: {error}");
        std::process::exit(1);
    }
}
