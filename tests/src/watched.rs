//! A disk that is polled whether its watch shows work or not, and judged by that: a reactor does not poll an idle one whose watch
//! is still ([`resilver_reactor::watch`]), so work that came without a change of what is watched, and without a message, would wait
//! for long.

use resilver_bdev::Disk;
use resilver_reactor::{Context, Doorbell, Watch, Work};

/// What a disk watches since it was last found idle.
#[derive(Debug, Default)]
pub struct Watched(Watch);

impl Watched {
    /// Polls `disk`, whose senders ring `doorbell`.
    ///
    /// # Errors
    /// There was work that no watch and no ring had shown.
    pub fn poll(
        &mut self,
        disk: &mut Disk,
        doorbell: &Doorbell,
        cx: &Context<'_>,
    ) -> Result<Work, &'static str> {
        let was_rung = doorbell.was_rung();
        let needs_no_poll = self.0.is_still() && !was_rung;
        match self.0.poll(disk, cx) {
            Work::Waiting | Work::Busy if needs_no_poll => {
                Err("an idle disk had work that nothing had shown")
            }
            work => Ok(work),
        }
    }
}
