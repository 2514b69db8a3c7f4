//! A mirror between disks in memory, where the reactor does the work: what the copier moves is in proportion to what the guest asks for.

use super::*;

const DISK: u64 = 64 << 20;
const REQUEST: u64 = 4096;
const TURNS: u64 = 100;

/// Bytes that are copied beside a guest that reads so often in each turn.
fn copied_beside(depth: u64) -> u64 {
    let memory = RegionTable::with_capacity(16);
    let buffer = memory.insert(Mapping::anonymous(1 << 20).unwrap()).unwrap();
    let slice = |length: u64| BufferSlice {
        region: buffer,
        length: u32::try_from(length).unwrap(),
        offset: 0,
    };
    let disk = |name| Malloc::new(name, BLOCK, DISK / u64::from(BLOCK)).unwrap();
    let (source, target) = (disk("source"), disk("target"));
    let mut now = Nanos::ZERO;
    let mut done = CompletionBatch::with_capacity(64);

    // Zeroes would not be copied.
    memory.write(slice(1 << 20), &vec![7; 1 << 20]).unwrap();
    let mut filling = source.open_channel(1).unwrap();
    filling.attach(&Context { now, memory: &memory });
    for offset in (0..DISK).step_by(1 << 20) {
        let cx = Context { now, memory: &memory };
        let io =
            BdevIo { tag: Tag(0), kind: IoKind::Write, may_unmap: false, offset, length: 1 << 20 };
        filling.submit(&cx, io, &[slice(1 << 20)]);
        filling.poll(&cx, &mut done);
        done.clear();
    }

    let channels = MirrorChannels {
        source: source.open_channel(DISK_DEPTH).unwrap(),
        copy_source: source.open_channel(COPY_DEPTH).unwrap(),
        target: target.open_channel(DISK_DEPTH + COPY_DEPTH).unwrap(),
    };
    let mut mirror = Mirror::new(blocking(), channels).unwrap();
    let cx = Context { now, memory: &memory };
    mirror.attach(&cx);
    mirror.scanned(&cx, ScanReport::Done);
    for turn in 0..TURNS {
        now = now + Nanos::from_micros(10);
        let cx = Context { now, memory: &memory };
        for at in 0..depth {
            let offset = (turn * depth + at) * REQUEST % DISK;
            let io = BdevIo {
                tag: Tag(0),
                kind: IoKind::Read,
                may_unmap: false,
                offset,
                length: REQUEST,
            };
            mirror.submit(&cx, io, &[slice(REQUEST)]);
        }
        mirror.commit(&cx);
        done.clear();
        mirror.poll(&cx, &mut done);
    }
    assert_eq!(
        mirror.info(now).status,
        JobStatus::Running,
        "all was copied; the disk is too small"
    );
    mirror.info(now).copied_bytes
}

#[test]
fn beside_a_guest_the_copier_moves_about_as_much_as_it_and_alone_what_it_can() {
    for depth in [1, 4, 32] {
        let (copied, asked) = (copied_beside(depth), TURNS * depth * REQUEST);
        assert!(
            copied >= asked / 3 && copied <= asked * 3 / 2,
            "{copied} bytes beside {asked} at depth {depth}"
        );
    }
    assert!(copied_beside(0) > TURNS / 2 * (128 << 10), "{} bytes alone", copied_beside(0));
}
