//! Memory: allocated as a sealed memfd, mapped from a peer's, brought by the caller, or a device's.
//!
//! All the unsafe code of this crate is in this module, in `bytes`, below it, and in `prefetch`.
#![allow(unsafe_code)]

mod bytes;

use std::borrow::Cow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::{fmt, io, ptr};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::device::{DeviceFailed, DeviceMemory};

/// A range of memory that a port can register.
///
/// A clone is another handle to the same range. The mapping lives as long as any handle, so a port that keeps a
/// handle with each registration can never have the memory unmapped under its device.
///
/// Others write here while the program runs: peers, devices, other threads. So there is no way to borrow the bytes;
/// [`read`](Memory::read), [`write`](Memory::write) and [`fill`](Memory::fill) copy byte by byte as relaxed atomics
/// would. Bytes that change during a copy arrive as some mixture of old and new, and nothing worse happens.
#[derive(Clone)]
pub struct Memory {
    range: Arc<Range>,
}

impl Memory {
    /// Allocates zeroed memory that peers on this host can map.
    ///
    /// It is a memfd whose length is sealed, so that no peer that holds the descriptor can shrink it and kill this
    /// process by SIGBUS. A forked child does not inherit the mapping, and an executed one not the descriptor: no
    /// stray process keeps writing after this one is proven dead.
    pub fn allocate(bytes: usize, options: &AllocateOptions) -> Result<Memory, MemoryError> {
        check_length(bytes)?;
        if options.name.len() > NAME_BYTES_MAX || options.name.contains('\0') {
            return Err(MemoryError::BadName { name: options.name.to_string() });
        }
        match options.huge_pages {
            HugePages::Never => Memory::allocate_with(bytes, options, Backing::Pages),
            HugePages::Require => Memory::allocate_with(bytes, options, Backing::HugePages),
            HugePages::Try => Memory::allocate_with(bytes, options, Backing::HugePages)
                .or_else(|_| Memory::allocate_with(bytes, options, Backing::PagesMadeHuge)),
        }
    }

