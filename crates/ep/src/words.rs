//! Shared memory as something else than bytes: the words on which ranks wait, and the rows of results.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::atomic::AtomicU32;

use crossdock_memory::copy::{Copier, Pieces};
use crossdock_memory::{Memory, MemoryError};
use crossdock_transport::Mapping;

use crate::error::GroupError;
use crate::{Bf16, Group, GroupConfig, GroupOptions, Summer};

/// A rank's region, as this process has it: its own, or a peer's that a port has mapped.
#[derive(Clone, Debug)]
pub(crate) struct RankMemory {
    memory: Memory,
    /// Dropped after the memory that it is.
    _mapping: Option<Mapping>,
}

impl RankMemory {
    pub fn mapped(mapping: Mapping) -> Result<RankMemory, MemoryError> {
        // SAFETY: the mapping is readable, writable, and stays as long as a clone of it is held, which is here until the
        // memory has been dropped: no handle of it leaves this value. No reference to its bytes is made but those of this
        // module.
        let memory = unsafe { Memory::from_raw(mapping.base(), mapping.bytes()) }?;
        Ok(RankMemory { memory, _mapping: Some(mapping) })
    }

    pub fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl Group {
    /// One rank of a group, all regions of which this process has mapped, by rank.
    ///
    /// # Safety
    /// Each of the memories is the [region](Group::allocate_region) of its rank, of a group with this configuration. They
    /// are given to the ranks of one group and to nothing else, each rank's group is made once, and nobody writes to
    /// them but these groups.
    pub unsafe fn over(
        config: &GroupConfig,
        rank: u32,
        memories: Vec<Memory>,
        options: &GroupOptions,
    ) -> Result<Group, GroupError> {
        Group::over_regions(config, rank, memories, options)
    }
}

impl From<Memory> for RankMemory {
    fn from(memory: Memory) -> RankMemory {
        RankMemory { memory, _mapping: None }
    }
}

/// Calls `then` with the word at this place.
///
/// # Panics
/// If the place is not inside the memory, or not that of a whole word.
pub(crate) fn with<T>((memory, offset): (&Memory, usize), then: impl FnOnce(&AtomicU32) -> T) -> T {
    let place = memory.at(offset, 4).expect("a word lies inside its region").cast::<u32>();
    assert!(place.is_aligned(), "a word at {place:?}");
    // SAFETY: the place is inside the memory, which is mapped, readable and writable while the handle that is borrowed
    // here lives, and it is aligned. Every access to the word, by this program and by those that share the memory, is
    // atomic.
    then(unsafe { AtomicU32::from_ptr(place) })
}

/// Rows as a source left them: so many, from this place on, so far apart.
#[derive(Clone, Copy)]
pub(crate) struct SourceRows<'a> {
    pub memory: &'a Memory,
    pub at: usize,
    pub stride: usize,
    pub count: usize,
}

/// Copies the first `row_bytes` of rows to places of `into`, each `row_bytes` long. No place may be named twice.
///
/// # Panics
/// If a row or a place does not exist.
pub(crate) fn copy_rows(
    copier: Copier,
    from: SourceRows<'_>,
    rows: &[u32],
    into: &mut [u8],
    places: &[u32],
    row_bytes: usize,
) {
    let most = |list: &[u32]| list.iter().max().map_or(0, |&most| most as usize + 1);
    assert!(most(rows) <= from.count && row_bytes <= from.stride, "rows of the source");
    assert!(
        most(places).checked_mul(row_bytes).is_some_and(|end| end <= into.len()),
        "places of the outputs"
    );
    let source = from.memory.at(from.at, from.count * from.stride).expect("rows lie inside their region");
    let pieces = Pieces {
        dst_base: into.as_mut_ptr(),
        dst_stride: row_bytes,
        src_base: source,
        src_stride: from.stride,
        piece_bytes: row_bytes,
        dst_index: places,
        src_index: rows,
    };
    // SAFETY: every row named is inside the range that was just found in the memory, which is mapped while its handle is
    // borrowed, and every place inside `into`, which is ours and no part of any shared memory; the caller vouches that no
    // place is named twice, so no two pieces overlap. Their source published the rows, and writes there again only when it
    // has heard this rank's next call, or has masked this rank, which then throws away what it has read. A source that is
    // masked here may write at any time: its rows are not read any more.
    unsafe { copier.copy_pieces(pieces) }
}

