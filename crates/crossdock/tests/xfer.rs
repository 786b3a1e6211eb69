//! Writes and reads by address: over every port, with memory that comes late, goes early, and with peers that go away.

mod carriers;

use std::time::{Duration, Instant};

use crossdock::xfer::{
    Block, Direction, Endpoint, EndpointConfig, RegisterError, Transfer, TransferError, Transferring,
};
use crossdock::{AllocateOptions, Authentication, Memory, PortConfig, PortError, SessionEnd, TicketError};

use carriers::Carrier;

const WAIT: Duration = Duration::from_secs(30);

/// Two of them, which write to each other.
fn endpoints(carrier: &Carrier) -> (Endpoint, Endpoint) {
    (open("here", vec![carrier.port(0)]), open("there", vec![carrier.port(1)]))
}

/// Devices that are software of an emulated kernel move some megabytes a second. With as much as elsewhere lanes ended there, with
/// `IBV_WC_RETRY_EXC_ERR` and `IBV_WC_REM_INV_REQ_ERR`: why is not known.
fn is_slow(carrier: &Carrier) -> bool {
    matches!(carrier, Carrier::Devices(_))
}

/// Over whatever there is without devices.
fn endpoint(name: &str) -> Endpoint {
    open(name, config(name).ports)
}

fn open(name: &str, ports: Vec<PortConfig>) -> Endpoint {
    Endpoint::open(EndpointConfig { ports, lanes_per_rail: 2, ..config(name) }).unwrap()
}

fn config(name: &str) -> EndpointConfig {
    EndpointConfig::new(name, Authentication::PreSharedKey(b"of these tests only".to_vec()))
}

fn soon() -> Instant {
    Instant::now() + WAIT
}

fn memory(bytes: usize) -> Memory {
    Memory::allocate(bytes, &AllocateOptions::default()).unwrap()
}

fn register(endpoint: &Endpoint, memory: &Memory) -> Result<(), RegisterError> {
    endpoint.handle().register(memory.clone()).unwrap().wait_until(soon()).unwrap()
}

fn begin(
    from: &Endpoint,
    to: &Endpoint,
    direction: Direction,
    blocks: Vec<Block>,
    deadline: Duration,
) -> Transferring {
    from.handle().transfer(Transfer { peer: to.address().into(), direction, blocks, deadline }).unwrap()
}

fn moved(
    from: &Endpoint,
    to: &Endpoint,
    direction: Direction,
    blocks: Vec<Block>,
) -> Result<(), TransferError> {
    let mut moving = begin(from, to, direction, blocks, WAIT);
    let end = moving.end.wait_until(soon()).unwrap();
    moving.quiet.wait_until(soon()).unwrap();
    end
}

fn address(memory: &Memory, offset: usize) -> u64 {
    memory.base() as u64 + offset as u64
}

fn fill(memory: &Memory, seed: usize) {
    let bytes: Vec<u8> = (0..memory.bytes()).map(|at| (at * 7 + at / 251 + seed) as u8).collect();
    memory.write(0, &bytes).unwrap();
}

fn bytes(memory: &Memory, offset: usize, count: usize) -> Vec<u8> {
    let mut found = vec![0; count];
    memory.read(offset, &mut found).unwrap();
    found
}

