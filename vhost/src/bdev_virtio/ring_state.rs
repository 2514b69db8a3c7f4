//! Who may touch a ring, as a state machine between the channel that owns it and the keeper that talks to the back end.
//!
//! The two are on different threads. The keeper says that the back end has gone; the owner then makes its ring ready for another
//! one, and only a ring that is ready is shown to it. So no back end ever sees a ring that is being changed, and the keeper
//! waits for no reactor: rings begin one by one, as they become ready.
//!
//! Whether the next back end knows what was in flight is part of a ring's phase. One answer for all rings would be wrong: an
//! owner may look at its ring only when the next back end has gone too, whose record has nothing of this ring in it.

use std::sync::atomic::{AtomicU8, Ordering};

/// Where a ring is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Ready; no back end has been told of it. Requests may be put into it.
    Stopped,
    /// A back end serves it, or is being told to.
    Running,
    /// Its back end broke the rules of the ring; the keeper has to hang up.
    Broken,
    /// Its back end has gone and recorded what was in flight, which the next one carries out; the owner has to take what was
    /// completed.
    Recorded,
    /// Its back end has gone, and no other will know what was in flight; the owner has to offer all of it again.
    Lost,
    /// No back end has come for too long; the owner has to fail what is in it.
    GivenUp,
    /// Empty; every request fails at once.
    Failing,
}

impl Phase {
    const ALL: [Self; 7] = [
        Self::Stopped,
        Self::Running,
        Self::Broken,
        Self::Recorded,
        Self::Lost,
        Self::GivenUp,
        Self::Failing,
    ];
}

/// What happens to a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Keeper: a back end is about to be told of it.
    Start,
    /// Owner: the back end broke the rules.
    Break,
    /// Keeper: the back end has gone, and its record goes to the next one.
    HangUpRecorded,
    /// Keeper: the back end has gone, and there is no record, or none that is of use.
    HangUp,
    /// Owner: what was completed has been taken, and the rest is as the back end left it.
    Taken,
    /// Owner: the ring is as new, and all that is in flight is offered again.
    Restarted,
    /// Keeper: it has been away for too long.
    GiveUp,
    /// Owner: all that was in the ring has failed.
    Emptied,
    /// Keeper: a back end is there again after all.
    Resume,
}

/// The table. None: the event changes nothing, because the other side was faster or the ring is not concerned.
pub(super) fn transition(phase: Phase, event: Event) -> Option<Phase> {
    use Event::{Break, Emptied, GiveUp, HangUp, HangUpRecorded, Restarted, Resume, Start, Taken};
    use Phase::{Broken, Failing, GivenUp, Lost, Recorded, Running, Stopped};
    match (phase, event) {
        (Stopped, Start) => Some(Running),
        (Running | Recorded, Break) => Some(Broken),
        (Running, HangUpRecorded) => Some(Recorded),
        // What was in flight in a stopped ring may have been in the record that is of no use any more.
        (Stopped | Running | Broken | Recorded, HangUp) | (Broken, HangUpRecorded) => Some(Lost),
        (Recorded, Taken) | (Lost, Restarted) | (Failing, Resume) => Some(Stopped),
        (Stopped | Recorded | Lost, GiveUp) => Some(GivenUp),
        (GivenUp, Emptied) => Some(Failing),
        (Stopped, Break | HangUpRecorded | Taken | Restarted | Emptied | Resume)
        | (Running, Start | Taken | Restarted | GiveUp | Emptied | Resume)
        | (Broken, Start | Break | Taken | Restarted | GiveUp | Emptied | Resume)
        | (Recorded, Start | HangUpRecorded | Restarted | Emptied | Resume)
        | (Lost, Start | Break | HangUpRecorded | HangUp | Taken | Emptied | Resume)
        | (
            GivenUp,
            Start | Break | HangUpRecorded | HangUp | Taken | Restarted | GiveUp | Resume,
        )
        | (
            Failing,
            Start | Break | HangUpRecorded | HangUp | Taken | Restarted | GiveUp | Emptied,
        ) => None,
    }
}

/// The phase of one ring, shared by its owner and the keeper.
#[derive(Debug)]
pub(super) struct RingState(AtomicU8);

impl RingState {
    /// Of a ring that nobody has been told of.
    pub(super) fn new() -> Self {
        Self(AtomicU8::new(Phase::Stopped as u8))
    }

    /// The phase now. What the other side did before it changed the phase is seen.
    #[inline]
    pub(super) fn phase(&self) -> Phase {
        decode(self.0.load(Ordering::SeqCst))
    }

    /// Makes an event happen; whether it changed anything.
    pub(super) fn apply(&self, event: Event) -> bool {
        let next = |phase| transition(decode(phase), event).map(|phase| phase as u8);
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).is_ok()
    }
}

fn decode(phase: u8) -> Phase {
    Phase::ALL.get(usize::from(phase)).copied().unwrap_or(Phase::Failing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_read_as_it_was_written() {
        for (number, phase) in (0..).zip(Phase::ALL) {
            assert_eq!((phase as u8, decode(number)), (number, phase));
        }
    }

    /// A back end is told of a ring in one phase only, which its owner alone can bring about after a back end has had it.
    #[test]
    fn a_ring_that_a_back_end_had_begins_again_only_by_its_owners_word() {
        let state = RingState::new();
        assert!(state.apply(Event::Start) && !state.apply(Event::Start));
        assert!(state.apply(Event::HangUp) && !state.apply(Event::Start));
        assert!(state.apply(Event::Restarted) && state.apply(Event::Start));
        assert!(state.apply(Event::Break) && state.apply(Event::HangUp));
        assert!(state.apply(Event::GiveUp) && !state.apply(Event::Restarted));
        assert!(!state.apply(Event::Resume), "what is in it has not failed yet");
        assert!(state.apply(Event::Emptied) && state.apply(Event::Resume));
        assert_eq!(state.phase(), Phase::Stopped);
    }

    /// Whatever follows: a ring whose requests no record has is offered anew, and by nothing else ready again.
    #[test]
    fn a_record_that_is_lost_once_is_of_no_use_to_a_ring_any_more() {
        let state = RingState::new();
        assert!(state.apply(Event::Start) && state.apply(Event::HangUpRecorded));
        assert!(!state.apply(Event::HangUpRecorded), "the record has gone to the next one since");
        assert!(state.apply(Event::Taken) && state.apply(Event::HangUp));
        assert!(!state.apply(Event::HangUpRecorded) && !state.apply(Event::Taken));
        assert_eq!(state.phase(), Phase::Lost);
        assert!(state.apply(Event::Restarted));

        assert!(state.apply(Event::Start) && state.apply(Event::HangUpRecorded));
        assert!(state.apply(Event::Break), "what the record says of it is wrong too");
        assert!(!state.apply(Event::Taken) && state.apply(Event::HangUp));
        assert_eq!(state.phase(), Phase::Lost);
    }
}
