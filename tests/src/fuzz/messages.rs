//! A front end that sends what it likes: the codec and the session's state machine.
//!
//! Properties: whatever arrives decodes or is refused, and what decodes says the same when it is encoded again; a message that is
//! refused leaves the session as it was; every message with an answer of its own gets exactly one, no other gets two; a ring
//! is started when it is stopped and complete, moved and stopped only while it runs, and the session's own account of which
//! rings run is the one that follows from what it told the data side.

use resilver_bdev::Limits;
use resilver_vhost::blk::{BlkDevice, CacheMode};
use resilver_vhost::message::{Header, Reply, decode};
use resilver_vhost::protocol::{BODY_BYTES_MAX, HEADER_BYTES, RING_SIZE_MAX, flags};
use resilver_vhost::session::{Action, Session, has_reply};

use super::Input;

/// Queues of the device.
const QUEUES: u16 = 4;
/// Messages of one program.
const STEPS: usize = 256;

const LIMITS: Limits = Limits {
    block_size: 512,
    num_blocks: 1 << 20,
    max_transfer: 1 << 20,
    max_segments: 128,
    max_unmap: 1 << 20,
    unmap: true,
    zeroes_unmap: true,
    optimal_io: 4096,
    read_only: false,
};

/// A message as it comes off the socket: its number, its body, and how many descriptors.
pub(super) fn message(input: &mut Input<'_>) -> (u32, Vec<u8>, usize) {
    let request = match input.u8() {
        255 => input.u32(),
        request => u32::from(request % 48),
    };
    let descriptors = usize::from(input.u8() % 10);
    let mut body = Vec::new();
    for _ in 0..input.u8() % 80 {
        // A field, or bytes.
        match input.u8() {
            small @ 0..=63 => body.extend(u32::from(small).to_ne_bytes()),
            power @ 64..=127 => body.extend((1u64 << (power - 64)).to_ne_bytes()),
            128..=159 => body.extend([0; 8]),
            160..=191 => body.extend(input.u64().to_ne_bytes()),
            192..=223 => body.extend(input.u32().to_ne_bytes()),
            length => body.extend(input.bytes(usize::from(length - 223))),
        }
    }
    body.truncate(BODY_BYTES_MAX);
    (request, body, descriptors)
}

/// Whether the two sides of the codec agree on an answer.
fn check_reply(request: u32, reply: &Reply) {
    let bytes = reply.encode(request);
    let (head, body) = bytes.split_first_chunk().expect("a header");
    let header = Header::decode(head).expect("our own header");
    assert!(header.is_reply() && header.request == request && header.size as usize == body.len());
    assert_eq!(Reply::decode(request, body).as_ref(), Ok(reply), "message {request}");
}

/// A session, and what a data side knows of it.
struct Bench {
    session: Session,
    running: [bool; QUEUES as usize],
}

impl Bench {
    fn take(&mut self, request: u32, body: &[u8], descriptors: usize) {
        let Ok(message) = decode(request, body, descriptors) else { return };
        let again = message.encode(flags::NEED_REPLY);
        let (head, again) = again.split_first_chunk::<HEADER_BYTES>().expect("a header");
        let header = Header::decode(head).expect("our own header");
        assert!(header.request == request && header.needs_reply());
        let fds = message.descriptors();
        assert_eq!(decode(request, again, fds).as_ref(), Ok(&message), "encoded again");

        let before = format!("{:?}", self.session);
        let actions = match self.session.handle(&message) {
            Ok(actions) => actions,
            Err(error) => {
                let after = format!("{:?}", self.session);
                assert_eq!(
                    before, after,
                    "{message:?} was refused ({error}) and changed something"
                );
                return;
            }
        };
        let replies = actions.iter().filter(|action| self.carry_out(request, action)).count();
        let owed = usize::from(has_reply(request));
        assert!(replies <= 1 && replies >= owed, "{replies} answers to {message:?}");
        for action in &actions {
            // As the connection does once the data side has stopped the ring.
            if let Action::Stop(queue) = action {
                self.session.stopped(*queue, 7);
                assert_eq!(self.session.base(*queue), 7);
            }
        }
        let running = (0..).zip(&self.running).filter(|(_, runs)| **runs).map(|(queue, _)| queue);
        assert!(running.eq(self.session.running()), "{message:?}: {:?}", self.running);
    }

    /// Does what the data side would; true for an answer.
    fn carry_out(&mut self, request: u32, action: &Action) -> bool {
        match action {
            Action::Start(queue) => {
                let ring = self.session.ring(*queue).expect("a complete ring");
                // Whether it suits its format the ring says when it is made: features may have changed since it was told.
                assert!((1..=RING_SIZE_MAX).contains(&ring.size));
                assert!(!self.replace(*queue, true), "ring {queue} runs already");
            }
            Action::Stop(queue) => {
                assert!(self.replace(*queue, false), "ring {queue} does not run");
            }
            Action::Move(queue) => assert!(self.running[usize::from(*queue)]),
            Action::Reply(reply) => check_reply(request, reply),
            Action::StageMemory(regions) => {
                check_reply(request, &Reply::MemTable(regions.clone()));
            }
            Action::StageRegion(region) => check_reply(request, &Reply::MemSlot(*region)),
            Action::Advise => check_reply(request, &Reply::Empty),
            _ => {}
        }
        matches!(
            action,
            Action::Reply(_)
                | Action::ReplyBase(_)
                | Action::MakeInflight(..)
                | Action::SaveState
                | Action::LoadState
                | Action::CheckState
                | Action::Advise
                | Action::StageMemory(_)
                | Action::StageRegion(_)
        )
    }

    fn replace(&mut self, queue: u16, runs: bool) -> bool {
        std::mem::replace(&mut self.running[usize::from(queue)], runs)
    }
}

/// Runs one program.
pub fn messages(data: &[u8]) {
    let mut input = Input::new(data);
    let read_only = input.flag();
    let device = BlkDevice {
        limits: LIMITS,
        read_only,
        num_queues: QUEUES,
        packed_ring: true,
        postcopy: true,
    };
    let session = Session::new(device, CacheMode::WriteBack);
    let mut bench = Bench { session, running: [false; QUEUES as usize] };
    let header = input.bytes(HEADER_BYTES);
    if let Some(header) = header.first_chunk() {
        let _ = Header::decode(header);
    }
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let (request, body, descriptors) = message(&mut input);
        bench.take(request, &body, descriptors);
    }
}
