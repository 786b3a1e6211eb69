//! What the medium carries on this machine, measured just before a scene: the yardstick of its share.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::{
    self as transport, Direction, Error, Event, Events, GrantId, LaneId, LaneTags, Op, PeerId, Port, Shape,
    Token,
};
use crossdock_verbs::VerbsPort;

use super::PortName;
use super::worker;

/// More would not make the figure better.
const MOST_BYTES: usize = 192 << 20;
const PIECE_BYTES: usize = 64 * 1152;
const REPEATS: usize = 3;

/// The best of a few tries with as many bytes as a pool has, in GB/s; 0 where nothing could be measured. Over RDMA, the
/// rails of both sides count.
pub fn measure(port: PortName, rails: [Option<&str>; 2], pool_bytes: u64) -> f64 {
    let bytes = usize::try_from(pool_bytes).map_or(MOST_BYTES, |bytes| bytes.min(MOST_BYTES));
    let tries = (0..REPEATS).map(|_| match port {
        PortName::Shm => copy(bytes),
        PortName::Tcp => stream(bytes).unwrap_or(0.0),
        PortName::Verbs => writes(rails, bytes).unwrap_or(0.0),
    });
    tries.fold(0.0, f64::max)
}

/// One thread copies page-sized pieces from one half of memory to the other, scattered.
fn copy(bytes: usize) -> f64 {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    let pieces = bytes / PIECE_BYTES;
    let begin = Instant::now();
    for at in 0..pieces {
        let (source, destination) =
            ((at * 7919) % pieces * PIECE_BYTES, (at * 104_729) % pieces * PIECE_BYTES);
        to[destination..destination + PIECE_BYTES].copy_from_slice(&from[source..source + PIECE_BYTES]);
    }
    let seconds = begin.elapsed().as_secs_f64();
    std::hint::black_box(&to);
    (pieces * PIECE_BYTES) as f64 / seconds / 1e9
}

/// One plain stream over loopback, large writes and reads.
fn stream(bytes: usize) -> std::io::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let reader = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            match stream.read(&mut buffer)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => left = left.saturating_sub(read),
            }
        }
        stream.write_all(&[1])
    });
    let mut stream = TcpStream::connect(address)?;
    let buffer = vec![1; 1 << 20];
    let begin = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(buffer.len());
        stream.write_all(&buffer[..piece])?;
        left -= piece;
    }
    stream.read_exact(&mut [0])?;
    let seconds = begin.elapsed().as_secs_f64();
    reader.join().map_err(|_| std::io::Error::other("the reading thread panicked"))??;
    Ok(bytes as f64 / seconds / 1e9)
}

/// Long writes on a lane between the devices of the two sides, a lane for each rail.
fn writes(rails: [Option<&str>; 2], bytes: usize) -> transport::Result<f64> {
    let [from, to] = rails.map(worker::rails);
    let mut lanes = from
        .into_iter()
        .zip(to)
        .map(|(from, to)| Writes::open(VerbsPort::open(from)?, VerbsPort::open(to)?))
        .collect::<transport::Result<Vec<_>>>()?;
    let begin = Instant::now();
    let mut written = 0;
    while written < bytes && begin.elapsed() < LONGEST {
        let came: transport::Result<Vec<usize>> = lanes.iter_mut().map(Writes::turn).collect();
        written += came?.iter().sum::<usize>();
    }
    Ok(written as f64 / begin.elapsed().as_secs_f64() / 1e9)
}

/// One lane, and the ports at both of its ends.
struct Writes {
    ports: [VerbsPort; 2],
    events: Events,
    op: Op<'static>,
    lane: LaneId,
    under_way: usize,
}

impl Writes {
    fn open(mut from: VerbsPort, mut to: VerbsPort) -> transport::Result<Self> {
        let memory = || Memory::allocate(WRITE_BYTES, &AllocateOptions::default());
        let (Ok(source), Ok(target)) = (memory(), memory()) else {
            return Err(Error::Limit { what: "memory", limit: WRITE_BYTES as u64 });
        };
        let ((local, _), (_, key)) = (from.register(&source)?, to.register(&target)?);
        let ((lane, here), (other, there)) = (from.open_lane(PeerId(0))?, to.open_lane(PeerId(0))?);
        let (ours, theirs) = ([1; 32], [2; 32]);
        from.connect(lane, &there, &LaneTags { ours, theirs })?;
        to.connect(other, &here, &LaneTags { ours: theirs, theirs: ours })?;
        let mut events = Events::with_capacity(EVENTS);
        let begin = Instant::now();
        let remote = loop {
            for port in [&mut from, &mut to] {
                port.poll(&mut events);
                events.clear();
            }
            match from.attach(lane, &key) {
                Ok(attached) => break attached.id,
                Err(Error::LaneNotUp { .. } | Error::NotYet) if begin.elapsed() < MEETING => {
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        };
        let shape =
            Shape::Span { local, local_offset: 0, remote, remote_offset: 0, bytes: WRITE_BYTES as u64 };
        // The devices check keys, and know of no grants.
        let (grant, direction) = (GrantId::NONE, Direction::Write);
        let op = Op { direction, grant, shape, imm: None, token: Some(Token(0)) };
        Ok(Self { ports: [from, to], events, op, lane, under_way: 0 })
    }

    /// Posts what there is room for, and says how many bytes have been written since the last turn.
    fn turn(&mut self) -> transport::Result<usize> {
        let [from, to] = &mut self.ports;
        while self.under_way < MOST_UNDER_WAY && from.post(self.lane, &[self.op])?.ops == 1 {
            self.under_way += 1;
        }
        from.poll(&mut self.events);
        let mut written = 0;
        for event in self.events.drain() {
            match event {
                Event::Done { .. } => written += 1,
                Event::Down { lane, .. } => return Err(Error::LaneDown { lane }),
                Event::Up { .. } | Event::Arrived { .. } => {}
            }
        }
        to.poll(&mut self.events);
        self.events.clear();
        self.under_way -= written;
        Ok(written * WRITE_BYTES)
    }
}

const WRITE_BYTES: usize = 1 << 20;
const MOST_UNDER_WAY: usize = 16;
const EVENTS: usize = 64;
/// Software that plays a device is slow: so long a try takes.
const LONGEST: Duration = Duration::from_secs(1);
/// For both ends of a lane to meet.
const MEETING: Duration = Duration::from_secs(10);
