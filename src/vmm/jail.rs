//! The jail around a VMM, as a plan; and what this host can give to any jail.
//!
//! Architecture invariant: the same for every backend. A plan says what there is; the launcher does it or fails.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use microvm_jail::{Access, Confined, Identity, LaunchSpec, Layer, Namespaces, Resource, Rlimit, Seccomp, Visible};

use crate::error::{Cause, Error, Result};
use crate::host::fork::PerProcess;
use crate::host::kernel;
use crate::host::process::{self, Exit};
use crate::host::remedy::{self, Place, UserNamespaces};
use crate::mutex::Mutex;

/// Yama's: 2 lets none but root read another process's memory, 3 nobody.
const PTRACE_SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";
/// What every VMM finds: somewhere to throw things away, and chance.
const DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];

/// Everything about one VM's jail that does not depend on its backend. `files` is data: what a VM needs to see besides
/// is one more entry ([`JailPlan::show`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailPlan {
    pub launcher: PathBuf,
    /// Namespaces and a root of its own; without them (where the host denies them) the VMM sees the host's paths, and
    /// Landlock alone decides over them.
    pub own_root: bool,
    /// Why that root can have no `/proc`; `None` where it can.
    pub no_proc: Option<String>,
    /// Whom the VMM runs as, when root starts it.
    pub identity: Option<Identity>,
    pub files: Vec<Visible>,
    pub rlimits: Vec<Rlimit>,
    pub cgroup_procs: Vec<PathBuf>,
    pub audit: bool,
    /// A VMM that opens its tap by name gets the device from the jail, and a network namespace of its own.
    pub hands_tap: bool,
}

impl JailPlan {
    /// A plan that shows the common devices and `devices`.
    ///
    /// # Errors
    /// [`Error::ImageUnreadable`].
    pub fn new(launcher: &Path, host: &HostJail, identity: Option<Identity>, devices: &[PathBuf]) -> Result<Self> {
        let mut plan = Self {
            launcher: launcher.to_owned(),
            own_root: host.own_root(),
            no_proc: host.no_proc.clone(),
            identity,
            files: Vec::new(),
            rlimits: Vec::new(),
            cgroup_procs: Vec::new(),
            audit: false,
            hands_tap: false,
        };
        for device in DEVICES.iter().map(Path::new).chain(devices.iter().map(PathBuf::as_path)) {
            plan.show("device", device, &device.display().to_string(), Access::Device)?;
        }
        Ok(plan)
    }

    /// Makes a file visible as `inside`; answers with the path by which the VMM finds it.
    ///
    /// # Errors
    /// [`Error::ImageUnreadable`] naming `field`, when there is no such file or the VM's user may not read it.
    pub fn show(&mut self, field: &'static str, host: &Path, inside: &str, access: Access) -> Result<PathBuf> {
        let unreadable = |source: Cause| Error::ImageUnreadable { field, path: host.to_owned(), source };
        let real = host.canonicalize().map_err(|error| unreadable(error.into()))?;
        if let Some(Identity { uid, gid }) = self.identity {
            let meta = real.metadata().map_err(|error| unreadable(error.into()))?;
            let shift = if meta.uid() == uid {
                6
            } else if meta.gid() == gid {
                3
            } else {
                0
            };
            if meta.mode() >> shift & 0o4 == 0 {
                let (mode, owner) = (meta.mode() & 0o777, meta.uid());
                let reason = format!(
                    "the VM runs as uid {uid}, and mode {mode:o} of uid {owner} does not let it read: chmod o+r the \
                     file (the folders above it may stay closed)"
                );
                return Err(unreadable(reason.into()));
            }
        }
        let inside = if self.own_root { PathBuf::from(inside) } else { real.clone() };
        // On the host's own paths, two names may stand for one file.
        if !self.own_root && self.files.iter().any(|file| file.inside == inside) {
            return Ok(inside);
        }
        self.files.push(Visible { host: real, inside: inside.clone(), access });
        Ok(inside)
    }

    /// Whether a VMM finds the files of any VM at the same places, and what it holds below `/proc/self/fd`: what a template
    /// needs that names its files.
    ///
    /// # Errors
    /// Why not.
    pub fn has_fixed_places(&self) -> std::result::Result<(), String> {
        match &self.no_proc {
            Some(reason) => Err(format!("a clone's memory needs a /proc in its jail: {reason}")),
            None if !self.own_root => Err("a template names its files by their places in a root of its own".into()),
            None => Ok(()),
        }
    }

