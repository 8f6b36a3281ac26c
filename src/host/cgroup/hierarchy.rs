//! Where the hierarchies are mounted, and where in them this process is (cgroups(7), proc_pid_mountinfo(5)).

use std::fs;
use std::path::{Path, PathBuf};

use super::Controller;

/// The unified hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unified {
    pub mount: PathBuf,
    /// The folder of this process's own group.
    pub own: PathBuf,
    controllers: Vec<String>,
}

impl Unified {
    /// Whether the hierarchy as a whole has a controller; a group may still not be given it.
    pub fn has(&self, controller: Controller) -> bool {
        self.controllers.iter().any(|name| name == controller.as_str())
    }
}

/// All hierarchies that are mounted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    v1: Vec<(Controller, PathBuf)>,
    v2: Option<Unified>,
}

impl Hierarchies {
    pub fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut found = Self::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        if let Some(v2) = &mut found.v2 {
            let controllers = fs::read_to_string(v2.mount.join("cgroup.controllers")).unwrap_or_default();
            v2.controllers = controllers.split_whitespace().map(str::to_owned).collect();
        }
        found
    }

    /// The own group's folder in the v1 hierarchy that has a controller.
    pub fn v1(&self, controller: Controller) -> Option<PathBuf> {
        self.v1.iter().find(|(has, _)| *has == controller).map(|(_, folder)| folder.clone())
    }

    pub fn v2(&self) -> Option<&Unified> {
        self.v2.as_ref()
    }

    fn parse(mountinfo: &str, cgroup: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some(Mount { root, point, kind, options }) = Mount::parse(line) else { continue };
            let own = |is_it: &dyn Fn(&str) -> bool| {
                let path = cgroup.lines().find_map(|line| {
                    let mut fields = line.splitn(3, ':').skip(1);
                    let (controllers, path) = (fields.next()?, fields.next()?);
                    is_it(controllers).then_some(path)
                })?;
                // In a container, the mount may show only a part of the hierarchy.
                let below = Path::new(path).strip_prefix(root).ok()?;
                Some(Path::new(point).join(below))
            };
            match kind {
                "cgroup2" if found.v2.is_none() => {
                    if let Some(own) = own(&|controllers| controllers.is_empty()) {
                        found.v2 = Some(Unified { mount: point.into(), own, controllers: Vec::new() });
                    }
                }
                "cgroup" => {
                    let has = |name: &str| options.split(',').any(|option| option == name);
                    for (controller, name) in [
                        (Controller::Cpu, "cpu"),
                        (Controller::Memory, "memory"),
                        (Controller::Pids, "pids"),
                        (Controller::Devices, "devices"),
                        (Controller::Io, "blkio"),
                    ] {
                        let own = own(&|controllers| controllers.split(',').any(|c| c == name));
                        found.v1.extend(own.filter(|_| has(name)).map(|own| (controller, own)));
                    }
                }
                _ => {}
            }
        }
        found
    }
}

struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, point) = (before.next()?, before.next()?);
        let mut after = after.split(' ');
        Some(Self { root, point, kind: after.next()?, options: after.nth(1)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_v1_finds_each_controllers_own_folder() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      31 25 0:27 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n\
                      32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = Hierarchies::parse(mounts, "4:memory:/a/b\n3:cpu,cpuacct:/\n0::/c\n");
        assert_eq!(found.v1(Controller::Cpu).unwrap(), Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found.v1(Controller::Memory).unwrap(), Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(found.v1(Controller::Pids), None);
        assert_eq!(found.v2().unwrap().own, Path::new("/sys/fs/cgroup/unified/c"));
    }

    #[test]
    fn test_parse_v2_in_a_container_strips_the_mounts_root() {
        let mounts = "30 25 0:26 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw,nsdelegate\n";
        let found = Hierarchies::parse(mounts, "0::/docker/x/y\n");
        assert_eq!(found.v2().unwrap().own, Path::new("/sys/fs/cgroup/y"));
    }
}
