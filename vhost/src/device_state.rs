//! What a device is besides its disk and its guest's memory, as bytes that another back end can go on with (vhost-user,
//! "Migrating back-end state").
//!
//! A front end has it saved while all rings are stopped, carries it to where the guest goes, and has it loaded there. It is
//! little: the disk itself is shared, and rings are the front end's to carry. It also says which disk it was, so that a guest
//! never goes on with another one.
//!
//! The layout, little-endian: `RESILVER`, version u16, length u16, block size u32, capacity in bytes u64, negotiated features
//! u64, serial 20 bytes, status u8, writeback u8, two bytes of zero, CRC-32 of all before. A later version may append
//! behind the zeroes; this one reads only its own.
//!
//! Fault model: the bytes come from a front end and may be anything. Nothing is used before all of it was found good.

use crate::blk::{BlkDevice, CacheMode, Serial};
use crate::protocol::features;

/// Bytes of a state.
pub const STATE_BYTES: usize = 60;
const MAGIC: [u8; 8] = *b"RESILVER";
const VERSION: u16 = 1;
/// Features that are of the connection and not of the guest.
const OF_CONNECTION: u64 = features::LOG_ALL | features::PROTOCOL_FEATURES;

/// Why a state was not loaded. The device is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Too short, or too long.
    #[error("a device state of {0} bytes is not of {STATE_BYTES}")]
    Length(usize),
    /// Not a state of ours.
    #[error("these bytes are no device state of Resilver's")]
    Foreign,
    /// Of another version.
    #[error(
        "the device state has version {0}, and only {VERSION} can be read; load it into the version that it came from"
    )]
    Version(u16),
    /// Its checksum does not match.
    #[error("the device state is damaged: its checksum does not match")]
    Damaged,
    /// A field has a value that no state has.
    #[error("the device state is malformed: {0} is {1}")]
    Field(&'static str, u64),
    /// It is of another disk.
    #[error(
        "the device state is of another disk: its {what} is {theirs} and here it is {ours}; connect the guest to the controller \
         of its own disk"
    )]
    OtherDisk {
        /// What differs.
        what: &'static str,
        /// In the state.
        theirs: u64,
        /// Here.
        ours: u64,
    },
    /// The serials differ.
    #[error(
        "the device state is of the disk with serial '{0}', and this is '{1}'; give both controllers the same serial"
    )]
    OtherSerial(Serial, Serial),
    /// The guest uses what is not offered here.
    #[error("the guest uses features {0:#x}, which this device does not have")]
    Features(u64),
}

/// The state of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceState {
    /// Bytes of a block.
    pub block_size: u32,
    /// Bytes of the disk.
    pub capacity: u64,
    /// What the guest has negotiated.
    pub features: u64,
    /// What GET_ID answers.
    pub serial: Serial,
    /// The virtio status (SET_STATUS).
    pub status: u8,
    /// What the guest wants of the cache.
    pub writeback: CacheMode,
}

impl DeviceState {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u16::try_from(STATE_BYTES).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend(self.block_size.to_le_bytes());
        bytes.extend(self.capacity.to_le_bytes());
        bytes.extend((self.features & !OF_CONNECTION).to_le_bytes());
        bytes.extend(self.serial.0);
        bytes.extend([self.status, u8::from(self.writeback == CacheMode::WriteBack), 0, 0]);
        bytes.extend(crc32(&bytes).to_le_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// It is not a whole and sound state of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader(bytes);
        let short = StateError::Length(bytes.len());
        if reader.take::<8>().ok_or(short)? != MAGIC {
            return Err(StateError::Foreign);
        }
        let version = u16::from_le_bytes(reader.take().ok_or(short)?);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let length = u16::from_le_bytes(reader.take().ok_or(short)?);
        if bytes.len() != STATE_BYTES || usize::from(length) != STATE_BYTES {
            return Err(short);
        }
        let (before, checksum) = bytes.split_last_chunk().ok_or(short)?;
        if crc32(before) != u32::from_le_bytes(*checksum) {
            return Err(StateError::Damaged);
        }
        let block_size = u32::from_le_bytes(reader.take().ok_or(short)?);
        let capacity = u64::from_le_bytes(reader.take().ok_or(short)?);
        let features = u64::from_le_bytes(reader.take().ok_or(short)?);
        let serial = Serial(reader.take().ok_or(short)?);
        let [status, writeback, _, _] = reader.take().ok_or(short)?;
        let writeback = match writeback {
            0 => CacheMode::WriteThrough,
            1 => CacheMode::WriteBack,
            other => return Err(StateError::Field("writeback", u64::from(other))),
        };
        Ok(Self { block_size, capacity, features, serial, status, writeback })
    }

