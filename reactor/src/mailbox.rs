//! Mailboxes: bounded many-to-one queues from control threads to something that a reactor polls.
//!
//! A full mailbox refuses the message and gives it back, so a control thread that floods a reactor notices; nothing is
//! allocated to send or to receive.
//!
//! A message whose receiver has gone is dropped, at once or when it is sent: whoever waits for the answer that it carries would
//! wait for ever, for it keeps the queue alive itself.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::queue::ArrayQueue;

#[cfg(not(loom))]
use crate::doorbell::Doorbell;

/// The sending side; any number of clones on any threads.
#[cfg(not(loom))]
pub struct Sender<T> {
    queue: Arc<ArrayQueue<T>>,
    closed: Arc<AtomicBool>,
    doorbell: Arc<Doorbell>,
}

/// The receiving side, polled by its one owner.
pub struct Receiver<T> {
    queue: Arc<ArrayQueue<T>>,
    /// Set before the queue is emptied for the last time.
    closed: Arc<AtomicBool>,
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        // A sender that has not seen this has pushed before the queue is emptied here, or empties it itself.
        self.closed.store(true, Ordering::SeqCst);
        while self.queue.pop().is_some() {}
    }
}

/// The mailbox was full; here is the message back.
#[derive(thiserror::Error)]
#[error("the mailbox is full")]
pub struct MailboxFull<T>(pub T);

impl<T> fmt::Debug for MailboxFull<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MailboxFull")
    }
}

/// A mailbox for `capacity` messages whose sender wakes the reactor behind `doorbell`.
#[cfg(not(loom))]
#[must_use]
pub fn mailbox<T>(capacity: usize, doorbell: Arc<Doorbell>) -> (Sender<T>, Receiver<T>) {
    let queue = Arc::new(ArrayQueue::new(capacity));
    let closed = Arc::new(AtomicBool::new(false));
    let sender = Sender { queue: Arc::clone(&queue), closed: Arc::clone(&closed), doorbell };
    (sender, Receiver { queue, closed })
}

#[cfg(not(loom))]
impl<T> Sender<T> {
    /// What wakes the receiver's reactor, for another mailbox of the same owner.
    #[must_use]
    pub fn doorbell(&self) -> Arc<Doorbell> {
        Arc::clone(&self.doorbell)
    }

    /// Sends a message and wakes the reactor if it sleeps. Where the receiver has gone the message is dropped.
    ///
    /// # Errors
    /// The mailbox is full; the message comes back.
    pub fn send(&self, message: T) -> Result<(), MailboxFull<T>> {
        self.queue.push(message).map_err(MailboxFull)?;
        if self.closed.load(Ordering::SeqCst) {
            while self.queue.pop().is_some() {}
            return Ok(());
        }
        self.doorbell.ring();
        Ok(())
    }
}

#[cfg(not(loom))]
impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        let (queue, closed) = (Arc::clone(&self.queue), Arc::clone(&self.closed));
        Self { queue, closed, doorbell: Arc::clone(&self.doorbell) }
    }
}

#[cfg(not(loom))]
impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sender({} waiting)", self.queue.len())
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Receiver({} waiting)", self.queue.len())
    }
}

impl<T> Receiver<T> {
    /// Whether nothing waits: two loads, so it may be asked every turn.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The oldest message.
    #[inline]
    #[must_use]
    pub fn receive(&self) -> Option<T> {
        if self.queue.is_empty() { None } else { self.queue.pop() }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_full_mailbox_gives_the_message_back() {
        let (sender, receiver) = mailbox(1, Arc::new(Doorbell::new().unwrap()));
        sender.send(1).unwrap();
        assert_eq!(sender.send(2).unwrap_err().0, 2);
        assert_eq!(receiver.receive(), Some(1));
        assert_eq!(receiver.receive(), None);
        sender.send(3).unwrap();
        assert!(!receiver.is_empty());
    }

    #[test]
    fn what_is_sent_to_nobody_is_dropped_and_not_kept() {
        let (sender, receiver) = mailbox(4, Arc::new(Doorbell::new().unwrap()));
        let message = Arc::new(());
        sender.send(Arc::clone(&message)).unwrap();
        drop(receiver);
        assert_eq!(Arc::strong_count(&message), 1, "sent before the receiver went");
        sender.send(Arc::clone(&message)).unwrap();
        assert_eq!(Arc::strong_count(&message), 1, "sent afterwards");
    }
}
