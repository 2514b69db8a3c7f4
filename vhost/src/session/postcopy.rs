//! Where a session is in a post-copy migration, as a table (vhost-user, "Postcopy").

use std::fmt;

/// Where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostcopyState {
    /// There is none.
    Off,
    /// A migration has begun that may become one: the monitor has a userfaultfd. It stays so where the migration ends without.
    Advised,
    /// Memory that is shared arrives later; all that is in use the monitor serves.
    Listening,
    /// Memory was shared that the monitor has not said it serves: nobody may touch that.
    Mapped,
}

/// What a message does to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostcopyEvent {
    /// POSTCOPY_ADVISE.
    Advise,
    /// POSTCOPY_LISTEN.
    Listen,
    /// SET_MEM_TABLE or ADD_MEM_REG.
    Map,
    /// The acknowledgement of what was answered to those.
    Acknowledge,
    /// POSTCOPY_END.
    End,
}

/// The table. None: the message is not allowed then.
#[must_use]
pub(super) fn transition(state: PostcopyState, event: PostcopyEvent) -> Option<PostcopyState> {
    use PostcopyEvent::{Acknowledge, Advise, End, Listen, Map};
    use PostcopyState::{Advised, Listening, Mapped, Off};
    match (state, event) {
        (Off, Advise) => Some(Advised),
        (Advised, Listen) => Some(Listening),
        // Outside of post-copy memory is shared as ever.
        (Off | Advised, Map) => Some(state),
        (Listening | Mapped, Map) => Some(Mapped),
        // QEMU acknowledges a table too that has not changed, of which nothing was sent.
        (Listening | Mapped, Acknowledge) => Some(Listening),
        (Listening, End) => Some(Off),
        (Off, Listen | Acknowledge | End)
        | (Advised, Advise | Acknowledge | End)
        | (Listening | Mapped, Advise | Listen)
        | (Mapped, End) => None,
    }
}

impl PostcopyState {
    /// Whether memory that is shared arrives later.
    #[must_use]
    pub fn is_listening(self) -> bool {
        matches!(self, Self::Listening | Self::Mapped)
    }
}

impl fmt::Display for PostcopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "no post-copy migration has been advised of",
            Self::Advised => "guest memory is not arriving yet",
            Self::Listening => "guest memory is arriving",
            Self::Mapped => "memory was shared and not acknowledged",
        })
    }
}