    /// Whether a guest of this state can go on with `device`, whose serial is `serial`.
    ///
    /// # Errors
    /// It is another disk, or lacks what the guest uses.
    pub fn fits(&self, device: &BlkDevice, serial: Serial) -> Result<(), StateError> {
        let (block_size, capacity) = (device.limits.block_size, device.limits.size());
        if self.serial != serial {
            return Err(StateError::OtherSerial(self.serial, serial));
        }
        for (what, theirs, ours) in [
            ("block size", u64::from(self.block_size), u64::from(block_size)),
            ("capacity", self.capacity, capacity),
        ] {
            if theirs != ours {
                return Err(StateError::OtherDisk { what, theirs, ours });
            }
        }
        match self.features & !device.features() {
            0 => Ok(()),
            unknown => Err(StateError::Features(unknown)),
        }
    }
}

/// What has not been read yet.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }
}

/// CRC-32 as Ethernet has it (reflected, polynomial 0x04c11db7), bit by bit: for a few bytes once in a migration.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    let whole = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
    !bytes.iter().fold(u32::MAX, whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::tests::DEVICE;
    use proptest::prelude::*;

    fn state() -> DeviceState {
        DeviceState {
            block_size: 512,
            capacity: 2048 * 512,
            features: features::VERSION_1 | features::FLUSH,
            serial: Serial::new("vm1"),
            status: 15,
            writeback: CacheMode::WriteThrough,
        }
    }

    #[test]
    fn a_state_comes_back_as_it_went_and_fits_its_own_disk() {
        let bytes = state().encode();
        assert_eq!(bytes.len(), STATE_BYTES);
        assert_eq!(DeviceState::decode(&bytes), Ok(state()));
        assert_eq!(state().fits(&DEVICE, state().serial), Ok(()));
        let logged = DeviceState { features: state().features | features::LOG_ALL, ..state() };
        assert_eq!(DeviceState::decode(&logged.encode()), Ok(state()), "a migration is no feature");
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn another_disk_is_refused() {
        let serial = state().serial;
        let refused = |state: DeviceState| state.fits(&DEVICE, serial).unwrap_err();
        let other = Serial::new("vm2\n");
        assert_eq!(
            refused(DeviceState { serial: other, ..state() }).to_string(),
            "the device state is of the disk with serial 'vm2\\n', and this is 'vm1'; give both controllers the same serial"
        );
        for state in [
            DeviceState { capacity: 1 << 30, ..state() },
            DeviceState { block_size: 4096, ..state() },
        ] {
            assert!(matches!(refused(state), StateError::OtherDisk { .. }));
        }
        let unknown = 1 << 40;
        let state = DeviceState { features: state().features | unknown, ..state() };
        assert_eq!(refused(state), StateError::Features(unknown));
    }

    #[test]
    fn what_is_no_state_is_told_apart() {
        let bytes = state().encode();
        let mut other = bytes.clone();
        other[0] = 0;
        assert_eq!(DeviceState::decode(&other), Err(StateError::Foreign));
        other = bytes.clone();
        other[8] = 2;
        assert_eq!(DeviceState::decode(&other), Err(StateError::Version(2)));
        other = bytes.clone();
        other.push(0);
        assert_eq!(DeviceState::decode(&other), Err(StateError::Length(STATE_BYTES + 1)));
        other = bytes.clone();
        other[53] = 7;
        let (before, _) = other.split_at(STATE_BYTES - 4);
        let checksum = crc32(before).to_le_bytes();
        other[STATE_BYTES - 4..].copy_from_slice(&checksum);
        assert_eq!(DeviceState::decode(&other), Err(StateError::Field("writeback", 7)));
        for length in 0..STATE_BYTES {
            assert!(DeviceState::decode(&bytes[..length]).is_err());
        }
    }

    proptest! {
        /// Whatever arrives is a state or an error; one damaged byte is always noticed.
        #[test]
        fn damage_is_noticed(at in 0..STATE_BYTES, damage in 1u8.., noise: Vec<u8>) {
            let mut bytes = state().encode();
            bytes[at] ^= damage;
            prop_assert!(DeviceState::decode(&bytes).is_err());
            prop_assert!(DeviceState::decode(&noise).is_err());
        }
    }
}
