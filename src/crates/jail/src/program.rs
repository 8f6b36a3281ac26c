//! The program to execute, in the form that the kernel takes.

use std::convert::Infallible;
use std::ffi::CString;

use microvm_jail::{LaunchSpec, Stage};
use nix::unistd::execve;

use crate::failure::Failure;

/// Made before the first fork, so that a spec that cannot be executed fails as a spec.
#[derive(Debug)]
pub struct Program {
    path: CString,
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    pub fn new(spec: &LaunchSpec) -> Result<Self, Failure> {
        let c_string = |text: String| {
            CString::new(text)
                .map_err(|error| Failure::new(Stage::Spec, format!("argv or env holds a NUL byte: {error}")))
        };
        let argv = spec.argv.iter().cloned().map(c_string).collect::<Result<Vec<_>, _>>()?;
        let env =
            spec.env.iter().map(|(name, value)| c_string(format!("{name}={value}"))).collect::<Result<Vec<_>, _>>()?;
        let path = argv.first().cloned().ok_or_else(|| Failure::new(Stage::Spec, "argv is empty"))?;
        Ok(Self { path, argv, env })
    }

    /// Becomes the program; comes back only with a failure.
    pub fn exec(&self) -> Result<Infallible, Failure> {
        execve(&self.path, &self.argv, &self.env).map_err(|errno| {
            let what = format!("executing {}", self.path.to_string_lossy());
            Failure::errno(Stage::Exec, errno, what)
        })
    }
}