#[test]
fn blocks_of_any_length_move_both_ways() {
    for carrier in Carrier::all() {
        let (here, there) = endpoints(&carrier);
        let (local, remote) = (carrier.memory(40 << 20), carrier.memory(40 << 20));
        register(&here, &local).unwrap();
        register(&there, &remote).unwrap();
        fill(&local, 1);
        // Pages, a long stretch, single bytes, nothing.
        let (pages, stretch) = if is_slow(&carrier) { (200, 1 << 20) } else { (2_000, 20 << 20) };
        let mut places: Vec<(usize, usize, usize)> = (0..pages)
            .map(|page| ((page * 37 % 2_048) * 4_096, (page * 11 % 2_048) * 4_096, 4_096))
            .collect();
        places.extend([(8 << 20, 9 << 20, stretch), (3, 30 << 20, 1), (77, (30 << 20) + 1, 5), (9, 9, 0)]);
        let block = |&(from, to, bytes): &(usize, usize, usize)| Block {
            local: address(&local, from),
            remote: address(&remote, to),
            bytes: bytes as u64,
        };
        let blocks: Vec<Block> = places.iter().map(block).collect();
        moved(&here, &there, Direction::Write, blocks.clone()).unwrap();
        for &(from, to, count) in &places {
            assert!(
                bytes(&local, from, count) == bytes(&remote, to, count),
                "{carrier:?}: {from} {to} {count}"
            );
        }
        // Back, into memory that was cleared.
        local.fill(0, local.bytes(), 0).unwrap();
        moved(&here, &there, Direction::Read, blocks).unwrap();
        for &(from, to, count) in &places {
            assert!(
                bytes(&local, from, count) == bytes(&remote, to, count),
                "{carrier:?}: {from} {to} {count}"
            );
        }
        // The other side dials nobody and writes all the same: there is one session.
        let back = Block { local: address(&remote, 5), remote: address(&local, 6), bytes: 1_000 };
        moved(&there, &here, Direction::Write, vec![back]).unwrap();
        assert_eq!(bytes(&remote, 5, 1_000), bytes(&local, 6, 1_000));
    }
}

#[test]
fn an_empty_transfer_is_a_probe() {
    let (here, there) = (endpoint("here"), endpoint("there"));
    moved(&here, &there, Direction::Write, Vec::new()).unwrap();
    let nobody = Transfer {
        peer: "127.0.0.1:1".into(),
        direction: Direction::Write,
        blocks: Vec::new(),
        deadline: Duration::from_millis(200),
    };
    let mut moving = here.handle().transfer(nobody).unwrap();
    assert_eq!(moving.end.wait_until(soon()).unwrap(), Err(TransferError::Expired { is_connected: false }));
    assert!(here.handle().transfer(Transfer { peer: "nowhere".into(), ..probe() }).is_err());
}

fn probe() -> Transfer {
    Transfer { peer: String::new(), direction: Direction::Write, blocks: Vec::new(), deadline: WAIT }
}

#[test]
fn a_stranger_is_refused_at_once() {
    let here = endpoint("here");
    let key = Authentication::PreSharedKey(b"another key altogether".to_vec());
    let there = Endpoint::open(EndpointConfig::new("there", key)).unwrap();
    let end = moved(&here, &there, Direction::Write, Vec::new()).unwrap_err();
    assert!(matches!(end, TransferError::PeerLost { .. }) && !end.is_retryable(), "{end}");
}

#[test]
fn memory_that_is_registered_later_is_found() {
    for carrier in Carrier::all() {
        let (here, there) = endpoints(&carrier);
        let (local, remote) = (carrier.memory(1 << 20), carrier.memory(1 << 20));
        register(&here, &local).unwrap();
        fill(&local, 3);
        moved(&here, &there, Direction::Write, Vec::new()).unwrap();
        let block =
            |to: &Memory| vec![Block { local: address(&local, 0), remote: address(to, 0), bytes: 1 << 20 }];
        let unknown = moved(&here, &there, Direction::Write, block(&remote)).unwrap_err();
        assert!(matches!(unknown, TransferError::UnknownRemote { .. }), "{unknown}");
        register(&there, &remote).unwrap();
        // Beside others that know where they go.
        for _ in 0..3 {
            let second = carrier.memory(1 << 20);
            register(&there, &second).unwrap();
            let begun: Vec<Transferring> = (0..20)
                .map(|nth| {
                    begin(
                        &here,
                        &there,
                        Direction::Write,
                        block(if nth % 2 == 0 { &remote } else { &second }),
                        WAIT,
                    )
                })
                .collect();
            for mut moving in begun {
                assert_eq!(moving.end.wait_until(soon()).unwrap(), Ok(()), "{carrier:?}");
            }
            assert!(bytes(&second, 0, 1 << 20) == bytes(&local, 0, 1 << 20));
            unregister(&there, &second).unwrap();
        }
        let late = carrier.memory(4_096);
        let from = Block { local: address(&late, 0), remote: address(&remote, 0), bytes: 4_096 };
        let unknown = moved(&here, &there, Direction::Write, vec![from]).unwrap_err();
        assert!(matches!(unknown, TransferError::UnknownLocal { .. }), "{unknown}");
        register(&here, &late).unwrap();
        moved(&here, &there, Direction::Write, vec![from]).unwrap();
    }
}

