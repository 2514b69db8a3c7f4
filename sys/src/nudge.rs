//! Nudging a thread out of a system call that does not return.
//!
//! A peer's event descriptor is written without waiting because it is non-blocking, but the flag is the peer's too: a virtual
//! machine monitor that fills the counter and takes the flag away would stop the reactor that interrupts its guest, and
//! with it every guest of that reactor. There is no write to an event descriptor that cannot wait (`RWF_NOWAIT` is not
//! for them; a descriptor cannot be opened again; io_uring hands the write to a worker thread, several microseconds each time).
//! So the write is left as it is, and a thread that makes no progress is sent a signal whose handler does nothing: a call
//! that waits returns `EINTR`, one that does not wait is not disturbed. It costs nothing until it is needed.

use std::io;
use std::sync::OnceLock;

/// What is sent. Ignored where nobody handles it, and used for nothing else here.
const SIGNAL: libc::c_int = libc::SIGURG;

/// Whether the handler was installed, or the `errno` that says why not.
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// A thread that can be nudged.
#[derive(Debug, Clone, Copy)]
pub struct Nudge(libc::pid_t);

impl Nudge {
    /// The calling thread.
    ///
    /// # Errors
    /// The kernel takes no handler.
    pub fn current() -> io::Result<Self> {
        (*INSTALLED.get_or_init(install)).map_err(io::Error::from_raw_os_error)?;
        // SAFETY: a plain system call without arguments.
        Ok(Self(unsafe { libc::gettid() }))
    }

    /// Ends the system call that the thread waits in, if it waits in one now. To be done again if that was a moment too early.
    pub fn nudge(self) {
        // SAFETY: a plain system call on numbers. A thread that has gone is an error; if its number belongs to another
        // thread of this process by now, that one is nudged for nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, SIGNAL) };
    }
}

fn install() -> Result<(), i32> {
    // SAFETY: a zeroed sigaction is a valid value: an empty mask and no flags, so without SA_RESTART.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    // SAFETY: `action` is initialised and its handler has the signature of one without SA_SIGINFO.
    let result = unsafe { libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()) };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
}

extern "C" fn nothing(_signal: libc::c_int) {}
