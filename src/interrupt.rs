//! Ctrl-C, and its like, as a flag: whoever must leave something in order looks at it and ends by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a terminal sends.
pub(crate) const CTRL_C: &[SignalKind] = &[SignalKind::interrupt()];
/// Whatever asks a process to end.
pub(crate) const ANY: &[SignalKind] =
    &[SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];

/// Whether the command was told to end. Clones share one answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes these signals from here on: the first is what [`Self::is_there`] tells, the second ends the process, after
    /// `last_act`.
    ///
    /// # Errors
    /// The system refuses; then a signal ends the process, as if nobody had asked.
    pub(crate) fn watch(signals: &[SignalKind], last_act: fn()) -> std::io::Result<Self> {
        let interrupt = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        for kind in signals {
            let inside = runtime.enter();
            let signals = signal(*kind)?;
            drop(inside);
            runtime.spawn(interrupt.clone().listen(signals, last_act));
        }
        // The tasks run for as long as somebody drives them.
        std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        Ok(interrupt)
    }

    async fn listen(self, mut signals: Signal, last_act: fn()) {
        while signals.recv().await.is_some() {
            if self.0.swap(true, Ordering::Relaxed) {
                last_act();
                std::process::exit(i32::from(crate::INTERRUPTED));
            }
        }
    }

    /// Whether a signal came.
    pub(crate) fn is_there(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