fn unregister(endpoint: &Endpoint, memory: &Memory) -> Result<(), RegisterError> {
    endpoint.handle().unregister(address(memory, 0)).unwrap().wait_until(soon()).unwrap()
}

#[test]
fn memory_that_was_taken_back_is_the_callers_again() {
    for carrier in Carrier::all() {
        let (here, there) = endpoints(&carrier);
        let (local, mut remote) = (carrier.memory(1 << 16), carrier.memory(1 << 16));
        register(&here, &local).unwrap();
        register(&there, &remote).unwrap();
        let again = RegisterError::Overlaps {
            address: address(&remote, 0),
            bytes: 1 << 16,
            other: address(&remote, 0),
        };
        assert_eq!(register(&there, &remote), Err(again));
        let block = vec![Block { local: address(&local, 0), remote: address(&remote, 0), bytes: 1 << 16 }];
        moved(&here, &there, Direction::Write, block.clone()).unwrap();
        unregister(&there, &remote).unwrap();
        assert!(remote.is_last_handle(), "{carrier:?}");
        assert_eq!(unregister(&there, &remote), Err(RegisterError::Unknown { address: address(&remote, 0) }));
        let unknown = moved(&here, &there, Direction::Write, block.clone()).unwrap_err();
        assert!(matches!(unknown, TransferError::UnknownRemote { .. }), "{unknown}");
        register(&there, &remote).unwrap();
        moved(&here, &there, Direction::Write, block).unwrap();
    }
}

#[test]
fn a_peer_that_goes_away_is_told_and_one_that_comes_back_is_found() {
    let here = open("here", vec![PortConfig::Tcp(None)]);
    let local = memory(64 << 20);
    register(&here, &local).unwrap();
    let there = open("there", vec![PortConfig::Tcp(None)]);
    let remote = memory(64 << 20);
    register(&there, &remote).unwrap();
    let block = Block { local: address(&local, 0), remote: address(&remote, 0), bytes: 64 << 20 };
    moved(&here, &there, Direction::Write, vec![block]).unwrap();
    let begun: Vec<Transferring> =
        (0..8).map(|_| begin(&here, &there, Direction::Write, vec![block], Duration::from_secs(2))).collect();
    let bind = there.address().parse().unwrap();
    drop(there);
    for mut moving in begun {
        // Those that were quick enough are there; the others end by their deadline.
        let _ = moving.end.wait_until(soon()).unwrap();
        moving.quiet.wait_until(soon()).unwrap();
    }
    let ports = vec![PortConfig::Tcp(None)];
    let there = Endpoint::open(EndpointConfig { ports, bind, ..config("there") }).unwrap();
    register(&there, &remote).unwrap();
    fill(&local, 9);
    moved(&here, &there, Direction::Write, vec![block]).unwrap();
    assert!(bytes(&local, 0, 64 << 20) == bytes(&remote, 0, 64 << 20));
}

#[test]
fn whoever_waits_hears_that_the_endpoint_is_closed() {
    let here = endpoint("here");
    let mut moving = here.handle().transfer(Transfer { peer: "127.0.0.1:1".into(), ..probe() }).unwrap();
    let handle = here.handle().clone();
    drop(here);
    assert!(matches!(moving.end.wait_until(soon()), Err(TicketError::Abandoned(_))));
    assert!(handle.transfer(Transfer { peer: "127.0.0.1:1".into(), ..probe() }).is_err());
}

