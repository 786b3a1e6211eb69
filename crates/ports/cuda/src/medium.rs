//! Ops become launches, which go on behind the port's back.
#![allow(unsafe_code)]

use std::time::Instant;

use crossdock_host::{Attaching, Ended, HeardOffer, Kind, Medium, Move, Offer, Refusal, Registered, Ticket};
use crossdock_memory::{Memory, MemoryKind};
use crossdock_transport::{Direction, DownCause, Mapping, Op, Result, Shape};

use crate::gpu::Gpu;
use crate::mover::{Ends, Mover, Progress};
use crate::offers::{FORMS, Place};
use crate::port::CopyEngines;
use crate::regions::{Offered, Region, Remote};

/// What moves bytes between memories that a GPU reaches.
#[derive(Debug)]
pub(crate) struct OnGpu {
    mover: Mover,
    engines: CopyEngines,
    /// As of the last poll.
    progress: Progress,
    pub moved: Moved,
}

/// How much was begun to be moved so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moved {
    pub bytes_written: u64,
    pub bytes_read: u64,
    pub by_engines_bytes: u64,
}

impl OnGpu {
    pub fn new(mut mover: Mover, engines: CopyEngines) -> OnGpu {
        let progress = mover.progress();
        OnGpu { mover, engines, progress, moved: Moved::default() }
    }

    pub fn gpu(&self) -> &Gpu {
        self.mover.gpu()
    }

    /// Whether a copy engine moves a stretch, by which of its sides are the host's.
    fn is_for_engine(&self, hosts: (bool, bool), bytes: u64) -> bool {
        let from_bytes = match hosts {
            (false, false) => self.engines.gpu_from_bytes,
            // The driver would copy by itself, and keep the port waiting.
            (true, true) => return false,
            _ => self.engines.host_from_bytes,
        };
        bytes >= from_bytes
    }
}

impl Medium for OnGpu {
    const KIND: &'static Kind =
        &Kind { name: "cuda", address_magic: *b"xca\x01", key_magic: *b"xck\x01", offers: FORMS };
    type Region = Region;
    type Offered = Offered;
    type Remote = Remote;
    type Lane = ();

    fn register(&mut self, memory: &Memory) -> Result<Region> {
        Region::of(self.gpu(), memory)
    }

    fn offer<'a>(&self, region: &'a Registered<Region>) -> Offer<'a> {
        let of = &region.region;
        Offer {
            form: of.place.form(),
            payload: of.place.payload(),
            descriptor: of.descriptor(&region.memory),
        }
    }

    fn hear(&mut self, offer: HeardOffer, bytes: u64) -> std::result::Result<Offered, DownCause> {
        let place = Place::read(offer.form, &offer.payload, bytes)?;
        Ok(Offered { place, descriptor: offer.descriptor })
    }

    fn attach(&mut self, offered: &Offered, attaching: &Attaching<'_>) -> Result<Remote> {
        offered.attach(self.gpu(), attaching)
    }

    fn mapping(remote: &Remote) -> Option<Mapping> {
        remote.mapping()
    }

    /// Memory that crossdock allocated may go: the peer has a mapping of its own, and what it stores there reaches nobody any
    /// more. An engine's is its owner's again.
    fn is_exposed(region: &Registered<Region>) -> bool {
        region.memory.kind() == MemoryKind::Device
            && Gpu::memory_of(&region.memory).is_some_and(|memory| memory.is_adopted())
    }

    fn room(&self, _lane: &(), op: &Op<'_>, _moved_bytes: u64) -> u64 {
        if self.mover.failure().is_some() {
            // To hear what `start` says of it.
            return u64::MAX;
        }
        match op.shape {
            Shape::Span { .. } => u64::from(self.mover.has_room_for_span()) * u64::MAX,
            Shape::Pages { local_pages, remote_pages, piece_bytes, .. } => {
                let (from, to) = match op.direction {
                    Direction::Write => (local_pages, remote_pages),
                    Direction::Read => (remote_pages, local_pages),
                };
                self.mover.room_for_pages(from, to, piece_bytes) as u64
            }
        }
    }

    fn start(
        &mut self,
        _lane: &mut (),
        part: &Move<'_, Self>,
    ) -> std::result::Result<Option<Ticket>, Refusal> {
        // A lane that has nothing on its way hears of a failure by its next op.
        if let Some(error) = self.mover.failure() {
            return Err(Refusal::Lane(DownCause::Driver { call: error.call, code: error.code }));
        }
        let (local, remote) = (part.local.region.address, part.remote.address);
        let ends = |local, remote| match part.op.direction {
            Direction::Write => (local, remote),
            Direction::Read => (remote, local),
        };
        match part.op.shape {
            Shape::Span { local_offset, remote_offset, bytes, .. } => {
                let (from, to) = ends(local + local_offset, remote + remote_offset);
                let hosts = (part.local.memory.kind() != MemoryKind::Device, part.remote.is_of_host());
                // SAFETY: the op's extents lie in both regions, which the GPU reaches; the port keeps them until the ticket is over.
                // What peers and owners write there meanwhile comes out mixed, and no reference to any of it exists.
                unsafe {
                    match self.is_for_engine(hosts, bytes) {
                        true => {
                            self.mover.copy(from, to, bytes);
                            self.moved.by_engines_bytes += bytes;
                        }
                        false => self.mover.span(from, to, bytes),
                    }
                }
            }
            Shape::Pages {
                local_offset,
                local_stride_bytes,
                local_pages,
                remote_offset,
                remote_stride_bytes,
                remote_pages,
                piece_bytes,
                ..
            } => {
                let here =
                    Ends { base: local + local_offset, stride_bytes: local_stride_bytes, pages: local_pages };
                let there = Ends {
                    base: remote + remote_offset,
                    stride_bytes: remote_stride_bytes,
                    pages: remote_pages,
                };
                let (from, to) = match part.op.direction {
                    Direction::Write => (here, there),
                    Direction::Read => (there, here),
                };
                // SAFETY: as above. Where a caller's list names a page twice, one of its pieces is there in the end, or a mixture.
                unsafe { self.mover.pages(from, to, piece_bytes) };
            }
        }
        match part.op.direction {
            Direction::Write => self.moved.bytes_written += part.bytes,
            Direction::Read => self.moved.bytes_read += part.bytes,
        }
        Ok(Some(Ticket(self.mover.ticket())))
    }

    fn flush(&mut self, _lane: &mut ()) {
        self.mover.launch();
    }

    fn poll(&mut self) {
        self.progress = self.mover.progress();
    }

    fn ended(&mut self, _lane: &mut ()) -> Ended {
        let Progress { ended, failed } = self.progress;
        let cause = |(first, error): (u64, crate::driver::CudaError)| {
            (Ticket(first), DownCause::Driver { call: error.call, code: error.code })
        };
        Ended { until: Ticket(ended), failed: failed.map(cause) }
    }

    fn stop(&mut self, deadline: Instant) {
        self.mover.wait(deadline);
        self.progress = self.mover.progress();
    }
}
