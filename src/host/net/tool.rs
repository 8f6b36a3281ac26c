//! `tc` and `nft`: what they are to do goes in on stdin, so that nothing of it needs quoting.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::memfd::{memfd_create, MFdFlags};

use super::{rtnetlink, Refusal};
use crate::error::Cause;
use crate::host::binary;

/// How long one run may take; each takes a few milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// An ordinary user's PATH leaves these out.
const SYSTEM_PATH: &str = "/usr/sbin:/sbin";
/// What the tools say of something that is gone already: tc and nft have words alone, and say these because of `LC_ALL=C`.
const GONE: [&str; 3] = ["Cannot find device", "No such device", "No such file or directory"];

/// A program that changes the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    Tc,
    Nft,
}

impl Tool {
    pub const ALL: [Self; 2] = [Self::Tc, Self::Nft];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tc => "tc",
            Self::Nft => "nft",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Tc => "iproute2 (Fedora: iproute, iproute-tc)",
            Self::Nft => "nftables",
        }
    }

    /// # Errors
    /// The package to install.
    pub fn find(self) -> Result<PathBuf, Refusal> {
        let path = std::env::var_os("PATH").map(|path| {
            let mut path = path;
            path.push(":");
            path.push(SYSTEM_PATH);
            path
        });
        let path = path.unwrap_or_else(|| SYSTEM_PATH.into());
        binary::find(self.name(), Some(&path)).ok_or_else(|| {
            let (name, package) = (self.name(), self.package());
            Refusal::new(format!("there is no program {name:?}"), format!("install the package {package}"))
        })
    }

    /// Does what `batch` says, up to the first line that fails. All of it or nothing, if this is `nft`.
    ///
    /// # Errors
    /// What the tool said.
    pub fn run(self, batch: &str) -> Result<(), Refusal> {
        self.start(&self.batch_arguments(false), batch).map(drop)
    }

    /// Does all lines of `batch` that can be done, and logs why others could not, unless what they are about is gone.
    pub fn run_all(self, batch: &str) {
        if batch.is_empty() {
            return;
        }
        let Err(refusal) = self.start(&self.batch_arguments(true), batch) else { return };
        let told = |line: &&str| !line.starts_with("Command failed") && !GONE.iter().any(|gone| line.contains(gone));
        for line in refusal.cause.to_string().lines().filter(told) {
            log::warn!("the network was not cleaned up: {line}");
        }
    }

    /// What the tool prints for `arguments`.
    ///
    /// # Errors
    /// What it said instead.
    pub fn ask(self, arguments: &[&str]) -> Result<String, Refusal> {
        self.start(arguments, "")
    }

    fn batch_arguments(self, go_on: bool) -> Vec<&'static str> {
        match (self, go_on) {
            (Self::Nft, _) => vec!["-f", "-"],
            (_, false) => vec!["-batch", "-"],
            (_, true) => vec!["-force", "-batch", "-"],
        }
    }

    fn start(self, arguments: &[&str], stdin: &str) -> Result<String, Refusal> {
        let path = self.find()?;
        let failed = |error: std::io::Error| {
            let text = format!("{}: {error}", path.display());
            Refusal::new(Cause::explained(error, text), "look at the limits of this process (ulimit -a)")
        };
        let input = file_with(stdin).map_err(failed)?;
        let (mut reader, writer) = std::io::pipe().map_err(failed)?;
        let mut child = Command::new(&path)
            .args(arguments)
            .env_clear()
            .env("LC_ALL", "C")
            .stdin(Stdio::from(input))
            .stdout(writer.try_clone().map_err(failed)?)
            .stderr(writer)
            .spawn()
            .map_err(failed)?;
        let said = read_until(&mut reader, Instant::now() + DEADLINE);
        if said.is_none() {
            child.kill().map_err(failed)?;
        }
        let status = child.wait().map_err(failed)?;
        match said {
            Some(said) if status.success() => Ok(said),
            // The tool's exit code is the same for every failure.
            Some(said) if rtnetlink::is_denied() => Err(Refusal::denied(said.trim())),
            Some(said) => Err(Refusal::new(
                format!("{} failed: {}", self.name(), said.trim()),
                "check that the kernel has what it names (modules nf_tables, nft_connlimit, ifb, cls_u32, act_mirred, sch_tbf)",
            )),
            None => Err(Refusal::new(
                format!("{} did not end within {} s", self.name(), DEADLINE.as_secs()),
                "look at what holds it up",
            )),
        }
    }
}

/// A file in memory, to be read from its beginning.
fn file_with(text: &str) -> std::io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"batch", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

/// All that comes before the end; `None` when that takes too long.
fn read_until(reader: &mut (impl Read + AsFd), deadline: Instant) -> Option<String> {
    let mut said = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(reader.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return None,
            Ok(_) => match reader.read(&mut chunk) {
                Ok(0) => return Some(String::from_utf8_lossy(&said).into_owned()),
                Ok(length) => said.extend_from_slice(&chunk[..length]),
                Err(_) => return None,
            },
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_ask_gives_what_the_tool_prints() {
        assert!(Tool::Tc.ask(&["-V"]).unwrap().contains("iproute2"));
    }

    #[test]
    fn test_run_a_line_that_fails_says_which_and_why() {
        let refusal = Tool::Tc.run("qdisc show dev no-such-device\n").unwrap_err();
        assert!(refusal.cause.to_string().contains("no-such-device"), "{refusal:?}");
    }
}