    /// Maps the first `bytes` of a memfd that a peer allocated.
    ///
    /// Its length has to be sealed against shrinking: an unsealed one is refused, because its owner could shorten
    /// it at any time and every access would then kill this process.
    pub fn from_fd(fd: OwnedFd, bytes: usize) -> Result<Memory, MemoryError> {
        check_length(bytes)?;
        // What has no seals at all, a plain file for instance, answers EINVAL.
        let seals = rustix::fs::fcntl_get_seals(&fd).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Err(MemoryError::NotSealed);
        }
        let stat = rustix::fs::fstat(&fd)
            .map_err(Failed::at("fstat"))
            .map_err(|failed| failed.explain(bytes, Backing::Pages))?;
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if (bytes as u64) > file_bytes {
            return Err(MemoryError::FileTooShort { bytes, file_bytes });
        }
        // A file of huge pages answers with their size, and its mappings are made of whole ones.
        let unit = usize::try_from(stat.st_blksize).unwrap_or(1).max(1);
        let mapped_bytes = round_up(bytes, unit).ok_or(MemoryError::TooLarge { bytes })?;
        let mapped_bytes = mapped_bytes.min(usize::try_from(file_bytes).unwrap_or(usize::MAX));
        let range =
            Range::map(fd, bytes, mapped_bytes).map_err(|failed| failed.explain(bytes, Backing::Pages))?;
        Ok(Memory { range: Arc::new(range) })
    }

    /// Memory that the caller allocated, of any origin. Its kind is [`MemoryKind::Private`].
    ///
    /// # Safety
    /// From now until the last handle is dropped, by this program and by every port it was registered with:
    /// - `base .. base + bytes` stays mapped, readable and writable;
    /// - no Rust reference to any of these bytes is used, since peers, devices and the methods of every handle may
    ///   read and write them at any time, from any thread; raw pointers and atomics remain allowed.
    ///
    /// How the owner of the bytes knows that the last handle is dropped: it keeps one itself, and frees the bytes, or
    /// uses them as its own again, only once [`is_last_handle`](Memory::is_last_handle) has said so of that one. To
    /// deregister the memory everywhere, or to drop the ports, is not enough. A port keeps its handle for as long as a
    /// peer could still write by itself; a port that is dropped while such a peer is still connected never lets go of
    /// it, and the bytes must then stay as they are until the process ends.
    // A suppression of tests/lsan-suppressions.txt names it.
    #[inline(never)]
    pub unsafe fn from_raw(base: *mut u8, bytes: usize) -> Result<Memory, MemoryError> {
        check_length(bytes)?;
        let base = NonNull::new(base).ok_or(MemoryError::NullBase)?;
        if base.addr().checked_add(bytes).is_none() {
            return Err(MemoryError::Wraps { base: base.addr().get(), bytes });
        }
        Ok(Memory { range: Arc::new(Range { base, bytes, origin: Origin::Caller }) })
    }

    /// Memory of a device, at `base` as the device addresses it. Its kind is [`MemoryKind::Device`]: no CPU reaches it, and
    /// `device` does for it what [`read`](Memory::read), [`write`](Memory::write) and [`fill`](Memory::fill) ask for.
    ///
    /// # Safety
    /// Until `device` is dropped, `base .. base + bytes` is memory of its device, and of nobody else in this process, by that
    /// address; it stays allocated, and nobody relies on its bytes staying as they are: peers and devices write there at any time.
    /// What it exports is of the same range.
    pub unsafe fn from_device(
        base: u64,
        bytes: usize,
        device: Box<dyn DeviceMemory>,
    ) -> Result<Memory, MemoryError> {
        check_length(bytes)?;
        let base = usize::try_from(base).map_err(|_| MemoryError::TooLarge { bytes })?;
        let base = NonNull::new(ptr::without_provenance_mut::<u8>(base)).ok_or(MemoryError::NullBase)?;
        if base.addr().checked_add(bytes).is_none() {
            return Err(MemoryError::Wraps { base: base.addr().get(), bytes });
        }
        Ok(Memory { range: Arc::new(Range { base, bytes, origin: Origin::Device(device) }) })
    }

    /// Whether no other handle to the range is left, in this program or in a port: nobody but the caller can reach the
    /// bytes through this library any more.
    pub fn is_last_handle(&mut self) -> bool {
        // With the only handle borrowed exclusively, no other can be made meanwhile; and what others did with theirs
        // before they dropped them happened before this.
        Arc::get_mut(&mut self.range).is_some()
    }

    /// Where the range begins.
    #[inline]
    pub fn base(&self) -> *mut u8 {
        self.range.base.as_ptr()
    }

    /// How long the range is.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.range.bytes
    }

    /// What it is.
    pub fn kind(&self) -> MemoryKind {
        match self.range.origin {
            Origin::Mapped { .. } => MemoryKind::Shared,
            Origin::Caller => MemoryKind::Private,
            Origin::Device(_) => MemoryKind::Device,
        }
    }

    /// What stands for a [device's memory](MemoryKind::Device): a port of that device's knows its type.
    pub fn device(&self) -> Option<&dyn DeviceMemory> {
        match &self.range.origin {
            Origin::Device(device) => Some(&**device),
            Origin::Mapped { .. } | Origin::Caller => None,
        }
    }

    /// The descriptor to pass to a peer on this host; only [`MemoryKind::Shared`] has one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.range.origin {
            Origin::Mapped { fd, .. } => Some(fd.as_fd()),
            Origin::Caller | Origin::Device(_) => None,
        }
    }

    /// The address of `offset`, when `bytes` bytes from there lie inside. That of a [device's memory](MemoryKind::Device)
    /// means something to the device only.
    #[inline]
    pub fn at(&self, offset: usize, bytes: usize) -> Result<*mut u8, OutOfRange> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.range.bytes => Ok(self.base().wrapping_add(offset)),
            _ => Err(OutOfRange { offset, bytes, memory_bytes: self.range.bytes }),
        }
    }

    /// Copies `into.len()` bytes out, from `offset` on.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), AccessError> {
        let from = self.at(offset, into.len())?;
        if let Some(device) = self.device() {
            return Ok(device.read(offset, into)?);
        }
        // SAFETY: `at` has checked that the bytes lie in the range, the host's own, mapped and readable while `self` lives,
        // and to which no reference exists, so `into` is elsewhere.
        unsafe { bytes::load(from, into) };
        Ok(())
    }

    /// Copies `from` in, from `offset` on.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), AccessError> {
        let to = self.at(offset, from.len())?;
        if let Some(device) = self.device() {
            return Ok(device.write(offset, from)?);
        }
        // SAFETY: `at` has checked that the bytes lie in the range, the host's own, mapped and writable while `self` lives,
        // and to which no reference exists, so `from` is elsewhere.
        unsafe { bytes::store(to, from) };
        Ok(())
    }

    /// Sets `bytes` bytes to `value`, from `offset` on.
    pub fn fill(&self, offset: usize, bytes: usize, value: u8) -> Result<(), AccessError> {
        let to = self.at(offset, bytes)?;
        if let Some(device) = self.device() {
            return Ok(device.fill(offset, bytes, value)?);
        }
        // SAFETY: `at` has checked that the bytes lie in the range, the host's own, mapped and writable while `self` lives.
        unsafe { bytes::fill(to, bytes, value) };
        Ok(())
    }

    fn allocate_with(
        bytes: usize,
        options: &AllocateOptions,
        backing: Backing,
    ) -> Result<Memory, MemoryError> {
        let unit = if backing == Backing::HugePages { HUGE_PAGE_BYTES } else { 1 };
        let mapped_bytes = round_up(bytes, unit).ok_or(MemoryError::TooLarge { bytes })?;
        let range = Range::allocate(bytes, mapped_bytes, options, backing);
        let range = range.map_err(|failed| failed.explain(bytes, backing))?;
        Ok(Memory { range: Arc::new(range) })
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("base", &self.base())
            .field("bytes", &self.bytes())
            .field("kind", &self.kind())
            .finish()
    }
}

