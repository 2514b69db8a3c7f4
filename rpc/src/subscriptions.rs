//! Subscriptions: events pushed to a client as they come.
//!
//! A client that does not read must cost nothing. What waits to be written to a connection is bounded by [`QUEUE`]; a
//! subscription that finds no room waits, and the events wait in the log, which is bounded too. Those that the log drops
//! meanwhile are counted and told. So is the number of subscriptions of a connection bounded.

use std::cell::Cell;
use std::rc::Rc;

use serde_json::{Value, json};
use tokio::sync::mpsc::Sender;

use crate::error::{RpcError, code};
use crate::target::Target;

/// Responses and notifications that wait to be written to one connection.
pub(crate) const QUEUE: usize = 64;
/// Events that a subscription takes from the log at once.
const PAGE: usize = 64;
/// The most subscriptions of one connection.
const SUBSCRIPTIONS_MAX: usize = 16;

/// Takes notifications for one connection; closed when it goes.
#[derive(Clone)]
pub(crate) struct Notifications {
    queue: Sender<Value>,
    subscriptions: Rc<Cell<usize>>,
}

/// One subscription; it no longer counts when dropped.
pub(crate) struct Subscription {
    queue: Sender<Value>,
    subscriptions: Rc<Cell<usize>>,
}

impl Notifications {
    /// For a connection whose writer takes what is put into `queue`.
    pub(crate) fn new(queue: Sender<Value>) -> Self {
        Self { queue, subscriptions: Rc::default() }
    }

    /// Adds a subscription.
    pub(crate) fn subscribe(&self) -> Result<Subscription, RpcError> {
        let count = self.subscriptions.get();
        if count >= SUBSCRIPTIONS_MAX {
            let message = format!(
                "this connection has {SUBSCRIPTIONS_MAX} subscriptions, which is the most; subscribe without job_id to \
                 hear of all jobs, or use another connection"
            );
            return Err(RpcError::new(code::BUSY, "subscriptions", message, json!({})));
        }
        self.subscriptions.set(count + 1);
        let (queue, subscriptions) = (self.queue.clone(), Rc::clone(&self.subscriptions));
        Ok(Subscription { queue, subscriptions })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.subscriptions.set(self.subscriptions.get().saturating_sub(1));
    }
}

impl Subscription {
    /// Passes on what happens after event number `seen`, to one job or to all, until the connection goes.
    pub(crate) async fn feed(self, target: Rc<Target>, mut seen: u64, job_id: Option<String>) {
        loop {
            let page = tokio::select! {
                page = target.events.wait(seen, job_id.as_deref(), PAGE) => page,
                () = self.queue.closed() => return,
            };
            seen = page.sequence;
            let missed = (page.missed > 0)
                .then(|| json!({ "event": "events_missed", "count": page.missed }));
            for event in missed.into_iter().chain(page.events) {
                let notification =
                    json!({ "jsonrpc": "2.0", "method": "job_event", "params": event });
                if self.queue.send(notification).await.is_err() {
                    return;
                }
            }
        }
    }
}
