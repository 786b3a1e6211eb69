//! What a device does: copies, fills and kernels, a step at a time.

use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::AnyBitPattern;

use super::world::{Id, World};
use crate::driver::abi;
use crate::moves::{Pieces, Signal};

/// One thing in a stream.
pub enum Work {
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Fill {
        to: u64,
        value: u8,
        bytes: usize,
    },
    /// The page kernel, and how far it is. What its arguments lead to is read when it runs.
    Launch(Launch),
    /// Until a word is at least so large, counted around the end of 32 bits.
    WaitValue {
        address: u64,
        value: u32,
    },
    /// Until so many of a stream are done.
    Wait {
        stream: Id,
        done: u64,
    },
}

/// The arguments of the page kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Launch {
    pub word_bytes: u64,
    pub pieces: u64,
    pub pieces_count: u32,
    pub signals: u64,
    pub signals_count: u32,
    pub finished: u64,
    /// Words of a tile: those that a block moves at a time.
    pub tile_words: u64,
    pub tiles: u64,
    /// The piece that is being moved, and what of it has been.
    pub piece: u32,
    pub within: u64,
}

/// Does a step of every stream that can go on; whether any could.
pub fn run(world: &mut World) -> bool {
    let mut is_busy = false;
    for id in world.streams.keys().copied().collect::<Vec<Id>>() {
        is_busy |= step(world, id);
    }
    is_busy
}

fn step(world: &mut World, id: Id) -> bool {
    let Some(stream) = world.streams.get_mut(&id) else { return false };
    let device = stream.device;
    if world.paused.contains(&device) {
        return false;
    }
    let Some(mut work) = stream.queue.pop_front() else { return false };
    let has_ended = match world.spoiled.get(&device) {
        Some(_) => Ok(true),
        None => advance(world, device, &mut work),
    };
    let has_ended = has_ended.unwrap_or_else(|OutOfPlace| {
        world.spoiled.insert(device, abi::ERROR_ILLEGAL_ADDRESS);
        true
    });
    let waits = !has_ended && matches!(work, Work::Wait { .. } | Work::WaitValue { .. });
    let Some(stream) = world.streams.get_mut(&id) else { return true };
    match has_ended {
        true => stream.done += 1,
        false => stream.queue.push_front(work),
    }
    !waits
}

/// An access to what is not mapped for the device.
struct OutOfPlace;

/// Whether it has ended.
fn advance(world: &mut World, device: i32, work: &mut Work) -> Result<bool, OutOfPlace> {
    let most = world.pace.step_bytes.max(1);
    match work {
        Work::Copy { to, from, bytes } => {
            let part = most.min(*bytes);
            copy(world, device, *to, *from, part)?;
            (*to, *from, *bytes) = (*to + part as u64, *from + part as u64, *bytes - part);
            Ok(*bytes == 0)
        }
        Work::Fill { to, value, bytes } => {
            let part = most.min(*bytes);
            if part > 0 {
                accessible(world, device, *to, part)?;
                // SAFETY: the world has mapped the bytes, which its lock keeps mapped; no reference to them exists.
                unsafe { std::ptr::write_bytes(at(*to), *value, part) };
            }
            (*to, *bytes) = (*to + part as u64, *bytes - part);
            Ok(*bytes == 0)
        }
        Work::Launch(launch) => launch.advance(world, device, most),
        Work::WaitValue { address, value } => {
            accessible(world, device, *address, 4)?;
            // SAFETY: the world has mapped the word, which is aligned; others store there as atomics.
            let now = unsafe { AtomicU32::from_ptr(at(*address).cast()) }.load(Ordering::Acquire);
            Ok(now.wrapping_sub(*value) as i32 >= 0)
        }
        Work::Wait { stream, done } => {
            Ok(world.streams.get(stream).is_none_or(|stream| stream.done >= *done))
        }
    }
}

impl Launch {
    fn advance(&mut self, world: &World, device: i32, most: usize) -> Result<bool, OutOfPlace> {
        let mut left = most;
        while left > 0 && self.piece < self.pieces_count {
            let nth = u64::from(self.piece);
            let of: Pieces = read(world, device, self.pieces + nth * size_of::<Pieces>() as u64)?;
            let piece_bytes = u64::from(of.piece_words) * self.word_bytes;
            // As many words as the entry has tiles for: where the host counts otherwise than the kernel, some are left out.
            let next = self.pieces + (nth + 1) * size_of::<Pieces>() as u64;
            let end = match self.piece + 1 < self.pieces_count {
                true => read::<Pieces>(world, device, next)?.first_tile,
                false => self.tiles,
            };
            let words = of.words.min(end.saturating_sub(of.first_tile) * self.tile_words);
            if self.within >= words * self.word_bytes {
                (self.piece, self.within) = (self.piece + 1, 0);
                continue;
            }
            let (nth, begin) = (self.within / piece_bytes, self.within % piece_bytes);
            let part = (piece_bytes - begin).min(left as u64);
            let page = |list: u64| match list {
                0 => Ok(nth),
                list => Ok(u64::from(read::<u32>(world, device, list + 4 * nth)?)),
            };
            let from = of.from + page(of.from_pages)? * of.from_stride_bytes + begin;
            let to = of.to + page(of.to_pages)? * of.to_stride_bytes + begin;
            let is_aligned = |address: u64| address.is_multiple_of(self.word_bytes);
            if !is_aligned(from) || !is_aligned(to) {
                return Err(OutOfPlace);
            }
            copy(world, device, to, from, part as usize)?;
            (self.within, left) = (self.within + part, left - part as usize);
        }
        if self.piece < self.pieces_count {
            return Ok(false);
        }
        accessible(world, device, self.finished, 4)?;
        for nth in 0..u64::from(self.signals_count) {
            let signal: Signal = read(world, device, self.signals + nth * size_of::<Signal>() as u64)?;
            accessible(world, device, signal.at, 4)?;
            // SAFETY: the world has mapped the word, which is aligned; others read it as an atomic.
            unsafe { AtomicU32::from_ptr(at(signal.at).cast()) }.store(signal.value, Ordering::Release);
        }
        Ok(true)
    }
}

fn copy(world: &World, device: i32, to: u64, from: u64, bytes: usize) -> Result<(), OutOfPlace> {
    if bytes == 0 {
        return Ok(());
    }
    accessible(world, device, to, bytes)?;
    accessible(world, device, from, bytes)?;
    // SAFETY: the world has mapped both ranges, which its lock keeps mapped; no reference to them exists.
    unsafe { std::ptr::copy(at(from), at(to), bytes) };
    Ok(())
}

fn read<T: AnyBitPattern>(world: &World, device: i32, from: u64) -> Result<T, OutOfPlace> {
    accessible(world, device, from, size_of::<T>())?;
    // SAFETY: as above.
    Ok(unsafe { at(from).cast::<T>().read_unaligned() })
}

fn accessible(world: &World, device: i32, address: u64, bytes: usize) -> Result<(), OutOfPlace> {
    match world.is_accessible(device, address, bytes) {
        true => Ok(()),
        false => Err(OutOfPlace),
    }
}

fn at(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}