/// Stores a row at a place of this rank's staging, where it is not published yet.
///
/// # Panics
/// If the place is not inside the memory.
pub(crate) fn store_row(copier: Copier, memory: &Memory, at: usize, row: &[u8]) {
    let place = memory.at(at, row.len()).expect("a row lies inside its region");
    // SAFETY: the place is inside the memory, which is mapped while its handle is borrowed and is no part of `row`. Its
    // readers look there when the call has been published, and this rank is its only writer. Readers of the call before the
    // last have made their next call, or are masked, and throw away what they read.
    unsafe { copier.copy(place, row.as_ptr(), row.len()) }
}

/// A row of this rank's staging, to be written before it is published. It may hold anything.
///
/// # Panics
/// If the place is not inside the memory.
#[expect(
    clippy::mut_from_ref,
    reason = "the memory is a handle; who may write there now is in the safety comment"
)]
pub(crate) fn staged_row(memory: &Memory, at: usize, bytes: usize) -> &mut [u8] {
    let place = memory.at(at, bytes).expect("a row lies inside its region");
    // SAFETY: the place is inside the memory, which stays mapped as long as the handle that is borrowed here. A slot's
    // dispatch, which has the slot for itself, hands out one row at a time, before its call is published; who reads and who
    // writes there is as in `store_row`, and reads by raw pointers.
    unsafe { std::slice::from_raw_parts_mut(place, bytes) }
}

/// Rows of results in the memory of some ranks, all of one length: what one sum is made of.
#[derive(Debug)]
pub(crate) struct ResultRows<'a> {
    rows: Vec<*const Bf16>,
    hidden: usize,
    /// The handles that keep the rows mapped are borrowed.
    memories: PhantomData<&'a Memory>,
}

impl<'a> ResultRows<'a> {
    pub fn new(hidden: usize) -> ResultRows<'a> {
        ResultRows { rows: Vec::new(), hidden, memories: PhantomData }
    }

    pub fn clear(&mut self) {
        self.rows.clear();
    }

    /// # Panics
    /// If the row is not inside the memory, or not that of whole numbers.
    pub fn push(&mut self, memory: &'a Memory, at: usize) {
        let row = memory.at(at, 2 * self.hidden).expect("a row lies inside its region").cast::<Bf16>();
        assert!(row.is_aligned(), "a row at {row:?}");
        self.rows.push(row);
    }

    /// The weighted sum of the rows, in their order.
    ///
    /// # Panics
    /// If `out` is not as long as a row.
    pub fn weighted(&self, summer: Summer, weights: &[f32], out: &mut [Bf16]) {
        assert_eq!(self.hidden, out.len(), "rows as long as their sum");
        // SAFETY: each row was found inside a memory whose handle is still borrowed, and is as long as the sum. It was
        // published by its rank, which writes there again only when this rank has made its next call, or is masked and
        // what it reads counts for nothing.
        unsafe { summer.weighted(&self.rows, weights, out) }
    }

    /// The sum of the biases and the rows, in their order.
    ///
    /// # Panics
    /// If `out` or a bias is not as long as a row.
    pub fn plain(&self, summer: Summer, biases: &[&[Bf16]], out: &mut [Bf16]) {
        assert_eq!(self.hidden, out.len(), "rows as long as their sum");
        // SAFETY: as above.
        unsafe { summer.plain(&self.rows, biases, out) }
    }
}

/// This rank's own results, to be written before they are published.
///
/// # Panics
/// If they are not inside the memory, or not at a place of whole numbers.
#[expect(
    clippy::mut_from_ref,
    reason = "the memory is a handle; who may write there now is in the safety comment"
)]
pub(crate) fn results(memory: &Memory, at: usize, len: usize) -> &mut [Bf16] {
    // Where there are none, too, they have their place: callers in C go on from there.
    let first = memory.at(at, 2 * len).expect("results lie inside their region").cast::<Bf16>();
    assert!(first.is_aligned(), "results at {first:?}");
    // SAFETY: the place is inside the memory, which stays mapped as long as the handle that is borrowed here, and any
    // bits are a number. One step of a slot hands this out, behind an exclusive borrow of the step, from after its
    // dispatch was received until its combine is published; so no other reference to these bytes lives. Every rank that
    // is not masked has made its next call since it last read them, and reads them again only when they are published.
    // A rank that is masked may still read, by raw pointers, and throws away what it read.
    unsafe { std::slice::from_raw_parts_mut(first, len) }
}
