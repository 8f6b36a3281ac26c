//! The pool of warm VMs, so that a start is a wake-up.
//!
//! Architecture invariant: the pool yields to the user's own VMs. Warm VMs are made one at a time while no
//! start is under way, they take only what the quota leaves over and give it back as soon as a VM is created that needs
//! it, and they go when the host runs short of memory.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::error::Result;
use crate::host::memory;
use crate::image::template::FileId;
use crate::model::{PoolSpec, PoolTier, QuotaUse, VmSpec};
use crate::mutex::Mutex;
use crate::vm::{new_id, Settings, VmPool, WarmVm};

/// How often dead warm VMs are swept and the host's memory is checked.
const LOOK: Duration = Duration::from_secs(1);
/// After a start its caller most likely talks to the VM first.
const AFTER_START: Duration = Duration::from_millis(100);
/// How long to wait after a warm VM could not be made; doubled each time.
const BACK_OFF: Duration = Duration::from_millis(500);
const MAX_BACK_OFF: Duration = Duration::from_secs(30);
/// The share of the host's memory that the pool leaves free.
const SPARE_SHARE: u64 = 10;

/// How many warm VMs of a `PoolSpec` are ready.
#[derive(Debug, Clone)]
pub struct PoolUse {
    pub spec: PoolSpec,
    pub ready: usize,
}

/// The warm VMs of one kind, oldest first.
struct Bucket {
    spec: PoolSpec,
    ready: VecDeque<PooledVm>,
}

struct PooledVm {
    warm: WarmVm,
    /// The caller's files that it was made from, as they were then.
    files: Vec<(PathBuf, FileId)>,
}

impl PooledVm {
    fn is_usable(&self) -> bool {
        let unchanged = |(path, id): &(PathBuf, FileId)| FileId::of(path).is_ok_and(|now| now == *id);
        self.warm.is_alive() && self.files.iter().all(unchanged)
    }
}

/// The warm VMs and the one that is being made: both are taken out of what the quota leaves over.
struct Stock {
    buckets: Vec<Bucket>,
    pending: Option<PendingVm>,
}

struct PendingVm {
    cost: QuotaUse,
    cancelled: Arc<Notify>,
}

impl Stock {
    fn used(&self) -> QuotaUse {
        let ready = self
            .buckets
            .iter()
            .flat_map(|bucket| std::iter::repeat_n(QuotaUse::from(&bucket.spec.vm.limits), bucket.ready.len()));
        ready.chain(self.pending.as_ref().map(|pending| pending.cost)).sum()
    }

    /// Cancels the VM that is being made, else evicts the oldest of the fullest bucket.
    fn evict_one(&mut self) -> Option<PooledVm> {
        if let Some(pending) = self.pending.take() {
            pending.cancelled.notify_one();
            return None;
        }
        self.buckets.iter_mut().max_by_key(|bucket| bucket.ready.len())?.ready.pop_front()
    }
}

/// The pool of one manager.
pub struct Pool {
    settings: Arc<Settings>,
    stock: Mutex<Stock>,
    /// Starts under way that a caller waits for.
    starting: AtomicUsize,
    changed: Notify,
}

impl Pool {
    pub fn new(specs: &[PoolSpec], settings: Arc<Settings>) -> Arc<Self> {
        let bucket = |spec: &PoolSpec| Bucket { spec: spec.clone(), ready: VecDeque::new() };
        Arc::new(Self {
            settings,
            stock: Mutex::new(Stock { buckets: specs.iter().map(bucket).collect(), pending: None }),
            starting: AtomicUsize::new(0),
            changed: Notify::new(),
        })
    }

    pub fn usage(&self) -> Vec<PoolUse> {
        let stock = self.stock.lock();
        stock.buckets.iter().map(|bucket| PoolUse { spec: bucket.spec.clone(), ready: bucket.ready.len() }).collect()
    }

    /// Evicts VMs until no more than `left` is used.
    pub fn shrink_to(&self, left: QuotaUse) {
        let mut evicted = Vec::new();
        {
            let mut stock = self.stock.lock();
            while !stock.used().fits_in(&left) {
                evicted.extend(stock.evict_one());
            }
        }
        // Dropped outside of the lock: that kills their VMMs.
        drop(evicted);
    }

