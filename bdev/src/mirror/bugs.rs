//! Planted bugs: the proof that the tests can fail.
//!
//! Each names one decision that the mirror must take rightly and takes wrongly while the bug is planted. Built without the
//! feature `planted-bugs`, `planted` is `false` at compile time and nothing of this remains. With it, a thread plants at
//! most one bug for itself, so that one build serves all of them and tests beside each other stay apart.

/// A decision taken wrongly, and what breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bug {
    /// A write that only the source gets does not dirty its chunks: the target never hears of it.
    WriteNotDirtied,
    /// A target error does not dirty the range of the guest's write: acknowledged, clean and not on the target.
    TargetErrorForgotten,
    /// A write to both legs goes from the guest's own buffers: a guest that changes them gives each leg other bytes.
    NoBounceCopy,
    /// The copier does not look for guest writes in flight: what it read before lands on the target after them.
    CopierIgnoresGuestWrites,
    /// A guest write does not wait for the copy of its chunk: the older bytes land last.
    GuestIgnoresCopier,
    /// A write that covers a dirty chunk in part makes it clean: the rest of the chunk is never copied.
    PartialWriteCleans,
    /// READY without a flush of the target: what was copied may be lost with the host.
    ReadyWithoutFlush,
    /// A failed flush of the target dirties nothing: what it lost is never copied again.
    FailedFlushForgotten,
    /// A flush that was given up fails later, and nothing is made of it: what was written meanwhile may be gone.
    LateFlushErrorForgotten,
    /// A target write that timed out does not shut its range: it lands on newer bytes, and nobody knows.
    LateLandingForgotten,
    /// Overlapping guest writes do not wait for each other: the legs may see them in different orders.
    OverlapOrderLost,
    /// Cancel leaves writes in flight waiting for the target: a hung one hangs the guest.
    CancelKeepsTarget,
    /// A hole report counts though the guest wrote there since: its data becomes zeroes on the target.
    StaleHoleBelieved,
    /// Zero detection looks at all but the last block: a lone block of data at the end becomes zeroes.
    ZeroDetectionShort,
    /// A failed copy does not dirty its chunks again: they are never copied.
    FailedCopyForgotten,
    /// After the commit record a write that the target lacks is acknowledged: a crash now loses it.
    AcknowledgedBeforeRetract,
    /// A comparison of the legs takes no range: a guest write between its two reads looks like a difference.
    VerifyTakesNoRange,
    /// Writes to an observer that nobody waits for do not shut their chunks: newer bytes are overtaken by them.
    TrailingForgotten,
    /// A switch-over does not wait for writes that trail: the guest goes on with a disk that lacks them.
    TrailingNotAwaited,
    /// A part of a cluster is written to a difference image that has nothing of it: the rest of its base is hidden.
    ClusterNotFilled,
    /// A mirror keeps its working bitmap's bits to itself when it ends: what is written afterwards is not recorded.
    BitmapNotHandedBack,
}

impl Bug {
    /// All of them, for whoever plants one after the other.
    pub const ALL: [Self; 21] = [
        Self::WriteNotDirtied,
        Self::TargetErrorForgotten,
        Self::NoBounceCopy,
        Self::CopierIgnoresGuestWrites,
        Self::GuestIgnoresCopier,
        Self::PartialWriteCleans,
        Self::ReadyWithoutFlush,
        Self::FailedFlushForgotten,
        Self::LateFlushErrorForgotten,
        Self::LateLandingForgotten,
        Self::OverlapOrderLost,
        Self::CancelKeepsTarget,
        Self::StaleHoleBelieved,
        Self::ZeroDetectionShort,
        Self::FailedCopyForgotten,
        Self::AcknowledgedBeforeRetract,
        Self::VerifyTakesNoRange,
        Self::TrailingForgotten,
        Self::TrailingNotAwaited,
        Self::ClusterNotFilled,
        Self::BitmapNotHandedBack,
    ];
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug for this thread, or takes the last one out again.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this decision is to be taken wrongly.
#[cfg(feature = "planted-bugs")]
#[inline]
pub(crate) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this decision is to be taken wrongly: never, in this build.
#[cfg(not(feature = "planted-bugs"))]
#[inline]
pub(crate) const fn planted(_bug: Bug) -> bool {
    false
}
