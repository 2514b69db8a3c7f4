//! Disks: bdevs that reactors poll.
//!
//! A bdev gets a disk when a controller or a job first uses it and loses it with the last. The disk stays where it was put
//! for as long as it lives; after a switch-over the same disk is over another bdev. One task for each disk passes its
//! events on; it ends with the disk.

use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use resilver_bdev::{Bdev, DISK_DEPTH, Disk, DiskCommand, DiskEvent, DiskHandle, Limits, Reply};
use resilver_reactor::{Poller, PollerId, ReactorHandle};
use serde_json::json;
use tokio::sync::{Notify, oneshot};

use crate::error::{RpcError, code};
use crate::mirror::Origin;
use crate::modules::BdevEntry;
use crate::reactors::CpuMask;
use crate::target::{Graph, Target, files_of};

/// A disk, named by control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct DiskId(pub(crate) u64);

/// What ended jobs left on a disk: I/O that its device does not end.
#[derive(Debug, Default)]
pub(crate) struct Releasing {
    /// Channels whose end is awaited.
    pub(crate) channels: usize,
    /// Bdevs that stay claimed until then: all of them until the last, because a channel that comes back does not say whose
    /// it was.
    pub(crate) bdevs: BTreeMap<String, Origin>,
}

impl Releasing {
    /// A job has ended and left channels, the leg given up among them.
    pub(crate) fn add(&mut self, channels: usize, leg: &str, origin: Origin) {
        self.channels += channels;
        self.bdevs.insert(leg.to_owned(), origin);
    }
}

/// A disk as control keeps it.
pub(crate) struct DiskEntry {
    /// What it is over now.
    pub(crate) bdev: Arc<dyn Bdev>,
    pub(crate) handle: DiskHandle,
    pub(crate) limits: Limits,
    pub(crate) reactor: ReactorHandle,
    pub(crate) releasing: Releasing,
    poller: PollerId,
    /// Wakes the task that passes events on.
    woken: Arc<Notify>,
}

impl Target {
    /// The disk over a bdev, made if there is none, on a reactor that the mask allows.
    pub(crate) fn disk_over(
        self: &Rc<Self>,
        bdev: &Arc<dyn Bdev>,
        mask: Option<CpuMask>,
    ) -> Result<DiskId, RpcError> {
        if let Some((id, disk)) = self.graph().disk_of(bdev.name()) {
            let core = disk.reactor.core();
            if mask.is_none_or(|mask| mask.contains(core)) {
                return Ok(id);
            }
            let expected =
                format!("bdev '{}' is in use on core {core}: a mask that contains it", bdev.name());
            return Err(RpcError::parameter("cpumask", "", expected));
        }
        // A disk that was superseded is not served again, however it is stacked.
        for file in files_of(bdev.as_ref()) {
            self.state.check(&file)?;
        }
        let reactor = {
            let graph = self.graph();
            let load = |core| graph.disks.values().filter(|it| it.reactor.core() == core).count();
            self.reactors.place(mask, load)?.clone()
        };
        let root = bdev.open_channel(DISK_DEPTH)?;
        let (limits, stats) = (*root.limits(), Arc::clone(bdev.stats()));
        let woken = Arc::new(Notify::new());
        let wake = Arc::clone(&woken);
        let (disk, handle) = Disk::new(root, stats, reactor.doorbell(), move || wake.notify_one());
        let disk = disk.with_bitmaps(self.graph().bitmaps_below(bdev.as_ref()));
        let poller = reactor.add(Box::new(disk))?;
        let mut graph = self.graph_mut();
        graph.next_disk += 1;
        let id = DiskId(graph.next_disk);
        let (bdev, releasing) = (Arc::clone(bdev), Releasing::default());
        let entry = DiskEntry {
            bdev,
            handle: handle.clone(),
            limits,
            reactor,
            releasing,
            poller,
            woken: Arc::clone(&woken),
        };
        graph.disks.insert(id, entry);
        tokio::task::spawn_local(pump(Rc::downgrade(self), id, handle, woken));
        Ok(id)
    }