/// How [`Memory::allocate`] backs the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocateOptions {
    /// Shown in `/proc/self/maps` and to whoever debugs the process; at most 249 bytes, no NUL.
    pub name: Cow<'static, str>,
    /// Whether to use 2 MiB pages, which cost a device fewer translations.
    pub huge_pages: HugePages,
    /// Whether every page is made present now, so that the first transfers pay no page fault and a host that lacks
    /// the memory fails here, not in the middle of one.
    pub prefault: bool,
}

impl Default for AllocateOptions {
    fn default() -> AllocateOptions {
        AllocateOptions { name: Cow::Borrowed("crossdock"), huge_pages: HugePages::Never, prefault: false }
    }
}

/// Whether memory is made of 2 MiB pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// The system's ordinary pages.
    #[default]
    Never,
    /// Reserved huge pages if the host has enough free, else ordinary pages that the kernel may make huge.
    Try,
    /// Reserved huge pages, or [`MemoryError::NoHugePages`].
    Require,
}

/// What a range of memory is, as far as ports care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// A sealed memfd: peers on this host can map it.
    Shared,
    /// The caller's memory.
    Private,
    /// A device's memory, which no CPU reaches by itself.
    Device,
}

/// A range that leaves the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at {offset} leave a memory of {memory_bytes} bytes")]
pub struct OutOfRange {
    /// Where the range begins.
    pub offset: usize,
    /// How long it is.
    pub bytes: usize,
    /// How long the memory is.
    pub memory_bytes: usize,
}

/// Why bytes of a memory were not copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// They do not lie inside.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The memory is a device's, and that failed.
    #[error(transparent)]
    Device(#[from] DeviceFailed),
}

/// Why there is no memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// No bytes were asked for.
    #[error("a memory of zero bytes cannot be made")]
    ZeroBytes,
    /// More bytes were asked for than an address space can hold.
    #[error("{bytes} bytes are more than an address space holds")]
    TooLarge {
        /// How many were asked for.
        bytes: usize,
    },
    /// The host does not have that much memory, or the process may not have it.
    #[error("the host does not give {bytes} bytes")]
    OutOfMemory {
        /// How many were asked for.
        bytes: usize,
    },
    /// Huge pages were required and the host has too few free: see `/proc/sys/vm/nr_hugepages`.
    #[error("the host has no {bytes} bytes free in huge pages of 2 MiB")]
    NoHugePages {
        /// How many bytes were asked for.
        bytes: usize,
    },
    /// The process, or the host, has no file descriptor left.
    #[error("no file descriptor is left")]
    TooManyFiles,
    /// The name is too long or has a NUL in it.
    #[error("{name:?} cannot name a memory: it has more than 249 bytes, or a NUL")]
    BadName {
        /// The name.
        name: String,
    },
    /// The caller's memory begins at address zero.
    #[error("memory cannot begin at the null address")]
    NullBase,
    /// The caller's memory ends behind the last address.
    #[error("{bytes} bytes at {base:#x} leave the address space")]
    Wraps {
        /// Where it begins.
        base: usize,
        /// How long it is.
        bytes: usize,
    },
    /// The peer's descriptor could be shortened while it is mapped.
    #[error("the file is not sealed against shrinking: mapping it would let its owner kill this process")]
    NotSealed,
    /// The peer's file is shorter than the peer said.
    #[error("the file has {file_bytes} bytes, not {bytes}")]
    FileTooShort {
        /// How many were to be mapped.
        bytes: usize,
        /// How many there are.
        file_bytes: u64,
    },
    /// The system refused for a reason that has no variant of its own.
    #[error("{call}: {}", io::Error::from_raw_os_error(*code))]
    Refused {
        /// What was called.
        call: &'static str,
        /// The system's error number.
        code: i32,
    },
}

/// How the memfd is backed, one try of [`HugePages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    Pages,
    PagesMadeHuge,
    HugePages,
}

/// What all handles share.
struct Range {
    base: NonNull<u8>,
    bytes: usize,
    origin: Origin,
}

enum Origin {
    /// Mapped here, unmapped with the last handle. Huge pages make the mapping longer than the range.
    Mapped { fd: OwnedFd, mapped_bytes: usize },
    /// The caller's, and the caller's to free.
    Caller,
    /// A device's, freed with what stands for it.
    Device(Box<dyn DeviceMemory>),
}

