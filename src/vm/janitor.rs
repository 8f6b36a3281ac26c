//! What dead processes left of their VMs, and the process that outlives ours to remove it.
//!
//! A process that is killed cannot clean up. So beside it a small one waits (`microvm-janitor`, one for each process that
//! has VMs): it is told which folders are in use, and when its socket ends it does what the next manager's start would do.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::network;
use super::settings::Settings;
use crate::error::{Error, Result};
use crate::host::fork::{self, ForkGuard, PerProcess};
use crate::host::{cgroup, messages, process};
use crate::image::template;
use crate::mutex::Mutex;
use crate::store::{disk, lease, runtime, Kind, Root};

/// How long a process that closes its descriptors may take to be gone.
const DEATH: Duration = Duration::from_secs(5);

/// What a VMM that is still dying holds is free at the second or third look.
const PASSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(200)];

/// A message beside the folders' descriptors; each path is one of at most 4096 bytes.
const MESSAGE: usize = 16 * 1024;

/// The folders that the VMs of one manager have in use. Its descriptors are what the janitor works on; the paths are for
/// messages.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct RootsMessage {
    runtime: PathBuf,
    cache: PathBuf,
    has_templates: bool,
}

/// A manager's folders, and whether it keeps templates.
#[derive(Debug, Clone)]
struct Roots {
    runtime: Arc<Root>,
    cache: Arc<Root>,
    has_templates: bool,
}

impl PartialEq for Roots {
    fn eq(&self, other: &Self) -> bool {
        let ids = |roots: &Self| (roots.runtime.mark_id().to_owned(), roots.cache.mark_id().to_owned());
        ids(self) == ids(other) && self.has_templates == other.has_templates
    }
}

/// The janitor of this process.
struct JanitorProcess {
    child: Child,
    lifeline: OwnedFd,
    _fork_guard: ForkGuard,
    sent: Vec<Roots>,
}

static JANITOR: PerProcess<Mutex<Option<JanitorProcess>>> = PerProcess::new();

/// Removes what dead processes left in and for the folders of VMs; returns the names of their VMs. Blocking.
#[must_use]
pub fn sweep(runtime: Option<&Root>, cache: Option<&Root>, cgroup_parent: Option<&Path>) -> Vec<String> {
    // First: it ends the VMMs, and a tap is somebody's as long as its VMM lives.
    let swept = runtime.map_or_else(Vec::new, runtime::sweep);
    if let Some(cache) = cache {
        disk::sweep(cache);
    }
    network::sweep();
    lease::sweep();
    cgroup::sweep_orphans(cgroup_parent);
    swept
}

/// Sees to it that a process cleans up after this one, before this one has anything. Blocking; where it fails, the next
/// manager's start does it, and a warning says so.
///
/// # Errors
/// [`Error::FolderRefused`].
pub fn keep(settings: &Settings) -> Result<()> {
    let (runtime, cache) = settings.folders.roots()?;
    let roots = Roots { runtime, cache, has_templates: settings.templates.is_some() };
    let mut janitor = JANITOR.get().lock();
    let kept = try_keep(&mut janitor, &settings.image.janitor, roots);
    drop(janitor);
    if let Err(error) = kept {
        log::warn!("{error}; if this process is killed, only the next manager's start cleans up after it");
    }
    Ok(())
}

fn try_keep(janitor: &mut Option<JanitorProcess>, program: &Path, roots: Roots) -> Result<()> {
    let is_alive = janitor.as_mut().is_some_and(|janitor| matches!(janitor.child.try_wait(), Ok(None)));
    let mut unsent = Vec::new();
    if !is_alive {
        unsent = janitor.take().map(|janitor| janitor.sent).unwrap_or_default();
        *janitor = Some(spawn(program)?);
    }
    let Some(janitor) = janitor.as_mut() else { return Ok(()) };
    unsent.push(roots);
    for roots in unsent {
        if janitor.sent.contains(&roots) {
            continue;
        }
        send(&janitor.lifeline, &roots).map_err(|error| Error::host("tell", "the janitor", error))?;
        janitor.sent.push(roots);
    }
    Ok(())
}

