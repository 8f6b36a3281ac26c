//! The bus of a manager's events, and its subscribers.
//!
//! Architecture invariant: `publish` never waits. A slow subscriber loses its oldest events and can see how many;
//! `hub` and `queue` are held for a few instructions, `hub` first, never across an await or a log call.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::host::clock;
use crate::model::{printable, Event, EventKind, VmId, VmSpec, RECORD_BYTES};
use crate::mutex::Mutex;

#[derive(Debug, Default)]
struct Hub {
    sequence: u64,
    counts: [u64; EventKind::NAMES.len()],
    dropped: u64,
    subscribers: Vec<Weak<Subscriber>>,
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

/// Receives the events that are published after it was made.
#[derive(Debug)]
pub struct Subscriber {
    queue: Mutex<Queue>,
    capacity: usize,
    arrived: Condvar,
    notify: Notify,
}

/// The outcome of [`Subscriber::wait`].
#[derive(Debug, Clone, PartialEq)]
pub enum Recv {
    Event(Arc<Event>),
    /// No event before the deadline.
    TimedOut,
    /// The bus or the subscriber is closed, and its queue is empty.
    Closed,
}

impl Events {
    pub fn publish(&self, vm_id: &VmId, spec: &Arc<VmSpec>, kind: EventKind, detail: impl Into<String>) {
        let detail = kind.detail(printable(&detail.into(), RECORD_BYTES).into_owned());
        let (vm_id, spec) = (vm_id.clone(), spec.clone());
        let unix_time_s = clock::unix_time_ns() as f64 / 1e9;
        let mut hub = self.hub.lock();
        hub.sequence += 1;
        let name = kind.name();
        if let Some(index) = EventKind::NAMES.iter().position(|known| *known == name) {
            hub.counts[index] += 1;
        }
        let event = Event { sequence: hub.sequence, unix_time_s, vm_id, spec, kind, detail };
        let event = Arc::new(event);
        let mut dropped = 0;
        // Under the lock of the hub, so that each subscriber gets them in their order.
        hub.subscribers.retain(|subscriber| {
            let Some(subscriber) = subscriber.upgrade() else { return false };
            dropped += u64::from(subscriber.push(event.clone()));
            true
        });
        hub.dropped += dropped;
    }

    /// Subscribes to what is published from now on; the queue holds at most `capacity` events.
    #[must_use]
    pub fn subscribe(&self, capacity: usize) -> Arc<Subscriber> {
        let subscriber = Arc::new(Subscriber {
            queue: Mutex::default(),
            capacity: capacity.max(1),
            arrived: Condvar::new(),
            notify: Notify::new(),
        });
        self.hub.lock().subscribers.push(Arc::downgrade(&subscriber));
        subscriber
    }

    /// Closes every subscriber.
    pub fn close(&self) {
        let subscribers = std::mem::take(&mut self.hub.lock().subscribers);
        subscribers.iter().filter_map(Weak::upgrade).for_each(|subscriber| subscriber.close());
    }

    /// How many events of each kind there were, in the order of [`EventKind::NAMES`], and how many were dropped from full queues.
    #[must_use]
    pub fn counts(&self) -> ([u64; EventKind::NAMES.len()], u64) {
        let hub = self.hub.lock();
        (hub.counts, hub.dropped)
    }
}

impl Subscriber {
    /// Returns whether an older event was lost.
    fn push(&self, event: Arc<Event>) -> bool {
        let mut queue = self.queue.lock();
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

    /// Accepts no more events; queued ones can still be taken.
    pub fn close(&self) {
        self.queue.lock().closed = true;
        self.arrived.notify_all();
        self.notify.notify_one();
    }

    /// Gives back an event that was taken for a caller that has given up, to be the next one; a full queue drops it.
    pub fn put_back(&self, event: Arc<Event>) {
        let mut queue = self.queue.lock();
        if queue.events.len() < self.capacity {
            queue.events.push_front(event);
        } else {
            queue.dropped += 1;
        }
        drop(queue);
        self.arrived.notify_one();
        self.notify.notify_one();
    }

    /// How many events were dropped from the full queue.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.queue.lock().dropped
    }

    /// How many wait to be taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.lock().events.len()
    }

