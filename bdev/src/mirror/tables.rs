//! The mirror's difficult decisions, as tables: what a guest's request does to which leg and to the bitmap, what a failure
//! does, and what a verb does when a leg hangs. Each row has a letter; the tests visit every row.
//!
//! The tables know no slots and no time. What they are asked with is gathered by the core; what they answer is carried out
//! there.

use crate::io::IoKind;
use crate::job::{CopyMode, JobVerb, Side};

/// What the chunks of a request are, taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Span {
    /// Some chunk is clean.
    pub clean: bool,
    /// Some dirty chunk is covered whole.
    pub dirty_whole: bool,
    /// Some dirty chunk is touched in part.
    pub dirty_part: bool,
}

/// What the mirror does with guest writes now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Mirroring {
    /// Writes go to the source and dirty.
    Behind,
    /// As `Both`, and nobody waits for the target.
    Trailing,
    /// Writes go to both legs where that helps.
    Both,
    /// As `Both`, and the switch-over has begun: nothing may become dirty for want of a promise.
    Switching,
    /// The target is no longer written: it is being given up, or is complete as of a point in time.
    Detached,
}

impl Mirroring {
    /// All of them.
    #[cfg(test)]
    pub(super) const ALL: [Self; 5] =
        [Self::Behind, Self::Trailing, Self::Both, Self::Switching, Self::Detached];
}

/// Why the target cannot take part in a request, though the mode would have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum TargetHindrance {
    /// Nothing hinders.
    None,
    /// An I/O that was given up may still land in these chunks, after anything sent now; or so many were given up that no
    /// more are risked.
    Shut,
    /// As `Shut`, and the target is an observer for which nothing is remembered.
    Forgotten,
    /// The target is a difference image that lacks the rest of a chunk which the request touches in part.
    Unfilled,
}

/// Which legs get a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Legs {
    /// None: it succeeds as it is.
    Neither,
    /// The source only.
    Source,
    /// Both, in parallel.
    Both,
}

/// What becomes of the dirty bits of a request's chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Bits {
    /// They stay as they are.
    Keep,
    /// All touched chunks are dirty, before anything is submitted.
    Dirty,
    /// Chunks covered whole are clean once both legs have succeeded.
    Clean,
    /// They stay as they are though the target goes without: the write is counted as dropped.
    Forget,
}

/// A row of the write table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct WriteRow {
    /// Its letter.
    pub row: char,
    /// Who gets the request.
    pub legs: Legs,
    /// What becomes of the bits.
    pub bits: Bits,
    /// What is sent; a discard may become a write of zeroes.
    pub sent: IoKind,
}