    /// Takes a disk off its reactor if nobody uses it any more. One that still has requests of a guest that has gone stays until
    /// they have ended: whoever uses the bdev next must know of them.
    pub(crate) async fn retire_disk(&self, id: DiskId) {
        let entry = {
            let mut graph = self.graph_mut();
            let used = graph.controllers_of(id).next().is_some() || graph.job_on(id).is_some();
            let busy =
                |disk: &DiskEntry| disk.releasing.channels > 0 || disk.handle.left_in_flight() > 0;
            if used || graph.disks.get(&id).is_some_and(busy) {
                return;
            }
            graph.disks.remove(&id)
        };
        let Some(entry) = entry else { return };
        entry.woken.notify_one();
        // The poller is dropped here, on the control thread: closing files may take its time.
        let (sender, receiver) = oneshot::channel::<Box<dyn Poller>>();
        let hand_back = move |poller| {
            let _ = sender.send(poller);
        };
        if entry.reactor.remove(entry.poller, hand_back).is_ok() {
            drop(receiver.await);
        } else {
            tracing::warn!(
                core = entry.reactor.core(),
                "a disk could not be taken off its reactor"
            );
        }
    }

    /// Retires a disk when the last request of guests that have gone has ended, if nobody uses it then.
    pub(crate) fn retire_when_left(self: &Rc<Self>, id: DiskId) {
        let target = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(LOOK_AT_LEFT).await;
                let Some(target) = target.upgrade() else { return };
                let left = target.graph().disks.get(&id).map(|disk| disk.handle.left_in_flight());
                match left {
                    None => return,
                    Some(0) => return target.retire_disk(id).await,
                    Some(_) => {}
                }
            }
        });
    }

    /// One channel that an ended job left is empty.
    fn channel_released(&self, id: DiskId) {
        let mut graph = self.graph_mut();
        if let Some(disk) = graph.disks.get_mut(&id) {
            disk.releasing.channels = disk.releasing.channels.saturating_sub(1);
        }
        drop(graph);
        self.close_released(id);
    }

    /// Once nothing of the ended jobs of a disk is in flight, their legs are free, and those that were made for a job are
    /// closed.
    pub(crate) fn close_released(&self, id: DiskId) {
        let released = self.graph_mut().take_released(id);
        for entry in released {
            self.put_bitmaps_away(entry.bdev.as_ref());
        }
    }
}

impl Graph {
    /// The legs that were made for ended jobs of a disk, once nothing is in flight on any.
    fn take_released(&mut self, id: DiskId) -> Vec<BdevEntry> {
        let Some(disk) = self.disks.get_mut(&id).filter(|disk| disk.releasing.channels == 0) else {
            return Vec::new();
        };
        let legs = std::mem::take(&mut disk.releasing.bdevs);
        let made = legs.into_iter().filter(|(_, origin)| *origin == Origin::Made);
        made.filter_map(|(name, _)| {
            self.uses_of(&name).is_empty().then(|| self.bdevs.remove(&name)).flatten()
        })
        .collect()
    }
}

/// Passes a disk's events on until the disk or the target is gone.
async fn pump(target: Weak<Target>, id: DiskId, handle: DiskHandle, woken: Arc<Notify>) {
    loop {
        while let Some(event) = handle.next_event() {
            let Some(target) = target.upgrade() else { return };
            match event {
                DiskEvent::Job(event) => target.job_event(id, event).await,
                DiskEvent::JobEnded { side, info, releasing } => {
                    target.job_ended(id, side, info, releasing);
                }
                DiskEvent::Released(channel) => {
                    drop(channel);
                    target.channel_released(id);
                }
            }
            target.retire_disk(id).await;
        }
        let here = target.upgrade().is_some_and(|it| it.graph().disks.contains_key(&id));
        if !here {
            return;
        }
        woken.notified().await;
    }
}

/// How often is looked whether a device that did not answer has ended its requests.
const LOOK_AT_LEFT: Duration = Duration::from_millis(100);
/// How often a full mailbox is tried again, a millisecond apart, before the caller is told.
const SEND_TRIES: u32 = 1000;

/// Sends a command to a disk, waiting for room in its mailbox.
pub(crate) async fn send(handle: &DiskHandle, command: DiskCommand) -> Result<(), RpcError> {
    let mut command = command;
    for _ in 0..SEND_TRIES {
        match handle.send(command) {
            Ok(()) => return Ok(()),
            Err(back) => command = *back,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let message = "the disk's reactor does not keep up with its messages; try again";
    Err(RpcError::new(code::AGAIN, "reactor_busy", message, json!({})))
}

/// Sends a command that is answered, and waits for the answer.
pub(crate) async fn ask<T: Send + 'static>(
    handle: &DiskHandle,
    command: impl FnOnce(Reply<T>) -> DiskCommand,
) -> Result<T, RpcError> {
    let (sender, receiver) = oneshot::channel();
    let reply = Box::new(move |answer| {
        // Whoever asked may have gone; then nobody needs the answer.
        let _ = sender.send(answer);
    });
    send(handle, command(reply)).await?;
    receiver.await.map_err(|_| RpcError::gone())
}