    fn take(queue: &mut Queue) -> Option<Recv> {
        match queue.events.pop_front() {
            Some(event) => Some(Recv::Event(event)),
            None if queue.closed => Some(Recv::Closed),
            None => None,
        }
    }

    /// The next event; blocks the thread at most until `deadline`.
    #[must_use]
    pub fn wait(&self, deadline: Instant) -> Recv {
        let mut queue = self.queue.lock();
        loop {
            if let Some(received) = Self::take(&mut queue) {
                return received;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Recv::TimedOut;
            }
            queue = self.arrived.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next event; `None` when there will be none.
    pub async fn next(&self) -> Option<Arc<Event>> {
        loop {
            match Self::take(&mut self.queue.lock()) {
                Some(Recv::Event(event)) => return Some(event),
                Some(_) => {
                    // Every other task that waits has come to the end, too.
                    self.notify.notify_one();
                    return None;
                }
                None => {}
            }
            self.notify.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IsolationType, SpecPatch};

    fn publish(events: &Events, detail: &str) {
        let spec = Arc::new(VmSpec::new(IsolationType::Plugin, SpecPatch::default()));
        events.publish(&VmId::parse("vm").unwrap(), &spec, EventKind::Created, detail);
    }

    fn details(subscriber: &Subscriber) -> Vec<String> {
        std::iter::from_fn(|| match subscriber.wait(Instant::now()) {
            Recv::Event(event) => Some(event.detail.clone()),
            _ => None,
        })
        .collect()
    }

    #[tokio::test]
    async fn test_every_task_that_waits_hears_of_the_end_and_of_what_was_put_back() {
        let events = Events::default();
        let subscriber = events.subscribe(2);
        publish(&events, "1");
        let first = subscriber.next().await.unwrap();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let subscriber = subscriber.clone();
                tokio::spawn(async move { subscriber.next().await })
            })
            .collect();
        tokio::task::yield_now().await;
        subscriber.put_back(first.clone());
        tokio::task::yield_now().await;
        events.close();
        let mut received = Vec::new();
        for task in waiting {
            received.extend(task.await.unwrap());
        }
        assert_eq!(received, std::slice::from_ref(&first));
        let full = events.subscribe(1);
        publish(&events, "4");
        full.put_back(first);
        assert_eq!((details(&full), full.dropped()), (vec!["4".to_owned()], 1));
    }

    #[test]
    fn test_subscribe_receives_later_events_in_order() {
        let events = Events::default();
        publish(&events, "before");
        let subscriber = events.subscribe(10);
        for detail in ["a", "b", "c"] {
            publish(&events, detail);
        }
        assert_eq!(details(&subscriber), ["a", "b", "c"]);
        assert_eq!(subscriber.wait(Instant::now()), Recv::TimedOut);
        assert_eq!(events.counts().0[0], 4);
    }

    #[test]
    fn test_full_queue_loses_the_oldest_and_counts_it() {
        let events = Events::default();
        let (slow, fast) = (events.subscribe(2), events.subscribe(10));
        for detail in ["a", "b", "c", "d"] {
            publish(&events, detail);
        }
        assert_eq!((details(&slow), slow.dropped()), (vec!["c".to_owned(), "d".to_owned()], 2));
        assert_eq!((details(&fast).len(), fast.dropped(), events.counts().1), (4, 0, 2));
    }

    #[test]
    fn test_close_wakes_a_waiting_subscriber_after_the_last_event() {
        let events = Arc::new(Events::default());
        let subscriber = events.subscribe(2);
        let closing = events.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            publish(&closing, "last");
            closing.close();
            publish(&closing, "too late");
        });
        let far = Instant::now() + Duration::from_secs(20);
        assert!(matches!(subscriber.wait(far), Recv::Event(event) if event.detail == "last"));
        assert_eq!(subscriber.wait(far), Recv::Closed);
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn test_next_wakes_for_an_event_and_for_the_end() {
        let events = Arc::new(Events::default());
        let subscriber = events.subscribe(2);
        let publishing = events.clone();
        let (received, ()) = tokio::join!(subscriber.next(), async move { publish(&publishing, "one") });
        assert_eq!(received.unwrap().detail, "one");
        events.close();
        assert_eq!(subscriber.next().await, None);
    }
}
