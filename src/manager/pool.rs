//! VMs that stand by, so that a start is a wake-up.
//!
//! Architecture invariant: what nobody has asked for is in nobody's way. Standby VMs are made one at a time while no
//! start is under way, they take only what the quota leaves over and give it back as soon as a VM is created that needs
//! it, and they go when the host runs short of memory.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::error::Result;
use crate::host::{clock, memory};
use crate::image::template::FileId;
use crate::model::{Backend, Form, IsolationType, NetworkConfig, PoolSpec, QuotaUse, ResourceLimits, VmId};
use crate::vm::{Settings, Spec, Standby, Supply};

/// How often dead ones are looked for and the host's memory is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Who has started a VM most likely talks to it first.
const AFTER_START: Duration = Duration::from_millis(100);
/// How long to wait after one could not be made; doubled each time.
const BACK_OFF: Duration = Duration::from_millis(500);
const MAX_BACK_OFF: Duration = Duration::from_secs(30);
/// The share of the host's memory that the pool leaves free.
const SPARE_SHARE: u64 = 10;

/// How a shelf is filled.
#[derive(Debug, Clone)]
pub struct ShelfUse {
    pub spec: PoolSpec,
    pub ready: usize,
}

/// The standby VMs of one shape, oldest first.
struct Shelf {
    spec: PoolSpec,
    standing: VecDeque<Item>,
}

struct Item {
    standby: Standby,
    /// The caller's files that it was made from, as they were then.
    files: Vec<(PathBuf, FileId)>,
}

impl Item {
    fn is_usable(&self) -> bool {
        let unchanged = |(path, id): &(PathBuf, FileId)| FileId::of(path).is_ok_and(|now| now == *id);
        self.standby.is_alive() && self.files.iter().all(unchanged)
    }
}

/// The pool of one manager.
pub struct Pool {
    settings: Arc<Settings>,
    backend: Option<Backend>,
    shelves: Mutex<Vec<Shelf>>,
    /// Starts that someone waits for.
    starting: AtomicUsize,
    changed: Notify,
}

fn cost(limits: &ResourceLimits) -> QuotaUse {
    QuotaUse { vcpus: limits.vcpu_count, memory_mb: limits.memory_mb }
}

impl Pool {
    pub fn new(specs: &[PoolSpec], backend: Option<Backend>, settings: Arc<Settings>) -> Arc<Self> {
        let shelf = |spec: &PoolSpec| Shelf { spec: spec.clone(), standing: VecDeque::new() };
        Arc::new(Self {
            settings,
            backend,
            shelves: Mutex::new(specs.iter().map(shelf).collect()),
            starting: AtomicUsize::new(0),
            changed: Notify::new(),
        })
    }

