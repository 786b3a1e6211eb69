//! The ops of a plan, lazily and resumably.

use std::ops::Range;

use crossdock_transport::{Direction, GrantId, LocalId, Op, Posted, RemoteId, Shape};

use super::geometry::{Geometry, Group};
use super::{Entry, Plan};
use crate::LayerBuffer;

/// How one lane names what a plan speaks of. A peer's regions have other names on each lane.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    /// [`Write`](Direction::Write): this side is the source. [`Read`](Direction::Read): it is the destination.
    pub direction: Direction,
    /// The peer's grant.
    pub grant: GrantId,
    /// This side's regions, in the order of its announcement.
    pub local: &'a [LocalId],
    /// The peer's regions as attached to the lane, in the order of the peer's announcement.
    pub remote: &'a [RemoteId],
}

/// The ops that move some layers over one lane.
///
/// Ops come layer by layer. They carry neither immediate nor token; the caller sets these where it wants them.
///
/// ```
/// # use crossdock_kv::{CacheLayout, PageTable, Plan, PlanInput, Route};
/// # use crossdock_transport::{Direction, GrantId, LocalId, Op, Posted, RemoteId};
/// # let post = |ops: &[Op<'_>]| Posted::all(ops);
/// let layout = CacheLayout::deepseek_r1(64, 16)?;
/// let plan = Plan::build(&PlanInput {
///     source: PageTable::new(&layout, &[4, 9]),
///     destination: PageTable::new(&layout, &[12, 3]),
///     tokens: 0..128,
/// })?;
/// let (local, remote) = ([LocalId(7)], [RemoteId(2)]);
/// let route = Route { direction: Direction::Write, grant: GrantId::new(1, 0), local: &local, remote: &remote };
/// let ops = plan.ops(route, plan.layers())?;
/// let mut batch = [Op::notify(0); 16];
/// let mut cursor = ops.start();
/// while !ops.is_done(cursor) {
///     let filled = ops.fill(cursor, &mut batch);
///     cursor = ops.advance(cursor, post(&batch[..filled]));
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ops<'a> {
    plan: &'a Plan,
    route: Route<'a>,
    /// Of the plan.
    entries: Range<u32>,
}

/// How far a sequence of ops has been posted. Means something only to [`Ops`] of the same plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    entry: u32,
    /// Of the entry's set.
    geometry: u32,
    strand: u32,
    group: u32,
    /// What a short post has taken of the op: bytes of a span, pieces of a paged op.
    within: u64,
}

impl Plan {
    /// The ops that move these layers over the lane of `route`.
    pub fn ops<'a>(&'a self, route: Route<'a>, layers: Range<u32>) -> Result<Ops<'a>, OpsError> {
        let planned = self.layers();
        if layers.start < planned.start || layers.end > planned.end || layers.start > layers.end {
            return Err(OpsError::LayersNotPlanned { layers, planned });
        }
        let (local, remote) = match route.direction {
            Direction::Write => (self.source_regions, self.destination_regions),
            Direction::Read => (self.destination_regions, self.source_regions),
        };
        for (side, needed, known) in
            [("local", local, route.local.len()), ("remote", remote, route.remote.len())]
        {
            if needed as usize > known {
                return Err(OpsError::UnknownRegion { side, region: needed - 1, known });
            }
        }
        let entries = self.entries_of(&layers);
        Ok(Ops { plan: self, route, entries: entries.start as u32..entries.end as u32 })
    }
}

impl<'a> Ops<'a> {
    /// Before the first op.
    pub fn start(&self) -> Cursor {
        self.enter(self.entries.start)
    }

    /// Whether every op has been posted.
    pub fn is_done(&self, cursor: Cursor) -> bool {
        cursor.entry >= self.entries.end
    }

    /// Whether the op at the cursor is the last one.
    pub fn is_last(&self, cursor: Cursor) -> bool {
        !self.is_done(cursor) && self.is_done(self.after(cursor))
    }

    /// Writes the next ops into `batch`, from the cursor on, and says how many: fewer than fit only at the end.
    pub fn fill(&self, cursor: Cursor, batch: &mut [Op<'a>]) -> usize {
        let mut next = cursor;
        for (filled, slot) in batch.iter_mut().enumerate() {
            if self.is_done(next) {
                return filled;
            }
            *slot = self.op(next);
            next = self.after(next);
        }
        batch.len()
    }

    /// Where posting goes on after a port took `posted` of what [`fill`](Ops::fill) gave from the cursor on. An op
    /// of which all bytes were taken is done, even if the port had no room for the immediate that the caller set on it.
    ///
    /// # Panics
    /// If `posted` says more than there is.
    pub fn advance(&self, mut cursor: Cursor, posted: Posted) -> Cursor {
        for _ in 0..posted.ops {
            assert!(!self.is_done(cursor), "a port took more ops than it was given");
            cursor = self.after(cursor);
        }
        if posted.within > 0 {
            cursor.within += posted.within;
            let parts = self.parts(cursor);
            assert!(cursor.within <= parts, "a port took more of an op than there is");
            // All of its bytes, but not what the caller had set on it.
            if cursor.within == parts {
                cursor = self.after(cursor);
            }
        }
        cursor
    }

    /// How many bytes all of the ops move.
    pub fn bytes(&self) -> u64 {
        self.entries().map(|entry| self.plan.sets[entry.set as usize].bytes).sum()
    }

    /// How many ops there are.
    pub fn count(&self) -> usize {
        let of_set = |entry: &Entry| self.plan.geometries_of(&self.plan.sets[entry.set as usize]);
        self.entries().flat_map(of_set).map(Geometry::ops).sum()
    }

    fn entries(&self) -> impl Iterator<Item = &'a Entry> {
        self.plan.entries[self.entries.start as usize..self.entries.end as usize].iter()
    }

