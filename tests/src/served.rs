//! A disk served over vhost-user in the test's own process: a real reactor, a real controller on a control thread of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use resilver_bdev::{Bdev, DISK_DEPTH, Disk, DiskHandle, IoStats};
use resilver_reactor::{Reactor, ReactorConfig, ReactorHandle};
use resilver_vhost::server::Role;
use resilver_vhost::{Controller, ControllerConfig, VhostError, VhostStats};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// How long anything may take before a test is given up as hung.
pub const PATIENCE: Duration = Duration::from_secs(30);

type Order = Box<dyn FnOnce(&Controller) + Send>;

/// A controller over one bdev.
pub struct Served {
    config: ControllerConfig,
    orders: Option<UnboundedSender<Order>>,
    control: Option<JoinHandle<Result<(), VhostError>>>,
    stats: Arc<VhostStats>,
    io_stats: Arc<IoStats>,
    disk: DiskHandle,
    reactor: Reactor,
    _directory: tempfile::TempDir,
}

impl Served {
    /// Serves `bdev` to guests that may write, with up to 4 queues.
    ///
    /// # Panics
    /// If that is not possible; as everything here, because it is a test's.
    #[must_use]
    pub fn new(bdev: &dyn Bdev) -> Self {
        Self::with(bdev, ReactorConfig::default(), |_| ())
    }

    /// The same, on a reactor of one's own and with a changed configuration.
    ///
    /// # Panics
    /// As [`Served::new`].
    #[must_use]
    pub fn with(
        bdev: &dyn Bdev,
        reactor: ReactorConfig,
        change: impl FnOnce(&mut ControllerConfig),
    ) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut config = ControllerConfig {
            name: "vm1".to_owned(),
            socket_path: directory.path().join("vm1"),
            role: Role::Listen,
            read_only: false,
            serial: None,
            num_queues: 4,
            packed_ring: true,
            postcopy: true,
        };
        change(&mut config);
        let reactor = Reactor::start(reactor, 0).expect("a reactor");
        let channel = bdev.open_channel(DISK_DEPTH).expect("a channel");
        let limits = *channel.limits();
        let io_stats = Arc::new(IoStats::default());
        let (disk, handle) =
            Disk::new(channel, Arc::clone(&io_stats), reactor.handle().doorbell(), || ());
        reactor.handle().add(Box::new(disk)).expect("room on the reactor");
        let (orders, inbox) = unbounded_channel();
        let (sender, started) = mpsc::channel();
        let (controller_config, controller_disk) = (config.clone(), handle.clone());
        let control = std::thread::spawn(move || {
            run_control(inbox, || {
                let controller = Controller::start(controller_config, controller_disk, limits)?;
                sender.send(Arc::clone(controller.stats())).expect("the test waits");
                Ok(controller)
            })
        });
        let stats = started.recv_timeout(PATIENCE).expect("the controller starts");
        Self {
            config,
            orders: Some(orders),
            control: Some(control),
            stats,
            io_stats,
            disk: handle,
            reactor,
            _directory: directory,
        }
    }

    /// The controller's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.config.socket_path.clone()
    }

    /// The controller's counters.
    #[must_use]
    pub fn stats(&self) -> &VhostStats {
        &self.stats
    }

    /// The disk's counters.
    #[must_use]
    pub fn io_stats(&self) -> &IoStats {
        &self.io_stats
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &DiskHandle {
        &self.disk
    }

    /// The reactor that the disk is on.
    #[must_use]
    pub fn reactor(&self) -> &ReactorHandle {
        self.reactor.handle()
    }

    /// Asks the controller something, on its own thread.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Controller) -> T + Send + 'static,
    ) -> T {
        let (sender, answer) = mpsc::channel();
        let order: Order = Box::new(move |controller| {
            let _ = sender.send(question(controller));
        });
        let orders = self.orders.as_ref().expect("a controller that was not stopped");
        assert!(orders.send(order).is_ok(), "the control thread has gone");
        answer.recv_timeout(PATIENCE).expect("the controller answers")
    }

    /// Stops the controller.
    ///
    /// # Errors
    /// The controller's.
    ///
    /// # Panics
    /// If it was stopped before, or its thread panicked.
    pub fn stop(&mut self) -> Result<(), VhostError> {
        self.orders = None;
        let control = self.control.take().expect("a controller that was not stopped");
        control.join().expect("the control thread ends well")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if self.control.is_some() {
            let _ = self.stop();
        }
    }
}

/// The control thread: a controller that takes orders until nobody can give any more.
fn run_control(
    mut orders: UnboundedReceiver<Order>,
    start: impl FnOnce() -> Result<Controller, VhostError>,
) -> Result<(), VhostError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, async move {
        let controller = start()?;
        while let Some(order) = orders.recv().await {
            order(&controller);
        }
        controller.stop().await
    })
}

/// Waits until a condition holds.
///
/// # Panics
/// If it does not within [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