/// What a guest's write, discard or write-zeroes does.
///
/// | | mirroring | span | legs | bits |
/// | --- | --- | --- | --- | --- |
/// | A | detached, behind | any | source | dirty |
/// | B | both, switching | range shut | source | dirty |
/// | C | both, switching | all clean | both | keep |
/// | D | both, switching | dirty chunks covered whole, or those and clean ones | both | clean |
/// | E | both, switching | dirty chunks in part only | source | keep: still dirty |
/// | F | both, switching | dirty chunks in part, and clean ones or dirty ones covered whole | both | clean what is covered |
/// | O | both, switching | range shut, for an observer that things are dropped for | source | forget |
/// | R | both, switching | a clean chunk in part, of which a difference image has nothing | source | dirty |
/// | U | both | discard, not both legs zero by deallocating | source, as it is | dirty |
/// | V | switching | the same | neither | keep |
///
/// In rows C to F a discard becomes a write of zeroes that may deallocate. Reason: what a discarded range reads is not
/// promised, so two legs given the same discard may differ and a clean chunk would no longer mean equal. Where both legs
/// deallocate to write zeroes the guest's discard costs the same and both read zero. Where one of them would have to write
/// zeroes out (row U), the discard goes to the source and the chunks are read again; during a switch-over (row V), when
/// nothing may become dirty, it is dropped, which a discard allows.
///
/// *Both* is meant to include *trailing* here, whose requests fly like others; what has been answered before its target leg ended
/// makes nothing clean.
///
/// Row F sends the whole request to both legs: in the part of a dirty chunk that it touches the target gets bytes that
/// will be copied again, which is harmless; splitting the request would cost more.
pub(super) fn on_write(
    kind: IoKind,
    mirroring: Mirroring,
    span: Span,
    hindrance: TargetHindrance,
    zeroes_unmap: bool,
) -> WriteRow {
    let row = |row, legs, bits, sent| WriteRow { row, legs, bits, sent };
    match mirroring {
        Mirroring::Behind | Mirroring::Detached => {
            return row('A', Legs::Source, Bits::Dirty, kind);
        }
        Mirroring::Switching if kind == IoKind::Unmap && !zeroes_unmap => {
            return row('V', Legs::Neither, Bits::Keep, kind);
        }
        Mirroring::Both | Mirroring::Trailing if kind == IoKind::Unmap && !zeroes_unmap => {
            return row('U', Legs::Source, Bits::Dirty, kind);
        }
        Mirroring::Both | Mirroring::Trailing | Mirroring::Switching => {}
    }
    let sent = if kind == IoKind::Unmap { IoKind::WriteZeroes } else { kind };
    match (hindrance, span.dirty_part, span.dirty_whole, span.clean) {
        (TargetHindrance::Shut, ..) => row('B', Legs::Source, Bits::Dirty, sent),
        (TargetHindrance::Forgotten, ..) => row('O', Legs::Source, Bits::Forget, sent),
        (TargetHindrance::Unfilled, ..) => row('R', Legs::Source, Bits::Dirty, sent),
        (TargetHindrance::None, false, false, _) => row('C', Legs::Both, Bits::Keep, sent),
        (TargetHindrance::None, false, true, _) => row('D', Legs::Both, Bits::Clean, sent),
        (TargetHindrance::None, true, false, false) => row('E', Legs::Source, Bits::Keep, sent),
        (TargetHindrance::None, true, _, _) => row('F', Legs::Both, Bits::Clean, sent),
    }
}

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failed {
    /// The guest's write, discard or write-zeroes on one leg.
    GuestWrite(Side),
    /// The guest's flush on one leg.
    GuestFlush(Side),
    /// The copier's read of the source.
    CopyRead,
    /// The copier's write of the target.
    CopyWrite,
    /// A flush of the target that the job asked for.
    JobFlush,
    /// A read of one leg, to be compared with the other.
    CheckRead(Side),
}

impl Failed {
    /// All of them.
    #[cfg(test)]
    pub(super) const ALL: [Self; 9] = [
        Self::GuestWrite(Side::Source),
        Self::GuestWrite(Side::Target),
        Self::GuestFlush(Side::Source),
        Self::GuestFlush(Side::Target),
        Self::CopyRead,
        Self::CopyWrite,
        Self::JobFlush,
        Self::CheckRead(Side::Source),
        Self::CheckRead(Side::Target),
    ];

    /// The leg that failed.
    pub(super) fn side(self) -> Side {
        match self {
            Self::GuestWrite(side) | Self::GuestFlush(side) | Self::CheckRead(side) => side,
            Self::CopyRead => Side::Source,
            Self::CopyWrite | Self::JobFlush => Side::Target,
        }
    }
}

/// How far the job has gone, as failures see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Progress {
    /// Copying or in sync; also paused.
    Mirroring,
    /// Waiting or pending, without a record of the switch-over.
    Switching,
    /// A record of the switch-over exists, or may.
    Recorded,
    /// The target is being given up.
    Leaving,
}

impl Progress {
    /// All of them.
    #[cfg(test)]
    pub(super) const ALL: [Self; 4] =
        [Self::Mirroring, Self::Switching, Self::Recorded, Self::Leaving];
}

/// What the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum GuestHears {
    /// The error.
    TheError,
    /// The source's result.
    TheSource,
    /// The source's result, but not before the record of the switch-over is taken back.
    TheSourceOnceRetracted,
    /// Nothing: it asked for nothing.
    Nothing,
}

/// Which chunks become dirty. Always before the guest is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Dirties {
    /// Those of the failed request.
    Range,
    /// Those written on that leg and not known to be durable there.
    Undurable,
}

/// What the job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum JobDoes {
    /// What the leg's error policy says.
    Policy,
    /// Goes back to ready with the reason; the error is counted.
    UndoSwitch,
    /// Nothing; it is leaving already.
    Nothing,
}

/// A row of the failure table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FailureRow {
    /// Its letter.
    pub row: char,
    /// What the guest is told.
    pub guest: GuestHears,
    /// What becomes dirty.
    pub dirties: Dirties,
    /// What the job does.
    pub job: JobDoes,
}

