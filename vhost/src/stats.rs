//! What a controller counts.

use resilver_reactor::stats::Cell;

/// Counters of one controller, over all its sessions. Written by the disk's reactor, but for [`VhostStats::sessions`] and
/// [`VhostStats::fetched_pages`].
#[derive(Debug, Default)]
pub struct VhostStats {
    /// Requests finished, failed ones included.
    pub requests: Cell,
    /// Kicks that ended a sleep of the reactor. While it polls, guests are asked not to kick.
    pub kicks: Cell,
    /// Interrupts sent: at most one a turn and queue.
    pub interrupts: Cell,
    /// Requests of an earlier session or process, executed again because the in-flight region had them.
    pub resubmitted: Cell,
    /// Pages of guest memory that were waited for in post-copy migrations. Written by the control thread.
    pub fetched_pages: Cell,
    /// Front ends that have connected. Written by the control thread.
    pub sessions: Cell,
}
