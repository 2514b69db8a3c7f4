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

    /// What happened after `after`, to one job or to all.
    pub(crate) fn page(&self, after: u64, job_id: Option<&str>) -> Page {
        let log = self.log.borrow();
        let oldest = log.events.front().map_or(log.newest + 1, |event| event.sequence);
        let wanted = |event: &&Event| {
            event.sequence > after && job_id.is_none_or(|job_id| event.job_id == job_id)
        };
        Page {
            sequence: log.newest,
            missed: oldest.saturating_sub(after.saturating_add(1)),
            events: log.events.iter().filter(wanted).map(|event| event.body.clone()).collect(),
        }
    }

    /// As [`EventLog::page`], waiting for the first event if there is none yet.
    pub(crate) async fn wait(&self, after: u64, job_id: Option<&str>) -> Page {
        loop {
            let grown = self.grown.notified();
            let page = self.page(after, job_id);
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
        let page = log.page(0, None);
        assert_eq!((page.missed, page.events.len()), (10, EVENTS_MAX));
        assert_eq!(log.page(page.sequence, None).events, [] as [Value; 0]);
        assert_eq!(log.page(0, Some("a")).events.len(), EVENTS_MAX / 2);
        log.add("job_error", "b", json!({}));
        let page = log.page(page.sequence, None);
        assert_eq!((page.missed, page.events.len()), (0, 1));
    }
}
