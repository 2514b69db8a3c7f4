//! The session's table and its rules, message by message.

use proptest::prelude::*;

use super::*;
use crate::blk::tests::DEVICE;

fn session() -> Session {
    Session::new(DEVICE, CacheMode::WriteBack)
}

const ADDRESSES: RingAddresses =
    RingAddresses { flags: 0, descriptors: 0x1000, used: 0x2000, available: 0x3000, log: 0 };

fn negotiated(extra: u64) -> Session {
    let mut session = session();
    let wanted = features::VERSION_1 | features::PROTOCOL_FEATURES | extra;
    session.handle(&Message::SetFeatures(wanted)).unwrap();
    session
}

/// The messages that describe ring 0, but for its kick.
fn describe(session: &mut Session) {
    for message in [
        Message::SetVringNum { index: 0, num: 128 },
        Message::SetVringBase { index: 0, base: 7 },
        Message::SetVringAddr { index: 0, addresses: ADDRESSES },
    ] {
        assert_eq!(session.handle(&message).unwrap(), []);
    }
}

const KICK: Message = Message::SetVringKick { index: 0, fd: FdPresence::Attached };
const KICKED: Action = Action::SetNotifier(0, Notifier::Kick, FdPresence::Attached);

#[test]
fn every_state_and_event_has_its_row() {
    use RingEvent::*;
    use RingState::*;
    let rows = [
        (Stopped, Size, Some((Stopped, Step::Nothing)), Some((Stopped, Step::Nothing))),
        (Stopped, Addresses, Some((Stopped, Step::Nothing)), Some((Stopped, Step::Nothing))),
        (Stopped, Base, Some((Stopped, Step::Nothing)), Some((Stopped, Step::Nothing))),
        (Stopped, Kick, Some((Kicked, Step::Nothing)), Some((Running, Step::Start))),
        (Stopped, Stop, Some((Stopped, Step::Nothing)), Some((Stopped, Step::Nothing))),
        (Kicked, Size, Some((Kicked, Step::Nothing)), Some((Running, Step::Start))),
        (Kicked, Addresses, Some((Kicked, Step::Nothing)), Some((Running, Step::Start))),
        (Kicked, Base, Some((Kicked, Step::Nothing)), Some((Running, Step::Start))),
        (Kicked, Kick, Some((Kicked, Step::Nothing)), Some((Running, Step::Start))),
        (Kicked, Stop, Some((Stopped, Step::Nothing)), Some((Stopped, Step::Nothing))),
        (Running, Size, None, None),
        (Running, Addresses, Some((Running, Step::Move)), Some((Running, Step::Move))),
        (Running, Base, None, None),
        (Running, Kick, Some((Running, Step::Nothing)), Some((Running, Step::Nothing))),
        (Running, Stop, Some((Stopped, Step::Stop)), Some((Stopped, Step::Stop))),
    ];
    for (state, event, incomplete, complete) in rows {
        assert_eq!(transition(state, event, Readiness::Incomplete), incomplete);
        assert_eq!(transition(state, event, Readiness::Complete), complete);
    }
}

#[test]
fn a_ring_starts_with_its_kick_and_stops_with_the_question_where_it_stands() {
    let mut session = negotiated(features::RING_EVENT_IDX);
    describe(&mut session);
    assert_eq!(session.handle(&KICK).unwrap(), [KICKED, Action::Start(0)]);
    let setup = session.ring(0).unwrap();
    assert_eq!((setup.size, setup.base, setup.enabled), (128, 7, Enabled::No));
    assert_eq!((setup.events, setup.indirect), (EventMode::Index, Indirect::Refused));
    let enable = Message::SetVringEnable { index: 0, enable: 1 };
    assert_eq!(session.handle(&enable).unwrap(), [Action::Enable(0, Enabled::Yes)]);
    let stop = Message::GetVringBase { index: 0 };
    assert_eq!(session.handle(&stop).unwrap(), [Action::Stop(0), Action::ReplyBase(0)]);
    session.stopped(0, 99);
    assert_eq!(session.handle(&stop).unwrap(), [Action::ReplyBase(0)]);
    assert_eq!(session.base(0), 99);
    assert_eq!(session.ring(0).unwrap().enabled, Enabled::Yes, "enable survives a stop");
}

