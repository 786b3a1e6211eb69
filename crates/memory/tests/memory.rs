//! What `Memory` promises, asked of the kernel.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use crossdock_memory::{AllocateOptions, HugePages, Memory, MemoryError, MemoryKind, OutOfRange};
use rustix::fs::{MemfdFlags, SealFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_getfd};

const PAGE_BYTES: usize = 4096;

fn allocate(bytes: usize) -> Memory {
    Memory::allocate(bytes, &AllocateOptions::default()).unwrap()
}

/// The kernel's description of the mapping that begins at `memory`.
fn smaps_of(memory: &Memory) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", memory.base().addr());
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let head = lines.next().expect("the memory is mapped");
    // Fields begin with a capital letter, the next mapping with a hexadecimal digit in lower case.
    let fields = lines.take_while(|line| line.starts_with(|first: char| first.is_ascii_uppercase()));
    std::iter::once(head).chain(fields).collect::<Vec<_>>().join("\n")
}

/// Whether this runs under an emulator that answers `madvise` and does nothing: a kernel refuses advice that does
/// not exist. The tests of what advice does have nothing to ask then.
fn advice_is_ignored() -> bool {
    let memory = allocate(PAGE_BYTES);
    // SAFETY: a kernel that knows no such advice does nothing.
    let ignored = unsafe { libc::madvise(memory.base().cast(), PAGE_BYTES, 0x7fff) } == 0;
    if ignored {
        eprintln!("skipped: madvise does nothing here");
    }
    ignored
}

#[test]
fn new_memory_is_zero_and_takes_what_is_written() {
    let memory = allocate(3 * PAGE_BYTES + 5);
    assert_eq!((memory.bytes(), memory.kind()), (3 * PAGE_BYTES + 5, MemoryKind::Shared));
    let mut all = vec![1; memory.bytes()];
    memory.read(0, &mut all).unwrap();
    assert!(all.iter().all(|&byte| byte == 0));

    memory.write(PAGE_BYTES - 2, b"dock").unwrap();
    memory.fill(memory.bytes() - 3, 3, 7).unwrap();
    memory.read(0, &mut all).unwrap();
    assert_eq!(&all[PAGE_BYTES - 3..PAGE_BYTES + 3], b"\0dock\0");
    assert_eq!(&all[3 * PAGE_BYTES..], [0, 0, 7, 7, 7]);
}

#[test]
fn a_range_outside_is_refused_and_nothing_is_touched() {
    let memory = allocate(PAGE_BYTES);
    let mut two = [9; 2];
    for (offset, bytes) in [(PAGE_BYTES - 1, 2), (PAGE_BYTES + 1, 0), (usize::MAX, 2), (usize::MAX - 1, 2)] {
        let refused = OutOfRange { offset, bytes, memory_bytes: PAGE_BYTES };
        assert_eq!(memory.read(offset, &mut two[..bytes]), Err(refused.into()));
        assert_eq!(memory.write(offset, &two[..bytes]), Err(refused.into()));
        assert_eq!(memory.fill(offset, bytes, 1), Err(refused.into()));
        assert_eq!(memory.at(offset, bytes), Err(refused));
    }
    assert_eq!(two, [9; 2]);
    let mut all = [1; PAGE_BYTES];
    memory.read(0, &mut all).unwrap();
    assert_eq!(all, [0; PAGE_BYTES]);
    assert_eq!(memory.at(PAGE_BYTES, 0).unwrap(), memory.base().wrapping_add(PAGE_BYTES));
    memory.write(PAGE_BYTES, &[]).unwrap();
}

#[test]
fn nobody_can_change_the_length() {
    let memory = allocate(2 * PAGE_BYTES);
    let fd = memory.fd().unwrap();
    for bytes in [0, PAGE_BYTES as u64, 4 * PAGE_BYTES as u64] {
        assert_eq!(rustix::fs::ftruncate(fd, bytes), Err(Errno::PERM), "to {bytes}");
    }
    assert_eq!(rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE), Err(Errno::PERM));
    assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
}

