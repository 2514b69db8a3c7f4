//! Errors: counted, told without a storm, and a reason to rest where they happen.
//!
//! All of it is arithmetic on the time it is given, over tables of a fixed size.
//!
//! **Events.** Errors that are alike (leg, operation, what is done about it, error) make one event a second at most, with their number.
//!
//! **Rests.** A copy that failed and is to be tried again is tried alone, chunk by chunk, so that a bad spot is as small as it
//! is; a chunk that fails rests ever longer, while all others go on. Where more spots fail than the table holds it is the leg that
//! is bad, and the copier rests as a whole.

use std::ops::Range;

use resilver_reactor::Nanos;

use crate::io::{IoError, IoKind};
use crate::job::{ErrorAction, ErrorCounts, JobEvent, Side};

/// Ever longer rests while errors keep coming.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct BackOff {
    rest: Nanos,
    until: Nanos,
}

impl BackOff {
    const SHORTEST: Nanos = Nanos::from_millis(10);
    const LONGEST: Nanos = Nanos::from_secs(5);
    /// An error that comes this many rests after the last rest was over is a new trouble.
    const FORGET: u64 = 4;

    /// An error. Several during one rest count once.
    pub(super) fn failed(&mut self, now: Nanos) {
        if now < self.until {
            return;
        }
        let quiet = now - self.until;
        self.rest =
            if self.rest == Nanos::ZERO || quiet.0 > self.rest.0.saturating_mul(Self::FORGET) {
                Self::SHORTEST
            } else {
                (self.rest + self.rest).min(Self::LONGEST)
            };
        self.until = now + self.rest;
    }

    /// Until when to rest.
    pub(super) fn until(&self) -> Nanos {
        self.until
    }
}

/// Chunks where something failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Spot {
    chunks: Range<u64>,
    back_off: BackOff,
}

/// Spots that are known to be bad at the same time.
const SPOTS: usize = 16;

/// Where the copier rests, and until when.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct BadSpots {
    spots: [Spot; SPOTS],
    whole: BackOff,
}

/// What a run of chunks has to do with bad spots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// Nothing, up to this chunk.
    Free(u64),
    /// One chunk at a time.
    Alone,
    /// Not before this.
    Rests(Nanos),
}

impl BadSpots {
    /// A copy of these chunks failed. `still_bad` says of known spots whether there is anything to copy in them.
    pub(super) fn failed(
        &mut self,
        chunks: &Range<u64>,
        still_bad: impl Fn(&Range<u64>) -> bool,
        now: Nanos,
    ) {
        let single = chunks.end - chunks.start == 1;
        if let Some(known) = self.spots.iter_mut().find(|spot| spot.chunks == *chunks) {
            if single {
                known.back_off.failed(now);
            }
            return;
        }
        let free = |spot: &&mut Spot| spot.chunks.is_empty() || !still_bad(&spot.chunks);
        match self.spots.iter_mut().find(free) {
            Some(free) => {
                *free = Spot { chunks: chunks.clone(), back_off: BackOff::default() };
                if single {
                    free.back_off.failed(now);
                }
            }
            None => self.whole.failed(now),
        }
    }

    /// A comparison failed: what it reads is not told apart.
    pub(super) fn failed_anywhere(&mut self, now: Nanos) {
        self.whole.failed(now);
    }

    /// Until when everything rests.
    pub(super) fn until(&self) -> Nanos {
        self.whole.until()
    }

    /// These chunks have been copied.
    pub(super) fn copied(&mut self, chunks: &Range<u64>) {
        for spot in &mut self.spots {
            if chunks.start <= spot.chunks.start && spot.chunks.end <= chunks.end {
                *spot = Spot::default();
            }
        }
    }

    /// The same as far as it matters from now on: for a model that compares states.
    #[cfg(test)]
    pub(super) fn seen_at(&self, now: Nanos) -> Vec<(Range<u64>, Nanos)> {
        let spots = self.spots.iter().map(|spot| (spot.chunks.clone(), spot.back_off.until()));
        let all = spots.chain([(0..0, self.whole.until())]);
        all.map(|(chunks, until)| (chunks, until.max(now))).collect()
    }

    /// How a run that begins with this chunk may be copied.
    pub(super) fn manner(&self, first: u64, end: u64, now: Nanos) -> Manner {
        let mut manner = Manner::Free(end);
        for spot in self.spots.iter().filter(|spot| !spot.chunks.is_empty()) {
            if spot.chunks.contains(&first) {
                if spot.back_off.until() > now {
                    return Manner::Rests(spot.back_off.until());
                }
                manner = Manner::Alone;
            } else if let Manner::Free(upto) = &mut manner
                && (first..*upto).contains(&spot.chunks.start)
            {
                *upto = spot.chunks.start;
            }
        }
        manner
    }
}

/// What makes two errors alike.
type Likeness = (Side, IoKind, ErrorAction, IoError);

/// Errors of one likeness.
#[derive(Debug, Clone, Copy)]
struct Alike {
    like: Likeness,
    /// Not told yet.
    count: u64,
    /// They are held back until then.
    quiet_until: Nanos,
}

/// Likenesses that are told apart at the same time.
const ALIKE: usize = 16;

/// Errors counted for good, and gathered so that lasting ones make one event a second.
#[derive(Debug, Clone, Default)]
pub(super) struct ErrorLog {
    total: ErrorCounts,
    alike: [Option<Alike>; ALIKE],
}

