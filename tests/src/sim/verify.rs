//! What the simulator does about verification: passes at any moment, and targets that rot without a word.
//!
//! The oracle: no pass finds more chunks to differ than sectors have rotted, so a run without rot has no false alarm; and a
//! job that compares its legs before a switch-over never switches to a target that has rotted before (that the legs are
//! equal then is judged where the job ends). Only such jobs have targets that rot, for nothing else could notice.

use resilver_bdev::{JobStatus, JobVerb, VerifyRequest};
use resilver_reactor::Nanos;

use super::rng::Rng;
use super::world::World;

/// Whether, and how, an operator looks after the legs in this turn.
#[must_use]
pub fn whim(rng: &mut Rng) -> Option<JobVerb> {
    match rng.below(1000) {
        0..=7 => Some(JobVerb::Verify(VerifyRequest {
            sample_percent: rng.pick(&[100, 100, 50, 3]),
            speed: rng.pick(&[0, 0, 1 << 20]),
            seed: rng.below(u64::MAX),
        })),
        8 => Some(JobVerb::StopVerify),
        _ => None,
    }
}

impl World {
    /// A sector of the target rots now and then, while the job could still notice.
    pub(super) fn let_target_rot(&mut self) {
        let status = self.job_status();
        let sectors = self.sectors as u64;
        let Some(job) = self.control.job_mut().filter(|job| job.verifies) else { return };
        let early = matches!(status, Some(JobStatus::Running | JobStatus::Ready));
        if !early || !self.rng.chance(5) {
            return;
        }
        let sector = self.rng.below(sectors) as usize;
        job.spoilt += 1;
        job.target.rot(sector);
        self.trace.line(format_args!("sector {sector} of the target rots"));
    }

    /// A pass finds only what has rotted.
    pub(super) fn judge_verification(&self, now: Nanos) {
        let Some(job) = self.control.job() else { return };
        let Some(info) = job.probe.look(now) else { return };
        let (found, spoilt) = (info.verify.mismatches_ever, job.spoilt);
        if found > spoilt {
            self.trace.finding(format_args!(
                "{found} chunks are said to differ, and {spoilt} sectors have rotted: {:?}",
                info.verify
            ));
        }
    }
}
