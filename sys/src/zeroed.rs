//! Arrays of zeroes: as large as they may ever have to be, and resident only where they have been used.
//!
//! A queue keeps for each of its slots as many buffers as an operation can have. Nearly all operations have a few, and nearly
//! all slots of a disk that is not overloaded are never claimed; written out at the start they would be two megabytes for
//! each disk of a host. Asked of the system as zeroes, pages that nobody has written to are not there.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::ptr;

/// A type of which all zeroes are a value.
///
/// # Safety
/// All bytes zero must be a valid value of the type.
pub(crate) unsafe trait Zeroed: Sized {}

/// So many values of zeroes. Panics if there are none, or more than an address space has.
pub(crate) fn zeroed<T: Zeroed>(count: usize) -> Box<[T]> {
    let layout = Layout::array::<T>(count).unwrap_or_else(|_| panic!("{count} slots"));
    assert!(layout.size() > 0, "an array of nothing");
    // SAFETY: the layout has a size.
    let memory = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    // SAFETY: allocated just now for `count` values with the layout that a box of them has, and owned by nobody else; zeroes are
    // a value of the type by its promise.
    unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(memory, count)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    // SAFETY: integers.
    unsafe impl Zeroed for [u64; 512] {}

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn what_is_not_used_is_not_resident() {
        let before = resident_kib();
        let mut pages = zeroed::<[u64; 512]>(1 << 16); // 256 MiB
        pages[77][1] = 5;
        assert_eq!((pages[77][1], pages[78][1], pages.len()), (5, 0, 1 << 16));
        assert!(resident_kib() < before + (64 << 10), "more than was used is resident");
    }
}
