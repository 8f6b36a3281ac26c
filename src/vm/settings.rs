//! What the VMs of one manager have in common, and what one of them got.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use serde_json::Value;
use tokio::sync::Semaphore;

use super::events::Events;
use super::network::Connected;
use crate::error::Error;
use crate::host::zygote::Zygotes;
use crate::image::template::{Digests, SnapshotStore, Store};
use crate::image::GuestImage;
use crate::model::{Backend, Grade, Ipv4Net, JailMode};
use crate::store::Folders;
use crate::vmm::Binaries;

/// How VMs are monitored.
#[derive(Debug, Clone, Copy)]
pub struct Heartbeat {
    /// `None`: a VM is sampled only when a caller asks.
    pub interval: Option<Duration>,
    /// How many samples in a row an agent may leave without a sign of life.
    pub misses: u32,
}

/// What the VMs of one manager have in common.
#[derive(Debug, Clone)]
pub struct Settings {
    pub folders: Folders,
    pub image: GuestImage,
    /// `None`: every VM boots.
    pub templates: Option<Arc<Store>>,
    /// Templates of the users' own, and suspended VMs.
    pub snapshots: Arc<SnapshotStore>,
    pub suspended: Arc<SnapshotStore>,
    pub digests: Arc<Digests>,
    pub binaries: Binaries,
    pub min_isolation: Option<Grade>,
    pub jail: JailMode,
    /// `None`: each VMM is executed, with a layout of its own in memory.
    pub zygotes: Option<Arc<Zygotes>>,
    /// First and last uid for VMs, where root starts them.
    pub uid_range: (u32, u32),
    /// Below which group the VMs' groups are made; `None`: where this process may.
    pub cgroup_parent: Option<PathBuf>,
    pub start_timeout: Duration,
    pub command_timeout: Duration,
    pub network_range: Ipv4Net,
    pub heartbeat: Heartbeat,
    /// Turns to start: more at once would make each slower and none faster.
    pub starts: Arc<Semaphore>,
    /// Where what happens to them is told.
    pub events: Arc<Events>,
}

impl Settings {
    /// Names the configuration's key for the folder that is full, read-only or closed.
    pub(super) fn with_key(&self, mut error: Error) -> Error {
        let Error::Host { object, source, remedy: remedy @ None, .. } = &mut error else { return error };
        if !matches!(source.errno(), Some(Errno::EACCES | Errno::ENOSPC | Errno::EROFS | Errno::EDQUOT)) {
            return error;
        }
        let Folders { runtime, cache } = &self.folders;
        let is_below = |folder: &Path| Path::new(object).starts_with(folder);
        let key = match (is_below(runtime.path()), is_below(cache.path())) {
            (true, _) => "runtime_dir",
            (_, true) => "cache_dir",
            _ => return error,
        };
        *remedy = Some(format!("config[{key:?}] names another folder"));
        error
    }
}

/// The program that runs a VM.
#[derive(Debug, Clone)]
pub struct VmmFacts {
    pub path: PathBuf,
    /// What it says of its version.
    pub version: Option<String>,
    /// Whether it is the one of our own package.
    pub packaged: bool,
}

/// What a VM got, beyond what was asked for.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub pid: Option<i32>,
    pub backend: Option<Backend>,
    /// Why it is that one.
    pub backend_reason: Option<String>,
    pub grade: Option<Grade>,
    pub accelerator: Option<&'static str>,
    pub vmm: Option<VmmFacts>,
    /// `boot`, `clone`, `pool` or `resume`.
    pub origin: Option<&'static str>,
    /// The stages of its start and how long each took.
    pub stages: Vec<(&'static str, Duration)>,
    pub socket: PathBuf,
    /// How it is confined, and where each limit is enforced; `None` while it does not run.
    pub jail: Option<Value>,
    pub limits: Option<Value>,
    /// `None` while it is on no network.
    pub network: Option<Arc<Connected>>,
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::error::Cause;
    use crate::model::ManagerConfig;

    fn with_key(object: &str, cause: impl Into<Cause>) -> String {
        let folders = serde_json::json!({"runtime_dir": "/of/run", "cache_dir": "/of/cache", "templates": false});
        let config = ManagerConfig::from_json(folders.as_object().unwrap()).unwrap();
        let settings = crate::manager::settings(&config, GuestImage::in_directory(Path::new("/data")));
        // As often as it is asked.
        settings.with_key(settings.with_key(Error::host("create", object, cause))).to_string()
    }

    #[test]
    fn test_with_key_names_it_once_where_the_folder_itself_refuses() {
        let failed = |number| io::Error::from_raw_os_error(number);
        let remedy = |key| format!("; config[\"{key}\"] names another folder");
        for number in [libc::EACCES, libc::ENOSPC, libc::EROFS, libc::EDQUOT] {
            let expected = format!("create failed on /of/run/a: {}{}", failed(number), remedy("runtime_dir"));
            assert_eq!(with_key("/of/run/a", failed(number)), expected);
        }
        assert!(with_key("/of/cache/disks/a", Errno::ENOSPC).ends_with(&remedy("cache_dir")));
        let explained = Cause::explained(failed(libc::EROFS), "it cannot be written");
        assert!(with_key("/of/cache", explained).ends_with(&format!("it cannot be written{}", remedy("cache_dir"))));
    }

    #[test]
    fn test_with_key_leaves_other_errors_and_other_places_alone() {
        let denied = || io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(with_key("/of/running", denied()), format!("create failed on /of/running: {}", denied()));
        assert!(!with_key("/of/run/a", io::Error::from_raw_os_error(libc::EIO)).contains("config"));
        // A text is no error number, whatever it says.
        assert!(!with_key("/of/run/a", "the guest says (os error 13)").contains("config"));
    }
}
