//! Prefetching: telling the processor of memory that is wanted soon.
//!
//! What a guest has written lies in its core's cache. Fetching a line of it takes longer than all the work on a request, and one
//! line tells where the next one is; so whoever has several requests before him names the lines of all of them first, and
//! they travel at the same time.
//!
//! A prefetch reads and changes nothing that a program could see, and of an address that is not mapped it does nothing.

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Has the line of `address` fetched, to be written as well: a guest keeps a request's status beside its header.
#[inline]
pub(crate) fn prefetch(address: *const u8) {
    // On a processor without the instruction (before 2014) it is none.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it cannot fault and changes no memory and no register.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// The same for a line that is only read.
#[inline]
pub(crate) fn prefetch_to_read(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prefetcht0 [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}