/// Memory of the caller's own, too, which shared memory's port reaches by the kernel.
#[test]
fn memory_is_the_callers_again_when_the_endpoint_is_closed() {
    for carrier in Carrier::all() {
        let (here, there) = endpoints(&carrier);
        let (mut source, mut target) = (vec![3u8; 1 << 20], vec![0u8; 1 << 20]);
        let own = |bytes: &mut Vec<u8>| {
            // SAFETY: the vector outlives the memory, as the test shows, and nobody looks at it meanwhile.
            unsafe { Memory::from_raw(bytes.as_mut_ptr(), bytes.len()) }.unwrap()
        };
        let (mut local, mut remote) = (own(&mut source), own(&mut target));
        if let Carrier::Gpu(_) = carrier {
            let refused = register(&here, &local).unwrap_err();
            assert!(matches!(refused, RegisterError::Port(PortError::Unsupported { .. })), "{refused}");
            continue;
        }
        register(&here, &local).unwrap();
        register(&there, &remote).unwrap();
        let block = Block { local: address(&local, 0), remote: address(&remote, 0), bytes: 1 << 20 };
        let end = moved(&here, &there, Direction::Write, vec![block]);
        if let Err(TransferError::PeerLost {
            cause: SessionEnd::Port(PortError::Unsupported { advice, .. }),
        }) = end
        {
            println!("skipped: {carrier:?}: {advice}");
            continue;
        }
        end.unwrap();
        drop(here);
        assert!(local.is_last_handle(), "{carrier:?}");
        drop(there);
        assert!(remote.is_last_handle(), "{carrier:?}");
        assert!(target.iter().all(|&byte| byte == 3), "{carrier:?}");
    }
}

/// Numbers of regions are used again: an endpoint may register for as long as it likes.
#[test]
fn memory_comes_and_goes_more_often_than_there_are_numbers() {
    let (here, there) = endpoints(&Carrier::Tcp);
    let (local, remote) = (memory(4_096), memory(4_096));
    register(&here, &local).unwrap();
    for _ in 0..4_200 {
        register(&there, &remote).unwrap();
        unregister(&there, &remote).unwrap();
    }
    register(&there, &remote).unwrap();
    let block = Block { local: address(&local, 0), remote: address(&remote, 0), bytes: 4_096 };
    moved(&here, &there, Direction::Write, vec![block]).unwrap();
}

/// Both sides write to each other at once, from several threads, while sessions are renewed under them.
#[test]
fn many_threads_write_both_ways_while_sessions_are_renewed() {
    for carrier in &Carrier::all() {
        let (here, there) = endpoints(carrier);
        let (rounds, page_bytes) = if is_slow(carrier) { (6, 2_048) } else { (30, 16_384) };
        let (one, other) = (carrier.memory(8 << 20), carrier.memory(8 << 20));
        register(&here, &one).unwrap();
        register(&there, &other).unwrap();
        // The first half of each is what is sent.
        for (memory, seed) in [(&one, 1), (&other, 2)] {
            fill(memory, seed);
        }
        std::thread::scope(|scope| {
            for thread in 0..2usize {
                for (from, to, source, target) in
                    [(&here, &there, &one, &other), (&there, &here, &other, &one)]
                {
                    scope.spawn(move || {
                        for round in 0..rounds {
                            let blocks = (0..64).map(|page| {
                                let page = (page * 29 + round) % 64 + thread * 64;
                                let at = page * page_bytes;
                                Block {
                                    local: address(source, at),
                                    remote: address(target, (4 << 20) + at),
                                    bytes: page_bytes as u64,
                                }
                            });
                            let end = moved(from, to, Direction::Write, blocks.collect());
                            assert_eq!(end, Ok(()), "{carrier:?}: whatever is renewed");
                        }
                    });
                }
            }
            scope.spawn(|| {
                for _ in 0..5 {
                    let late = carrier.memory(4_096);
                    register(&there, &late).unwrap();
                    let block = Block { local: address(&one, 0), remote: address(&late, 0), bytes: 4_096 };
                    let _ = moved(&here, &there, Direction::Write, vec![block]);
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
        });
        for (from, to, source, target) in [(&here, &there, &one, &other), (&there, &here, &other, &one)] {
            let count = 256 * page_bytes;
            let block =
                Block { local: address(source, 0), remote: address(target, 4 << 20), bytes: count as u64 };
            moved(from, to, Direction::Write, vec![block]).unwrap();
            assert!(bytes(source, 0, count) == bytes(target, 4 << 20, count), "{carrier:?}");
        }
    }
}
