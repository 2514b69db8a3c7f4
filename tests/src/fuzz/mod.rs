//! What the fuzzers run: for every surface that somebody else writes to, a function from bytes to a verdict. It returns, or it
//! panics because a property does not hold.
//!
//! The functions are ordinary safe code in the workspace and know no fuzzer. libFuzzer drives them for hours
//! (`scripts/fuzz`), `tests/tests/fuzz_smoke.rs` replays the corpus and some mutations of it on every CI run. A target
//! reads its bytes as a program (`Input`): an opcode, its operands, the next opcode; so a mutation changes one step and
//! not the meaning of all that follow, and an input that ends early is a shorter program.

mod back_end;
mod bench;
mod connection;
mod disk;
mod messages;
mod mutate;
mod ring;
mod rpc;
mod state;

pub use back_end::back_end;
pub use connection::connection;
pub use messages::messages;
pub use mutate::Mutator;
pub use ring::ring;
pub use rpc::rpc;
pub use state::state;

/// A target: its name, which is also its corpus' and its binary's, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 6] = [
    ("back_end", back_end),
    ("connection", connection),
    ("messages", messages),
    ("ring", ring),
    ("rpc", rpc),
    ("state", state),
];

/// The bytes of an input, taken one after the other. Where there are none left everything is zero.
pub(crate) struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// At most `length` bytes.
    pub(crate) fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (bytes, rest) = self.rest.split_at(length.min(self.rest.len()));
        self.rest = rest;
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let bytes = self.bytes(N);
        let mut array = [0; N];
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// One of these.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.u8()) % from.len()]
    }
}
