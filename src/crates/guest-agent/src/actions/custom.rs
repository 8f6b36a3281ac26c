//! Actions that an image, or its user, brings: one executable each, JSON in on stdin, JSON out on stdout.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use microvm_protocol::identity::Identity;
use microvm_protocol::message::{refuse_internal, Code, Failure};
use serde_json::Value;

use super::program::{Collected, Program, ROOT};
use super::{fail, Outcome};
use crate::children::Ended;
use crate::job::Job;

const DIRECTORIES: [&str; 2] = ["/etc/microvm/actions.d", "/data/actions.d"];
const TIMEOUT: Duration = Duration::from_secs(30);
const MAX_OUTPUT: usize = 4 << 20;

fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let is_plain = (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain);
    is_plain && refuse_internal(name).is_none()
}

fn is_action(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The disk is open to every user, and what is found here is run by root.
fn is_trusted(directory: &Path) -> bool {
    let meta = directory.symlink_metadata();
    meta.is_ok_and(|meta| meta.is_dir() && meta.uid() == ROOT && meta.mode() & 0o022 == 0)
}

/// An image's folder is what its maker made it.
fn directories() -> impl Iterator<Item = &'static Path> {
    let [image, disk] = DIRECTORIES.map(Path::new);
    [Some(image), Some(disk).filter(|disk| is_trusted(disk))].into_iter().flatten()
}

pub fn names() -> Vec<String> {
    let entries = directories().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
    let found = entries.filter(|entry| is_action(&entry.path())).map(|entry| entry.file_name());
    found.map(|name| name.to_string_lossy().into_owned()).filter(|name| is_name(name)).collect()
}

pub fn find(name: &str) -> Option<PathBuf> {
    if !is_name(name) {
        return None;
    }
    directories().map(|directory| directory.join(name)).find(|path| is_action(path))
}

pub fn run(path: &Path, params: &Value, identity: &Identity, job: &Job) -> Outcome {
    let shown = path.display().to_string();
    let stdin = serde_json::to_vec(params)
        .map_err(|error| Failure { code: Code::BadParams, message: format!("params: {error}") })?;
    let program = Program {
        path: &shown,
        args: &[],
        env: &BTreeMap::new(),
        cwd: "/",
        timeout: Some(TIMEOUT),
        uid: ROOT,
        terminal: None,
        tool: None,
    };
    let mut said = Collected::new(stdin, MAX_OUTPUT);
    let ended = program.start(identity, job, !said.stdin.is_empty())?.drive(&mut said)?;
    let [stdout, stderr] = said.streams;
    let stderr = String::from_utf8_lossy(&stderr.bytes);
    let said: Vec<&str> = stderr.lines().rev().take(5).collect();
    let said = said.into_iter().rev().collect::<Vec<_>>().join("\n");
    match ended {
        Ended::Code(0) => serde_json::from_slice(&stdout.bytes)
            .or_else(|error| fail(Code::ActionFailed, format!("{shown} did not answer with JSON: {error}"))),
        Ended::Code(code) => fail(Code::ActionFailed, format!("{shown} ended with exit code {code}: {said}")),
        Ended::Signal(signal) => fail(Code::Killed, format!("{shown} was killed by signal {signal}: {said}")),
    }
}
