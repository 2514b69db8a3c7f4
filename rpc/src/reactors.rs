//! The reactors of a target, and which of them a disk is put on.

use std::rc::Weak;
use std::time::Duration;

use resilver_reactor::{Idle, Reactor, ReactorConfig, ReactorError, ReactorHandle};
use serde_json::json;

use crate::error::RpcError;
use crate::target::Target;

/// Cores by number: bit `n` stands for core `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuMask(u128);

impl CpuMask {
    /// The largest core number and one.
    pub const CORES: usize = 128;

    /// Reads a mask as SPDK writes it: hexadecimal with or without `0x`, or a list such as `[0,2-3]`; and the list without
    /// brackets, as Linux writes it, where `list` says that it cannot be a number.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if let Some(list) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            return Self::parse_list(list);
        }
        let digits = text.strip_prefix("0x").or(text.strip_prefix("0X")).unwrap_or(text);
        match u128::from_str_radix(digits, 16) {
            Ok(0) => Err("the mask names no core".into()),
            Ok(mask) => Ok(Self(mask)),
            Err(_) => Err("a hexadecimal mask such as 0x6, or a list such as [1,2]".into()),
        }
    }

    /// Reads a list of cores: `0`, `2-3`, `0,2-3`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse_list(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            let core = text.trim().parse::<usize>().ok().filter(|core| *core < Self::CORES);
            core.ok_or_else(|| {
                format!(
                    "'{text}' is not a core; write a list such as 0,2-3 of cores below {}",
                    Self::CORES
                )
            })
        };
        let mut mask = 0;
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(format!("'{part}' runs backwards"));
            }
            for core in first..=last {
                mask |= 1 << core;
            }
        }
        Ok(Self(mask))
    }

    /// Whether the core is in it.
    #[must_use]
    pub fn contains(self, core: usize) -> bool {
        core < Self::CORES && self.0 >> core & 1 == 1
    }

    /// The cores in it.
    pub fn cores(self) -> impl Iterator<Item = usize> {
        (0..Self::CORES).filter(move |core| self.contains(*core))
    }
}

/// A mask of one core, as SPDK writes it.
pub(crate) fn mask_of(core: usize) -> String {
    let bit = u32::try_from(core).ok().and_then(|core| 1_u128.checked_shl(core));
    format!("{:x}", bit.unwrap_or(0))
}

/// The running reactors.
#[derive(Debug)]
pub struct Reactors {
    reactors: Vec<Reactor>,
    idle: Idle,
}

impl Reactors {
    /// Starts one reactor on each core, or a single one that is not pinned where no cores are named.
    ///
    /// # Errors
    /// A core cannot be used, or the kernel refuses a thread.
    pub fn start(cores: Option<CpuMask>, idle: Idle) -> Result<Self, ReactorError> {
        let pins: Vec<Option<usize>> = match cores {
            Some(mask) => mask.cores().map(Some).collect(),
            None => vec![None],
        };
        let start = |core: Option<usize>| {
            Reactor::start(ReactorConfig { core, idle, ..ReactorConfig::default() }, 0)
        };
        let reactors = pins.into_iter().map(start).collect::<Result<_, _>>()?;
        Ok(Self { reactors, idle })
    }

    /// How they idle.
    #[must_use]
    pub fn idle(&self) -> Idle {
        self.idle
    }

    /// Control's sides of them.
    pub fn handles(&self) -> impl Iterator<Item = &ReactorHandle> {
        self.reactors.iter().map(Reactor::handle)
    }

    /// The reactor with the fewest disks among those that the mask allows. `load` counts the disks on a core.
    pub(crate) fn place(
        &self,
        mask: Option<CpuMask>,
        load: impl Fn(usize) -> usize,
    ) -> Result<&ReactorHandle, RpcError> {
        let allowed = |it: &&ReactorHandle| mask.is_none_or(|mask| mask.contains(it.core()));
        let best = self.handles().filter(allowed).min_by_key(|it| load(it.core()));
        best.ok_or_else(|| {
            let cores: Vec<usize> = self.handles().map(ReactorHandle::core).collect();
            let mask = mask.map_or(0, |mask| mask.0);
            let mut error = RpcError::parameter(
                "cpumask",
                format!("{mask:#x}"),
                format!(
                    "a mask that contains one of the reactors' cores {cores:?} (serve --cores)"
                ),
            );
            if let Some(data) = &mut error.data {
                data["cores"] = json!(cores);
            }
            error
        })
    }
}

/// How often is looked whether a reactor makes progress.
const WATCH: Duration = Duration::from_millis(100);

/// Gets reactors out of system calls that a front end makes wait, for as long as there is a target.
pub(crate) async fn watch(target: Weak<Target>) {
    let mut turns = Vec::new();
    loop {
        tokio::time::sleep(WATCH).await;
        let Some(target) = target.upgrade() else { return };
        turns.resize(target.reactors.handles().count(), 0);
        for (handle, turns) in target.reactors.handles().zip(&mut turns) {
            *turns = handle.nudge_if_stuck(*turns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cores(mask: Result<CpuMask, String>) -> Vec<usize> {
        mask.unwrap().cores().collect()
    }

    #[test]
    fn masks_are_read_as_spdk_writes_them_and_lists_as_linux_does() {
        assert_eq!(cores(CpuMask::parse("0x6")), [1, 2]);
        assert_eq!(cores(CpuMask::parse("6")), [1, 2]);
        assert_eq!(cores(CpuMask::parse("[0,2-3]")), [0, 2, 3]);
        assert_eq!(cores(CpuMask::parse_list("1, 4-5")), [1, 4, 5]);
        for bad in ["", "0x0", "x", "[]", "[3-1]", "[128]"] {
            assert!(CpuMask::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_goes_to_the_least_loaded_reactor_that_its_mask_allows() {
        let reactors = Reactors::start(CpuMask::parse_list("0-1").ok(), Idle::Adaptive).unwrap();
        let place = |mask: Option<&str>, load: fn(usize) -> usize| {
            let mask = mask.map(|mask| CpuMask::parse(mask).unwrap());
            reactors.place(mask, load).map(ReactorHandle::core)
        };
        assert_eq!(place(None, |core| 1 - core), Ok(1));
        assert_eq!(place(Some("0x1"), |core| 1 - core), Ok(0));
        assert!(place(Some("0x8"), |_| 0).is_err());
    }
}
