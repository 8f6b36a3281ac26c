//! The program to execute, in the form that the kernel takes.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::RawFd;

use crate::{LaunchSpec, Stage};
use nix::unistd::execve;

use super::descriptors;
use super::failure::Failure;

/// How V becomes the program.
#[derive(Debug, Clone, Copy)]
pub struct Become {
    /// What the filter of system calls would not allow any more.
    pub prepare: fn(&ExecImage) -> Result<(), Failure>,
    /// Comes back only with a failure.
    pub enter: fn(&ExecImage) -> Result<Infallible, Failure>,
}

impl Become {
    /// By execve(2), which needs no preparation.
    pub const EXEC: Self = Self { prepare: |_| Ok(()), enter: ExecImage::exec };
}

/// Made before the first fork, so that a spec that cannot be executed fails as a spec.
#[derive(Debug)]
pub struct ExecImage {
    path: CString,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    /// Where the program's own descriptors end: what is open from here on is the jail's.
    pub first_free_fd: RawFd,
}

impl ExecImage {
    pub(super) fn new(spec: &LaunchSpec) -> Result<Self, Failure> {
        let c_string = |text: String| {
            CString::new(text)
                .map_err(|error| Failure::new(Stage::Spec, format!("argv or env holds a NUL byte: {error}")))
        };
        let argv = spec.argv.iter().cloned().map(c_string).collect::<Result<Vec<_>, _>>()?;
        let env =
            spec.env.iter().map(|(name, value)| c_string(format!("{name}={value}"))).collect::<Result<Vec<_>, _>>()?;
        let path = argv.first().cloned().ok_or_else(|| Failure::new(Stage::Spec, "argv is empty"))?;
        Ok(Self { path, argv, env, first_free_fd: descriptors::first_free_above(&spec.fds) })
    }

    fn exec(&self) -> Result<Infallible, Failure> {
        execve(&self.path, &self.argv, &self.env).map_err(|errno| {
            let what = format!("executing {}", self.path.to_string_lossy());
            Failure::errno(Stage::Exec, errno, what)
        })
    }
}
