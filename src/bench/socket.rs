//! A disk behind a vhost-user-blk socket, as a driver in a guest has it.

use std::path::Path;

use anyhow::{Context as _, ensure};
use resilver_sys::{WaitSet, usize_from};
use resilver_vhost::front_end::{Connection, ConnectionConfig, DataBuffer, DriverQueue, Request};

use super::Job;
use super::disk::{Access, Disk, Shape, fill};

/// A connected disk.
pub(crate) struct Socket {
    connection: Connection,
    queues: Vec<DriverQueue>,
    /// Bytes of a request.
    block: u32,
}

impl Socket {
    /// Connects to a back end, with room for the job.
    pub(crate) fn connect(path: &Path, job: &Job, seed: u64) -> anyhow::Result<Self> {
        // Three descriptors a request where there are no indirect ones.
        let queue_size = job.per_queue().saturating_mul(3).next_power_of_two().max(16);
        let config = ConnectionConfig {
            queues: job.queues,
            queue_size,
            segments: 1,
            data_bytes: usize::from(job.depth) * usize_from(u64::from(job.block)),
            ..ConnectionConfig::default()
        };
        let (connection, queues) = Connection::connect(path, config)?;
        let memory = connection.memory();
        fill(memory.mapping(), memory.data_bytes(), seed)?;
        Ok(Self { connection, queues, block: job.block })
    }
}

impl Disk for Socket {
    fn shape(&self) -> Shape {
        let device = self.connection.device();
        Shape {
            capacity: device.capacity,
            block_size: device.block_size,
            read_only: device.read_only,
            direct: None,
        }
    }

    fn queues(&self) -> usize {
        self.queues.len()
    }

    fn submit(&mut self, queue: usize, access: Access) -> anyhow::Result<()> {
        let Access { slot, reads, offset } = access;
        let request = if reads { Request::Read { offset } } else { Request::Write { offset } };
        let buffer = DataBuffer { offset: slot as u64 * u64::from(self.block), length: self.block };
        Ok(self.queues[queue].submit(request, &[buffer], slot as u64)?)
    }

    fn publish(&mut self) {
        self.queues.iter_mut().for_each(DriverQueue::publish);
    }

    fn pop(&mut self, queue: usize) -> anyhow::Result<Option<usize>> {
        let Some(finished) = self.queues[queue].pop()? else { return Ok(None) };
        finished.result.context("a request failed")?;
        Ok(Some(usize_from(finished.tag)))
    }

    fn in_flight(&self) -> usize {
        self.queues.iter().map(|queue| usize::from(queue.in_flight())).sum()
    }

    fn look(&mut self) -> anyhow::Result<()> {
        ensure!(!self.connection.is_closed(), "the back end closed the connection");
        Ok(())
    }

    fn arm(&mut self, set: &mut WaitSet) -> bool {
        let mut quiet = true;
        for queue in &mut self.queues {
            quiet &= queue.arm();
        }
        self.queues.iter().for_each(|queue| set.add(queue.call_fd()));
        quiet
    }

    fn disarm(&mut self) {
        self.queues.iter_mut().for_each(DriverQueue::disarm);
    }
}