fn send(lifeline: &OwnedFd, roots: &Roots) -> std::io::Result<()> {
    let Roots { runtime, cache, has_templates } = roots;
    let (runtime_path, cache_path) = (runtime.path().to_owned(), cache.path().to_owned());
    let text =
        serde_json::to_vec(&RootsMessage { runtime: runtime_path, cache: cache_path, has_templates: *has_templates })?;
    messages::send(lifeline, &text, &[runtime.as_fd(), cache.as_fd()])
}

/// The next message; `None` when its sender is gone.
fn receive(lifeline: &impl AsFd) -> std::io::Result<Option<(RootsMessage, Vec<OwnedFd>)>> {
    let Some((text, folders)) = messages::receive(lifeline, MESSAGE)? else { return Ok(None) };
    Ok(Some((serde_json::from_slice(&text)?, folders)))
}

fn spawn(program: &Path) -> Result<JanitorProcess> {
    let failed = |error: std::io::Error| Error::host("start", program.display(), error);
    // In messages: each carries the descriptors of its folders.
    let (lifeline, theirs) = messages::pair().map_err(failed)?;
    let mut command = Command::new(program);
    command
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        // Ctrl-C is for those who have a terminal.
        .process_group(0);
    let child = fork::inherit_nothing(&mut command).spawn().map_err(failed)?;
    let _fork_guard = fork::guard(&lifeline);
    Ok(JanitorProcess { child, lifeline, _fork_guard, sent: Vec::new() })
}

/// The janitor itself: receives folders on its standard input until that ends, then removes what is left.
///
/// # Errors
/// [`Error::Host`] when it cannot tell whose janitor it is.
pub fn serve() -> Result<()> {
    let master = process::Parent::of_this_process()?;
    let mut places = Vec::new();
    while let Some((message, fds)) =
        receive(&std::io::stdin()).map_err(|error| Error::host("receive", "the folders to clean up", error))?
    {
        let [runtime, cache] = &fds[..] else { continue };
        let runtime = Root::received(Kind::Runtime, runtime, &message.runtime);
        match (runtime, Root::received(Kind::Cache, cache, &message.cache)) {
            (Ok(runtime), Ok(cache)) => places.push((runtime, cache, message.has_templates)),
            (Err(error), _) | (_, Err(error)) => log::warn!("{error}"),
        }
    }
    // Its locks are free only when all its descriptors are closed.
    master.ended_within(DEATH);
    for pause in PASSES {
        std::thread::sleep(pause);
        for (runtime, cache, has_templates) in &places {
            let swept = sweep(Some(runtime), Some(cache), None);
            log::debug!("removed {}", swept.join(", "));
            if *has_templates {
                template::remove_unfinished(&cache.at("templates"));
            }
            ["snapshots", "suspended"].iter().for_each(|store| template::clean_up_folder(&cache.at(store)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Folders;

    #[test]
    fn test_receive_gets_folders_with_their_descriptors() {
        let scratch = tempfile::tempdir().unwrap();
        let folders = Folders::new(Some(scratch.path().join("run")), Some(scratch.path().join("cache")));
        let (runtime, cache) = folders.roots().unwrap();
        let roots = Roots { runtime, cache, has_templates: true };
        let (ours, theirs) = messages::pair().unwrap();
        send(&ours, &roots).unwrap();
        drop(ours);
        // The descriptors lead to the folders, wherever these are by now.
        std::fs::rename(scratch.path().join("run"), scratch.path().join("moved")).unwrap();
        let (message, fds) = receive(&theirs).unwrap().unwrap();
        let [runtime, cache] = &fds[..] else { panic!("{fds:?}") };
        assert_eq!(
            Root::received(Kind::Runtime, runtime, &message.runtime).unwrap().mark_id(),
            roots.runtime.mark_id()
        );
        assert_eq!(Root::received(Kind::Cache, cache, &message.cache).unwrap().mark_id(), roots.cache.mark_id());
        assert!(Root::received(Kind::Runtime, cache, &message.cache).is_err());
        assert!(receive(&theirs).unwrap().is_none());
    }
}
