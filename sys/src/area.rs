//! Areas: fixed pieces of shared memory that are read and written word by word, such as the parts of a virtqueue.
//!
//! An [`Area`] keeps its mapping alive and resolves its address once, so that polling a ring costs one load. Every access
//! is checked against the area's length and alignment; what the other side wrote there is an allegation all the same.
//!
//! Ordering: `load_acquire` pairs with the other side's release store of an index, `store_release` with its acquire load.
//! Everything else is relaxed: descriptor contents are ordered by the index that publishes them.
//!
//! With the feature `model` an area is a piece of a model checker's memory instead (`area/model.rs`), so that the code above,
//! as it stands, is run in every order that the memory model allows.

#[cfg(all(feature = "model", not(debug_assertions)))]
compile_error!(
    "the feature `model` is for tests: what is built with it shares no memory with a guest"
);

#[cfg(feature = "model")]
mod model;
#[cfg(not(feature = "model"))]
mod shared;

#[cfg(feature = "model")]
pub use model::{Area, fence, without_fences};
#[cfg(not(feature = "model"))]
pub use shared::{Area, fence};

/// Why an area was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AreaError {
    /// It leaves its mapping.
    #[error("the area leaves its mapping")]
    OutOfBounds,
    /// Its address is not a multiple of the alignment asked for.
    #[error("the area is not aligned to {0} bytes")]
    Misaligned(usize),
}