#[test]
fn a_forked_child_does_not_have_the_mapping() {
    if advice_is_ignored() {
        return;
    }
    let memory = allocate(PAGE_BYTES);
    memory.fill(0, PAGE_BYTES, 1).unwrap();
    let mut resident = 0u8;
    // SAFETY: the child calls `mincore` and `_exit` alone, which are system calls and nothing else, so what other
    // threads held at the fork does not matter; `resident` has a byte for the one page.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            let unmapped = libc::mincore(memory.base().cast(), PAGE_BYTES, &mut resident) == -1
                && *libc::__errno_location() == libc::ENOMEM;
            libc::_exit(if unmapped { 42 } else { 1 });
        }
        child
    };
    assert!(child > 0);
    let mut status = 0;
    // SAFETY: `status` is ours to write.
    let ended = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(ended, child);
    assert!(libc::WIFEXITED(status));
    assert_eq!(libc::WEXITSTATUS(status), 42);

    // The same question to the parent, which shows that the child's answer means something.
    // SAFETY: `resident` has a byte for the one page.
    let mapped = unsafe { libc::mincore(memory.base().cast(), PAGE_BYTES, &mut resident) };
    assert_eq!((mapped, resident & 1), (0, 1));

    let fd = memory.fd().unwrap().try_clone_to_owned().unwrap();
    let of_a_peer = Memory::from_fd(fd, PAGE_BYTES).unwrap();
    let smaps = smaps_of(&of_a_peer);
    let flags = smaps.lines().find(|line| line.starts_with("VmFlags:")).unwrap();
    assert!(flags.contains(" dc"), "{flags} lack what keeps a mapping out of children");
}

#[test]
fn sizes_that_cannot_be_are_refused_by_name() {
    let options = AllocateOptions::default();
    assert_eq!(Memory::allocate(0, &options).unwrap_err(), MemoryError::ZeroBytes);
    let bytes = usize::MAX;
    assert_eq!(Memory::allocate(bytes, &options).unwrap_err(), MemoryError::TooLarge { bytes });
    // Longer than any address space of 57 bits, and not too long for a file.
    let bytes = 1 << 60;
    assert_eq!(Memory::allocate(bytes, &options).unwrap_err(), MemoryError::OutOfMemory { bytes });
    let bytes = isize::MAX as usize;
    let huge = AllocateOptions { huge_pages: HugePages::Require, ..options };
    assert_eq!(Memory::allocate(bytes, &huge).unwrap_err(), MemoryError::TooLarge { bytes });
}

#[test]
fn names_reach_the_kernel_or_are_refused() {
    let named = |name: String| AllocateOptions { name: name.into(), ..AllocateOptions::default() };
    let memory = Memory::allocate(1, &named("kv-pages".into())).unwrap();
    assert!(smaps_of(&memory).lines().next().unwrap().contains("kv-pages"));
    Memory::allocate(1, &named("n".repeat(249))).unwrap();
    for name in ["n".repeat(250), "a\0b".into()] {
        assert_eq!(Memory::allocate(1, &named(name.clone())).unwrap_err(), MemoryError::BadName { name });
    }
}

