//! The gateway of one VM: started by the VM's manager, in a jail, with the wire and the manager's socket open.

use std::process::ExitCode;

fn main() -> ExitCode {
    match microvm_usernet::serve::serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("microvm-usernet: {error}");
            ExitCode::FAILURE
        }
    }
}
