//! Missing pages: memory that is mapped before its pages have come, because another process brings them (userfaultfd(2),
//! ioctl_userfaultfd(2)).
//!
//! Two descriptors of this kind stand between a thread and a page that its file does not have yet:
//!
//! * One that is **served**: whoever touches the page waits, the descriptor tells its reader of the fault, and the page's coming
//!   or [`Userfault::wake`] ends the wait. Only a [`FaultWindow`] is registered there, and only threads that may wait touch one.
//! * One that **refuses**: whoever touches the page gets a bus error, which the guard of [`crate::sigbus`] turns into a page of
//!   zeroes of our own and a poisoned mapping. It stands under the mappings that everybody else uses, so that a thread which
//!   must not wait never does, whatever is wrong above; and so that nobody fills a hole of the file with zeroes, which whoever
//!   brings the pages would take for the page.
//!
//! Both are for faults of user mode alone (`UFFD_USER_MODE_ONLY`, Linux 5.11), which needs no privilege; the kernel's own access to
//! a missing page, in a request on behalf of a disk, fails with `EFAULT` and does not wait either.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::mapping::{Mapping, MappingError};
use crate::usize_from;

/// `UFFD_USER_MODE_ONLY` of linux/userfaultfd.h.
const USER_MODE_ONLY: libc::c_int = 1;
/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_SIGBUS`.
const FEATURE_SIGBUS: u64 = 1 << 7;
/// `UFFDIO_REGISTER_MODE_MISSING`, `UFFDIO_REGISTER_MODE_MINOR`.
const MODE_MISSING: u64 = 1;
const MODE_MINOR: u64 = 4;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`, `_IOWR(0xaa, 0, struct uffdio_register)`, `_IOR(0xaa, 2, struct uffdio_range)`.
const IOCTL_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const IOCTL_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const IOCTL_WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
/// `_IOWR(0xaa, 7, struct uffdio_continue)`.
const IOCTL_CONTINUE: libc::Ioctl = 0xc020_aa07_u32 as libc::Ioctl;
/// Bytes of a `struct uffd_msg`, where it has the address, and the event that is a fault (`UFFD_EVENT_PAGEFAULT`).
const EVENT_BYTES: usize = 32;
const EVENT_ADDRESS: std::ops::Range<usize> = 16..24;
const EVENT_FAULT: u8 = 0x12;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_continue`.
#[repr(C)]
struct ContinueArgument {
    range: RangeArgument,
    mode: u64,
    mapped: i64,
}

/// What becomes of a thread that touches a page that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFault {
    /// It waits until somebody who reads the descriptor has brought the page.
    Wait,
    /// It gets a bus error.
    Refuse,
}

/// A userfaultfd of this process, or another one's.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Asks the kernel for one, non-blocking for its reader.
    ///
    /// # Errors
    /// The kernel has none to give: it is older than 5.11 (`EINVAL`), was built without (`ENOSYS`), or a sandbox forbids the system
    /// call (`EPERM`).
    pub fn open(on_fault: OnFault) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: a plain system call on numbers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = libc::c_int::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
        let fault = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let features = if on_fault == OnFault::Refuse { FEATURE_SIGBUS } else { 0 };
        let mut argument = ApiArgument { api: API, features, ioctls: 0 };
        fault.control(IOCTL_API, &mut argument)?;
        Ok(fault)
    }

    /// One that came from another process, whose faults are to be served here.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Another descriptor of the same, for whoever is to serve the faults.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// The address of the next fault, in the address space that the descriptor belongs to; none if nobody waits.
    #[must_use]
    pub fn next_fault(&self) -> Option<u64> {
        let mut event = [0; EVENT_BYTES];
        while rustix::io::read(&self.0, &mut event).ok()? == EVENT_BYTES {
            if event[0] == EVENT_FAULT {
                return event[EVENT_ADDRESS].try_into().ok().map(u64::from_ne_bytes);
            }
        }
        None
    }

    /// Has those that wait for a page of these bytes look again. Both numbers are multiples of the page size, and addresses of the
    /// address space that the descriptor belongs to.
    ///
    /// # Errors
    /// They are not, or that address space is gone.
    pub fn wake(&self, address: u64, length: u64) -> io::Result<()> {
        self.control(IOCTL_WAKE, &mut RangeArgument { start: address, len: length })
    }

    /// From now on touching a page of `mapping` that its file does not have, or in the other mode that is not mapped yet, is a fault
    /// of this descriptor's.
    fn register(&self, mapping: &Mapping, mode: u64) -> io::Result<()> {
        let (start, len) = mapping.extent();
        let range = RangeArgument { start: start as u64, len: len as u64 };
        // SAFETY: advice on a mapping of ours. Collapsing small pages into a huge one would fill holes; a kernel that cannot
        // does not need the advice.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_NOHUGEPAGE) };
        let mut argument = RegisterArgument { range, mode, ioctls: 0 };
        self.control(IOCTL_REGISTER, &mut argument)
    }

    fn control<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request is called with the structure that it is made of (the constants above), which outlives the call.
        // None of them has the kernel read or write memory besides: they name ranges of the address space, and what a registered
        // range does to those who touch it is safe for all accesses of this crate, which are volatile or the C library's.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// What stands under the mappings that nobody may wait in, while pages are missing. Dropped, a missing page is a page of zeroes
/// again, as in any other file.
#[derive(Debug)]
pub struct FaultRefusal(Userfault);

impl FaultRefusal {
    /// One that covers nothing yet.
    ///
    /// # Errors
    /// As [`Userfault::open`].
    pub fn new() -> io::Result<Self> {
        Userfault::open(OnFault::Refuse).map(Self)
    }

    /// Touching a page of `mapping` that its file does not have poisons it from now on.
    ///
    /// # Errors
    /// Its file's pages cannot be missing: it is not memory (a memfd, tmpfs or hugetlbfs).
    pub fn cover(&self, mapping: &Mapping) -> io::Result<()> {
        self.0.register(mapping, MODE_MISSING)
    }

    /// The same of every page that is not [admitted](FaultRefusal::admit) first, whether its file has it or not: for a simulator, where
    /// the side that brings the pages and the side that waits for them share one file.
    ///
    /// # Errors
    /// As [`FaultRefusal::cover`]; or the kernel is older than 5.14.
    pub fn cover_all(&self, mapping: &Mapping) -> io::Result<()> {
        self.0.register(mapping, MODE_MISSING | MODE_MINOR)
    }

    /// A page of a mapping that is covered, counted from the beginning of what is mapped, may be touched from now on, if its file has
    /// it.
    ///
    /// # Errors
    /// The file does not have it, or it was admitted before.
    pub fn admit(&self, mapping: &Mapping, page: usize) -> io::Result<()> {
        let (start, size) = (mapping.extent().0, mapping.page_size());
        let start = start.saturating_add(page.saturating_mul(size)) as u64;
        let range = RangeArgument { start, len: size as u64 };
        self.0.control(IOCTL_CONTINUE, &mut ContinueArgument { range, mode: 0, mapped: 0 })
    }
}

/// A second mapping of a piece of a file, whose pages are fetched by touching them. What is read there is of no interest.
#[derive(Debug)]
pub struct FaultWindow {
    mapping: Arc<Mapping>,
    faults: Arc<Userfault>,
}

impl FaultWindow {
    /// A window on what `mapping` maps, which must not be used for anything else; its faults go to the reader of `faults`.
    ///
    /// # Errors
    /// Its file's pages cannot be missing: it is not memory (a memfd, tmpfs or hugetlbfs).
    pub fn new(mapping: Arc<Mapping>, faults: Arc<Userfault>) -> Result<Self, MappingError> {
        let registered = faults.register(&mapping, MODE_MISSING);
        registered.map_err(|source| MappingError::Os { length: mapping.len() as u64, source })?;
        Ok(Self { mapping, faults })
    }

    /// Where the first byte of the mapping is, in this process: what the reader of the faults counts from.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.mapping.base().as_ptr() as u64
    }

    /// What is mapped.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Touches a page, counted from the beginning of what is mapped, and so waits until it has come, or the window is closed.
    pub fn touch(&self, page: usize) {
        let (start, len) = self.mapping.extent();
        let offset = page.saturating_mul(self.mapping.page_size());
        if offset < len {
            // SAFETY: within the mapping, which lives as long as the window; `close` maps something else there, which can be
            // read as well. What is read is dropped, so it may be torn or change.
            unsafe { ((start + offset) as *const u8).read_volatile() };
        }
    }

    /// Lets everybody go who waits in the window, now and later. The file is left as it is: whoever brings its pages finds every
    /// hole that there was. That is why the window is not just unregistered: the fault would go on and fill the hole.
    pub fn close(&self) {
        let (start, len) = self.mapping.extent();
        // SAFETY: exactly the range that the mapping owns, which nobody uses but `touch`; the mapping unmaps it later as it would
        // have before. Whoever is in a fault there is either on the descriptor's list when this returns, because mapping
        // excludes faults that are being taken, or finds the new pages.
        let mapped = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        // Where the kernel has no room for that the window stays as it is: a thread is stuck, the guest's memory is not harmed.
        if mapped != libc::MAP_FAILED {
            // It refuses only what is not aligned.
            let _ = self.faults.wake(start as u64, len as u64);
        }
    }
}

/// The page of a mapping that has its byte `offset`, as [`FaultWindow::touch`] counts.
#[must_use]
pub fn page_of(mapping: &Mapping, offset: u64) -> usize {
    let (start, _) = mapping.extent();
    let skew = mapping.base().as_ptr() as usize - start;
    skew.saturating_add(usize_from(offset)) / mapping.page_size()
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};

    use super::*;
    use crate::{BufferSlice, PAGE_SIZE, RegionTable};

    const PAGE: u64 = PAGE_SIZE as u64;

    /// Memory of four pages, of which the first is there. None where this kernel has no userfaultfd: then the reason is said.
    fn memory() -> Option<(OwnedFd, Arc<Userfault>)> {
        let faults = match Userfault::open(OnFault::Wait) {
            Ok(faults) => Arc::new(faults),
            Err(error) => {
                eprintln!("SKIPPED: userfaultfd: {error}");
                return None;
            }
        };
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 4 * PAGE).unwrap();
        rustix::io::pwrite(&fd, b"here", 0).unwrap();
        Some((fd, faults))
    }

    fn window(fd: &OwnedFd, faults: &Arc<Userfault>) -> Arc<FaultWindow> {
        let mapping = Mapping::shared(fd.as_fd(), 0, 4 * PAGE).unwrap();
        Arc::new(FaultWindow::new(mapping, Arc::clone(faults)).unwrap())
    }

    /// Whether the file has a page there.
    fn has(fd: &OwnedFd, page: u64) -> bool {
        seek(fd, SeekFrom::Data(page * PAGE)).is_ok_and(|at| at == page * PAGE)
    }

    fn touch_in_thread(window: &Arc<FaultWindow>, page: usize) -> mpsc::Receiver<()> {
        let (window, (sender, done)) = (Arc::clone(window), mpsc::channel());
        std::thread::spawn(move || {
            window.touch(page);
            let _ = sender.send(());
        });
        done
    }

    fn fault_of(faults: &Userfault) -> u64 {
        loop {
            if let Some(address) = faults.next_fault() {
                return address;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_missing_page_is_waited_for_until_it_comes() {
        let Some((fd, faults)) = memory() else { return };
        let window = window(&fd, &faults);
        window.touch(0);
        let done = touch_in_thread(&window, 2);
        let address = fault_of(&faults);
        assert_eq!(address - window.base(), 2 * PAGE);
        assert!(done.recv_timeout(Duration::from_millis(50)).is_err(), "it waits");
        rustix::io::pwrite(&fd, b"came", 2 * PAGE).unwrap();
        faults.wake(address, PAGE).unwrap();
        done.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(has(&fd, 2) && !has(&fd, 3));
    }

    #[test]
    fn a_window_that_is_closed_lets_its_waiters_go_and_leaves_the_holes() {
        let Some((fd, faults)) = memory() else { return };
        let window = window(&fd, &faults);
        let waiters = [touch_in_thread(&window, 1), touch_in_thread(&window, 3)];
        let _ = (fault_of(&faults), fault_of(&faults));
        // The monitor keeps its descriptor: closing ours would let nobody go.
        let monitor = Userfault::from_fd(faults.try_clone_fd().unwrap());
        window.close();
        for waiter in waiters {
            waiter.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        window.touch(2);
        assert!(has(&fd, 0) && !has(&fd, 1) && !has(&fd, 2) && !has(&fd, 3));
        drop((window, monitor));
    }

    #[test]
    fn who_must_not_wait_gets_zeroes_of_its_own_and_a_poisoned_mapping() {
        let Some((fd, _faults)) = memory() else { return };
        let refusal = FaultRefusal::new().unwrap();
        let mapping = Mapping::shared(fd.as_fd(), 0, 4 * PAGE).unwrap();
        refusal.cover(&mapping).unwrap();
        let table = RegionTable::with_capacity(1);
        let region = table.insert(Arc::clone(&mapping)).unwrap();
        let at = |page: u64| BufferSlice { region, length: 4, offset: page * PAGE };
        let mut bytes = [0; 4];
        table.read(at(0), &mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
        rustix::io::pwrite(&fd, b"came", PAGE).unwrap();
        table.read(at(1), &mut bytes).unwrap();
        assert_eq!((&bytes, mapping.poisoned()), (b"came", false));
        table.write(at(3), b"lost").unwrap();
        assert!(mapping.poisoned() && !has(&fd, 3));
        drop(refusal);
        table.write(at(2), b"kept").unwrap();
        assert!(has(&fd, 2), "without it a hole is filled, as in any other file");
    }

    #[test]
    fn a_page_that_is_there_and_was_not_admitted_is_refused_to_a_simulators_device() {
        let Some((fd, _faults)) = memory() else { return };
        let refusal = FaultRefusal::new().unwrap();
        let mapping = Mapping::shared(fd.as_fd(), 0, 4 * PAGE).unwrap();
        refusal.cover_all(&mapping).unwrap();
        let table = RegionTable::with_capacity(1);
        let region = table.insert(Arc::clone(&mapping)).unwrap();
        let mut bytes = [0; 4];
        refusal.admit(&mapping, 0).unwrap();
        table.read(BufferSlice { region, length: 4, offset: 0 }, &mut bytes).unwrap();
        assert_eq!((&bytes, mapping.poisoned()), (b"here", false));
        rustix::io::pwrite(&fd, b"too ", PAGE).unwrap();
        table.read(BufferSlice { region, length: 4, offset: PAGE }, &mut bytes).unwrap();
        assert_eq!((bytes, mapping.poisoned()), ([0; 4], true));
    }

    #[test]
    fn a_file_whose_pages_cannot_be_missing_is_refused() {
        let Some((_fd, faults)) = memory() else { return };
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE).unwrap();
        let is_memory = rustix::fs::fstatfs(&file).unwrap().f_type == 0x0102_1994;
        let mapping = Mapping::shared(file.as_fd(), 0, PAGE).unwrap();
        assert_eq!(FaultWindow::new(mapping, faults).is_ok(), is_memory);
    }
}