/// What a failure does. The copy mode makes no difference, for an I/O in flight may stem from either mode; a time-out is a
/// failure like others, and shuts its range besides.
///
/// | | failed | job | guest hears | dirties | job does |
/// | --- | --- | --- | --- | --- | --- |
/// | A | guest write, source | mirroring | the error | range | policy |
/// | B | guest write, target | mirroring | the source's result | range | policy |
/// | C | guest flush, source | mirroring | the error | undurable | policy |
/// | D | guest flush, target | mirroring | the source's result | undurable | policy |
/// | E | copy read, copy write, either read of a comparison | mirroring | nothing | range | policy |
/// | F | job flush | mirroring | nothing | undurable | policy |
/// | G | a to f | switching | as before | as before | undoes the switch |
/// | H | a to f | recorded | as before, but the source's result waits for the retraction | as before | undoes the switch |
/// | I | a to f | leaving | as before | as before | nothing |
///
/// Row G holds for every policy, `report` too: the operator who asked for a switch-over keeps a job that is ready, with the
/// reason; if the error lasts, the copy of the dirty range meets it again and the policy then applies.
pub(super) fn on_failure(failed: Failed, progress: Progress) -> FailureRow {
    let (row, guest, dirties) = match failed {
        Failed::GuestWrite(Side::Source) => ('A', GuestHears::TheError, Dirties::Range),
        Failed::GuestWrite(Side::Target) => ('B', GuestHears::TheSource, Dirties::Range),
        Failed::GuestFlush(Side::Source) => ('C', GuestHears::TheError, Dirties::Undurable),
        Failed::GuestFlush(Side::Target) => ('D', GuestHears::TheSource, Dirties::Undurable),
        Failed::CopyRead | Failed::CopyWrite | Failed::CheckRead(_) => {
            ('E', GuestHears::Nothing, Dirties::Range)
        }
        Failed::JobFlush => ('F', GuestHears::Nothing, Dirties::Undurable),
    };
    match (progress, guest) {
        (Progress::Mirroring, _) => FailureRow { row, guest, dirties, job: JobDoes::Policy },
        (Progress::Switching, _) => {
            FailureRow { row: 'G', guest, dirties, job: JobDoes::UndoSwitch }
        }
        (Progress::Recorded, GuestHears::TheSource) => FailureRow {
            row: 'H',
            guest: GuestHears::TheSourceOnceRetracted,
            dirties,
            job: JobDoes::UndoSwitch,
        },
        (Progress::Recorded, _) => {
            FailureRow { row: 'H', guest, dirties, job: JobDoes::UndoSwitch }
        }
        (Progress::Leaving, _) => FailureRow { row: 'I', guest, dirties, job: JobDoes::Nothing },
    }
}

/// What a verb waits for when a leg hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    /// Takes effect at once.
    AtOnce,
    /// Takes effect at once for the guest; the hung leg's channel is released with its I/O in flight.
    DetachesTarget,
    /// Waits for the hung I/O, or for its time-out, or for the operator to cancel.
    WaitsForTheIo,
    /// Waits for holds that are undone one after the other until the source answers: the guest's own I/O is stuck there,
    /// with or without a mirror.
    WaitsForTheSource,
}

/// What a verb does when a leg hangs.
///
/// | | verb | target hung | source hung |
/// | --- | --- | --- | --- |
/// | A | pause, resume, set-speed, change, verify, stop-verify, dismiss | at once | at once |
/// | B | cancel | detaches the target | waits for the source |
/// | C | complete, finish, finalize | waits for the I/O | waits for the I/O |
pub(super) fn on_hang(verb: JobVerb, hung: Side) -> (char, Outcome) {
    match (verb, hung) {
        (
            JobVerb::Pause
            | JobVerb::Resume
            | JobVerb::SetSpeed(_)
            | JobVerb::Change(_)
            | JobVerb::SetCeiling(_)
            | JobVerb::Verify(_)
            | JobVerb::StopVerify
            | JobVerb::Dismiss,
            Side::Source | Side::Target,
        ) => ('A', Outcome::AtOnce),
        (JobVerb::Cancel, Side::Target) => ('B', Outcome::DetachesTarget),
        (JobVerb::Cancel, Side::Source) => ('B', Outcome::WaitsForTheSource),
        (JobVerb::Complete | JobVerb::Finish | JobVerb::Finalize, Side::Source | Side::Target) => {
            ('C', Outcome::WaitsForTheIo)
        }
    }
}