    /// Takes a file out again that is shown as `inside`.
    pub fn hide(&mut self, inside: &Path) {
        self.files.retain(|file| file.inside != inside);
    }

    /// Shows another file in the place of one that is shown already; answers with the path by which the VMM finds it.
    ///
    /// # Errors
    /// As [`JailPlan::show`]'s.
    pub fn show_instead(&mut self, field: &'static str, inside: &Path, host: &Path) -> Result<PathBuf> {
        let old = self.files.iter().position(|file| file.inside == inside).map(|index| self.files.remove(index));
        let access = old.map_or(Access::Read, |old| old.access);
        self.show(field, host, &inside.display().to_string(), access)
    }

    /// Lets the VMM write files of this size, for a moment that has a file of its memory's size.
    pub fn allow_files_of(&mut self, bytes: u64) {
        for limit in self.rlimits.iter_mut().filter(|limit| limit.resource == Resource::Fsize) {
            (limit.soft, limit.hard) = (limit.soft.max(bytes), limit.hard.max(bytes));
        }
    }

    /// Lets the VMM make files in a folder for its sockets, which is shown as `inside`.
    pub fn allow_files_in(&mut self, inside: &Path) {
        for folder in self.files.iter_mut().filter(|file| file.inside == inside) {
            folder.access = Access::Folder;
        }
    }

    /// The launch spec for a program whose files are in the plan by now.
    #[must_use]
    pub fn spec(&self, argv: Vec<String>, env: Vec<(String, String)>, seccomp: Seccomp) -> LaunchSpec {
        LaunchSpec {
            env,
            namespaces: if self.own_root { Namespaces::ALL } else { Namespaces::NONE },
            new_root: self.own_root,
            files: self.files.clone(),
            identity: self.identity,
            rlimits: self.rlimits.clone(),
            cgroup_procs: self.cgroup_procs.clone(),
            seccomp,
            audit: self.audit,
            ..LaunchSpec::new(argv)
        }
    }
}

/// What this host can give to any jail of this user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostJail {
    pub namespaces: Layer,
    /// Why the new root can have no `/proc` of the VM's own processes; `None` where it can.
    pub no_proc: Option<String>,
    /// A uid for each VM.
    pub identity: Layer,
    /// What confined the program of a trial launch; `None` when not even the weakest jail could be made.
    pub confined: Option<Confined>,
}

impl HostJail {
    #[must_use]
    pub fn own_root(&self) -> bool {
        matches!(self.namespaces, Layer::Given(_))
    }

    /// Whether a VMM can have a network namespace of its own although it opens its tap by name: the jail answers its opening
    /// of the device, by a descriptor that is put among the VMM's (Linux 5.9), and reads in its memory what it opens.
    ///
    /// # Errors
    /// Why not.
    pub fn hands_taps(&self) -> std::result::Result<&'static str, String> {
        let scope = std::fs::read_to_string(PTRACE_SCOPE).ok().and_then(|text| text.trim().parse().ok());
        hands_taps(self.own_root(), kernel::is_at_least(5, 9), scope)
    }

    #[must_use]
    pub fn own_uid(&self) -> bool {
        self.own_root() && nix::unistd::geteuid().is_root() && matches!(self.identity, Layer::Given(_))
    }
}

fn hands_taps(
    own_root: bool,
    adds_descriptors: bool,
    ptrace_scope: Option<u32>,
) -> std::result::Result<&'static str, String> {
    match (own_root, adds_descriptors, ptrace_scope) {
        (false, _, _) => Err("it needs the namespaces: the VMM opens its tap in the host's".into()),
        (_, false, _) => {
            Err("it needs Linux 5.9: the VMM opens its tap by name, in the host's network namespace".into())
        }
        (_, _, Some(scope @ 2..)) => Err(format!(
            "{PTRACE_SCOPE} is {scope}: the VMM opens its tap by name, in the host's network namespace; a value of 1 lets \
             its supervisor see what it opens"
        )),
        _ => Ok("empty; its tap's device is opened outside of it and handed in"),
    }
}

