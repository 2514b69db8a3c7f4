//! The bus-error guard: a guest that shortens its memory file must not take the target down.
//!
//! Touching a page of a shared mapping behind the end of its file raises SIGBUS, at any copy, in any thread. The handler
//! looks the address up in a table of the mappings that [`crate::Mapping::shared`] made; if it lies in one, it puts zeroes
//! there and behind it, to the mapping's end, and marks it poisoned, and the copy goes on. The session sees
//! [`crate::Mapping::poisoned`] before it tells its guest of anything more, and ends. Any other SIGBUS is a fault of ours or of the
//! hardware and gets the default action: it ends the process.
//!
//! All of the rest at once, because each piece is a mapping of its own to the kernel, which has room for some ten thousand in a
//! process: page by page a guest could use them up, and the next page would end us.
//!
//! Rejected: checking the file's size before each copy (a race, and a system call), and refusing memory files that are not
//! sealed against shrinking (QEMU and others do not seal theirs). io_uring needs no guard: the kernel's own access
//! to such a page fails with `EFAULT`.
//!
//! Everything the handler touches is a static table of atomics; it takes no lock, allocates nothing, and calls only `mmap`
//! and `sigaction`, which are plain system calls.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use crate::incidents;

/// The most shared mappings of one process: rings, in-flight buffers and memory slots of all its guests.
const ENTRIES: usize = 4096;

/// One guarded mapping.
struct Entry {
    taken: AtomicBool,
    /// Odd while it guards. The handler believes what it has read if this is the same before and after.
    version: AtomicUsize,
    base: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    poisoned: AtomicBool,
}