// SAFETY: the range is plain memory, reachable from every thread, and `bytes` copies it without data races; or it is a
// device's, and what stands for that is `Send` and `Sync`. Nothing else in here changes after it was made.
unsafe impl Send for Range {}
// SAFETY: as above.
unsafe impl Sync for Range {}

impl Range {
    fn allocate(
        bytes: usize,
        mapped_bytes: usize,
        options: &AllocateOptions,
        backing: Backing,
    ) -> Result<Range, Failed> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if backing == Backing::HugePages {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        // Hosts can be told to refuse memfds that could be executed. Kernels before 6.3 do not know the flag.
        let fd = match rustix::fs::memfd_create(&*options.name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => rustix::fs::memfd_create(&*options.name, flags),
            answer => answer,
        };
        let fd = fd.map_err(Failed::at("memfd_create"))?;
        rustix::fs::ftruncate(&fd, mapped_bytes as u64).map_err(Failed::at("ftruncate"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(Failed::at("fcntl(F_ADD_SEALS)"))?;
        let range = Range::map(fd, bytes, mapped_bytes)?;
        if backing == Backing::PagesMadeHuge {
            // Advice only: where the host has no transparent huge pages for shared memory, small ones serve.
            let _ = range.advise(Advice::LinuxHugepage);
        }
        if options.prefault {
            range.advise(Advice::LinuxPopulateWrite).map_err(Failed::at("madvise(MADV_POPULATE_WRITE)"))?;
        }
        Ok(range)
    }

    /// Maps the file and keeps the mapping out of forked children.
    fn map(fd: OwnedFd, bytes: usize, mapped_bytes: usize) -> Result<Range, Failed> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free place, so no mapping is replaced. No reference to the bytes is ever made,
        // so that others may change them; nobody can shorten the file, which is sealed.
        let base =
            unsafe { rustix::mm::mmap(ptr::null_mut(), mapped_bytes, protection, MapFlags::SHARED, &fd, 0) };
        let base = base.map_err(Failed::at("mmap"))?;
        let base = NonNull::new(base.cast::<u8>()).expect("the kernel places no mapping at the null address");
        let range = Range { base, bytes, origin: Origin::Mapped { fd, mapped_bytes } };
        range.advise(Advice::LinuxDontFork).map_err(Failed::at("madvise(MADV_DONTFORK)"))?;
        Ok(range)
    }

    /// Gives the kernel advice about a mapping of our own; about other memory there is none to give.
    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        match self.origin {
            // SAFETY: the whole mapping is ours, and none of the advice used here takes bytes away from it.
            Origin::Mapped { mapped_bytes, .. } => unsafe {
                rustix::mm::madvise(self.base.as_ptr().cast(), mapped_bytes, advice)
            },
            Origin::Caller | Origin::Device(_) => Ok(()),
        }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Origin::Mapped { mapped_bytes, .. } = self.origin {
            // SAFETY: the mapping is ours, as long as it was made, and with the last handle nobody knows of it.
            let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), mapped_bytes) };
            debug_assert_eq!(unmapped, Ok(()), "a mapping of our own can be unmapped");
        }
    }
}

/// A call that the system refused.
struct Failed {
    call: &'static str,
    code: Errno,
}

impl Failed {
    fn at(call: &'static str) -> impl FnOnce(Errno) -> Failed {
        move |code| Failed { call, code }
    }

    /// What the refusal means to whoever asked for `bytes` bytes.
    fn explain(self, bytes: usize, backing: Backing) -> MemoryError {
        match (backing, self.code) {
            // Which of these a kernel without huge pages gives depends on what it lacks.
            (Backing::HugePages, Errno::NOMEM | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => {
                MemoryError::NoHugePages { bytes }
            }
            (_, Errno::NOMEM | Errno::NOSPC | Errno::FBIG) => MemoryError::OutOfMemory { bytes },
            (_, Errno::MFILE | Errno::NFILE) => MemoryError::TooManyFiles,
            _ => MemoryError::Refused { call: self.call, code: self.code.raw_os_error() },
        }
    }
}

/// Pointers into a range must be able to reach each other, so no range is longer than `isize` says.
fn check_length(bytes: usize) -> Result<(), MemoryError> {
    match bytes {
        0 => Err(MemoryError::ZeroBytes),
        _ if isize::try_from(bytes).is_err() => Err(MemoryError::TooLarge { bytes }),
        _ => Ok(()),
    }
}

fn round_up(bytes: usize, unit: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(unit).filter(|&rounded| isize::try_from(rounded).is_ok())
}

const HUGE_PAGE_BYTES: usize = 2 << 20;
/// The kernel's limit for the name of a memfd.
const NAME_BYTES_MAX: usize = 249;
