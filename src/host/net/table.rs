//! A table of nf_tables that is made of parts: made with the first, removed with the last, and put back as a whole when
//! someone else removed it (`nft flush ruleset` does).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::watch::Removals;
use super::{Refusal, Tool};

use crate::mutex::Mutex;

/// The table of this process.
#[derive(Debug)]
pub struct Table {
    name: String,
    /// What makes the table without a part, where there is none of its name.
    head: String,
    /// What removes the table, there or not.
    drop: String,
    state: Mutex<TableState>,
    /// How often it was put back: what was added to it in between is lost.
    restored: AtomicU64,
}

#[derive(Debug, Default)]
struct TableState {
    next: u64,
    parts: BTreeMap<u64, String>,
    watcher: Option<JoinHandle<()>>,
}

/// A part in force; dropping it takes it out.
#[derive(Debug)]
pub struct Part {
    table: Arc<Table>,
    id: u64,
    remove: String,
}

impl Table {
    #[must_use]
    pub fn new(name: &str, head: String, drop: String) -> Arc<Self> {
        let (state, restored) = (Mutex::default(), AtomicU64::new(0));
        Arc::new(Self { name: name.to_owned(), head, drop, state, restored })
    }

    /// Puts a part into force, all of it or nothing. Blocking; call on the runtime.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn add(self: &Arc<Self>, add: String, remove: String) -> Result<Part, Refusal> {
        // Held while `nft` runs: what is in force and what is noted must be the same.
        let mut state = self.state.lock();
        if state.parts.is_empty() {
            Tool::Nft.run(&format!("{}{}{add}", self.drop, self.head))?;
        } else {
            Tool::Nft.run(&add)?;
        }
        let id = state.next;
        state.next += 1;
        state.parts.insert(id, add);
        if state.watcher.as_ref().is_none_or(JoinHandle::is_finished) {
            let (watched, table) = (Removals::subscribe(), Arc::downgrade(self));
            state.watcher = watched
                .inspect_err(|error| log::warn!("no news from nf_tables ({error}): a flushed table stays flushed"))
                .ok()
                .map(|removals| Handle::current().spawn(watch(removals, table)));
        }
        Ok(Part { table: self.clone(), id, remove })
    }

    /// Changes what a part of the table holds; blocking.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn change(&self, text: &str) -> Result<(), Refusal> {
        let _state = self.state.lock();
        Tool::Nft.run(text)
    }

    /// Another number than before means that changes were lost.
    #[must_use]
    pub fn restored(&self) -> u64 {
        self.restored.load(Ordering::Acquire)
    }

    fn remove(&self, part: &Part) {
        let mut state = self.state.lock();
        state.parts.remove(&part.id);
        let removed = if state.parts.is_empty() { Tool::Nft.run(&self.drop) } else { Tool::Nft.run(&part.remove) };
        // Someone else was at it: what is left is made anew.
        let removed = removed.or_else(|refusal| {
            log::warn!("{}: a part could not be taken out, so all is made anew: {}", self.name, refusal.cause);
            self.make_anew(&state)
        });
        if let Err(refusal) = removed {
            log::error!("{}: not cleaned up: {}; {}", self.name, refusal.cause, refusal.remedy);
        }
    }

    fn make_anew(&self, state: &TableState) -> Result<(), Refusal> {
        let parts: String = state.parts.values().map(String::as_str).collect();
        let head = if state.parts.is_empty() { "" } else { &self.head };
        Tool::Nft.run(&format!("{}{head}{parts}", self.drop))?;
        self.restored.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Puts the table back if it should be there and is not.
    fn restore(&self) {
        let state = self.state.lock();
        if state.parts.is_empty() {
            return;
        }
        let there = Tool::Nft.ask(&["list", "tables"]);
        let there = there.map(|tables| tables.lines().filter(|line| line.ends_with(&self.name)).count());
        let restored = match there {
            // One in each family.
            Ok(2) => return,
            Ok(_) => self.make_anew(&state),
            Err(refusal) => Err(refusal),
        };
        match restored {
            Ok(()) => log::warn!("{}: someone removed it; it was put back", self.name),
            Err(refusal) => {
                log::error!("{}: someone removed it, and it was not put back: {}", self.name, refusal.cause)
            }
        }
    }
}

async fn watch(removals: Removals, table: std::sync::Weak<Table>) {
    loop {
        if let Err(error) = removals.next().await {
            log::warn!("no more news from nf_tables: {error}");
            return;
        }
        let Some(table) = table.upgrade() else { return };
        if let Err(error) = tokio::task::spawn_blocking(move || table.restore()).await {
            log::warn!("a removed table was not looked at: {error}");
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.table.remove(self);
    }
}
