//! What the front end says, as bytes (vhost-user document, "Message Specification" and "Front-end message types").

/// A request header: code, flags, payload length.
pub(super) const HEADER: usize = 12;
/// Header flags: the version, and the bits for a reply and the wish for one.
pub(super) const VERSION: u32 = 1;
pub(super) const VERSION_MASK: u32 = 3;
pub(super) const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// Features of the device (virtio 1.2 §6, §5.2.3) and of the protocol.
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_RO: u64 = 1 << 5;
pub(super) const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_MQ: u64 = 1 << 12;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;
pub(super) const F_INDIRECT: u64 = 1 << 28;
pub(super) const F_EVENT_INDEX: u64 = 1 << 29;
pub(super) const F_PROTOCOL: u64 = 1 << 30;
pub(super) const F_VERSION_1: u64 = 1 << 32;
pub(super) const PROTOCOL_MQ: u64 = 1 << 0;
pub(super) const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
pub(super) const PROTOCOL_CONFIG: u64 = 1 << 9;

/// Front-end message types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Message {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

impl Message {
    /// The document's name for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures => "SET_FEATURES",
            Self::SetOwner => "SET_OWNER",
            Self::SetMemTable => "SET_MEM_TABLE",
            Self::SetVringNum => "SET_VRING_NUM",
            Self::SetVringAddr => "SET_VRING_ADDR",
            Self::SetVringBase => "SET_VRING_BASE",
            Self::GetVringBase => "GET_VRING_BASE",
            Self::SetVringKick => "SET_VRING_KICK",
            Self::SetVringCall => "SET_VRING_CALL",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Self::GetQueueNum => "GET_QUEUE_NUM",
            Self::SetVringEnable => "SET_VRING_ENABLE",
            Self::GetConfig => "GET_CONFIG",
        }
    }
}

/// A header in front of `payload` bytes.
pub(super) fn header(message: Message, flags: u32, payload: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&(message as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&(VERSION | flags).to_ne_bytes());
    bytes[8..].copy_from_slice(&payload.to_ne_bytes());
    bytes
}

/// Numbers one after another.
pub(super) fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Two 32-bit numbers: a vring and its state.
pub(super) fn vring_state(index: u16, value: u32) -> Vec<u8> {
    [u32::from(index), value].iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// The 32-bit number at byte `at`; 0 beyond the end, as configuration spaces read.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u32::from_ne_bytes(*field))
}

/// The 64-bit number at byte `at`, likewise.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u64::from_ne_bytes(*field))
}
