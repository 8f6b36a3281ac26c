//! The launcher as a program, for any VMM: V executes it.

use microvm_jail::launcher::{self, Become};

fn main() {
    std::process::exit(launcher::run(Become::EXEC));
}