    /// Keeps the pool filled, for ever; `left` says what the quota leaves over.
    pub async fn keep_filled(self: Arc<Self>, left: impl Fn() -> Option<QuotaUse>) {
        let mut back_off = BACK_OFF;
        loop {
            self.evict_stale();
            let begun = self.begin(&left);
            let Some(left) = left() else { return };
            // Whatever was reserved since has not seen what was begun, or is seen here.
            self.shrink_to(left);
            let Some((spec, cancelled)) = begun else {
                if tokio::time::timeout(LOOK, self.changed.notified()).await.is_ok() {
                    tokio::time::sleep(AFTER_START).await;
                }
                continue;
            };
            let made = tokio::select! {
                biased;
                () = cancelled.notified() => continue,
                made = self.make(&spec) => made,
            };
            match made {
                Ok(pooled) => {
                    back_off = BACK_OFF;
                    drop(self.keep(&spec, pooled));
                }
                Err(error) => {
                    self.stock.lock().pending = None;
                    log::warn!("a VM of the pool could not be made: {error}; the next try is in {back_off:?}");
                    tokio::time::sleep(back_off).await;
                    back_off = (back_off * 2).min(MAX_BACK_OFF);
                }
            }
        }
    }

    /// Drops what is dead or outdated, and one more when the host runs short of memory.
    fn evict_stale(&self) {
        let mut out = Vec::new();
        for bucket in &mut self.stock.lock().buckets {
            let (good, bad) = std::mem::take(&mut bucket.ready).into_iter().partition(PooledVm::is_usable);
            bucket.ready = good;
            out.push(bad);
        }
        let lost: usize = out.iter().map(VecDeque::len).sum();
        if lost > 0 {
            log::warn!("{lost} VMs of the pool were dead or outdated");
        }
        if !memory::has_spare(0, SPARE_SHARE / 2) {
            let evicted = self.stock.lock().evict_one();
            if evicted.is_some() {
                log::info!("the host is short of memory: a warm VM was evicted");
            }
        }
    }

    /// Begins to make a VM that a bucket lacks, if one may be made now; its cost counts from here on.
    fn begin(&self, left: &impl Fn() -> Option<QuotaUse>) -> Option<(PoolSpec, Arc<Notify>)> {
        if self.starting.load(Ordering::Acquire) > 0 {
            return None;
        }
        let left = left()?;
        let mut stock = self.stock.lock();
        let used = stock.used();
        let fits = |bucket: &&Bucket| {
            let one = QuotaUse::from(&bucket.spec.vm.limits);
            bucket.ready.len() < bucket.spec.size
                && (used + one).fits_in(&left)
                && memory::has_spare(one.memory_mb, SPARE_SHARE)
        };
        let lacking = stock.buckets.iter().filter(fits).min_by_key(|bucket| bucket.ready.len());
        let spec = lacking.map(|bucket| bucket.spec.clone())?;
        let cancelled = Arc::new(Notify::new());
        stock.pending = Some(PendingVm { cost: QuotaUse::from(&spec.vm.limits), cancelled: cancelled.clone() });
        Some((spec, cancelled))
    }

    /// Puts a new warm VM into its bucket; returns it when it was cancelled at the last moment.
    fn keep(&self, spec: &PoolSpec, pooled: PooledVm) -> Option<PooledVm> {
        let mut stock = self.stock.lock();
        let bucket = stock.pending.take().and(stock.buckets.iter_mut().find(|bucket| bucket.spec == *spec));
        match bucket {
            Some(bucket) => {
                bucket.ready.push_back(pooled);
                None
            }
            None => Some(pooled),
        }
    }

    async fn make(&self, pool: &PoolSpec) -> Result<PooledVm> {
        let (vm_id, spec) = (new_id("pool")?, Arc::new(pool.vm.clone()));
        let look = |path: &Path| Some((path.to_owned(), FileId::of(path).ok()?));
        let files = spec.image.files().filter_map(look).collect();
        Ok(PooledVm { warm: WarmVm::make(&vm_id, &spec, &self.settings, pool.tier).await?, files })
    }

    /// Ends every warm VM.
    pub fn drain(&self) {
        let ready: Vec<_> = {
            let mut stock = self.stock.lock();
            stock.pending = None;
            stock.buckets.iter_mut().map(|bucket| std::mem::take(&mut bucket.ready)).collect()
        };
        drop(ready);
    }
}

impl VmPool for Pool {
    fn take(&self, spec: &VmSpec) -> Option<WarmVm> {
        let is_it = |bucket: &&mut Bucket| spec.can_take(&bucket.spec.vm);
        let mut out = Vec::new();
        let taken = {
            let mut stock = self.stock.lock();
            // Of several forms of one kind the one that is furthest.
            let mut fitting: Vec<&mut Bucket> = stock.buckets.iter_mut().filter(is_it).collect();
            fitting.sort_by_key(|bucket| {
                std::cmp::Reverse(PoolTier::ALL.iter().position(|tier| *tier == bucket.spec.tier))
            });
            fitting.into_iter().find_map(|bucket| loop {
                let pooled = bucket.ready.pop_front()?;
                if pooled.is_usable() {
                    break Some(pooled.warm);
                }
                out.push(pooled);
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
