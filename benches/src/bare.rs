//! The best means known to move scattered pages, without anything around them: what a port is measured against.
//!
//! All of the benchmarks' unsafe copies are here. Each takes whole [`Memory`]s and checks the lists against them.
#![allow(unsafe_code)]

mod gpu;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, ptr};

use crossdock::{AllocateOptions, Memory};
use crossdock_shm::copy::{Copier, CopyThreads, Pieces};
use crossdock_shm::process_memory::{PeerProcess, ProcessPieces};
use rustix::process::Pid;

pub use gpu::GpuPair;

/// Pages that move from one pool to another.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    /// Which pages of the source.
    pub from: &'a [u32],
    /// Where they go; as long as `from`.
    pub to: &'a [u32],
    /// The length of a page.
    pub page_bytes: usize,
    /// How many pages each layer has in either pool.
    pub layer_pages: u32,
    /// How many layers there are.
    pub layers: u32,
}

impl<'a> Pages<'a> {
    /// The bytes of all pages in all layers.
    pub fn bytes(&self) -> u64 {
        self.from.len() as u64 * self.page_bytes as u64 * u64::from(self.layers)
    }

    fn check(&self, list: &[u32], pool_bytes: usize) {
        let layer_bytes = self.layer_pages as usize * self.page_bytes;
        assert!(list.iter().all(|&page| page < self.layer_pages), "a page beyond its layer");
        assert!(layer_bytes * self.layers as usize <= pool_bytes, "layers beyond the pool");
        assert_eq!(self.from.len(), self.to.len(), "each page has both of its ends");
    }

    fn layer_offsets(&self) -> impl Iterator<Item = usize> + use<> {
        let layer_bytes = self.layer_pages as usize * self.page_bytes;
        (0..self.layers as usize).map(move |layer| layer * layer_bytes)
    }

    fn part(&self, part: usize, parts: usize) -> Pages<'a> {
        let range = self.from.len() * part / parts..self.from.len() * (part + 1) / parts;
        Pages { from: &self.from[range.clone()], to: &self.to[range], ..*self }
    }

    fn pieces(&self, source: &Memory, target: &Memory, offset: usize) -> Pieces<'a> {
        Pieces {
            dst_base: target.base().wrapping_add(offset),
            dst_stride: self.page_bytes,
            src_base: source.base().wrapping_add(offset),
            src_stride: self.page_bytes,
            piece_bytes: self.page_bytes,
            dst_index: self.to,
            src_index: self.from,
        }
    }
}

/// Copies page by page with the C library's `memcpy`, in equal parts on so many threads.
///
/// # Panics
/// If a list leaves its pool, as everything here does.
pub fn memcpy(source: &Memory, target: &Memory, pages: Pages<'_>, threads: usize) {
    in_parts(
        pages,
        threads,
        |part| {
            for offset in part.layer_offsets() {
                let (from, to) = (source.base().wrapping_add(offset), target.base().wrapping_add(offset));
                for (&here, &there) in part.from.iter().zip(part.to) {
                    let from = from.wrapping_add(here as usize * part.page_bytes);
                    let to = to.wrapping_add(there as usize * part.page_bytes);
                    // SAFETY: `in_parts` has checked that both pages lie in their memories, which are different mappings.
                    unsafe { ptr::copy_nonoverlapping(from, to, part.page_bytes) };
                }
            }
        },
        source,
        target,
    );
}

/// Copies with one copier on so many threads.
pub fn copy(copier: Copier, source: &Memory, target: &Memory, pages: Pages<'_>, threads: usize) {
    in_parts(
        pages,
        threads,
        |part| {
            for offset in part.layer_offsets() {
                // SAFETY: as in `memcpy`; no page is named twice, since the lists are parts of permutations.
                unsafe { copier.copy_pieces(part.pieces(source, target, offset)) };
            }
        },
        source,
        target,
    );
}

/// Copies with the port's own copy threads, all pages in one call a layer.
pub fn copy_shared(threads: &mut CopyThreads, source: &Memory, target: &Memory, pages: Pages<'_>) {
    pages.check(pages.from, source.bytes());
    pages.check(pages.to, target.bytes());
    for offset in pages.layer_offsets() {
        // SAFETY: as in `copy`.
        unsafe { threads.copy_pieces(pages.pieces(source, target, offset)) };
    }
}

fn in_parts(
    pages: Pages<'_>,
    threads: usize,
    copy: impl Fn(Pages<'_>) + Sync,
    source: &Memory,
    target: &Memory,
) {
    pages.check(pages.from, source.bytes());
    pages.check(pages.to, target.bytes());
    if threads == 1 {
        return copy(pages);
    }
    std::thread::scope(|scope| {
        for part in 1..threads {
            let copy = &copy;
            scope.spawn(move || copy(pages.part(part, threads)));
        }
        copy(pages.part(0, threads));
    });
}

/// A pool of another process that is reached with `process_vm_writev` and `process_vm_readv`.
#[derive(Clone, Copy, Debug)]
pub struct ThereMemory {
    /// The process.
    pub process: Pid,
    /// Where the pool begins in it.
    pub base: u64,
    /// How long it is.
    pub bytes: usize,
}

/// Which way bytes go between this process and another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From here to there.
    Write,
    /// From there to here.
    Read,
}