#[test]
fn a_ring_that_was_kicked_too_soon_starts_when_all_is_known() {
    let mut session = negotiated(0);
    assert_eq!(session.handle(&KICK).unwrap(), [KICKED]);
    let size = Message::SetVringNum { index: 0, num: 256 };
    assert_eq!(session.handle(&size).unwrap(), []);
    let addresses = Message::SetVringAddr { index: 0, addresses: ADDRESSES };
    assert_eq!(session.handle(&addresses).unwrap(), [Action::Start(0)]);
    assert_eq!(session.handle(&addresses).unwrap(), [Action::Move(0)]);
    assert!(session.handle(&size).is_err());
    assert_eq!(session.ring(0).unwrap().size, 256);
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    let mut session = session();
    session.handle(&Message::SetFeatures(features::VERSION_1)).unwrap();
    describe(&mut session);
    session.handle(&KICK).unwrap();
    assert_eq!(session.ring(0).unwrap().enabled, Enabled::Yes);
}

#[test]
fn what_was_not_offered_is_refused() {
    let mut session = session();
    let unknown = 1 << 34; // packed rings
    assert_eq!(
        session.handle(&Message::SetFeatures(unknown)),
        Err(SessionError::Features { unknown })
    );
    let unknown = protocol_features::MQ << 2;
    assert_eq!(
        session.handle(&Message::SetProtocolFeatures(unknown)),
        Err(SessionError::Features { unknown })
    );
    assert_eq!(session.features(), 0);
}

#[test]
fn ring_features_stay_while_a_ring_runs_and_the_same_again_is_no_change() {
    let mut session = negotiated(features::FLUSH);
    describe(&mut session);
    session.handle(&KICK).unwrap();
    let same = session.features();
    assert_eq!(session.handle(&Message::SetFeatures(same)).unwrap(), []);
    let changed = features::RING_EVENT_IDX;
    assert_eq!(
        session.handle(&Message::SetFeatures(same | changed)),
        Err(SessionError::FeaturesInUse { changed })
    );
}

#[test]
fn rings_that_are_not_there_and_sizes_that_are_none_are_refused() {
    let mut session = negotiated(0);
    let no_ring = Err(SessionError::NoRing { index: 2, num_queues: 2 });
    assert_eq!(session.handle(&Message::GetVringBase { index: 2 }), no_ring);
    let fd = FdPresence::Absent;
    assert_eq!(session.handle(&Message::SetVringErr { index: 2, fd }), no_ring);
    for num in [0, 3, 129, 65536, u32::MAX] {
        let size = Message::SetVringNum { index: 0, num };
        assert_eq!(session.handle(&size), Err(SessionError::RingSize(num)));
    }
    assert!(session.handle(&Message::SetVringBase { index: 0, base: 65536 }).is_err());
    assert!(session.handle(&Message::SetVringEnable { index: 0, enable: 2 }).is_err());
    assert!(session.handle(&Message::SetStatus(256)).is_err());
}

#[test]
fn the_configuration_space_is_read_in_any_piece_that_exists() {
    let mut session = negotiated(0);
    let get = |offset, length| {
        Message::GetConfig(ConfigPiece { offset, flags: 0, bytes: vec![0; length] })
    };
    for (offset, length) in [(0, 60), (0, 256), (20, 4), (255, 1)] {
        let answer = session.handle(&get(offset, length)).unwrap();
        let [Action::Reply(Reply::Config(piece))] = answer.as_slice() else {
            panic!("{answer:?}");
        };
        assert_eq!((piece.offset, piece.bytes.len()), (offset, length));
    }
    for (offset, length) in [(0, 0), (256, 1), (200, 57), (u32::MAX, 2)] {
        let answer = session.handle(&get(offset, length)).unwrap();
        assert_eq!(answer, [Action::Reply(Reply::Empty)]);
    }
}