#[test]
fn prefault_makes_every_page_present() {
    if advice_is_ignored() {
        return;
    }
    let bytes = 64 * PAGE_BYTES;
    let resident_kb = |prefault| {
        let memory =
            Memory::allocate(bytes, &AllocateOptions { prefault, ..AllocateOptions::default() }).unwrap();
        let smaps = smaps_of(&memory);
        let line = smaps.lines().find(|line| line.starts_with("Rss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    };
    assert_eq!(resident_kb(true), bytes / 1024);
    assert_eq!(resident_kb(false), 0);
}

#[test]
fn huge_pages_are_huge_or_refused_and_trying_always_works() {
    let options = |huge_pages| AllocateOptions { huge_pages, ..AllocateOptions::default() };
    let bytes = (2 << 20) + 1;
    match Memory::allocate(bytes, &options(HugePages::Require)) {
        Ok(memory) => {
            assert_eq!(memory.bytes(), bytes);
            assert!(smaps_of(&memory).contains("KernelPageSize:     2048 kB"));
            let mapped = Memory::from_fd(memory.fd().unwrap().try_clone_to_owned().unwrap(), bytes).unwrap();
            memory.write(bytes - 1, &[5]).unwrap();
            let mut byte = [0];
            mapped.read(bytes - 1, &mut byte).unwrap();
            assert_eq!(byte, [5]);
        }
        Err(error) => assert_eq!(error, MemoryError::NoHugePages { bytes }),
    }
    let memory = Memory::allocate(bytes, &options(HugePages::Try)).unwrap();
    memory.fill(0, bytes, 1).unwrap();
    assert_eq!(memory.bytes(), bytes);
}

#[test]
fn a_peer_sees_the_same_bytes() {
    let memory = allocate(2 * PAGE_BYTES);
    let fd = || memory.fd().unwrap().try_clone_to_owned().unwrap();
    let mapped = Memory::from_fd(fd(), PAGE_BYTES + 1).unwrap();
    assert_eq!((mapped.bytes(), mapped.kind()), (PAGE_BYTES + 1, MemoryKind::Shared));
    assert_ne!(mapped.base(), memory.base());
    memory.write(PAGE_BYTES, b"x").unwrap();
    let mut byte = [0];
    mapped.read(PAGE_BYTES, &mut byte).unwrap();
    assert_eq!(&byte, b"x");

    let too_long = MemoryError::FileTooShort { bytes: 2 * PAGE_BYTES + 1, file_bytes: 2 * PAGE_BYTES as u64 };
    assert_eq!(Memory::from_fd(fd(), 2 * PAGE_BYTES + 1).unwrap_err(), too_long);
    assert_eq!(Memory::from_fd(fd(), 0).unwrap_err(), MemoryError::ZeroBytes);
}

#[test]
fn what_a_peer_could_shorten_is_not_mapped() {
    let memfd = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memfd, PAGE_BYTES as u64).unwrap();
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::GROW).unwrap();
    let file = OwnedFd::from(File::open("/proc/self/exe").unwrap());
    for fd in [memfd, file] {
        assert_eq!(Memory::from_fd(fd, 1).unwrap_err(), MemoryError::NotSealed);
    }
}

#[test]
fn the_mapping_lives_as_long_as_any_handle() {
    let memory = allocate(PAGE_BYTES);
    let handle = memory.clone();
    let base = memory.base();
    drop(memory);
    let back = std::thread::spawn(move || {
        handle.write(1, &[3]).unwrap();
        let mut byte = [0];
        handle.read(1, &mut byte).unwrap();
        (byte, handle)
    });
    let (byte, handle) = back.join().unwrap();
    assert_eq!(byte, [3]);
    assert_eq!(handle.base(), base);
    // A reader of the descriptor alone keeps the bytes, not the mapping.
    let fd = handle.fd().unwrap().as_fd().try_clone_to_owned().unwrap();
    drop(handle);
    let mut byte = [0];
    rustix::io::pread(&fd, &mut byte, 1).unwrap();
    assert_eq!(byte, [3]);
}

#[test]
fn memory_of_the_caller_is_private_and_stays_the_callers() {
    let owner: Box<[u8]> = vec![6; 100].into();
    let base = Box::into_raw(owner);
    {
        // SAFETY: the allocation outlives the handle and no reference to it is used while the handle lives.
        let mut memory = unsafe { Memory::from_raw(base.cast(), 100) }.unwrap();
        assert_eq!((memory.bytes(), memory.kind()), (100, MemoryKind::Private));
        assert_eq!(memory.base(), base.cast());
        assert!(memory.fd().is_none());
        memory.clone().write(98, &[1, 2]).unwrap();
        assert!(memory.write(99, &[1, 2]).is_err());
        let other = memory.clone();
        assert!(!memory.is_last_handle(), "somebody else may write");
        drop(other);
        assert!(memory.is_last_handle());
    }
    // SAFETY: it came from `Box::into_raw`, and the only handle is gone.
    let owner = unsafe { Box::from_raw(base) };
    assert_eq!(owner[96..], [6, 6, 1, 2]);
}

#[test]
fn addresses_that_cannot_be_are_refused_by_name() {
    let mut byte = 0u8;
    let from_raw = |base: *mut u8, bytes: usize| {
        // SAFETY: each of these is refused before any handle exists.
        unsafe { Memory::from_raw(base, bytes) }.unwrap_err()
    };
    assert_eq!(from_raw(&mut byte, 0), MemoryError::ZeroBytes);
    assert_eq!(from_raw(&mut byte, usize::MAX), MemoryError::TooLarge { bytes: usize::MAX });
    assert_eq!(from_raw(std::ptr::null_mut(), 1), MemoryError::NullBase);
    let last = std::ptr::without_provenance_mut(usize::MAX);
    assert_eq!(from_raw(last, 1), MemoryError::Wraps { base: usize::MAX, bytes: 1 });
}

#[test]
fn handles_can_go_to_any_thread() {
    fn threads<T: Send + Sync + 'static>() {}
    threads::<Memory>();
}
