//! Mutations of inputs, the same for the same seed: what the smoke run does instead of a fuzzer's feedback.

/// Makes inputs out of those of a corpus.
pub struct Mutator {
    state: u64,
}

impl Mutator {
    /// The mutator of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    /// A number below `bound`, or zero where there is none (xorshift64*, Vigna 2016: enough for this, and needs no crate).
    fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let word = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        usize::try_from(word).unwrap_or_default() % bound.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.below(256).to_le_bytes()[0]
    }

    /// An input with a few changes: bytes flipped, replaced, inserted, removed, repeated, or taken from another input.
    #[must_use]
    pub fn mutate(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let nothing = Vec::new();
        let mut input = corpus.get(self.below(corpus.len())).unwrap_or(&nothing).clone();
        for _ in 0..=self.below(6) {
            let at = self.below(input.len());
            let length = self.below(16).min(input.len() - at);
            match self.below(7) {
                0 if !input.is_empty() => input[at] ^= 1 << self.below(8),
                1 if !input.is_empty() => input[at] = self.byte(),
                2 => drop(input.splice(at..at, (0..=length).map(|_| self.byte()))),
                3 => drop(input.drain(at..at + length)),
                4 => {
                    let again = input[at..at + length].to_vec();
                    input.splice(at..at, again);
                }
                5 => {
                    let other = corpus.get(self.below(corpus.len())).unwrap_or(&nothing);
                    let from = self.below(other.len());
                    let until = from + self.below(64).min(other.len() - from);
                    input.splice(at..at, other[from..until].iter().copied());
                }
                _ => input.extend((0..=length).map(|_| self.byte())),
            }
        }
        input
    }
}
