//! The doorbell: how a sender wakes a reactor that sleeps, without a system call when it does not.
//!
//! Sender: publish the message, then [`Doorbell::ring`], which signals only if the sleeper's flag is up. Sleeper: raise the
//! flag ([`Doorbell::about_to_sleep`]), look at everything once more, sleep, lower it ([`Doorbell::awake`]). Both sides put
//! a sequentially consistent fence between their store and their load, so at least one of them sees the other: a
//! store-buffer (Dekker) protocol. The test below checks every interleaving with loom; without either fence it fails.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// The flag of one sleeper.
#[derive(Debug)]
pub struct SleepFlag(AtomicBool);

impl Default for SleepFlag {
    fn default() -> Self {
        Self(AtomicBool::new(false))
    }
}

impl SleepFlag {
    /// Says that the owner is about to sleep. It must look for work once more after this.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Says that the owner is awake.
    pub fn lower(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether the owner sleeps or may be about to. To be asked after the message has been published.
    #[must_use]
    pub fn is_up(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(not(loom))]
pub use real::Doorbell;

#[cfg(not(loom))]
mod real {
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use resilver_sys::{EventFd, WaitSet};

    use super::SleepFlag;

    /// Wakes one sleeper.
    #[derive(Debug)]
    pub struct Doorbell {
        flag: SleepFlag,
        /// It was rung, and the owner has not asked since.
        rung: AtomicBool,
        event: EventFd,
    }

    impl Doorbell {
        /// A doorbell nobody sleeps behind yet.
        ///
        /// # Errors
        /// The process is out of descriptors.
        pub fn new() -> io::Result<Self> {
            Ok(Self {
                flag: SleepFlag::default(),
                rung: AtomicBool::new(false),
                event: EventFd::new()?,
            })
        }

        /// Wakes the sleeper if it sleeps. Call it after the message is published.
        #[inline]
        pub fn ring(&self) {
            self.rung.store(true, Ordering::Release);
            if self.flag.is_up() {
                self.event.signal();
            }
        }

        /// Whether it was rung since this was last asked: one load while it was not. Whatever was published before is seen
        /// after this.
        #[inline]
        #[must_use]
        pub fn was_rung(&self) -> bool {
            self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::Acquire)
        }

        /// Whether the sleeper sleeps, or is about to.
        #[must_use]
        pub fn is_asleep(&self) -> bool {
            self.flag.is_up()
        }

        /// Raises the flag and adds the event to what ends the sleep. Look for messages once more after this.
        pub fn about_to_sleep(&self, set: &mut WaitSet) {
            self.flag.raise();
            set.add(&self.event);
        }

        /// Lowers the flag after a sleep, or instead of one. `slept` says whether there can be a signal to take.
        pub fn awake(&self, slept: bool) {
            self.flag.lower();
            if slept {
                self.event.drain();
            }
        }
    }
}

#[cfg(all(test, loom))]
mod model {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    use super::SleepFlag;

    /// A sleeper that goes to sleep with a message published is lost for good: in no interleaving may that happen
    /// without a signal having been sent.
    #[test]
    fn a_message_is_seen_or_a_signal_is_sent() {
        loom::model(|| {
            let flag = Arc::new(SleepFlag::default());
            let message = Arc::new(AtomicBool::new(false));
            let signal = Arc::new(AtomicBool::new(false));
            let sender = {
                let (flag, message, signal) =
                    (Arc::clone(&flag), Arc::clone(&message), Arc::clone(&signal));
                thread::spawn(move || {
                    message.store(true, Ordering::Relaxed);
                    if flag.is_up() {
                        signal.store(true, Ordering::Relaxed);
                    }
                })
            };
            flag.raise();
            let seen = message.load(Ordering::Relaxed);
            sender.join().unwrap();
            assert!(seen || signal.load(Ordering::Relaxed), "the message was lost");
        });
    }
}
