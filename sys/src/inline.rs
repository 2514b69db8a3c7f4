//! What one turn takes of operations that the kernel carries out on the thread that submits them.
//!
//! What is copied there all other disks of the thread wait for. So a commit takes no more than a turn should be long, and leaves
//! the rest to the next; the queues to the kernel that work so have the bounds from here.

/// The most operations of one commit.
pub(crate) const OPERATIONS: usize = 128;
/// A commit takes no further operation once it has this many bytes, whose copying takes some 60 µs: the length of a turn.
const BYTES: u64 = 1 << 20;

/// How many operations of these lengths, in their order, one commit takes: at least one, if there is one.
#[inline]
pub(crate) fn share_of_a_turn(lengths: impl Iterator<Item = u64>) -> usize {
    let (mut count, mut bytes) = (0, 0);
    for length in lengths.take(OPERATIONS) {
        if bytes >= BYTES {
            break;
        }
        bytes += length;
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_takes_what_is_short_and_few_and_one_at_least() {
        assert_eq!(share_of_a_turn([].into_iter()), 0);
        assert_eq!(share_of_a_turn(std::iter::repeat_n(4096, 21)), 21);
        assert_eq!(share_of_a_turn(std::iter::repeat_n(0, 1000)), OPERATIONS);
        assert_eq!(share_of_a_turn(std::iter::repeat_n(BYTES, 3)), 1);
        assert_eq!(share_of_a_turn([BYTES - 1, BYTES, 1].into_iter()), 2);
    }
}