/// Moves pages between processes, this many a call.
pub fn process_memory(
    here: &Memory,
    there: ThereMemory,
    way: Way,
    pages: Pages<'_>,
    pages_per_call: usize,
) -> io::Result<()> {
    let (local, remote) = match way {
        Way::Write => (pages.from, pages.to),
        Way::Read => (pages.to, pages.from),
    };
    pages.check(local, here.bytes());
    pages.check(remote, there.bytes);
    let process = PeerProcess::new(there.process);
    for offset in pages.layer_offsets() {
        for (local, remote) in local.chunks(pages_per_call).zip(remote.chunks(pages_per_call)) {
            let pieces = ProcessPieces {
                local_base: here.base().wrapping_add(offset),
                local_stride: pages.page_bytes,
                remote_base: there.base + offset as u64,
                remote_stride: pages.page_bytes as u64,
                piece_bytes: pages.page_bytes,
                local_index: local,
                remote_index: remote,
            };
            // SAFETY: the local pages lie in `here`, as was checked, and nobody else uses them during a benchmark's
            // pass; the other process has offered its pool for this.
            let moved = unsafe {
                match way {
                    Way::Write => process.write_pieces(pieces),
                    Way::Read => process.read_pieces(pieces),
                }
            };
            moved.map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// The memory behind a descriptor of another process of the same user, as it is.
pub fn map_theirs(process: i32, descriptor: i32, bytes: usize) -> io::Result<Memory> {
    let path = format!("/proc/{process}/fd/{descriptor}");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    Memory::from_fd(file.into(), bytes).map_err(io::Error::other)
}

/// The same, all of it present.
pub fn open_theirs(process: i32, descriptor: i32, bytes: usize) -> io::Result<Memory> {
    let memory = map_theirs(process, descriptor, bytes)?;
    // SAFETY: the range is mapped, and making its pages present takes no byte away.
    unsafe { rustix::mm::madvise(memory.base().cast(), bytes, rustix::mm::Advice::LinuxPopulateWrite)? };
    Ok(memory)
}

/// Which end of a stream this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Has the pages.
    Sends,
    /// Wants them.
    Receives,
}

/// One end's part of moving pages over connections, many pages in a call: each connection has an equal part of the
/// list and a thread, and at last the receiving end answers with a word.
pub fn stream(connections: &[TcpStream], pool: &Memory, pages: Pages<'_>, end: End) -> io::Result<()> {
    let list = match end {
        End::Sends => pages.from,
        End::Receives => pages.to,
    };
    pages.check(list, pool.bytes());
    let count = connections.len();
    let run = |part: usize| {
        let list = &list[list.len() * part / count..list.len() * (part + 1) / count];
        let mut connection = &connections[part];
        let socket = connection.as_raw_fd();
        match end {
            End::Sends => {
                stream_pages(pool, list, pages, |pieces| {
                    // SAFETY: every piece lies in the pool, which outlives the call.
                    unsafe { libc::writev(socket, pieces.as_ptr(), pieces.len() as _) }
                })?;
                connection.read_exact(&mut [0; 8])
            }
            End::Receives => {
                stream_pages(pool, list, pages, |pieces| {
                    // SAFETY: every piece lies in the pool, which outlives the call and to which there is no reference.
                    unsafe { libc::readv(socket, pieces.as_ptr(), pieces.len() as _) }
                })?;
                connection.write_all(&[1; 8])
            }
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..count).map(|part| scope.spawn(move || run(part))).collect();
        let mut result = run(0);
        for other in others {
            result = result.and(other.join().expect("it does not panic"));
        }
        result
    })
}

/// Lets every call on a connection fail that has waited for the other end for so long.
pub fn give_up_after(connection: &TcpStream, limit: Duration) -> io::Result<()> {
    connection.set_read_timeout(Some(limit))?;
    connection.set_write_timeout(Some(limit))
}

fn stream_pages(
    pool: &Memory,
    list: &[u32],
    pages: Pages<'_>,
    mut call: impl FnMut(&[libc::iovec]) -> isize,
) -> io::Result<()> {
    let mut space = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; PIECES_A_CALL];
    for offset in pages.layer_offsets() {
        for chunk in list.chunks(PIECES_A_CALL) {
            for (piece, &page) in space.iter_mut().zip(chunk) {
                let at = pool.base().wrapping_add(offset + page as usize * pages.page_bytes);
                *piece = libc::iovec { iov_base: at.cast(), iov_len: pages.page_bytes };
            }
            let mut left = &mut space[..chunk.len()];
            while !left.is_empty() {
                let mut moved = match call(left) {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    moved if moved < 0 => {
                        let error = io::Error::last_os_error();
                        match error.kind() {
                            io::ErrorKind::Interrupted => continue,
                            _ => return Err(error),
                        }
                    }
                    moved => moved as usize,
                };
                while let Some(piece) = left.first_mut() {
                    if moved < piece.iov_len {
                        piece.iov_base = piece.iov_base.wrapping_byte_add(moved);
                        piece.iov_len -= moved;
                        break;
                    }
                    moved -= piece.iov_len;
                    left = &mut left[1..];
                }
            }
        }
    }
    Ok(())
}

