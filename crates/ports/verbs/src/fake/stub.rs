//! A device that costs next to nothing, to measure what stands above it: writes and reads are done when they are posted,
//! and no byte of them moves. What tells the peer something goes the long way, without the bytes of writes.
#![allow(unsafe_code)]

use super::SETTLE_STEPS;
use super::pair::{Data, Work};
use super::table;
use super::world::{Errno, World};
use crate::ibverbs::sys::*;

/// Takes a chain of requests.
///
/// # Safety
/// The chain is one of requests that ends with null, and there is a place for one.
pub(super) unsafe fn post(
    world: &mut World,
    id: u32,
    first: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> Errno {
    let mut next = first;
    while !next.is_null() {
        // SAFETY: the caller's promise.
        let taken = unsafe {
            next = post_silent(world, id, next);
            if next.is_null() {
                break;
            }
            post_one(world, id, &*next)
        };
        if let Err(errno) = taken {
            // SAFETY: the caller's promise.
            unsafe { *bad = next };
            return errno;
        }
        // SAFETY: the caller's promise.
        next = unsafe { (*next).next };
    }
    0
}

/// Takes requests as long as none asks for a completion or tells the peer something: they are only counted. Gives back
/// the first that it did not take.
///
/// # Safety
/// The chain is one of requests that ends with null.
unsafe fn post_silent(world: &mut World, id: u32, first: *mut ibv_send_wr) -> *mut ibv_send_wr {
    let Some(pair) = world.pairs.get_mut(&id) else { return first };
    if pair.state != IBV_QPS_RTS || !pair.works.is_empty() {
        return first;
    }
    let room = pair.cap.max_send_wr - pair.sends_used;
    let (mut next, mut count) = (first, 0);
    while count < room && !next.is_null() {
        // SAFETY: the caller's promise.
        let request = unsafe { &*next };
        if !is_move(request) || request.send_flags & IBV_SEND_SIGNALED != 0 {
            break;
        }
        count += 1;
        next = request.next;
    }
    pair.sends_used += count;
    pair.done_silently += count;
    world.counters.sends_posted += u64::from(count);
    next
}

/// # Safety
/// The request's list is as long as it says, and what goes inline can be read.
unsafe fn post_one(world: &mut World, id: u32, request: &ibv_send_wr) -> Result<(), Errno> {
    let cap = world.may_send(id)?;
    let pair = world.pairs.get_mut(&id).expect("just found");
    if is_move(request) && pair.state == IBV_QPS_RTS && pair.works.is_empty() {
        if pair.sends_used == cap.max_send_wr {
            return Err(libc::ENOMEM);
        }
        pair.sends_used += 1;
        pair.done_silently += 1;
        world.counters.sends_posted += 1;
        world.tell_done(id, request.wr_id, request.opcode, 0);
        return Ok(());
    }
    // SAFETY: the caller's promise.
    let work = unsafe { table::work(request, &cap)? };
    let work = match request.opcode {
        IBV_WR_SEND | IBV_WR_SEND_WITH_IMM => work,
        _ => Work { data: Data::Pieces(Vec::new()), bytes: 0, ..work },
    };
    world.post(id, work)?;
    world.settle(SETTLE_STEPS);
    Ok(())
}

/// A write or a read of which the peer is told nothing.
#[inline]
fn is_move(request: &ibv_send_wr) -> bool {
    matches!(request.opcode, IBV_WR_RDMA_WRITE | IBV_WR_RDMA_READ)
}
