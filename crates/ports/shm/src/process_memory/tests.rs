use super::*;

/// The process under test is this one: the kernel treats its own memory like another process's.
fn this_process() -> PeerProcess {
    PeerProcess::new(rustix::process::getpid())
}

/// Whether the system lets a process use these calls on itself at all; it says so where it does not.
fn calls_are_there() -> bool {
    match this_process().probe() {
        Ok(()) => true,
        Err(why @ (ProcessMemoryError::Unsupported | ProcessMemoryError::Refused { .. })) => {
            eprintln!("skipped: {why}");
            false
        }
        Err(other) => panic!("the probe of this process failed: {other}"),
    }
}

fn pieces<'a>(
    local: &mut [u8],
    remote: &mut [u8],
    piece_bytes: usize,
    local_index: &'a [u32],
    remote_index: &'a [u32],
) -> ProcessPieces<'a> {
    ProcessPieces {
        local_base: local.as_mut_ptr(),
        local_stride: piece_bytes,
        remote_base: remote.as_mut_ptr().expose_provenance() as u64,
        remote_stride: piece_bytes as u64,
        piece_bytes,
        local_index,
        remote_index,
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| at.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes()[0]).collect()
}

#[test]
fn scattered_pieces_arrive_in_more_batches_than_one() {
    if !calls_are_there() {
        return;
    }
    const PIECE_BYTES: usize = 100;
    let count = 3 * BATCH_RANGES as u32 + 5;
    let local_index = (0..count).map(|piece| piece * 7 % count).collect::<Vec<u32>>();
    let remote_index = (0..count).map(|piece| count - 1 - piece).collect::<Vec<u32>>();
    let mut local = pattern(count as usize * PIECE_BYTES);
    let mut remote = vec![0; local.len()];
    let list = pieces(&mut local, &mut remote, PIECE_BYTES, &local_index, &remote_index);
    // SAFETY: all pieces lie in the two vectors, which nobody else uses.
    unsafe { this_process().write_pieces(list) }.unwrap();
    let mut back = vec![0; local.len()];
    for (&from, &to) in local_index.iter().zip(&remote_index) {
        let (from, to) = (from as usize * PIECE_BYTES, to as usize * PIECE_BYTES);
        assert_eq!(local[from..from + PIECE_BYTES], remote[to..to + PIECE_BYTES]);
    }
    let list = pieces(&mut back, &mut remote, PIECE_BYTES, &local_index, &remote_index);
    // SAFETY: as above.
    unsafe { this_process().read_pieces(list) }.unwrap();
    assert!(back == local);
}

#[test]
fn neighbours_merge_on_each_side_by_itself() {
    let (mut local, mut remote) = (vec![0; 4096], vec![0; 4096]);
    let list = pieces(&mut local, &mut remote, 16, &[0, 1, 2, 9], &[5, 6, 8, 9]);
    let batch = Batch::after(&list, 0);
    let lengths = |ranges: &Ranges| ranges.filled().iter().map(|range| range.iov_len).collect::<Vec<_>>();
    assert_eq!(lengths(&batch.local), [48, 16]);
    assert_eq!(lengths(&batch.remote), [32, 32]);
    let rest = Batch::after(&list, 20);
    assert_eq!(lengths(&rest.local), [28, 16]);
    assert_eq!(lengths(&rest.remote), [12, 32]);
}

#[test]
fn a_full_batch_still_takes_neighbours() {
    let count = BATCH_RANGES as u32;
    let index = (0..count).map(|piece| piece * 2).chain([count * 2 - 1, count * 2]).collect::<Vec<u32>>();
    let (mut local, mut remote) = (vec![0; 4096], vec![0; 4096]);
    let list = pieces(&mut local, &mut remote, 8, &index, &index);
    let batch = Batch::after(&list, 0);
    assert_eq!(batch.local.filled().len(), BATCH_RANGES);
    assert_eq!(batch.local.filled()[BATCH_RANGES - 1].iov_len, 3 * 8);
}

#[test]
fn an_empty_list_and_empty_pieces_do_nothing() {
    let (mut local, mut remote) = ([1u8; 8], [2u8; 8]);
    // SAFETY: there are no bytes to touch.
    unsafe {
        this_process().write_pieces(pieces(&mut local, &mut remote, 8, &[], &[])).unwrap();
        this_process().write_pieces(pieces(&mut local, &mut remote, 0, &[0], &[0])).unwrap();
    }
    assert_eq!(remote, [2; 8]);
}

#[test]
fn a_bad_range_says_how_far_the_copy_came() {
    if !calls_are_there() {
        return;
    }
    const PIECE_BYTES: usize = 4096;
    let mut local = pattern(4 * PIECE_BYTES);
    // SAFETY: a fresh mapping at no particular address, whose last page nobody may touch.
    let remote = unsafe {
        let remote = rustix::mm::mmap_anonymous(
            core::ptr::null_mut(),
            4 * PIECE_BYTES,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
        )
        .unwrap();
        rustix::mm::mprotect(
            remote.cast::<u8>().add(3 * PIECE_BYTES).cast(),
            PIECE_BYTES,
            rustix::mm::MprotectFlags::empty(),
        )
        .unwrap();
        remote
    };
    let pieces = ProcessPieces {
        local_base: local.as_mut_ptr(),
        local_stride: PIECE_BYTES,
        remote_base: remote.expose_provenance() as u64,
        remote_stride: PIECE_BYTES as u64,
        piece_bytes: PIECE_BYTES,
        local_index: &[0, 1, 2, 3],
        remote_index: &[2, 0, 3, 1],
    };
    // SAFETY: the kernel refuses what is not accessible; the rest is ours.
    let error = unsafe { this_process().write_pieces(pieces) }.unwrap_err();
    let pid = this_process().pid().as_raw_nonzero().get();
    assert_eq!(error, ProcessMemoryError::BadRange { pid, copied_bytes: 2 * PIECE_BYTES });
    // SAFETY: the mapping is ours and nobody refers to it any more.
    unsafe { rustix::mm::munmap(remote, 4 * PIECE_BYTES).unwrap() };
}

#[test]
fn a_dead_process_is_told_apart() {
    if !calls_are_there() {
        return;
    }
    let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
    let peer = PeerProcess::new(Pid::from_raw(child.id() as i32).unwrap());
    child.wait().unwrap();
    let pid = peer.pid().as_raw_nonzero().get();
    assert_eq!(peer.probe(), Err(ProcessMemoryError::PeerDied { pid, copied_bytes: 0 }));
    let (mut local, mut remote) = ([0u8; 8], [0u8; 8]);
    // SAFETY: the local piece is ours, and there is no remote one.
    let result = unsafe { peer.write_pieces(pieces(&mut local, &mut remote, 8, &[0], &[0])) };
    assert_eq!(result, Err(ProcessMemoryError::PeerDied { pid, copied_bytes: 0 }));
}

#[test]
fn a_refusal_advises() {
    let error = this_process().error(Direction::Write, Errno::PERM, 0);
    assert!(matches!(error, ProcessMemoryError::Refused { .. }));
    assert!(error.to_string().contains("ptrace_scope"));
}