#[test]
fn only_writeback_can_be_written_and_only_where_it_was_negotiated() {
    let set = |offset, flags, bytes: &[u8]| {
        Message::SetConfig(ConfigPiece { offset, flags, bytes: bytes.to_vec() })
    };
    let mut plain = negotiated(features::FLUSH);
    assert!(plain.handle(&set(32, config_flags::WRITABLE, &[0])).is_err());
    let mut session = negotiated(features::FLUSH | features::CONFIG_WCE);
    for refused in [
        set(0, config_flags::WRITABLE, &[0]),
        set(31, config_flags::WRITABLE, &[0, 0]),
        set(32, config_flags::WRITABLE, &[]),
        set(32, 2, &[0]),
    ] {
        assert!(session.handle(&refused).is_err(), "{refused:?}");
    }
    let off = session.handle(&set(32, config_flags::WRITABLE, &[0])).unwrap();
    assert_eq!(off, [Action::SetCache(CacheMode::WriteThrough)]);
    let restored = session.handle(&set(0, config_flags::LIVE_MIGRATION, &[1; 60])).unwrap();
    assert_eq!(restored, [Action::SetCache(CacheMode::WriteBack)]);
}

/// QEMU and Cloud Hypervisor read the configuration space once, before they negotiate, and answer their guests from that copy
/// for good; so a device that was told "write through" there, or a reset that changes the mode unseen, would lose writes that
/// a guest believes to be durable.
#[test]
fn the_cache_is_always_as_its_front_end_has_read_or_written_it() {
    let get =
        Message::GetConfig(ConfigPiece { offset: WRITEBACK_OFFSET, flags: 0, bytes: vec![0] });
    let says = |session: &mut Session| match session.handle(&get).unwrap().as_slice() {
        [Action::Reply(Reply::Config(piece))] => piece.bytes[0],
        other => panic!("{other:?}"),
    };
    let wanted = features::FLUSH | features::CONFIG_WCE | features::PROTOCOL_FEATURES;
    let mut session = session();
    assert_eq!(says(&mut session), 1, "read before it is negotiated");
    let back = session.handle(&Message::SetFeatures(wanted)).unwrap();
    assert_eq!(back, [Action::SetCache(CacheMode::WriteBack)]);
    let flags = config_flags::WRITABLE;
    let off = ConfigPiece { offset: WRITEBACK_OFFSET, flags, bytes: vec![0] };
    session.handle(&Message::SetConfig(off)).unwrap();
    session.handle(&Message::SetStatus(15)).unwrap();
    for reset in [Message::SetStatus(0), Message::ResetDevice] {
        let actions = session.handle(&reset).unwrap();
        assert!(actions.contains(&Action::SetCache(CacheMode::WriteThrough)), "{actions:?}");
        assert_eq!(says(&mut session), 0);
    }
    session.handle(&Message::SetFeatures(0)).unwrap();
    let again = session.handle(&Message::SetFeatures(wanted)).unwrap();
    assert_eq!(again, [Action::SetCache(CacheMode::WriteThrough)]);
    assert_eq!(
        session.writeback(),
        CacheMode::WriteThrough,
        "what the next connection begins with"
    );
}

#[test]
fn a_reset_stops_what_runs_and_forgets_the_rings() {
    let back = Action::SetCache(CacheMode::WriteBack);
    let mut session = negotiated(features::FLUSH);
    assert_eq!(session.handle(&Message::SetStatus(0)).unwrap(), [], "nothing to reset yet");
    session.handle(&Message::SetStatus(15)).unwrap();
    describe(&mut session);
    session.handle(&KICK).unwrap();
    session.handle(&Message::SetVringEnable { index: 0, enable: 1 }).unwrap();
    assert_eq!(
        session.handle(&Message::SetStatus(0)).unwrap(),
        [Action::Stop(0), back.clone(), Action::GuestReset]
    );
    assert_eq!(session.ring(0), None);
    assert_eq!(session.running().count(), 0);
    assert_eq!(session.handle(&Message::ResetDevice).unwrap(), [back], "it is reset already");
    assert_eq!(session.handle(&Message::GetStatus).unwrap(), number(0));
}

fn fd() -> impl Strategy<Value = FdPresence> {
    prop_oneof![Just(FdPresence::Attached), Just(FdPresence::Absent)]
}