/// How guest writes are mirrored in a copy mode while nothing special is under way.
pub(super) fn usual(mode: CopyMode) -> Mirroring {
    match mode {
        CopyMode::Background => Mirroring::Behind,
        CopyMode::WriteBlocking => Mirroring::Both,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Rows;
    use super::*;
    use std::collections::BTreeSet;

    const BOOLS: [bool; 2] = [false, true];
    const HINDRANCES: [TargetHindrance; 4] = [
        TargetHindrance::None,
        TargetHindrance::Shut,
        TargetHindrance::Forgotten,
        TargetHindrance::Unfilled,
    ];
    const KINDS: [IoKind; 3] = [IoKind::Write, IoKind::Unmap, IoKind::WriteZeroes];

    fn every_write() -> impl Iterator<Item = (IoKind, Mirroring, Span, TargetHindrance, bool)> {
        KINDS.into_iter().flat_map(|kind| {
            Mirroring::ALL.into_iter().flat_map(move |mirroring| {
                (0..16 * HINDRANCES.len()).map(move |case| {
                    let bit = |at: usize| case & (1 << at) != 0;
                    let span = Span { clean: bit(0), dirty_whole: bit(1), dirty_part: bit(2) };
                    (kind, mirroring, span, HINDRANCES[case / 16], bit(3))
                })
            })
        })
    }

    #[test]
    fn every_row_of_the_write_table_is_reached() {
        let rows: BTreeSet<char> =
            every_write().map(|(k, m, s, h, z)| on_write(k, m, s, h, z).row).collect();
        assert_eq!(rows, Rows::ALL.write.letters().chars().collect());
    }

    #[test]
    fn what_only_the_source_gets_is_dirty_afterwards() {
        for (kind, mirroring, span, hindrance, zeroes_unmap) in every_write() {
            let row = on_write(kind, mirroring, span, hindrance, zeroes_unmap);
            if row.legs == Legs::Source {
                let already = !span.clean && !span.dirty_whole;
                let forgotten = row.bits == Bits::Forget && hindrance == TargetHindrance::Forgotten;
                let dirty = row.bits == Bits::Dirty || already || forgotten;
                assert!(dirty, "{row:?} with {span:?}");
            }
        }
    }

    #[test]
    fn both_legs_get_only_what_reads_the_same_on_both() {
        for (kind, mirroring, span, hindrance, zeroes_unmap) in every_write() {
            let row = on_write(kind, mirroring, span, hindrance, zeroes_unmap);
            if row.legs == Legs::Both {
                assert_ne!(row.sent, IoKind::Unmap, "{row:?}");
                assert_eq!(hindrance, TargetHindrance::None, "{row:?}");
            }
        }
    }

    #[test]
    fn the_target_never_fails_the_guest() {
        for progress in Progress::ALL {
            for failed in Failed::ALL {
                let row = on_failure(failed, progress);
                if failed.side() == Side::Target {
                    assert_ne!(row.guest, GuestHears::TheError, "{failed:?}, {progress:?}");
                }
                if progress == Progress::Recorded {
                    assert_ne!(row.guest, GuestHears::TheSource, "{failed:?}");
                }
            }
        }
    }

    #[test]
    fn every_row_of_the_failure_table_is_reached() {
        let rows: BTreeSet<char> = Progress::ALL
            .into_iter()
            .flat_map(|progress| Failed::ALL.map(|failed| on_failure(failed, progress).row))
            .collect();
        assert_eq!(rows, Rows::ALL.failure.letters().chars().collect());
    }

    #[test]
    fn a_hung_target_holds_up_no_cancel_and_no_setting() {
        let verbs = [
            JobVerb::Cancel,
            JobVerb::Pause,
            JobVerb::Resume,
            JobVerb::SetSpeed(0),
            JobVerb::Complete,
            JobVerb::Finalize,
            JobVerb::Dismiss,
            JobVerb::Change(CopyMode::Background),
            JobVerb::SetCeiling(None),
            JobVerb::Finish,
        ];
        let mut rows = BTreeSet::new();
        for verb in verbs {
            for hung in [Side::Source, Side::Target] {
                let (row, outcome) = on_hang(verb, hung);
                rows.insert(row);
                let waits = outcome == Outcome::WaitsForTheIo;
                let may_wait =
                    matches!(verb, JobVerb::Complete | JobVerb::Finish | JobVerb::Finalize);
                assert_eq!(waits, may_wait, "{verb:?}");
            }
        }
        assert_eq!(rows, Rows::ALL.hang.letters().chars().collect());
        for dirty in BOOLS {
            let span = Span { clean: !dirty, dirty_whole: dirty, dirty_part: false };
            let hung = TargetHindrance::Shut;
            let row = on_write(IoKind::Write, Mirroring::Both, span, hung, true);
            assert_eq!(row.legs, Legs::Source);
        }
    }
}
