//! Whether the device can reach memory that it has registered: some platforms register and then move nothing, or
//! something else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossdock_transport::{Error, Result};

use crate::choice::Chosen;
use crate::ibverbs::chain::{Pieces, SendChain};
use crate::ibverbs::context::Context;
use crate::ibverbs::objects::{
    CompletionQueue, Completions, MemoryRegion, Path, ProtectionDomain, QueuePair, SharedReceiveQueue,
};
use crate::ibverbs::sys::IBV_WC_SUCCESS;
use crate::options::VerbsOptions;

/// What a probe needs of a port.
pub(crate) struct Probe<'a> {
    pub context: &'a Arc<Context>,
    pub protection: &'a Arc<ProtectionDomain>,
    pub receives: &'a SharedReceiveQueue,
    pub chosen: &'a Chosen,
    pub options: &'a VerbsOptions,
    /// Twice [`PROBE_BYTES`] of the port's own.
    pub scratch: &'a MemoryRegion,
}

impl Probe<'_> {
    /// Writes a pattern into both ends of a region through the device, reads it back both ways, and puts back what was
    /// there. Nobody else may use the region meanwhile. Blocks until it is done, a second at most for each transfer.
    pub fn run(&self, region: &MemoryRegion) -> Result<()> {
        let mut lane = Loopback::new(self)?;
        let bytes = region.bytes().min(PROBE_BYTES as u64) as usize;
        for offset in [0, region.bytes() - bytes as u64] {
            // What is there is fetched and put back through the device as well: a GPU's memory has no other way.
            lane.go(self.scratch, 0, region, offset, bytes, Way::Read)?;
            let scratch = self.scratch.memory();
            let mut before = [0; PROBE_BYTES];
            scratch.read(0, &mut before[..bytes]).expect("the scratch is long enough");
            let moved = self.try_pattern(&mut lane, region, offset, bytes, &before.map(|byte| !byte));
            // Whatever came of it, what was there is put back: by the device, or if that cannot by the processor.
            if lane.go(self.scratch, 0, region, offset, bytes, Way::Write).is_err()
                && let Some(memory) = region.host()
            {
                memory.write(offset as usize, &before[..bytes]).expect("inside the region");
            }
            let (written, read) = moved?;
            if !written || !read {
                return Err(Error::Unsupported {
                    what: "RDMA with this memory: the device moved other bytes than it was told",
                    advice: "look at IOMMU and ACS settings, and at the kernel log",
                });
            }
        }
        Ok(())
    }

    /// Whether a pattern is there after it was written, and whether it comes back when it is read.
    fn try_pattern(
        &self,
        lane: &mut Loopback,
        region: &MemoryRegion,
        offset: u64,
        bytes: usize,
        pattern: &[u8; PROBE_BYTES],
    ) -> Result<(bool, bool)> {
        let scratch = self.scratch.memory();
        let second = PROBE_BYTES as u64;
        scratch.write(PROBE_BYTES, pattern).expect("the scratch is long enough");
        lane.go(self.scratch, second, region, offset, bytes, Way::Write)?;
        let mut found = *pattern;
        if let Some(memory) = region.host() {
            memory.read(offset as usize, &mut found[..bytes]).expect("inside the region");
        }
        let written = found == *pattern;
        scratch.fill(PROBE_BYTES, PROBE_BYTES, 0).expect("the scratch is long enough");
        lane.go(self.scratch, second, region, offset, bytes, Way::Read)?;
        scratch.read(PROBE_BYTES, &mut found[..bytes]).expect("the scratch is long enough");
        Ok((written, found == *pattern))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Write,
    Read,
}

/// A queue pair that is connected to itself.
struct Loopback {
    queue_pair: QueuePair,
    completion_queue: Arc<CompletionQueue>,
    completions: Completions,
    chain: SendChain,
}

impl Loopback {
    fn new(probe: &Probe<'_>) -> Result<Self> {
        let Probe { chosen, options, .. } = probe;
        let completion_queue = CompletionQueue::new(probe.context, 4)?;
        let queue_pair = QueuePair::new(probe.protection, &completion_queue, probe.receives, 2, 0)?;
        queue_pair.to_init(chosen.port, options.partition_key_index)?;
        let path = Path {
            port: chosen.port,
            lid: chosen.lid,
            gid: chosen.gid,
            gid_index: chosen.gid_index,
            service_level: options.service_level,
            traffic_class: options.traffic_class,
            hop_limit: options.hop_limit,
            mtu: chosen.mtu,
        };
        queue_pair.to_receive(&path, queue_pair.number, 0, 1)?;
        queue_pair.to_send(0, 1, options.ack_timeout_exponent(), options.retries)?;
        Ok(Self { queue_pair, completion_queue, completions: Completions::new(), chain: SendChain::new() })
    }

    fn go(
        &mut self,
        local: &MemoryRegion,
        local_offset: u64,
        remote: &MemoryRegion,
        remote_offset: u64,
        bytes: usize,
        way: Way,
    ) -> Result<()> {
        let of = Pieces::new(local, remote.base(), remote.remote_key, bytes as u32, way == Way::Read, 0);
        self.chain.push_piece(0, &of, local_offset, remote_offset);
        self.chain.signal_last();
        self.queue_pair.post(&mut self.chain).map_err(|(_, failed)| failed)?;
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            self.completion_queue.poll(&mut self.completions, 1)?;
            match self.completions.take() {
                Some(completion) if completion.status == IBV_WC_SUCCESS => return Ok(()),
                Some(_) => break,
                None => std::thread::yield_now(),
            }
        }
        Err(Error::Unsupported {
            what: "RDMA with this memory: the device cannot reach what it has registered",
            advice: "look at IOMMU and ACS settings, and at the kernel log",
        })
    }
}

/// How much is moved at either end of a region.
pub(crate) const PROBE_BYTES: usize = 64;
const PATIENCE: Duration = Duration::from_secs(1);