static TABLE: [Entry; ENTRIES] = [const {
    Entry {
        taken: AtomicBool::new(false),
        version: AtomicUsize::new(0),
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; ENTRIES];

/// Whether the handler was installed, or the `errno` that says why not.
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// A place in the table, given back when dropped. Owned by the mapping it guards.
#[derive(Debug)]
pub(crate) struct Guard(usize);

impl Guard {
    /// Guards the `len` bytes at `base`, whose pages have `page` bytes. All three are as `mmap` had them, so `base` and `len`
    /// are multiples of `page`.
    ///
    /// # Errors
    /// The table is full, or the handler cannot be installed.
    pub(crate) fn new(base: usize, len: usize, page: usize) -> io::Result<Self> {
        (*INSTALLED.get_or_init(install)).map_err(io::Error::from_raw_os_error)?;
        for (index, entry) in TABLE.iter().enumerate() {
            if entry.taken.swap(true, Ordering::AcqRel) {
                continue;
            }
            // Who reads anything of what follows sees that the version is not the one of before.
            fence(Ordering::Release);
            entry.base.store(base, Ordering::Relaxed);
            entry.len.store(len, Ordering::Relaxed);
            entry.page.store(page, Ordering::Relaxed);
            entry.poisoned.store(false, Ordering::Relaxed);
            entry.version.fetch_add(1, Ordering::Release);
            return Ok(Self(index));
        }
        Err(io::Error::other("too many shared memory regions are mapped"))
    }

    /// Whether a page of the mapping was lost.
    pub(crate) fn poisoned(&self) -> bool {
        TABLE[self.0].poisoned.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let entry = &TABLE[self.0];
        entry.version.fetch_add(1, Ordering::Release);
        entry.taken.store(false, Ordering::Release);
    }
}

/// Makes `on_bus_error` the process's handler.
fn install() -> Result<(), i32> {
    // SAFETY: a zeroed sigaction is a valid value: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_error as *const () as usize;
    // ONSTACK: the threads that std starts have an alternate stack, and a copy may be deep in theirs.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is initialised and its handler has the signature that SA_SIGINFO asks for.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
}

/// Runs on the thread that touched the page, in the middle of whatever it did.
extern "C" fn on_bus_error(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: errno is this thread's own; the kernel passes a valid siginfo with SA_SIGINFO, and SIGBUS fills its address.
    let (errno, address) = unsafe { (*libc::__errno_location(), (*info).si_addr() as usize) };
    if !replace_rest(address) {
        // Not ours: with the default action in place the access faults again, and the process ends as it would have.
        // SAFETY: a plain system call on constants.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above; what was interrupted must find its errno unchanged.
    unsafe { *libc::__errno_location() = errno };
}

/// Maps zeroes over the page of `address` and all behind it, if a guarded mapping has it.
fn replace_rest(address: usize) -> bool {
    for entry in &TABLE {
        let version = entry.version.load(Ordering::Acquire);
        let [base, len, page] =
            [&entry.base, &entry.len, &entry.page].map(|it| it.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        // An entry that changes meanwhile is not that of a mapping which is being touched.
        let stands = version % 2 == 1 && version == entry.version.load(Ordering::Relaxed);
        if !stands || address < base || address - base >= len {
            continue;
        }
        let start = base + (address - base) / page * page;
        entry.poisoned.store(true, Ordering::Relaxed);
        incidents::add();
        // SAFETY: all of it lies in a live mapping of this process that this crate owns (a Guard is dropped before its
        // mapping is unmapped), so MAP_FIXED replaces nothing else; nobody holds a reference into it.
        let mapped = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                base + len - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        return mapped != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use crate::{BufferSlice, Mapping, PAGE_SIZE, RegionTable, incidents};

    #[test]
    fn a_file_shortened_under_its_mapping_reads_zero_and_poisons_it() {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 4 * PAGE_SIZE as u64).unwrap();
        let mapping = Mapping::shared(fd.as_fd(), 0, 4 * PAGE_SIZE as u64).unwrap();
        let table = RegionTable::with_capacity(1);
        let region = table.insert(mapping.clone()).unwrap();
        let at = |page: usize| BufferSlice { region, length: 8, offset: (page * PAGE_SIZE) as u64 };
        table.write(at(0), b"stays on").unwrap();
        table.write(at(3), b"is lost.").unwrap();
        assert!(!mapping.poisoned());

        ftruncate(&fd, PAGE_SIZE as u64).unwrap();
        let mut bytes = [0xff; 8];
        table.read(at(3), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        assert!(mapping.poisoned());
        table.write(at(2), b"goes on.").unwrap();
        table.read(at(2), &mut bytes).unwrap();
        assert_eq!(&bytes, b"goes on.");
        table.read(at(0), &mut bytes).unwrap();
        assert_eq!(&bytes, b"stays on");
    }

    #[test]
    fn all_behind_a_lost_page_is_one_mapping() {
        // More pages than the kernel has room for mappings, if every other were one of its own.
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let pages = 2 * limit.trim().parse::<usize>().unwrap().min(100_000);
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, (pages * PAGE_SIZE) as u64).unwrap();
        let mapping = Mapping::shared(fd.as_fd(), 0, (pages * PAGE_SIZE) as u64).unwrap();
        let table = RegionTable::with_capacity(1);
        let region = table.insert(mapping.clone()).unwrap();
        ftruncate(&fd, PAGE_SIZE as u64).unwrap();
        let before = incidents();
        for page in (1..pages).step_by(2) {
            let mut byte = [0xff];
            let offset = (page * PAGE_SIZE) as u64;
            table.read(BufferSlice { region, length: 1, offset }, &mut byte).unwrap();
            assert_eq!(byte, [0]);
        }
        assert!(mapping.poisoned());
        // Other tests lose pages, too, but not so many.
        assert!((1..100).contains(&(incidents() - before)));
    }

    #[test]
    fn a_guard_given_back_does_not_poison_the_next_mapping() {
        for _ in 0..3 {
            let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, PAGE_SIZE as u64).unwrap();
            let mapping = Mapping::shared(fd.as_fd(), 0, PAGE_SIZE as u64).unwrap();
            assert!(!mapping.poisoned());
            ftruncate(&fd, 0).unwrap();
            let table = RegionTable::with_capacity(1);
            let region = table.insert(mapping.clone()).unwrap();
            table.write(BufferSlice { region, length: 1, offset: 0 }, &[1]).unwrap();
            assert!(mapping.poisoned());
        }
    }

    /// Run by the test below in a process of its own, which it ends.
    #[test]
    fn child_touching_memory_that_nobody_guards() {
        if std::env::var_os("RESILVER_SIGBUS_CHILD").is_none() {
            return;
        }
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, PAGE_SIZE as u64).unwrap();
        // The handler is installed by the first guarded mapping.
        let _guarded = Mapping::shared(fd.as_fd(), 0, PAGE_SIZE as u64).unwrap();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        ftruncate(&fd, 0).unwrap();
        // SAFETY: mapped; the read faults, which is what the test is about.
        unsafe { address.cast::<u8>().read_volatile() };
    }

    #[test]
    fn a_bus_error_anywhere_else_ends_the_process() {
        let child = "sigbus::tests::child_touching_memory_that_nobody_guards";
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", child, "--test-threads=1"])
            .env("RESILVER_SIGBUS_CHILD", "1")
            .output()
            .unwrap()
            .status;
        assert_eq!(status.signal(), Some(libc::SIGBUS));
    }
}