    /// The op at the cursor, less what has been taken of it.
    fn op(&self, cursor: Cursor) -> Op<'a> {
        let (entry, geometry, group) = self.at(cursor);
        let strand = geometry.strands()[cursor.strand as usize];
        let source = Side::new(entry.source, geometry.units().0, strand.0 + group.source_offset);
        let destination =
            Side::new(entry.destination, geometry.units().1, strand.1 + group.destination_offset);
        let done = if group.pieces == 1 { 0 } else { cursor.within };
        let (source_indices, destination_indices) = geometry.indices(group, done);
        let (local, local_pages, remote, remote_pages) = match self.route.direction {
            Direction::Write => (source, source_indices, destination, destination_indices),
            Direction::Read => (destination, destination_indices, source, source_indices),
        };
        let shape = if group.pieces == 1 {
            Shape::Span {
                local: self.route.local[local.region as usize],
                local_offset: local.byte(local_pages[0]) + cursor.within,
                remote: self.route.remote[remote.region as usize],
                remote_offset: remote.byte(remote_pages[0]) + cursor.within,
                bytes: group.piece_bytes - cursor.within,
            }
        } else {
            Shape::Pages {
                local: self.route.local[local.region as usize],
                local_offset: local.offset,
                local_stride_bytes: local.unit_bytes,
                local_pages,
                remote: self.route.remote[remote.region as usize],
                remote_offset: remote.offset,
                remote_stride_bytes: remote.unit_bytes,
                remote_pages,
                piece_bytes: group.piece_bytes,
            }
        };
        Op { direction: self.route.direction, grant: self.route.grant, shape, imm: None, token: None }
    }

    fn at(&self, cursor: Cursor) -> (&'a Entry, &'a Geometry, &'a Group) {
        let entry = &self.plan.entries[cursor.entry as usize];
        let geometry = &self.geometries(entry)[cursor.geometry as usize];
        (entry, geometry, &geometry.groups()[cursor.group as usize])
    }

    fn geometries(&self, entry: &Entry) -> &'a [Geometry] {
        self.plan.geometries_of(&self.plan.sets[entry.set as usize])
    }

    /// Of how many parts the op at the cursor consists.
    fn parts(&self, cursor: Cursor) -> u64 {
        if self.is_done(cursor) {
            return 0;
        }
        match self.at(cursor).2 {
            Group { pieces: 1, piece_bytes, .. } => *piece_bytes,
            group => u64::from(group.pieces),
        }
    }

    fn after(&self, cursor: Cursor) -> Cursor {
        let (entry, geometry, _) = self.at(cursor);
        let mut next = Cursor { group: cursor.group + 1, within: 0, ..cursor };
        if next.group as usize == geometry.groups().len() {
            (next.group, next.strand) = (0, cursor.strand + 1);
        }
        if next.strand as usize == geometry.strands().len() {
            (next.strand, next.geometry) = (0, cursor.geometry + 1);
        }
        match next.geometry as usize == self.geometries(entry).len() {
            true => self.enter(cursor.entry + 1),
            false => next,
        }
    }

    /// The first op of an entry; the end if there is none, since without tokens no entry has any.
    fn enter(&self, entry: u32) -> Cursor {
        let is_empty = self.entries().next().is_none_or(|entry| self.geometries(entry).is_empty());
        let entry = if is_empty { self.entries.end } else { entry };
        Cursor { entry, geometry: 0, strand: 0, group: 0, within: 0 }
    }
}

/// One end of an op.
struct Side {
    region: u32,
    offset: u64,
    unit_bytes: u64,
}

impl Side {
    fn new(buffer: LayerBuffer, unit_bytes: u64, group_offset: u64) -> Self {
        Self { region: buffer.region, offset: buffer.offset + group_offset, unit_bytes }
    }

    fn byte(&self, index: u32) -> u64 {
        self.offset + u64::from(index) * self.unit_bytes
    }
}

/// Why a plan gives no ops.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpsError {
    /// Some of the layers are not part of the plan.
    #[error(
        "layers {}..{} were asked for, {}..{} are planned",
        layers.start, layers.end, planned.start, planned.end
    )]
    LayersNotPlanned {
        /// The layers asked for.
        layers: Range<u32>,
        /// The layers of the plan.
        planned: Range<u32>,
    },
    /// A layout names a region that was not announced.
    #[error("the layout names {side} region {region}, {known} are known")]
    UnknownRegion {
        /// `"local"` or `"remote"`.
        side: &'static str,
        /// The region's number.
        region: u32,
        /// How many were announced.
        known: usize,
    },
}
