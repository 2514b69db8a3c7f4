//! The event log: what jobs did, in order, for whoever asks.
//!
//! Every event has a sequence number. The log keeps the last [`EVENTS_MAX`]; a reader that fell behind further is told how
//! many it missed. Jobs coalesce before they report ([`resilver_bdev::JobEvent::Error`] carries a count), so a persistent
//! error cannot wash the rest out of the log.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tokio::sync::Notify;

/// What QEMU calls our events: scripts and managers that know its monitor find their way by the field `qemu_event`.
pub(crate) mod qemu {
    /// A job that was cancelled ends with this, any other with [`COMPLETED`].
    pub(crate) const CANCELLED: &str = "BLOCK_JOB_CANCELLED";
    pub(crate) const COMPLETED: &str = "BLOCK_JOB_COMPLETED";

    /// The name of an event that always has the same.
    pub(super) fn name(event: &str) -> Option<&'static str> {
        match event {
            "job_status_change" => Some("JOB_STATUS_CHANGE"),
            "job_ready" => Some("BLOCK_JOB_READY"),
            "job_pending" => Some("BLOCK_JOB_PENDING"),
            "job_error" => Some("BLOCK_JOB_ERROR"),
            _ => None,
        }
    }
}

/// Events kept.
pub(crate) const EVENTS_MAX: usize = 4096;

/// One event.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) sequence: u64,
    pub(crate) job_id: String,
    pub(crate) body: Value,
}

#[derive(Debug, Default)]
struct Log {
    /// The number of the newest event; 0 before the first.
    newest: u64,
    events: VecDeque<Event>,
}

/// The log of one target.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    log: RefCell<Log>,
    grown: Notify,
}

/// What a reader gets.
#[derive(Debug, PartialEq)]
pub(crate) struct Page {
    /// Ask for what comes after this next time.
    pub(crate) sequence: u64,
    /// Events that were dropped before they could be read.
    pub(crate) missed: u64,
    pub(crate) events: Vec<Value>,
}

impl EventLog {
    /// Adds an event. `facts` is an object.
    pub(crate) fn add(&self, event: &str, job_id: &str, facts: Value) {
        let mut log = self.log.borrow_mut();
        log.newest += 1;
        let mut body = Map::new();
        body.insert("sequence".into(), log.newest.into());
        body.insert("time".into(), unix_seconds().into());
        body.insert("event".into(), event.into());
        body.insert("job_id".into(), job_id.into());
        if let Some(name) = qemu::name(event) {
            body.insert("qemu_event".into(), name.into());
        }
        if let Value::Object(facts) = facts {
            body.extend(facts);
        }
        let event =
            Event { sequence: log.newest, job_id: job_id.to_owned(), body: Value::Object(body) };
        log.events.push_back(event);
        if log.events.len() > EVENTS_MAX {
            log.events.pop_front();
        }
        drop(log);
        self.grown.notify_waiters();
    }

    /// The number of the newest event.
    pub(crate) fn newest(&self) -> u64 {
        self.log.borrow().newest
    }

    /// What happened after `after`, to one job or to all: the first `limit` events of it.
    pub(crate) fn page(&self, after: u64, job_id: Option<&str>, limit: usize) -> Page {
        let log = self.log.borrow();
        let oldest = log.events.front().map_or(log.newest + 1, |event| event.sequence);
        let wanted = |event: &&Event| {
            event.sequence > after && job_id.is_none_or(|job_id| event.job_id == job_id)
        };
        let mut events = log.events.iter().filter(wanted);
        let mut last = log.newest;
        let page: Vec<Value> = events
            .by_ref()
            .take(limit)
            .inspect(|it| last = it.sequence)
            .map(|it| it.body.clone())
            .collect();
        Page {
            sequence: if events.next().is_some() { last } else { log.newest },
            missed: oldest.saturating_sub(after.saturating_add(1)),
            events: page,
        }
    }

    /// As [`EventLog::page`], waiting for the first event if there is none yet.
    pub(crate) async fn wait(&self, after: u64, job_id: Option<&str>, limit: usize) -> Page {
        loop {
            let grown = self.grown.notified();
            let page = self.page(after, job_id, limit);
            if !page.events.is_empty() {
                return page;
            }
            grown.await;
        }
    }
}

impl Page {
    /// As an RPC answers it.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "sequence": self.sequence, "missed": self.missed, "events": self.events })
    }
}

/// Now, in seconds since 1970.
pub(crate) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_each_event_once_and_is_told_what_it_missed() {
        let log = EventLog::default();
        for number in 0..EVENTS_MAX + 10 {
            log.add("job_error", if number % 2 == 0 { "a" } else { "b" }, json!({ "n": number }));
        }
        let page = log.page(0, None, EVENTS_MAX);
        assert_eq!((page.missed, page.events.len()), (10, EVENTS_MAX));
        assert_eq!(log.page(page.sequence, None, EVENTS_MAX).events, [] as [Value; 0]);
        assert_eq!(log.page(0, Some("a"), EVENTS_MAX).events.len(), EVENTS_MAX / 2);
        log.add("job_error", "b", json!({}));
        let page = log.page(page.sequence, None, EVENTS_MAX);
        assert_eq!((page.missed, page.events.len()), (0, 1));
    }

    #[test]
    fn pages_of_any_size_have_every_event_once() {
        let log = EventLog::default();
        for number in 0..100 {
            log.add("job_error", if number % 3 == 0 { "a" } else { "b" }, json!({}));
        }
        for (limit, job) in [(1, None), (7, None), (7, Some("a")), (100, Some("a"))] {
            let (mut after, mut seen) = (0, vec![]);
            loop {
                let page = log.page(after, job, limit);
                assert!(page.events.len() <= limit && page.missed == 0);
                after = page.sequence;
                if page.events.is_empty() {
                    break;
                }
                seen.extend(page.events.iter().map(|event| event["sequence"].as_u64().unwrap()));
            }
            let step = if job.is_some() { 3 } else { 1 };
            assert_eq!(seen, (1..=100).step_by(step).collect::<Vec<_>>(), "{limit} {job:?}");
        }
    }
}
