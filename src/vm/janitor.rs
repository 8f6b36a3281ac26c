//! What dead processes left of their VMs, and the process that outlives ours to remove it.
//!
//! A process that is killed cannot clean up. So beside it a small one waits (`microvm-janitor`, one for each process that
//! has VMs): it is told which folders are in use, and when its socket ends it does what the next manager's start would do.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::confine::LEASES;
use super::{network, Settings};
use crate::error::{Error, Result};
use crate::host::fork::{self, Concealed, PerProcess};
use crate::host::runtime_dir::{self, Folders};
use crate::host::{disk, lease, process};
use crate::image::template;

/// How long a process that closes its descriptors may take to be gone.
const DEATH: Duration = Duration::from_secs(5);

/// What a VMM that is still dying holds is free at the second or third look.
const PASSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(200)];

/// The folders that the VMs of one manager have in use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Places {
    folders: Folders,
    templates: Option<PathBuf>,
    /// Of snapshots and suspended VMs.
    shelves: Vec<PathBuf>,
}

/// The janitor of this process.
struct Kept {
    child: Child,
    leash: UnixStream,
    _concealed: Concealed,
    told: BTreeSet<Places>,
}

static KEPT: PerProcess<Mutex<Option<Kept>>> = PerProcess::new();

/// Removes what dead processes left in and for `folders`; returns the names of their VMs. Blocking.
#[must_use]
pub fn sweep(folders: &Folders) -> Vec<String> {
    // First: it ends the VMMs, and a tap is somebody's as long as its VMM lives.
    let swept = runtime_dir::sweep(folders);
    disk::sweep(&folders.disks);
    network::sweep();
    lease::sweep(Path::new(LEASES));
    swept
}

/// Sees to it that somebody cleans up after this process, before it has anything. Blocking; where it fails, the next
/// manager's start does it, and a warning says so.
pub fn keep(settings: &Settings) {
    let templates = settings.templates.as_ref().map(|store| store.folder().to_owned());
    let shelves = [&settings.snapshots, &settings.suspended].map(|shelf| shelf.folder().to_owned()).into();
    let places = Places { folders: settings.folders.clone(), templates, shelves };
    let mut kept = KEPT.get().lock().unwrap_or_else(PoisonError::into_inner);
    let told = try_keep(&mut kept, &settings.image.janitor, places);
    drop(kept);
    if let Err(error) = told {
        log::warn!("{error}; if this process is killed, only the next manager's start cleans up after it");
    }
}

fn try_keep(kept: &mut Option<Kept>, program: &Path, places: Places) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| Error::host("tell", "the janitor", error);
    let is_of_use = kept.as_mut().is_some_and(|kept| matches!(kept.child.try_wait(), Ok(None)));
    let mut told = BTreeSet::new();
    if !is_of_use {
        told = kept.take().map(|kept| kept.told).unwrap_or_default();
        *kept = Some(spawn(program)?);
    }
    let Some(kept) = kept.as_mut() else { return Ok(()) };
    told.insert(places);
    for places in told {
        if kept.told.contains(&places) {
            continue;
        }
        let line = serde_json::to_string(&places).map_err(|error| failed(&error))? + "\n";
        kept.leash.write_all(line.as_bytes()).map_err(|error| failed(&error))?;
        kept.told.insert(places);
    }
    Ok(())
}

fn spawn(program: &Path) -> Result<Kept> {
    let failed = |error: std::io::Error| Error::host("start", program.display(), error);
    let (leash, theirs) = UnixStream::pair().map_err(failed)?;
    let mut command = Command::new(program);
    command
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        // Ctrl-C is for those who have a terminal.
        .process_group(0);
    let child = fork::inherit_nothing(&mut command).spawn().map_err(failed)?;
    let _concealed = fork::conceal(&leash);
    Ok(Kept { child, leash, _concealed, told: BTreeSet::new() })
}

/// The janitor itself: hears of folders on its standard input until that ends, then removes what is left.
///
/// # Errors
/// [`Error::Host`] when it cannot tell whose janitor it is.
pub fn serve() -> Result<()> {
    let master = process::Watched::parent()?;
    let mut places = BTreeSet::new();
    let lines = BufReader::new(std::io::stdin()).lines().map_while(std::result::Result::ok);
    places.extend(lines.filter_map(|line| serde_json::from_str::<Places>(&line).ok()));
    // Its locks are free only when all its descriptors are closed.
    master.ended_within(DEATH);
    for pause in PASSES {
        std::thread::sleep(pause);
        for Places { folders, templates, shelves } in &places {
            let swept = sweep(folders);
            log::debug!("removed {}", swept.join(", "));
            if let Some(templates) = templates {
                template::remove_unfinished(templates);
            }
            shelves.iter().for_each(|shelf| template::clean_up_folder(shelf));
        }
    }
    Ok(())
}