    fn shelves(&self) -> MutexGuard<'_, Vec<Shelf>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn usage(&self) -> Vec<ShelfUse> {
        self.shelves().iter().map(|shelf| ShelfUse { spec: shelf.spec.clone(), ready: shelf.standing.len() }).collect()
    }

    fn used(&self) -> QuotaUse {
        self.shelves().iter().fold(QuotaUse::default(), |sum, shelf| {
            let (each, count) = (cost(&shelf.spec.shape.limits), shelf.standing.len() as u64);
            QuotaUse { vcpus: sum.vcpus + each.vcpus * count, memory_mb: sum.memory_mb + each.memory_mb * count }
        })
    }

    /// Gives up VMs until no more than `left` is used.
    pub fn shrink_to(&self, left: QuotaUse) {
        let mut given_up = Vec::new();
        while self.used().vcpus > left.vcpus || self.used().memory_mb > left.memory_mb {
            given_up.extend(self.give_up_one());
        }
        // Dropped outside of the lock: that kills their VMMs.
        drop(given_up);
    }

    fn give_up_one(&self) -> Option<Item> {
        self.shelves().iter_mut().max_by_key(|shelf| shelf.standing.len())?.standing.pop_front()
    }

    /// Keeps the pool filled, for ever; `left` says what the quota leaves over.
    pub async fn keep_filled(self: Arc<Self>, left: impl Fn() -> Option<QuotaUse>) {
        let mut back_off = BACK_OFF;
        loop {
            self.throw_out();
            let Some(left) = left() else { return };
            let Some(spec) = self.short_of(left) else {
                if tokio::time::timeout(LOOK, self.changed.notified()).await.is_ok() {
                    tokio::time::sleep(AFTER_START).await;
                }
                continue;
            };
            match self.make(&spec).await {
                Ok(item) => {
                    back_off = BACK_OFF;
                    let mut shelves = self.shelves();
                    if let Some(shelf) = shelves.iter_mut().find(|shelf| shelf.spec == spec) {
                        shelf.standing.push_back(item);
                    }
                }
                Err(error) => {
                    log::warn!("a VM of the pool could not be made: {error}; the next try is in {back_off:?}");
                    tokio::time::sleep(back_off).await;
                    back_off = (back_off * 2).min(MAX_BACK_OFF);
                }
            }
        }
    }

    /// Drops what is dead or outdated, and one more when the host runs short of memory.
    fn throw_out(&self) {
        let mut out = Vec::new();
        for shelf in self.shelves().iter_mut() {
            let (good, bad) = std::mem::take(&mut shelf.standing).into_iter().partition(Item::is_usable);
            shelf.standing = good;
            out.push(bad);
        }
        let lost: usize = out.iter().map(VecDeque::len).sum();
        if lost > 0 {
            log::warn!("{lost} VMs of the pool were dead or outdated");
        }
        if !memory::has_spare(0, SPARE_SHARE / 2) {
            let given_up = self.give_up_one();
            if given_up.is_some() {
                log::info!("the host is short of memory: a VM of the pool was given up");
            }
        }
    }

    /// A shelf that lacks a VM which may be made now.
    fn short_of(&self, left: QuotaUse) -> Option<PoolSpec> {
        if self.starting.load(Ordering::Acquire) > 0 {
            return None;
        }
        let used = self.used();
        let fits = |shelf: &&Shelf| {
            let one = cost(&shelf.spec.shape.limits);
            shelf.standing.len() < shelf.spec.size
                && used.vcpus + one.vcpus <= left.vcpus
                && used.memory_mb + one.memory_mb <= left.memory_mb
                && memory::has_spare(one.memory_mb, SPARE_SHARE)
        };
        let shelves = self.shelves();
        shelves.iter().filter(fits).min_by_key(|shelf| shelf.standing.len()).map(|shelf| shelf.spec.clone())
    }

    async fn make(&self, pool: &PoolSpec) -> Result<Item> {
        let spec = self.spec(pool)?;
        let paths = [&spec.kernel_path, &spec.rootfs_path].into_iter().flatten();
        let files = paths.filter_map(|path| Some((path.clone(), FileId::of(path).ok()?))).collect();
        Ok(Item { standby: Standby::make(&spec, &self.settings, pool.form).await?, files })
    }

    fn spec(&self, pool: &PoolSpec) -> Result<Spec> {
        Ok(Spec {
            vm_id: VmId::parse(&format!("pool-{}", clock::hex(&clock::random::<6>()?)))?,
            backend: self.backend,
            isolation_type: IsolationType::BrowserTab,
            limits: pool.shape.limits.clone(),
            network: NetworkConfig::default(),
            kernel_path: pool.shape.kernel_path.clone(),
            rootfs_path: pool.shape.rootfs_path.clone(),
            template: None,
        })
    }

    /// Ends every VM that stands by.
    pub fn drain(&self) {
        let standing: Vec<_> = self.shelves().iter_mut().map(|shelf| std::mem::take(&mut shelf.standing)).collect();
        drop(standing);
    }
}

impl Supply for Pool {
    fn take(&self, spec: &Spec) -> Option<Standby> {
        // A network is a VM's own from its first packet on; nothing of that can be made ahead.
        if !spec.network.isolated_network || spec.backend != self.backend || spec.template.is_some() {
            return None;
        }
        let is_it = |shelf: &&mut Shelf| {
            let shape = &shelf.spec.shape;
            shape.limits == spec.limits
                && shape.kernel_path == spec.kernel_path
                && shape.rootfs_path == spec.rootfs_path
        };
        let mut out = Vec::new();
        let taken = {
            let mut shelves = self.shelves();
            // Of several forms of one shape the one that is furthest.
            let mut fitting: Vec<&mut Shelf> = shelves.iter_mut().filter(is_it).collect();
            fitting.sort_by_key(|shelf| std::cmp::Reverse(Form::ALL.iter().position(|form| *form == shelf.spec.form)));
            fitting.into_iter().find_map(|shelf| loop {
                let item = shelf.standing.pop_front()?;
                if item.is_usable() {
                    break Some(item.standby);
                }
                out.push(item);
            })
        };
        drop(out);
        taken
    }

    fn starting(&self, begins: bool) {
        if begins {
            self.starting.fetch_add(1, Ordering::AcqRel);
        } else {
            self.starting.fetch_sub(1, Ordering::AcqRel);
            self.changed.notify_one();
        }
    }
}