/// Any message, with rings and values that are likely to be some.
fn message() -> impl Strategy<Value = Message> {
    let index = 0u32..3;
    let feature = prop_oneof![
        Just(features::PROTOCOL_FEATURES | features::FLUSH | features::CONFIG_WCE),
        Just(features::RING_EVENT_IDX),
        any::<u64>()
    ];
    let piece = (0u32..300, 0u32..3, proptest::collection::vec(any::<u8>(), 0..70))
        .prop_map(|(offset, flags, bytes)| ConfigPiece { offset, flags, bytes });
    prop_oneof![
        feature.prop_map(Message::SetFeatures),
        Just(Message::ResetDevice),
        (0u64..20).prop_map(Message::SetStatus),
        (index.clone(), prop_oneof![Just(64u32), any::<u32>()])
            .prop_map(|(index, num)| Message::SetVringNum { index, num }),
        index.clone().prop_map(|index| Message::SetVringAddr { index, addresses: ADDRESSES }),
        (index.clone(), 0u32..70000)
            .prop_map(|(index, base)| Message::SetVringBase { index, base }),
        index.clone().prop_map(|index| Message::GetVringBase { index }),
        (index.clone(), fd()).prop_map(|(index, fd)| Message::SetVringKick { index, fd }),
        (index.clone(), fd()).prop_map(|(index, fd)| Message::SetVringCall { index, fd }),
        (index, 0u32..3).prop_map(|(index, enable)| Message::SetVringEnable { index, enable }),
        piece.clone().prop_map(Message::GetConfig),
        piece.prop_map(Message::SetConfig),
    ]
}

proptest! {
    /// Whatever a front end says in whatever order: the data side is told to start only what is stopped and known, to stop
    /// only what runs, and a message that is refused changes nothing.
    #[test]
    fn the_data_side_is_told_nothing_that_makes_no_sense(
        messages in proptest::collection::vec(message(), 0..60),
    ) {
        let mut session = session();
        let mut running = [false; 2];
        for message in messages {
            let before = format!("{session:?}");
            match session.handle(&message) {
                Err(_) => prop_assert_eq!(before, format!("{session:?}")),
                Ok(actions) => for action in actions {
                    match action {
                        Action::Start(queue) => {
                            let setup = session.ring(queue).unwrap();
                            prop_assert!(setup.size.is_power_of_two());
                            prop_assert!(!std::mem::replace(&mut running[usize::from(queue)], true));
                        }
                        Action::Stop(queue) => {
                            prop_assert!(std::mem::replace(&mut running[usize::from(queue)], false));
                        }
                        Action::Move(queue) => prop_assert!(running[usize::from(queue)]),
                        _ => {}
                    }
                }
            }
            let told: Vec<u16> = (0..2).filter(|queue| running[usize::from(*queue)]).collect();
            prop_assert_eq!(session.running().collect::<Vec<_>>(), told);
        }
    }
}

#[test]
fn the_log_is_switched_while_rings_run_and_answered_where_it_is_shared_memory() {
    let mut session = negotiated(0);
    describe(&mut session);
    session.handle(&KICK).unwrap();
    let log = Message::SetLogBase { size: 4096, offset: 64 };
    let set = || Action::SetLog { offset: 64, size: 4096 };
    assert_eq!(session.handle(&log).unwrap(), [set()]);
    let protocol = Message::SetProtocolFeatures(protocol_features::LOG_SHMFD);
    session.handle(&protocol).unwrap();
    assert_eq!(session.handle(&log).unwrap(), [set(), Action::Reply(Reply::U64(0))]);
    let base = features::VERSION_1 | features::PROTOCOL_FEATURES;
    for (wanted, logged) in [(base | features::LOG_ALL, true), (base, false)] {
        let actions = session.handle(&Message::SetFeatures(wanted)).unwrap();
        assert!(actions.contains(&Action::SetLogging), "{actions:?}");
        assert_eq!(session.is_logged(), logged);
    }
    let again = session.handle(&Message::SetFeatures(base)).unwrap();
    assert_eq!(again, [], "nothing has changed");
}

