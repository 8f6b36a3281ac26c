//! Where events come together, and those who hear them.
//!
//! Architecture invariant: whoever tells an event never waits. A hearer that is slow loses its oldest events, and can see
//! how many; `hub` and `queue` are held for a few instructions, `hub` first, never across an await or a log call.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::host::clock;
use crate::model::{printable, Event, Happening, IsolationType, VmId, RECORD_BYTES};

#[derive(Debug, Default)]
struct Hub {
    sequence: u64,
    counts: [u64; Happening::KINDS.len()],
    dropped: u64,
    hearers: Vec<Weak<Hearer>>,
}

/// The events of one manager.
#[derive(Debug, Default)]
pub struct Events {
    hub: Mutex<Hub>,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Arc<Event>>,
    dropped: u64,
    closed: bool,
}

/// One who hears events from now on.
#[derive(Debug)]
pub struct Hearer {
    queue: Mutex<Queue>,
    capacity: usize,
    arrived: Condvar,
    notify: Notify,
}

/// What [`Hearer::wait`] came back with.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    Event(Arc<Event>),
    /// Nothing within the time.
    Nothing,
    /// There is and will be nothing more.
    Closed,
}

impl Events {
    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn tell(&self, vm_id: &VmId, isolation_type: IsolationType, happening: Happening, detail: impl Into<String>) {
        let detail = happening.detail(printable(&detail.into(), RECORD_BYTES).into_owned());
        let vm_id = vm_id.clone();
        let unix_time_s = clock::unix_time_ns() as f64 / 1e9;
        let mut hub = self.hub();
        hub.sequence += 1;
        let kind = happening.kind();
        if let Some(index) = Happening::KINDS.iter().position(|known| *known == kind) {
            hub.counts[index] += 1;
        }
        let event = Event { sequence: hub.sequence, unix_time_s, vm_id, isolation_type, happening, detail };
        let event = Arc::new(event);
        let mut dropped = 0;
        // Under the lock of the hub, so that everyone hears them in their order.
        hub.hearers.retain(|hearer| {
            let Some(hearer) = hearer.upgrade() else { return false };
            dropped += u64::from(hearer.push(event.clone()));
            true
        });
        hub.dropped += dropped;
    }

    /// Begins to listen; at most `capacity` events wait to be taken.
    #[must_use]
    pub fn listen(&self, capacity: usize) -> Arc<Hearer> {
        let hearer = Arc::new(Hearer {
            queue: Mutex::default(),
            capacity: capacity.max(1),
            arrived: Condvar::new(),
            notify: Notify::new(),
        });
        self.hub().hearers.push(Arc::downgrade(&hearer));
        hearer
    }

    /// Tells every hearer that this was all.
    pub fn close(&self) {
        let hearers = std::mem::take(&mut self.hub().hearers);
        hearers.iter().filter_map(Weak::upgrade).for_each(|hearer| hearer.close());
    }

    /// How many events of each kind there were, in the order of [`Happening::KINDS`], and how many were lost to a hearer.
    #[must_use]
    pub fn counts(&self) -> ([u64; Happening::KINDS.len()], u64) {
        let hub = self.hub();
        (hub.counts, hub.dropped)
    }
}

impl Hearer {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether an older event was lost.
    fn push(&self, event: Arc<Event>) -> bool {
        let mut queue = self.queue();
        if queue.closed {
            return false;
        }
        let is_full = queue.events.len() == self.capacity;
        if is_full {
            queue.events.pop_front();
            queue.dropped += 1;
        }
        queue.events.push_back(event);
        drop(queue);
        self.arrived.notify_one();
        self.notify.notify_one();
        is_full
    }

    /// Takes no more; what has come can still be taken.
    pub fn close(&self) {
        self.queue().closed = true;
        self.arrived.notify_all();
        self.notify.notify_one();
    }

    /// How many events were lost because nobody took them in time.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.queue().dropped
    }

    /// How many wait to be taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue().events.len()
    }

    fn take(queue: &mut Queue) -> Option<Heard> {
        match queue.events.pop_front() {
            Some(event) => Some(Heard::Event(event)),
            None if queue.closed => Some(Heard::Closed),
            None => None,
        }
    }

    /// The next event; blocks the thread at most until `deadline`.
    #[must_use]
    pub fn wait(&self, deadline: Instant) -> Heard {
        let mut queue = self.queue();
        loop {
            if let Some(heard) = Self::take(&mut queue) {
                return heard;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Heard::Nothing;
            }
            queue = self.arrived.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next event; `None` when there will be none.
    pub async fn next(&self) -> Option<Arc<Event>> {
        loop {
            match Self::take(&mut self.queue()) {
                Some(Heard::Event(event)) => return Some(event),
                Some(_) => return None,
                None => {}
            }
            self.notify.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tell(events: &Events, detail: &str) {
        events.tell(&VmId::parse("vm").unwrap(), IsolationType::Plugin, Happening::Created, detail);
    }

    fn details(hearer: &Hearer) -> Vec<String> {
        std::iter::from_fn(|| match hearer.wait(Instant::now()) {
            Heard::Event(event) => Some(event.detail.clone()),
            _ => None,
        })
        .collect()
    }

    #[test]
    fn test_listen_hears_what_comes_after_in_order() {
        let events = Events::default();
        tell(&events, "before");
        let hearer = events.listen(10);
        for detail in ["a", "b", "c"] {
            tell(&events, detail);
        }
        assert_eq!(details(&hearer), ["a", "b", "c"]);
        assert_eq!(hearer.wait(Instant::now()), Heard::Nothing);
        assert_eq!(events.counts().0[0], 4);
    }

    #[test]
    fn test_full_queue_loses_the_oldest_and_counts_it() {
        let events = Events::default();
        let (slow, fast) = (events.listen(2), events.listen(10));
        for detail in ["a", "b", "c", "d"] {
            tell(&events, detail);
        }
        assert_eq!((details(&slow), slow.dropped()), (vec!["c".to_owned(), "d".to_owned()], 2));
        assert_eq!((details(&fast).len(), fast.dropped(), events.counts().1), (4, 0, 2));
    }

    #[test]
    fn test_close_wakes_who_waits_after_the_last_event() {
        let events = Arc::new(Events::default());
        let hearer = events.listen(2);
        let closing = events.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            tell(&closing, "last");
            closing.close();
            tell(&closing, "too late");
        });
        let far = Instant::now() + Duration::from_secs(20);
        assert!(matches!(hearer.wait(far), Heard::Event(event) if event.detail == "last"));
        assert_eq!(hearer.wait(far), Heard::Closed);
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn test_next_wakes_for_an_event_and_for_the_end() {
        let events = Arc::new(Events::default());
        let hearer = events.listen(2);
        let telling = events.clone();
        let (heard, ()) = tokio::join!(hearer.next(), async move { tell(&telling, "one") });
        assert_eq!(heard.unwrap().detail, "one");
        events.close();
        assert_eq!(hearer.next().await, None);
    }
}
