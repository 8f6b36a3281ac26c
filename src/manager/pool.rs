//! VMs that stand by, so that a start is a wake-up.
//!
//! Architecture invariant: what nobody has asked for is in nobody's way. Standby VMs are made one at a time while no
//! start is under way, they take only what the quota leaves over and give it back as soon as a VM is created that needs
//! it, and they go when the host runs short of memory.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::error::Result;
use crate::host::memory;
use crate::image::template::FileId;
use crate::model::{Form, PoolSpec, QuotaUse, VmSpec};
use crate::vm::{new_id, Settings, Standby, Supply};

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

/// The standby VMs of one kind, oldest first.
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

/// What stands by, and the one VM that is being made: both are taken out of what the quota leaves over.
struct Stock {
    shelves: Vec<Shelf>,
    making: Option<Making>,
}

struct Making {
    cost: QuotaUse,
    given_up: Arc<Notify>,
}

impl Stock {
    fn used(&self) -> QuotaUse {
        let standing = self
            .shelves
            .iter()
            .flat_map(|shelf| std::iter::repeat_n(QuotaUse::from(&shelf.spec.vm.limits), shelf.standing.len()));
        standing.chain(self.making.as_ref().map(|making| making.cost)).sum()
    }

    /// Gives up the VM that is being made, else the oldest of the fullest shelf.
    fn give_up_one(&mut self) -> Option<Item> {
        if let Some(making) = self.making.take() {
            making.given_up.notify_one();
            return None;
        }
        self.shelves.iter_mut().max_by_key(|shelf| shelf.standing.len())?.standing.pop_front()
    }
}

/// The pool of one manager.
pub struct Pool {
    settings: Arc<Settings>,
    stock: Mutex<Stock>,
    /// Starts that someone waits for.
    starting: AtomicUsize,
    changed: Notify,
}

impl Pool {
    pub fn new(specs: &[PoolSpec], settings: Arc<Settings>) -> Arc<Self> {
        let shelf = |spec: &PoolSpec| Shelf { spec: spec.clone(), standing: VecDeque::new() };
        Arc::new(Self {
            settings,
            stock: Mutex::new(Stock { shelves: specs.iter().map(shelf).collect(), making: None }),
            starting: AtomicUsize::new(0),
            changed: Notify::new(),
        })
    }

    fn stock(&self) -> MutexGuard<'_, Stock> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn usage(&self) -> Vec<ShelfUse> {
        let stock = self.stock();
        stock.shelves.iter().map(|shelf| ShelfUse { spec: shelf.spec.clone(), ready: shelf.standing.len() }).collect()
    }

    /// Gives up VMs until no more than `left` is used.
    pub fn shrink_to(&self, left: QuotaUse) {
        let mut given_up = Vec::new();
        {
            let mut stock = self.stock();
            while !stock.used().fits_in(&left) {
                given_up.extend(stock.give_up_one());
            }
        }
        // Dropped outside of the lock: that kills their VMMs.
        drop(given_up);
    }

    /// Keeps the pool filled, for ever; `left` says what the quota leaves over.
    pub async fn keep_filled(self: Arc<Self>, left: impl Fn() -> Option<QuotaUse>) {
        let mut back_off = BACK_OFF;
        loop {
            self.throw_out();
            let begun = self.begin(&left);
            let Some(left) = left() else { return };
            // Whatever was reserved since has not seen what was begun, or is seen here.
            self.shrink_to(left);
            let Some((spec, given_up)) = begun else {
                if tokio::time::timeout(LOOK, self.changed.notified()).await.is_ok() {
                    tokio::time::sleep(AFTER_START).await;
                }
                continue;
            };
            let made = tokio::select! {
                biased;
                () = given_up.notified() => continue,
                made = self.make(&spec) => made,
            };
            match made {
                Ok(item) => {
                    back_off = BACK_OFF;
                    drop(self.keep(&spec, item));
                }
                Err(error) => {
                    self.stock().making = None;
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
        for shelf in &mut self.stock().shelves {
            let (good, bad) = std::mem::take(&mut shelf.standing).into_iter().partition(Item::is_usable);
            shelf.standing = good;
            out.push(bad);
        }
        let lost: usize = out.iter().map(VecDeque::len).sum();
        if lost > 0 {
            log::warn!("{lost} VMs of the pool were dead or outdated");
        }
        if !memory::has_spare(0, SPARE_SHARE / 2) {
            let given_up = self.stock().give_up_one();
            if given_up.is_some() {
                log::info!("the host is short of memory: a VM of the pool was given up");
            }
        }
    }

    /// Begins to make a VM that a shelf lacks, if one may be made now; what it will use is taken from here on.
    fn begin(&self, left: &impl Fn() -> Option<QuotaUse>) -> Option<(PoolSpec, Arc<Notify>)> {
        if self.starting.load(Ordering::Acquire) > 0 {
            return None;
        }
        let left = left()?;
        let mut stock = self.stock();
        let used = stock.used();
        let fits = |shelf: &&Shelf| {
            let one = QuotaUse::from(&shelf.spec.vm.limits);
            shelf.standing.len() < shelf.spec.size
                && (used + one).fits_in(&left)
                && memory::has_spare(one.memory_mb, SPARE_SHARE)
        };
        let lacking = stock.shelves.iter().filter(fits).min_by_key(|shelf| shelf.standing.len());
        let spec = lacking.map(|shelf| shelf.spec.clone())?;
        let given_up = Arc::new(Notify::new());
        stock.making = Some(Making { cost: QuotaUse::from(&spec.vm.limits), given_up: given_up.clone() });
        Some((spec, given_up))
    }

    /// Puts what was made on its shelf; gives it back when it was given up at the last moment.
    fn keep(&self, spec: &PoolSpec, item: Item) -> Option<Item> {
        let mut stock = self.stock();
        let shelf = stock.making.take().and(stock.shelves.iter_mut().find(|shelf| shelf.spec == *spec));
        match shelf {
            Some(shelf) => {
                shelf.standing.push_back(item);
                None
            }
            None => Some(item),
        }
    }

    async fn make(&self, pool: &PoolSpec) -> Result<Item> {
        let (vm_id, spec) = (new_id("pool")?, Arc::new(pool.vm.clone()));
        let look = |path: &Path| Some((path.to_owned(), FileId::of(path).ok()?));
        let files = spec.image.files().filter_map(look).collect();
        Ok(Item { standby: Standby::make(&vm_id, &spec, &self.settings, pool.form).await?, files })
    }

    /// Ends every VM that stands by.
    pub fn drain(&self) {
        let standing: Vec<_> = {
            let mut stock = self.stock();
            stock.making = None;
            stock.shelves.iter_mut().map(|shelf| std::mem::take(&mut shelf.standing)).collect()
        };
        drop(standing);
    }
}

impl Supply for Pool {
    fn take(&self, spec: &VmSpec) -> Option<Standby> {
        let is_it = |shelf: &&mut Shelf| spec.can_take(&shelf.spec.vm);
        let mut out = Vec::new();
        let taken = {
            let mut stock = self.stock();
            // Of several forms of one kind the one that is furthest.
            let mut fitting: Vec<&mut Shelf> = stock.shelves.iter_mut().filter(is_it).collect();
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