#[test]
fn the_device_state_is_transferred_while_rings_are_stopped_and_refusals_are_always_answered() {
    let set = |direction, phase| Message::SetDeviceStateFd { direction, phase };
    let mut session = negotiated(0);
    let refused = session.handle(&set(device_state::SAVE, 0));
    assert_eq!(refused, Err(SessionError::NotNegotiated("SET_DEVICE_STATE_FD")));
    session.handle(&Message::SetProtocolFeatures(protocol_features::DEVICE_STATE)).unwrap();
    assert_eq!(session.handle(&set(device_state::SAVE, 0)).unwrap(), [Action::SaveState]);
    assert_eq!(session.handle(&set(device_state::LOAD, 0)).unwrap(), [Action::LoadState]);
    assert_eq!(session.handle(&Message::CheckDeviceState).unwrap(), [Action::CheckState]);
    for (direction, phase) in [(2, 0), (0, 1), (u32::MAX, u32::MAX)] {
        let refused = session.handle(&set(direction, phase));
        assert!(matches!(refused, Err(SessionError::Value { .. })), "{direction} {phase}");
    }
    describe(&mut session);
    session.handle(&KICK).unwrap();
    assert_eq!(session.handle(&set(device_state::LOAD, 0)), Err(SessionError::StateInUse));
    assert_eq!(refusal(request::SET_DEVICE_STATE_FD, false), Some(Reply::U64(0x101)));
    assert_eq!(refusal(request::CHECK_DEVICE_STATE, false), Some(Reply::U64(1)));
    assert_eq!(refusal(request::SET_VRING_NUM, false), None);
    assert_eq!(refusal(request::SET_VRING_NUM, true), Some(Reply::U64(1)));
}

/// How often the guest has reset its device while these messages were handled.
fn guest_resets(session: &mut Session, messages: &[Message]) -> usize {
    let mut count = 0;
    for message in messages {
        let actions = session.handle(message).unwrap();
        count += actions.iter().filter(|action| **action == Action::GuestReset).count();
    }
    count
}

#[test]
fn a_guest_has_reset_its_device_when_qemu_says_so_and_not_when_it_connects_or_pauses() {
    let mut session = negotiated(0);
    let protocol = protocol_features::STATUS | protocol_features::RESET_DEVICE;
    session.handle(&Message::SetProtocolFeatures(protocol)).unwrap();
    // As QEMU 10.0 sends it, but for what does not matter here.
    let connects = [Message::ResetDevice, Message::ResetDevice, Message::SetStatus(8)];
    let starts = [
        Message::SetVringNum { index: 0, num: 128 },
        Message::SetVringBase { index: 0, base: 0 },
        Message::SetVringAddr { index: 0, addresses: ADDRESSES },
        KICK,
        Message::SetVringEnable { index: 0, enable: 1 },
        Message::SetStatus(15),
    ];
    let stops = [
        Message::SetVringEnable { index: 0, enable: 0 },
        Message::GetVringBase { index: 0 },
        Message::SetStatus(0),
    ];
    let resets = [Message::ResetDevice, Message::ResetDevice, Message::ResetDevice];
    assert_eq!(guest_resets(&mut session, &connects), 0, "there is no guest yet");
    assert_eq!(guest_resets(&mut session, &starts), 0);
    assert_eq!(guest_resets(&mut session, &stops), 0, "paused");
    assert_eq!(guest_resets(&mut session, &starts), 0, "goes on");
    assert_eq!(guest_resets(&mut session, &stops), 0);
    assert_eq!(guest_resets(&mut session, &resets), 1, "reset");
    assert_eq!(guest_resets(&mut session, &starts), 0);
    // A front end without RESET_DEVICE has nothing else to say it with.
    session.handle(&Message::SetProtocolFeatures(protocol_features::STATUS)).unwrap();
    assert_eq!(guest_resets(&mut session, &stops), 1);
}

#[test]
fn every_state_and_event_of_a_post_copy_migration_has_its_row() {
    use PostcopyEvent::*;
    use PostcopyState::*;
    let rows = [
        (Off, [Some(Advised), None, Some(Off), None, None]),
        (Advised, [None, Some(Listening), Some(Advised), None, None]),
        (Listening, [None, None, Some(Mapped), Some(Listening), Some(Off)]),
        (Mapped, [None, None, Some(Mapped), Some(Listening), None]),
    ];
    for (state, becomes) in rows {
        for (event, expected) in [Advise, Listen, Map, Acknowledge, End].into_iter().zip(becomes) {
            assert_eq!(postcopy::transition(state, event), expected, "{state:?} {event:?}");
        }
    }
}

