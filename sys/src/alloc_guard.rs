//! The allocation guard: the allocator by which a test proves that the data path allocates nothing.
//!
//! A test binary installs [`AllocGuard`] with `#[global_allocator]`; production binaries do not. A thread then seals itself
//! for a stretch of code with [`seal`], and every allocation, reallocation or release it makes meanwhile is counted, or ends
//! the process if so asked: a core dump that shows who did it. Releases count too: memory given back on the data path
//! was taken from somewhere, and the allocator's lock is the same.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::marker::PhantomData;

/// What happens to an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Allowed,
    Counted,
    Fatal,
}

thread_local! {
    // Constant initialisers and no destructors, so that touching them allocates nothing.
    static RULE: Cell<Rule> = const { Cell::new(Rule::Allowed) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, watched on sealed threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllocGuard;

/// Notes one call of the allocator by this thread.
fn note() {
    match RULE.get() {
        Rule::Allowed => {}
        Rule::Counted => COUNT.set(COUNT.get() + 1),
        Rule::Fatal => std::process::abort(),
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for AllocGuard {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) };
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// This thread is sealed until the value is dropped. Seals nest; the inner one's rule holds.
#[derive(Debug)]
#[must_use = "the seal ends when it is dropped"]
pub struct Seal {
    before: Rule,
    count_before: u64,
    /// A seal belongs to its thread.
    _not_send: PhantomData<*const ()>,
}

/// Counts this thread's use of the allocator from now on.
pub fn seal() -> Seal {
    Seal::new(Rule::Counted)
}

/// Ends the process at this thread's next use of the allocator.
pub fn seal_or_abort() -> Seal {
    Seal::new(Rule::Fatal)
}

impl Seal {
    fn new(rule: Rule) -> Self {
        Self { before: RULE.replace(rule), count_before: COUNT.get(), _not_send: PhantomData }
    }

    /// Uses of the allocator since the seal began.
    #[must_use]
    pub fn count(&self) -> u64 {
        COUNT.get() - self.count_before
    }
}

impl Drop for Seal {
    fn drop(&mut self) {
        RULE.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static GUARD: AllocGuard = AllocGuard;

    #[test]
    fn a_sealed_thread_is_counted_and_others_are_not() {
        let seal = seal();
        let other = std::hint::black_box([0u8; 64]);
        assert_eq!((seal.count(), other[0]), (0, 0));
        let boxed = std::hint::black_box(Box::new(7));
        assert_eq!(seal.count(), 1);
        drop(boxed);
        assert_eq!(seal.count(), 2);
        drop(seal);
        let seal = super::seal();
        assert_eq!(seal.count(), 0);
    }
}
