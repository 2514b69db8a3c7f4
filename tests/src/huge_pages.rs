//! Huge pages for a test: reserved while it runs.

/// Huge pages that the host has more while this lives.
pub struct HugePages(u64);

impl HugePages {
    const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

    /// None, said aloud, where they cannot be had.
    #[must_use]
    pub fn reserve(test: &str, count: u64) -> Option<Self> {
        let reserve = || {
            let before = Self::reserved()?;
            Self::set(before + count)?;
            let pages = Self(count);
            (Self::reserved()? >= before + count).then_some(pages)
        };
        let pages = reserve();
        if pages.is_none() {
            let reason = format!("{count} huge pages cannot be reserved");
            crate::skip(test, &reason, "run it as root, with memory to spare");
        }
        pages
    }

    fn reserved() -> Option<u64> {
        std::fs::read_to_string(Self::RESERVED).ok()?.trim().parse().ok()
    }

    fn set(count: u64) -> Option<()> {
        std::fs::write(Self::RESERVED, count.to_string()).ok()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = Self::reserved().and_then(|all| Self::set(all.saturating_sub(self.0)));
    }
}