const REGION: RegionDescription =
    RegionDescription { guest_address: 0, size: 4096, user_address: 4096, file_offset: 0 };

/// A session whose operator trusts the monitor, and whose monitor has said so.
fn may_do_postcopy() -> Session {
    let device = BlkDevice { postcopy: true, ..DEVICE };
    let mut session = Session::new(device, CacheMode::WriteBack);
    let wanted = Message::SetProtocolFeatures(protocol_features::PAGEFAULT);
    assert_eq!(session.handle(&wanted).unwrap(), []);
    session
}

#[test]
fn a_post_copy_migration_goes_its_way_message_by_message() {
    let mut session = may_do_postcopy();
    let (table, slot) = (Message::SetMemTable(vec![REGION]), Message::AddMemReg(REGION));
    let empty = Message::SetMemTable(vec![]);
    let ack = |of| Message::MemoryAck { of, result: 0 };
    let does = |session: &mut Session, message: &Message| session.handle(message).unwrap();
    assert_eq!(does(&mut session, &Message::PostcopyAdvise), [Action::Advise]);
    assert_eq!(does(&mut session, &table), [Action::SetMemory(vec![REGION])], "not yet");
    assert_eq!(does(&mut session, &Message::PostcopyListen), [Action::Listen]);
    assert_eq!(does(&mut session, &ack(request::NONE)), [Action::UseStaged], "of nothing");
    assert_eq!(does(&mut session, &table), [Action::StageMemory(vec![REGION])]);
    assert_eq!(does(&mut session, &empty), [Action::UseStaged]);
    assert_eq!(does(&mut session, &empty), [Action::StageMemory(vec![])], "a table like any other");
    assert_eq!(does(&mut session, &slot), [Action::StageRegion(REGION)]);
    assert_eq!(does(&mut session, &slot), [Action::StageRegion(REGION)]);
    assert_eq!(does(&mut session, &ack(request::ADD_MEM_REG)), [Action::UseStaged]);
    let end = [Action::EndPostcopy, Action::Reply(Reply::U64(0))];
    assert_eq!(does(&mut session, &Message::PostcopyEnd), end);
    assert_eq!(does(&mut session, &table), [Action::SetMemory(vec![REGION])], "as ever");
    assert_eq!(does(&mut session, &Message::PostcopyAdvise), [Action::Advise], "once more");
}

#[test]
fn what_comes_at_the_wrong_time_in_a_post_copy_migration_changes_nothing() {
    let mut session = session();
    let advise = session.handle(&Message::PostcopyAdvise);
    assert_eq!(advise, Err(SessionError::NotNegotiated("POSTCOPY_ADVISE")));
    let wanted = Message::SetProtocolFeatures(protocol_features::PAGEFAULT);
    assert!(session.handle(&wanted).is_err(), "it is not offered by itself");

    let mut session = may_do_postcopy();
    let ack = Message::MemoryAck { of: request::ADD_MEM_REG, result: 0 };
    let refused = |session: &mut Session, messages: &[&Message]| {
        for message in messages {
            let state = session.postcopy();
            assert_eq!(session.handle(message), Err(SessionError::Postcopy(state)), "{message:?}");
            assert_eq!(session.postcopy(), state);
        }
    };
    let (advise, listen, end) =
        (&Message::PostcopyAdvise, &Message::PostcopyListen, &Message::PostcopyEnd);
    refused(&mut session, &[listen, end, &ack]);
    session.handle(advise).unwrap();
    refused(&mut session, &[advise, end, &ack]);
    session.handle(listen).unwrap();
    refused(&mut session, &[advise, listen]);
    session.handle(&Message::AddMemReg(REGION)).unwrap();
    refused(&mut session, &[advise, listen, end]);
    let bad = Message::MemoryAck { of: request::ADD_MEM_REG, result: 1 };
    assert!(matches!(session.handle(&bad), Err(SessionError::Value { value: 1, .. })));
    assert_eq!(session.postcopy(), PostcopyState::Mapped);
    session.undo_postcopy(PostcopyState::Listening);
    session.handle(end).unwrap();
}
