//! Prefetching: telling the processor of memory that is wanted soon.
//!
//! What a guest has written lies in its core's cache. Fetching a line of it takes longer than all the work on a request, and one
//! line tells where the next one is; so whoever has several requests before him names the lines of all of them first, and
//! they travel at the same time.
//!
//! A prefetch reads and changes nothing that a program could see, and of an address that is not mapped it does nothing.

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// What the line is wanted for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Access {
    // The areas of the exhaustive tests have nothing to fetch.
    #[cfg_attr(loom, allow(dead_code))]
    Read,
    /// To be written as well, so that it is fetched once: a guest keeps a request's status beside its header.
    Write,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! hint {
    ($instruction:literal, $address:expr) => {
        // SAFETY: a hint; it cannot fault and changes no memory and no register.
        unsafe {
            std::arch::asm!($instruction, in(reg) $address, options(nostack, preserves_flags, readonly));
        }
    };
}

/// Has the lines of a value fetched that will be read soon.
#[inline]
pub fn prefetch_value<T>(value: &T) {
    let begin: *const u8 = std::ptr::from_ref(value).cast();
    let before = begin.addr() % LINE;
    for line in (0..before + size_of::<T>()).step_by(LINE) {
        prefetch(begin.wrapping_sub(before).wrapping_add(line), Access::Read);
    }
}

/// Has the line of `address` fetched.
#[inline]
pub(crate) fn prefetch(address: *const u8, access: Access) {
    match access {
        #[cfg(target_arch = "x86_64")]
        Access::Read => hint!("prefetcht0 [{}]", address),
        // On a processor without the instruction (before 2014) it is none.
        #[cfg(target_arch = "x86_64")]
        Access::Write => hint!("prefetchw [{}]", address),
        #[cfg(target_arch = "aarch64")]
        Access::Read => hint!("prfm pldl1keep, [{}]", address),
        #[cfg(target_arch = "aarch64")]
        Access::Write => hint!("prfm pstl1keep, [{}]", address),
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        Access::Read | Access::Write => {
            let _ = address;
        }
    }
}
