//! The oracle: which bytes a guest may read, and which must have survived a power loss.
//!
//! Per sector it keeps the writes whose bytes may be there. A write joins when it is submitted; one that had ended before
//! another began leaves when that other succeeds; one that failed makes nobody leave. A read may return whatever was
//! possible at some moment between its submission and its completion; if no write was about, it also settles which of the
//! possible ones it is. Among writes in flight together no order is promised.
//!
//! A flush that succeeds fixes what was possible when it was submitted: after a power loss the sector holds that, or
//! something that joined later.

use std::ops::Range;

use super::sector::{Sector, Stamp};

/// Not yet.
const NEVER: u64 = u64::MAX;

/// What a write leaves in one sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Words of this write's buffer, which the guest has changed `versions - 1` times. `zero` says that zeroes were
    /// among what the buffer held.
    Stamped {
        /// Versions that the buffer had.
        versions: u8,
        /// Whether some of them were zero.
        zero: bool,
    },
    /// Zeroes.
    Zero,
    /// Anything at all: an unmapped sector.
    Any,
    /// Exactly this, as a read has shown.
    Exactly(Sector),
}

#[derive(Debug, Clone)]
struct Candidate {
    write: u32,
    value: Value,
    begun: u64,
    ended: u64,
    /// When it ceased to be possible.
    gone: u64,
}

impl Candidate {
    fn admits(&self, sector: usize, content: &Sector) -> bool {
        let admits_word = |word: u64, versions: u8, zero: bool| match Stamp::of_word(word) {
            Some(stamp) => {
                stamp.write == self.write
                    && usize::from(stamp.sector) == sector
                    && stamp.version < versions
            }
            None => zero && word == 0,
        };
        match &self.value {
            Value::Any => true,
            Value::Zero => content.word() == Some(0),
            Value::Exactly(known) => known == content,
            Value::Stamped { versions, zero } => match content.word() {
                Some(word) => admits_word(word, *versions, *zero),
                None => content.words().all(|word| admits_word(word, *versions, *zero)),
            },
        }
    }
}

/// What is known about one disk as its guest sees it.
#[derive(Debug)]
pub struct Oracle {
    sectors: Vec<Vec<Candidate>>,
    /// Of each sector: when the last write that succeeded there was submitted; 0 after a discard.
    written: Vec<u64>,
    /// Counts events; the order of submissions and completions.
    clock: u64,
    writes: u32,
    /// When the last successful flush was submitted.
    flushed: u64,
    /// When the reads that have not ended were submitted.
    reading: Vec<u64>,
}

