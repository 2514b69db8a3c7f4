//! What a verification is asked, and what it says: an online comparison of a mirror's two legs.
//!
//! The comparison itself is done inside the mirror, under the guest's I/O; here is only the data that goes in and out.

/// A verification pass, as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyRequest {
    /// How many of a hundred chunks are compared: 1 to 100.
    pub sample_percent: u8,
    /// Bytes of the disk that are compared in a second; 0 for no limit.
    pub speed: u64,
    /// Which chunks make the sample: another seed, another sample, spread over the disk just as evenly.
    pub seed: u64,
}

impl Default for VerifyRequest {
    fn default() -> Self {
        Self { sample_percent: 100, speed: 0, seed: 0 }
    }
}

/// Where a verification pass is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum VerifyState {
    /// There was none yet.
    #[default]
    None,
    /// It compares, or rests while its mirror is paused or switches.
    Running,
    /// It went through all that it was to compare.
    Completed,
    /// It was given up: by the operator, or with its mirror, or for the pass that a switch-over demands.
    Cancelled,
}

impl VerifyState {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What there is to say about the last pass, and about all of them. Bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyInfo {
    /// Which pass of the mirror this is, from 1; 0 if there was none.
    pub pass: u64,
    /// Where it is.
    pub state: VerifyState,
    /// Rate limit, bytes a second; 0 for none.
    pub speed: u64,
    /// What it is to compare.
    pub total_bytes: u64,
    /// Compared so far.
    pub checked_bytes: u64,
    /// Left out: dirty, so known to differ, or not readable.
    pub skipped_bytes: u64,
    /// Clean, and found to differ; dirty since then, so that they are copied again. Whole chunks.
    pub mismatched_bytes: u64,
    /// Compared by all passes.
    pub checked_ever: u64,
    /// Chunks that all passes found to differ.
    pub mismatches_ever: u64,
}