impl Alike {
    fn flush(&mut self) -> Option<JobEvent> {
        let (side, operation, action, error) = self.like;
        let count = std::mem::take(&mut self.count);
        (count > 0).then_some(JobEvent::Error { side, operation, action, error, count })
    }
}

impl ErrorLog {
    /// One event a second for errors that are alike.
    const SPACING: Nanos = Nanos::from_secs(1);

    /// Errors so far.
    pub(super) fn total(&self) -> ErrorCounts {
        self.total
    }

    /// Records an error. Answers with up to two events: the held-back count of another kind that makes room, and this one if it
    /// is new.
    pub(super) fn record(&mut self, like: Likeness, now: Nanos) -> [Option<JobEvent>; 2] {
        let counts = &mut self.total.counts[like.0 as usize][like.2 as usize];
        *counts = counts.saturating_add(1);
        if let Some(known) = self.alike.iter_mut().flatten().find(|known| known.like == like) {
            known.count += 1;
            if now < known.quiet_until {
                return [None, None];
            }
            known.quiet_until = now + Self::SPACING;
            return [None, known.flush()];
        }
        // The one that has been quiet longest makes room.
        let oldest = self.alike.iter_mut().min_by_key(|slot| slot.map(|it| it.quiet_until));
        let Some(slot) = oldest else { return [None, None] };
        let held = slot.as_mut().and_then(Alike::flush);
        let mut new = Alike { like, count: 1, quiet_until: now + Self::SPACING };
        let told = new.flush();
        *slot = Some(new);
        [held, told]
    }

    /// The event of errors held back, once it is time.
    pub(super) fn tick(&mut self, now: Nanos) -> Option<JobEvent> {
        let due = |it: &&mut Alike| it.count > 0 && now >= it.quiet_until;
        let due = self.alike.iter_mut().flatten().find(due)?;
        due.quiet_until = now + Self::SPACING;
        due.flush()
    }

    /// When errors held back are due.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        let held = self.alike.iter().flatten().filter(|it| it.count > 0);
        held.map(|it| it.quiet_until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_while_errors_last_and_begin_anew_afterwards() {
        let (mut back_off, mut now) = (BackOff::default(), Nanos::from_secs(1));
        let mut rests = Vec::new();
        for _ in 0..12 {
            back_off.failed(now);
            back_off.failed(now);
            rests.push(back_off.until() - now);
            now = back_off.until();
        }
        assert!(rests.is_sorted());
        assert_eq!((rests[0], rests[11]), (BackOff::SHORTEST, BackOff::LONGEST));
        now = now + Nanos::from_secs(60);
        back_off.failed(now);
        assert_eq!(back_off.until() - now, BackOff::SHORTEST);
    }

    #[test]
    fn a_bad_spot_is_found_chunk_by_chunk_and_rests_alone() {
        let (mut bad, now) = (BadSpots::default(), Nanos::from_secs(1));
        bad.failed(&(10..20), |_| true, now);
        assert_eq!(bad.manner(5, 30, now), Manner::Free(10), "up to the spot");
        assert_eq!(bad.manner(10, 30, now), Manner::Alone);
        bad.failed(&(12..13), |_| true, now);
        assert!(matches!(bad.manner(12, 30, now), Manner::Rests(until) if until > now));
        assert_eq!(bad.manner(13, 30, now), Manner::Alone);
        assert_eq!((bad.manner(20, 30, now), bad.until()), (Manner::Free(30), Nanos::ZERO));
        bad.copied(&(12..13));
        assert_eq!(bad.manner(12, 30, now), Manner::Alone);
        bad.copied(&(0..20));
        assert_eq!(bad.manner(5, 30, now), Manner::Free(30));
    }

    #[test]
    fn a_leg_that_fails_everywhere_rests_as_a_whole() {
        let (mut bad, now) = (BadSpots::default(), Nanos::from_secs(1));
        for chunk in 0..100 {
            bad.failed(&(chunk..chunk + 1), |_| true, now);
        }
        assert!(bad.until() > now);
        // Spots with nothing to copy make room.
        let mut bad = BadSpots::default();
        for chunk in 0..100 {
            bad.failed(&(chunk..chunk + 1), |spot| spot.start == chunk - 1, now);
        }
        assert_eq!(bad.until(), Nanos::ZERO);
    }

    #[test]
    fn lasting_errors_of_several_kinds_are_one_event_a_second_each_and_none_is_lost() {
        let mut log = ErrorLog::default();
        let kinds = [IoKind::Write, IoKind::Flush, IoKind::Read];
        let (mut events, mut errors) = (0, 0);
        let mut hear = |event: Option<JobEvent>| {
            if let Some(JobEvent::Error { count, .. }) = event {
                events += 1;
                errors += count;
            }
        };
        for milli in 0..3500 {
            let now = Nanos::from_millis(milli);
            for kind in kinds {
                let like = (Side::Target, kind, ErrorAction::Ignore, IoError::IO);
                log.record(like, now).into_iter().for_each(&mut hear);
            }
            hear(log.tick(now));
        }
        for _ in kinds {
            hear(log.tick(Nanos::from_secs(60)));
        }
        assert_eq!(errors, 3 * 3500);
        assert!((12..=15).contains(&events), "{events} events");
        assert_eq!(log.total().counts[1][1], 3 * 3500);
        assert_eq!(log.deadline(), None);
    }
}