impl Oracle {
    /// An oracle for a disk with this content, all durable.
    pub fn new(content: impl Iterator<Item = Sector>) -> Self {
        let candidate = |content| Candidate {
            write: 0,
            value: Value::Exactly(content),
            begun: 0,
            ended: 0,
            gone: NEVER,
        };
        let sectors: Vec<_> = content.map(|content| vec![candidate(content)]).collect();
        Self {
            written: vec![0; sectors.len()],
            sectors,
            clock: 1,
            writes: 0,
            flushed: 1,
            reading: Vec::new(),
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Names a write whose values are told by [`Oracle::begin`].
    pub fn next_write(&mut self) -> u32 {
        self.writes += 1;
        self.writes
    }

    /// A write, unmap or write-zeroes is submitted; `value` gives what it leaves in each sector.
    pub fn begin(&mut self, write: u32, sectors: Range<usize>, value: impl Fn(usize) -> Value) {
        let begun = self.tick();
        for sector in sectors {
            let value = value(sector);
            let candidate = Candidate { write, value, begun, ended: NEVER, gone: NEVER };
            self.sectors[sector].push(candidate);
        }
    }

    /// The guest changes the buffer of a write in flight: gives the stamp to write there, or none where the buffer has been
    /// changed often enough.
    pub fn scribble(&mut self, write: u32, sector: usize) -> Option<Stamp> {
        let of_write = |candidate: &&mut Candidate| candidate.write == write;
        let candidate = self.sectors[sector].iter_mut().find(of_write)?;
        let before = match &candidate.value {
            Value::Stamped { versions, zero } => (*versions, *zero),
            Value::Zero => (0, true),
            Value::Any | Value::Exactly(_) => return None,
        };
        let (version, zero) = before;
        if version == u8::MAX || candidate.ended != NEVER {
            return None;
        }
        candidate.value = Value::Stamped { versions: version + 1, zero };
        Some(Stamp { write, sector: sector as u16, version })
    }

    /// The write has ended.
    pub fn end(&mut self, write: u32, sectors: Range<usize>, ok: bool) {
        let now = self.tick();
        for sector in sectors {
            let candidates = &mut self.sectors[sector];
            let Some(own) = candidates.iter_mut().find(|candidate| candidate.write == write) else {
                continue;
            };
            own.ended = now;
            let begun = own.begun;
            if ok {
                // What a discard leaves is not promised, so nobody need have mirrored it.
                self.written[sector] = if own.value == Value::Any { 0 } else { begun };
                for other in candidates.iter_mut().filter(|other| other.ended < begun) {
                    other.gone = other.gone.min(now);
                }
            }
        }
        self.forget();
    }

    /// A read is submitted; the result names the moment.
    pub fn begin_read(&mut self) -> u64 {
        let begun = self.tick();
        self.reading.push(begun);
        begun
    }

    /// The read that was submitted then has ended, with this content unless it failed.
    ///
    /// # Errors
    /// What it returned was not possible.
    pub fn end_read(
        &mut self,
        begun: u64,
        first: usize,
        content: Option<&[Sector]>,
    ) -> Result<(), String> {
        let now = self.tick();
        for (at, content) in content.unwrap_or_default().iter().enumerate() {
            let sector = first + at;
            self.judge(sector, content, begun)?;
            self.settle(sector, content, begun, now);
        }
        self.reading.retain(|reading| *reading != begun);
        self.forget();
        Ok(())
    }

    fn judge(&self, sector: usize, content: &Sector, since: u64) -> Result<(), String> {
        let candidates = &self.sectors[sector];
        let mut possible = candidates.iter().filter(|candidate| candidate.gone > since);
        if possible.any(|candidate| candidate.admits(sector, content)) {
            return Ok(());
        }
        Err(format!(
            "sector {sector} holds {content:?}; possible since {since} were {candidates:?}"
        ))
    }

    /// A read saw this when no write was about: from now on nothing else is possible. What was possible until now may still
    /// come back with a power loss, so it is not forgotten.
    fn settle(&mut self, sector: usize, content: &Sector, begun: u64, now: u64) {
        let candidates = &mut self.sectors[sector];
        let current = candidates.iter().filter(|candidate| candidate.gone == NEVER);
        let ended = current.clone().map(|candidate| candidate.ended).max().unwrap_or(0);
        let value = Value::Exactly(content.clone());
        if ended > begun || current.clone().all(|candidate| candidate.value == value) {
            return;
        }
        for candidate in candidates.iter_mut().filter(|candidate| candidate.gone == NEVER) {
            candidate.gone = now;
        }
        candidates.push(Candidate { write: 0, value, begun: ended, ended, gone: NEVER });
    }

    /// Whether the sector may hold this in a copy of some point in time since `since`, which [`Oracle::begin_read`] named.
    ///
    /// # Errors
    /// It may not.
    pub fn check_since(&self, sector: usize, content: &Sector, since: u64) -> Result<(), String> {
        self.judge(sector, content, since)
    }

    /// When the last write of the sector that succeeded was submitted.
    #[must_use]
    pub fn written(&self, sector: usize) -> u64 {
        // A disk may be larger than its guest knows.
        self.written.get(sector).copied().unwrap_or(0)
    }

    /// This moment: what is submitted from now on is later.
    #[must_use]
    pub fn moment(&self) -> u64 {
        self.clock
    }

    /// A flush is submitted; the result names the moment.
    pub fn begin_flush(&mut self) -> u64 {
        self.tick()
    }

    /// The flush that was submitted then has succeeded.
    pub fn end_flush(&mut self, begun: u64) {
        self.flushed = self.flushed.max(begun);
        self.forget();
    }

    /// Whether the sector may hold this now.
    ///
    /// # Errors
    /// It may not.
    pub fn check_now(&self, sector: usize, content: &Sector) -> Result<(), String> {
        self.judge(sector, content, self.clock)
    }

    /// Whether the sector may hold this after a power loss now.
    ///
    /// # Errors
    /// It may not.
    pub fn check_after_power_loss(&self, sector: usize, content: &Sector) -> Result<(), String> {
        self.judge(sector, content, self.flushed)
    }

    /// Drops candidates that nobody can ask about any more.
    fn forget(&mut self) {
        let oldest = self.reading.iter().copied().min().unwrap_or(NEVER).min(self.flushed);
        // Sectors are few, but this runs with every request: a sector with one candidate has nothing to drop.
        for candidates in self.sectors.iter_mut().filter(|candidates| candidates.len() > 1) {
            candidates.retain(|candidate| candidate.gone > oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamped(write: u32, version: u8) -> Sector {
        Sector::filled(Stamp { write, sector: 0, version }.word())
    }

    const ONCE: Value = Value::Stamped { versions: 1, zero: false };

    fn read(oracle: &mut Oracle, content: Sector) -> Result<(), String> {
        let begun = oracle.begin_read();
        oracle.end_read(begun, 0, Some(&[content]))
    }

    #[test]
    fn an_acknowledged_write_replaces_what_had_ended_before_it() {
        let mut oracle = Oracle::new(std::iter::once(Sector::zero()));
        let write = oracle.next_write();
        oracle.begin(write, 0..1, |_| ONCE);
        assert!(oracle.check_now(0, &Sector::zero()).is_ok());
        assert!(oracle.check_now(0, &stamped(write, 0)).is_ok());
        oracle.end(write, 0..1, true);
        assert!(oracle.check_now(0, &Sector::zero()).is_err());
        assert!(read(&mut oracle, stamped(write, 0)).is_ok());
    }

    #[test]
    fn of_two_writes_at_once_either_may_win_until_a_read_has_shown_which() {
        let mut oracle = Oracle::new(std::iter::once(Sector::zero()));
        let (one, two) = (oracle.next_write(), oracle.next_write());
        oracle.begin(one, 0..1, |_| ONCE);
        oracle.begin(two, 0..1, |_| ONCE);
        oracle.end(two, 0..1, true);
        oracle.end(one, 0..1, true);
        assert!(oracle.check_now(0, &stamped(two, 0)).is_ok());
        assert!(read(&mut oracle, stamped(one, 0)).is_ok());
        assert!(read(&mut oracle, stamped(two, 0)).is_err());
    }

    #[test]
    fn a_failed_write_may_be_there_or_not() {
        let mut oracle = Oracle::new(std::iter::once(Sector::zero()));
        let write = oracle.next_write();
        oracle.begin(write, 0..1, |_| ONCE);
        oracle.end(write, 0..1, false);
        assert!(oracle.check_now(0, &Sector::zero()).is_ok());
        assert!(read(&mut oracle, stamped(write, 0)).is_ok());
        assert!(oracle.check_now(0, &Sector::zero()).is_err());
    }

    #[test]
    fn only_what_was_flushed_must_survive_a_power_loss() {
        let mut oracle = Oracle::new(std::iter::once(Sector::zero()));
        let write = oracle.next_write();
        oracle.begin(write, 0..1, |_| ONCE);
        oracle.end(write, 0..1, true);
        assert!(oracle.check_after_power_loss(0, &Sector::zero()).is_ok());
        let flush = oracle.begin_flush();
        oracle.end_flush(flush);
        assert!(oracle.check_after_power_loss(0, &Sector::zero()).is_err());
        assert!(oracle.check_after_power_loss(0, &stamped(write, 0)).is_ok());
    }

    #[test]
    fn a_scribbled_buffer_may_arrive_as_a_mixture_of_its_own_versions_only() {
        let mut oracle = Oracle::new(std::iter::once(Sector::zero()));
        let write = oracle.next_write();
        oracle.begin(write, 0..1, |_| ONCE);
        let stamp = oracle.scribble(write, 0).unwrap();
        oracle.end(write, 0..1, true);
        let mixture = Sector::torn(&stamped(write, 0), &Sector::filled(stamp.word()));
        assert!(oracle.check_now(0, &mixture).is_ok());
        let strange = Sector::torn(&stamped(write, 0), &Sector::zero());
        assert!(oracle.check_now(0, &strange).is_err());
    }
}