/// Exit code of the launcher when it is started by hand: it has reached its own first lines.
const LAUNCHER_USAGE: i32 = 64;

/// Finds out, once per process, by jailing the launcher itself: as wholly as can be, then with less, and with the filter of
/// system calls that a VMM is to get. `uid` serves for the moment that it takes. Blocking.
///
/// # Errors
/// [`Error::Host`] when the launcher does not start.
pub fn host_jail(launcher: &Path, uid: u32, seccomp: Seccomp) -> Result<Arc<HostJail>> {
    type Known = HashMap<(PathBuf, Seccomp), Arc<HostJail>>;
    static KNOWN: PerProcess<Mutex<Known>> = PerProcess::new();
    // Held throughout: whoever comes second would only do the same.
    let mut known = KNOWN.get().lock();
    let key = (launcher.to_owned(), seccomp);
    if let Some(found) = known.get(&key) {
        return Ok(found.clone());
    }
    let found = Arc::new(probe(launcher, uid, seccomp)?);
    known.insert(key, found.clone());
    Ok(found)
}

fn probe(launcher: &Path, uid: u32, seccomp: Seccomp) -> Result<HostJail> {
    let root = nix::unistd::geteuid().is_root();
    let mut reasons = Vec::new();
    for (identity, own_root) in [(true, true), (false, true), (false, false)] {
        if identity && !root {
            continue;
        }
        let identity_of = identity.then_some(Identity { uid, gid: uid });
        let attempt = |proc| attempt(launcher, identity_of, own_root, proc, seccomp);
        let (mut outcome, mut no_proc) = (attempt(own_root)?, None);
        if let (_, exit @ Exit::Failed { .. }) = &outcome {
            no_proc = Some(exit.to_string()).filter(|_| own_root);
            outcome = if own_root { attempt(false)? } else { outcome };
        }
        let confined = match outcome {
            (confined, Exit::Code(LAUNCHER_USAGE)) => confined,
            (_, exit) => {
                reasons.push(exit.to_string());
                continue;
            }
        };
        let why = |index: usize| reasons.get(index).cloned().unwrap_or_default();
        return Ok(HostJail {
            namespaces: match own_root {
                true => Layer::Given("user, mount, PID, network, IPC and UTS namespaces".into()),
                false => Layer::Missing(format!(
                    "{}; {}",
                    why(reasons.len() - 1),
                    remedy::namespaces(&UserNamespaces::look(), &Place::look())
                )),
            },
            no_proc,
            identity: match (root, identity) {
                (true, true) => Layer::Given("a uid of its own".into()),
                (true, false) => Layer::Missing(format!("{}; {}", why(0), remedy::own_uid(&Place::look()))),
                (false, _) => Layer::Given("the user of the manager (only root can give each VM its own)".into()),
            },
            confined,
        });
    }
    let why = reasons.last().cloned().unwrap_or_default();
    Ok(HostJail {
        namespaces: Layer::Missing(why.clone()),
        no_proc: None,
        identity: Layer::Missing(why),
        confined: None,
    })
}

fn attempt(
    launcher: &Path,
    identity: Option<Identity>,
    own_root: bool,
    proc: bool,
    seccomp: Seccomp,
) -> Result<(Option<Confined>, Exit)> {
    let none = Layer::Missing(String::new());
    let shape = if own_root { Layer::Given(String::new()) } else { none.clone() };
    let host = HostJail { namespaces: shape, no_proc: None, identity: none, confined: None };
    let mut plan = JailPlan::new(launcher, &host, None, &[])?;
    let program = plan.show("package data", launcher, "/vmm/trial", Access::Execute)?;
    plan.identity = identity;
    let argv = vec![program.display().to_string()];
    let spec = LaunchSpec { proc, ..plan.spec(argv, Vec::new(), seccomp) };
    process::try_launch(launcher, &spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_hands_taps_only_where_the_supervisor_can_see_and_answer() {
        assert!(hands_taps(true, true, None).is_ok() && hands_taps(true, true, Some(1)).is_ok());
        for (own_root, adds_descriptors, scope, word) in
            [(false, true, None, "namespaces"), (true, false, None, "5.9"), (true, true, Some(2), "ptrace_scope is 2")]
        {
            let why = hands_taps(own_root, adds_descriptors, scope).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }
}
