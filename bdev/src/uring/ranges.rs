//! How a range without data is carried out: the table of what is tried, in which order, on which kind of file.
//!
//! | asked | regular file | block device |
//! | --- | --- | --- |
//! | unmap | punch a hole; else nothing | discard; else punch a hole; else nothing |
//! | write zeroes, may unmap | punch a hole; else zero the range; else write zeroes | the same |
//! | write zeroes, may not | zero the range; else write zeroes | the same |
//!
//! "Else" is for a file system or device that says it cannot (tmpfs has no `ZERO_RANGE`, NFS before 4.2 neither); every other
//! error is the answer. An unmap is a hint, so one that cannot be carried out succeeds. What was found to be lacking is
//! not tried again.

use resilver_sys::uring::RangeOp;

use super::file::FileKind;
use crate::io::{BdevIo, IoKind};

/// One thing to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RangeStep {
    Try(RangeOp),
    /// Write zeroes from memory.
    Fill,
    /// Succeed.
    Nothing,
}

use RangeOp::{Discard, PunchHole, ZeroRange};
use RangeStep::{Fill, Nothing, Try};

/// The steps for an unmap or write-zeroes, best first.
pub(super) fn plan(file: FileKind, io: &BdevIo) -> &'static [RangeStep] {
    match (io.kind, file, io.may_unmap) {
        (IoKind::Unmap, FileKind::Regular, _) => &[Try(PunchHole), Nothing],
        (IoKind::Unmap, FileKind::BlockDevice, _) => &[Try(Discard), Try(PunchHole), Nothing],
        (IoKind::WriteZeroes, _, true) => &[Try(PunchHole), Try(ZeroRange), Fill],
        (IoKind::WriteZeroes, _, false) => &[Try(ZeroRange), Fill],
        (IoKind::Read | IoKind::Write | IoKind::Flush, _, _) => &[],
    }
}

/// Whether an error says "cannot", as opposed to "could not".
pub(super) fn says_unsupported(errno: i32) -> bool {
    const ENOSYS: i32 = 38;
    const ENOTTY: i32 = 25;
    const EOPNOTSUPP: i32 = 95;
    matches!(errno, ENOSYS | ENOTTY | EOPNOTSUPP)
}

/// What this file was found to be unable to do.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lacking {
    punch_hole: bool,
    zero_range: bool,
    discard: bool,
}

impl Lacking {
    /// Of a file that is known to deallocate, or known not to.
    pub(super) fn new(deallocates: bool) -> Self {
        Self { punch_hole: !deallocates, zero_range: false, discard: !deallocates }
    }

    pub(super) fn note(&mut self, operation: RangeOp) {
        *self.of(operation) = true;
    }

    fn of(&mut self, operation: RangeOp) -> &mut bool {
        match operation {
            PunchHole => &mut self.punch_hole,
            ZeroRange => &mut self.zero_range,
            Discard => &mut self.discard,
        }
    }

    /// The plan from its first step that is not known to be lacking.
    pub(super) fn feasible(mut self, plan: &'static [RangeStep]) -> &'static [RangeStep] {
        let first = plan.iter().position(|step| match step {
            Try(operation) => !*self.of(*operation),
            Fill | Nothing => true,
        });
        &plan[first.unwrap_or(plan.len())..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Tag;

    #[test]
    fn every_plan_ends_in_a_step_that_cannot_be_lacking() {
        let mut nothing_works = Lacking::default();
        for operation in [PunchHole, ZeroRange, Discard] {
            nothing_works.note(operation);
        }
        for kind in [IoKind::Unmap, IoKind::WriteZeroes] {
            for file in [FileKind::Regular, FileKind::BlockDevice] {
                for may_unmap in [false, true] {
                    let io = BdevIo { tag: Tag(0), kind, may_unmap, offset: 0, length: 512 };
                    let last = if kind == IoKind::Unmap { Nothing } else { Fill };
                    assert_eq!(nothing_works.feasible(plan(file, &io)), [last]);
                    let all = Lacking::new(true).feasible(plan(file, &io));
                    assert!(matches!(all[0], Try(_)), "{kind:?} on {file:?}");
                }
            }
        }
    }

    #[test]
    fn zeroes_that_may_not_unmap_never_punch() {
        for file in [FileKind::Regular, FileKind::BlockDevice] {
            let io = BdevIo {
                tag: Tag(0),
                kind: IoKind::WriteZeroes,
                may_unmap: false,
                offset: 0,
                length: 512,
            };
            assert!(!plan(file, &io).contains(&Try(PunchHole)));
            assert!(!plan(file, &io).contains(&Try(Discard)));
        }
    }
}