/// One end's part of moving a page over a connection that does not block: calls until all of it has moved.
pub fn page_spinning(
    connection: &TcpStream,
    pool: &Memory,
    page: u32,
    page_bytes: usize,
    end: End,
) -> io::Result<()> {
    let at = pool.at(page as usize * page_bytes, page_bytes).map_err(io::Error::other)?;
    // SAFETY: the page lies in the pool, which outlives the call and to which there is no reference.
    unsafe { spinning(connection, at, page_bytes, end) }
}

/// One end's part of asking for a page over such a connection: a word.
pub fn word_spinning(connection: &TcpStream, end: End) -> io::Result<()> {
    let mut word = [1; 8];
    // SAFETY: the word outlives the call, and nothing else uses it meanwhile.
    unsafe { spinning(connection, word.as_mut_ptr(), word.len(), end) }
}

/// # Safety
/// The bytes must be readable, and writable where they are received, and nobody else may use them during the call.
unsafe fn spinning(connection: &TcpStream, at: *mut u8, bytes: usize, end: End) -> io::Result<()> {
    let socket = connection.as_raw_fd();
    let mut patience = Patience::default();
    let mut done = 0;
    while done < bytes {
        let (rest, left) = (at.wrapping_add(done), bytes - done);
        // SAFETY: what is left is a part of what the caller vouches for.
        let moved = unsafe {
            match end {
                End::Sends => libc::send(socket, rest.cast(), left, libc::MSG_NOSIGNAL),
                End::Receives => libc::recv(socket, rest.cast(), left, 0),
            }
        };
        match moved {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => done += moved as usize,
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => patience.spin()?,
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Two words in memory that two processes share: each end grows its own, and spins until it sees the other's grow.
#[derive(Debug)]
pub struct Flags(Memory);

impl Flags {
    /// Both words are 0.
    pub fn new() -> io::Result<Self> {
        Memory::allocate(FLAGS_BYTES, &AllocateOptions::default()).map(Self).map_err(io::Error::other)
    }

    /// Those that another process has made.
    pub fn theirs(process: i32, descriptor: i32) -> io::Result<Self> {
        open_theirs(process, descriptor, FLAGS_BYTES).map(Self)
    }

    /// What the other process opens.
    pub fn descriptor(&self) -> Option<i32> {
        self.0.fd().map(|fd| fd.as_fd().as_raw_fd())
    }

    /// Shows a number, and everything that was written before, to the other end.
    pub fn show(&self, which: End, number: u64) {
        self.word(which).store(number, Ordering::Release);
    }

    /// What an end has shown last.
    pub fn shown(&self, which: End) -> u64 {
        self.word(which).load(Ordering::Acquire)
    }

    /// Spins until an end has shown this number.
    pub fn wait(&self, which: End, number: u64) -> io::Result<()> {
        let mut patience = Patience::default();
        while self.shown(which) < number {
            patience.spin()?;
        }
        Ok(())
    }

    fn word(&self, which: End) -> &AtomicU64 {
        // Far enough from each other that no line and no pair of lines holds both.
        let offset = if which == End::Sends { 0 } else { 256 };
        let at = self.0.at(offset, 8).expect("the memory is longer than that");
        // SAFETY: mappings begin at a page, so the word is aligned; it lives as long as the memory, and both processes
        // use it in no other way.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }
}

/// Spins, but not for ever: the other end may have died.
#[derive(Default)]
pub struct Patience {
    spins: u32,
    since: Option<Instant>,
}

impl Patience {
    /// Once more; an error of the kind [`TimedOut`](io::ErrorKind::TimedOut) after [`SPIN_LIMIT`].
    pub fn spin(&mut self) -> io::Result<()> {
        std::hint::spin_loop();
        self.spins = self.spins.wrapping_add(1);
        if self.spins.is_multiple_of(1 << 12)
            && self.since.get_or_insert_with(Instant::now).elapsed() > SPIN_LIMIT
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    /// The same where software may play the device: it needs a processor now and then.
    pub fn spin_or_yield(&mut self) -> io::Result<()> {
        self.spin()?;
        if self.spins.is_multiple_of(1 << 8) {
            std::thread::yield_now();
        }
        Ok(())
    }
}

const FLAGS_BYTES: usize = 4096;

/// How long the other end of a spinning one may take.
pub const SPIN_LIMIT: Duration = Duration::from_secs(30);

const PIECES_A_CALL: usize = 512;
