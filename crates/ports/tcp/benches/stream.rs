//! Scattered pages through the port and through a bare socket, in turns, on the loopback device.
//!
//! `cargo bench -p crossdock-tcp [-- --rounds N --megabytes N --congestion NAME --pages BYTES,.. --calls]`
//!
//! The bare socket moves the same pages with `writev` and `readv` from one thread to another, without frames, grants
//! or checks: what the medium costs. Printed are the medians of both, their ratio, and CPU seconds of both threads
//! for 10⁹ bytes; then the time of one 4 KiB page there and one back, both sides spinning.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use crossdock_memory::{Memory, PageLayout};
use crossdock_tcp::{TcpOptions, TcpPort};
use crossdock_transport::{
    Access, Arm, Direction, Event, Events, Grant, GrantId, GrantedBuffer, LaneId, LaneTags, LocalId, Op,
    PeerId, Port, RemoteId, Shape, Token,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt;

fn main() {
    let asked = Asked::from_arguments();
    println!(
        "{} MB a round, {} rounds, congestion {}",
        asked.bytes / 1_000_000,
        asked.rounds,
        asked.congestion.as_deref().unwrap_or("of the host")
    );
    println!(
        "{:>9} {:>10} {:>10} {:>6} {:>12} {:>12} {:>6}",
        "page", "port GB/s", "bare GB/s", "ratio", "port s/GB", "bare s/GB", "ratio"
    );
    for &page_bytes in &asked.pages {
        stream(&asked, page_bytes);
    }
    ping_pong(&asked);
}

struct Asked {
    rounds: usize,
    bytes: usize,
    congestion: Option<String>,
    pages: Vec<usize>,
    calls: bool,
}

impl Asked {
    fn from_arguments() -> Self {
        let mut asked = Self {
            rounds: 9,
            bytes: 256_000_000,
            congestion: None,
            pages: vec![1152, 4096, 16384, 65536, 1 << 20],
            calls: false,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_else(|| panic!("{name} needs a value"));
            match name.as_str() {
                "--rounds" => asked.rounds = value().parse().expect("a number of rounds"),
                "--megabytes" => {
                    asked.bytes = value().parse::<usize>().expect("a number of megabytes") * 1_000_000
                }
                "--congestion" => asked.congestion = Some(value()),
                "--pages" => {
                    asked.pages = value()
                        .split(',')
                        .filter(|page| !page.is_empty())
                        .map(|page| page.parse().expect("a page length"))
                        .collect();
                }
                "--calls" => asked.calls = true,
                // Cargo passes it to every benchmark.
                "--bench" => {}
                other => panic!("unknown option {other}"),
            }
        }
        asked
    }
}

/// The pages of one run: the same for the port and for the bare socket.
struct Work {
    page_bytes: usize,
    from: Vec<u32>,
    to: Vec<u32>,
    source: Memory,
    target: Memory,
}

impl Work {
    fn new(page_bytes: usize, bytes: usize) -> Self {
        let slots = POOL_BYTES / page_bytes;
        let pages = (bytes / page_bytes).min(slots);
        let memory = || {
            let options = crossdock_memory::AllocateOptions { prefault: true, ..Default::default() };
            Memory::allocate(POOL_BYTES, &options).expect("memory for the pages")
        };
        let work = Self {
            page_bytes,
            from: shuffled(1, slots)[..pages].to_vec(),
            to: shuffled(2, slots)[..pages].to_vec(),
            source: memory(),
            target: memory(),
        };
        for (i, &page) in work.from.iter().enumerate() {
            work.source.write(page as usize * page_bytes, &(i as u64).to_le_bytes()).expect("inside");
        }
        work
    }

    fn bytes(&self) -> usize {
        self.page_bytes * self.from.len()
    }

    /// Checks the first bytes of every page at the target and wipes them.
    fn verify(&self) {
        for (i, &page) in self.to.iter().enumerate() {
            let mut head = [0; 8];
            self.target.read(page as usize * self.page_bytes, &mut head).expect("inside");
            assert_eq!(u64::from_le_bytes(head), i as u64, "page {i} did not arrive");
            self.target.write(page as usize * self.page_bytes, &[0xff; 8]).expect("inside");
        }
    }
}

fn stream(asked: &Asked, page_bytes: usize) {
    let work = Arc::new(Work::new(page_bytes, asked.bytes));
    let mut port = PortPair::new(asked, &work);
    let mut bare = BarePair::new(asked);
    let mut rates = [Vec::new(), Vec::new()];
    let mut cpu = [0.0, 0.0];
    for round in 0..=asked.rounds {
        for (which, run) in
            [(0, &mut (|| port.stream(&work)) as &mut dyn FnMut() -> f64), (1, &mut || bare.stream(&work))]
        {
            let before = cpu_seconds();
            let seconds = run();
            let used = cpu_seconds() - before;
            work.verify();
            // The first round warms up.
            if round > 0 {
                rates[which].push(work.bytes() as f64 / seconds / 1e9);
                cpu[which] += used;
            }
        }
    }
    let gb = work.bytes() as f64 * asked.rounds as f64 / 1e9;
    // Neighbours disturb the rounds; the two of one round are disturbed alike.
    let ratio = median(rates[0].iter().zip(&rates[1]).map(|(port, bare)| port / bare).collect());
    let [port_rate, bare_rate] = rates.map(median);
    println!(
        "{page_bytes:>9} {port_rate:>10.3} {bare_rate:>10.3} {:>6.3} {:>12.3} {:>12.3} {:>6.3}",
        ratio,
        cpu[0] / gb,
        cpu[1] / gb,
        cpu[0] / cpu[1]
    );
    if asked.calls {
        let (writer, reader) = (port.writer.port.counters(), port.reader.port.counters());
        let per_mb = |calls: u64, bytes: u64| calls as f64 / (bytes as f64 / 1e6);
        println!(
            "          {:.2} sendmsg and {:.2} readv a megabyte",
            per_mb(writer.send_calls, writer.bytes_sent),
            per_mb(reader.receive_calls, reader.bytes_received)
        );
    }
}

fn ping_pong(asked: &Asked) {
    let work = Arc::new(Work::new(4096, 4096 * 256));
    let mut port = PortPair::new(asked, &work);
    let mut bare = BarePair::new(asked);
    let mut both = [Vec::new(), Vec::new()];
    for _ in 0..asked.rounds {
        both[0].extend(port.ping_pong(&work));
        both[1].extend(bare.ping_pong(&work));
    }
    let [port_us, bare_us] = both.map(median);
    println!(
        "4 KiB there and back: port {port_us:.2} us, bare {bare_us:.2} us, ratio {:.3}",
        port_us / bare_us
    );
}

/// One end of a lane for a thread.
struct PortEnd {
    port: TcpPort,
    lane: LaneId,
    region: LocalId,
    remote: RemoteId,
    events: Events,
}

impl PortEnd {
    fn wait(&mut self) {
        self.port.poll(&mut self.events);
        if !self.events.is_empty() {
            return;
        }
        if let Arm::Sleep(fd) = self.port.arm() {
            poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).expect("poll");
        }
    }

    fn post(&mut self, mut op: Op<'_>, mut idle: impl FnMut(&mut Self)) {
        loop {
            let posted = self.port.post(self.lane, &[op]).expect("posting");
            if posted.ops == 1 {
                return;
            }
            op = op.advance(posted.within);
            idle(self);
        }
    }

    fn pages<'l>(&self, work: &Work, from: &'l [u32], to: &'l [u32]) -> Op<'l> {
        let stride = work.page_bytes as u64;
        let shape = Shape::Pages {
            local: self.region,
            local_offset: 0,
            local_stride_bytes: stride,
            local_pages: from,
            remote: self.remote,
            remote_offset: 0,
            remote_stride_bytes: stride,
            remote_pages: to,
            piece_bytes: stride,
        };
        Op {
            direction: Direction::Write,
            grant: GrantId::new(0, 0),
            shape,
            imm: Some(1),
            token: Some(Token(1)),
        }
    }
}

struct PortPair {
    writer: PortEnd,
    reader: PortEnd,
}

impl PortPair {
    fn new(asked: &Asked, work: &Work) -> Self {
        let options = TcpOptions { congestion: asked.congestion.clone(), ..Default::default() };
        let mut ports = [&work.source, &work.target].map(|memory| {
            let mut port = TcpPort::open(options.clone()).expect("a port");
            let (region, key) = port.register(memory).expect("a region");
            let layout =
                PageLayout::dense(0, work.page_bytes as u64, (memory.bytes() / work.page_bytes) as u32);
            let pages = if memory.base() == work.source.base() { &work.from } else { &work.to };
            let buffers = [GrantedBuffer { region, layout }];
            let grant = Grant {
                id: GrantId::new(0, 0),
                peer: PeerId(1),
                access: Access::Write,
                buffers: &buffers,
                pages,
            };
            port.grant(&grant).expect("a grant");
            let (lane, address) = port.open_lane(PeerId(1)).expect("a lane");
            (port, region, key, lane, address)
        });
        let tags = LaneTags { ours: [1; 32], theirs: [1; 32] };
        let addresses = [ports[0].4.clone(), ports[1].4.clone()];
        for (i, (port, _, _, lane, _)) in ports.iter_mut().enumerate() {
            port.connect(*lane, &addresses[1 - i], &tags).expect("connecting");
        }
        let mut up = 0;
        while up < 2 {
            for (port, ..) in &mut ports {
                let mut events = Events::with_capacity(4);
                port.poll(&mut events);
                up += events.iter().filter(|event| matches!(event, Event::Up { .. })).count();
            }
        }
        let keys = [ports[0].2.clone(), ports[1].2.clone()];
        let mut which = 0;
        let [writer, reader] = ports.map(|(mut port, region, _, lane, _)| {
            let remote = port.attach(lane, &keys[1 - which]).expect("attaching").id;
            which += 1;
            PortEnd { port, lane, region, remote, events: Events::with_capacity(64) }
        });
        Self { writer, reader }
    }

    /// Seconds from the first post until the reader has told the writer that all has arrived.
    fn stream(&mut self, work: &Work) -> f64 {
        let Self { writer, reader } = self;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    reader.wait();
                    if reader.events.drain().any(|event| matches!(event, Event::Arrived { .. })) {
                        break;
                    }
                }
                reader.post(Op::notify(2), |_| unreachable!("there is room for one"));
            });
            let begin = Instant::now();
            let mut told = false;
            let mut note = |writer: &mut PortEnd| {
                writer.wait();
                told |= writer.events.drain().any(|event| matches!(event, Event::Arrived { .. }));
                told
            };
            let op = writer.pages(work, &work.from, &work.to);
            writer.post(op, |writer| {
                note(writer);
            });
            while !note(writer) {}
            begin.elapsed().as_secs_f64()
        })
    }

    /// Microseconds of each round trip of one page.
    fn ping_pong(&mut self, work: &Work) -> Vec<f64> {
        let Self { writer, reader } = self;
        let seen = |end: &mut PortEnd| loop {
            end.port.poll(&mut end.events);
            if end.events.drain().any(|event| matches!(event, Event::Arrived { .. })) {
                return;
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for trip in 0..TRIPS {
                    seen(reader);
                    let i = trip % 256;
                    let op = reader.pages(work, &work.to[i..=i], &work.from[i..=i]);
                    reader.post(Op { token: None, ..op }, |_| {});
                }
            });
            let mut trips = Vec::new();
            for trip in 0..TRIPS {
                let begin = Instant::now();
                let i = trip % 256;
                let op = writer.pages(work, &work.from[i..=i], &work.to[i..=i]);
                writer.post(Op { token: None, ..op }, |_| {});
                seen(writer);
                trips.push(begin.elapsed().as_secs_f64() * 1e6);
            }
            trips
        })
    }
}

struct BarePair {
    writer: TcpStream,
    reader: TcpStream,
}

impl BarePair {
    fn new(asked: &Asked) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        if let Some(name) = &asked.congestion {
            sockopt::set_tcp_congestion(&listener, name).expect("this congestion control");
        }
        let writer = TcpStream::connect(listener.local_addr().expect("an address")).expect("connecting");
        let (reader, _) = listener.accept().expect("accepting");
        for socket in [&writer, &reader] {
            socket.set_nodelay(true).expect("TCP_NODELAY");
            if let Some(name) = &asked.congestion {
                sockopt::set_tcp_congestion(socket, name).expect("this congestion control");
            }
        }
        Self { writer, reader }
    }

    fn stream(&mut self, work: &Work) -> f64 {
        let Self { writer, reader } = self;
        let source = Bytes::of(&work.source);
        let target = Bytes::of(&work.target);
        let (page, batch) = (work.page_bytes, 512);
        let started = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                started.wait();
                for pages in work.to.chunks(batch) {
                    let mut pieces: Vec<_> = pages
                        .iter()
                        .map(|&i| IoSliceMut::new(target.piece(i as usize * page, page)))
                        .collect();
                    let mut left = &mut pieces[..];
                    while !left.is_empty() {
                        let bytes = reader.read_vectored(left).expect("readv");
                        IoSliceMut::advance_slices(&mut left, bytes);
                    }
                }
                reader.write_all(&[1; 8]).expect("write");
            });
            started.wait();
            let begin = Instant::now();
            for pages in work.from.chunks(batch) {
                let mut pieces: Vec<_> =
                    pages.iter().map(|&i| IoSlice::new(source.piece(i as usize * page, page))).collect();
                let mut left = &mut pieces[..];
                while !left.is_empty() {
                    let bytes = writer.write_vectored(left).expect("writev");
                    IoSlice::advance_slices(&mut left, bytes);
                }
            }
            writer.read_exact(&mut [0; 8]).expect("read");
            begin.elapsed().as_secs_f64()
        })
    }

    fn ping_pong(&mut self, work: &Work) -> Vec<f64> {
        let Self { writer, reader } = self;
        writer.set_nonblocking(true).expect("non-blocking");
        reader.set_nonblocking(true).expect("non-blocking");
        let take = |socket: &mut TcpStream, page: &mut [u8]| {
            let mut have = 0;
            while have < page.len() {
                match socket.read(&mut page[have..]) {
                    Ok(bytes) => have += bytes,
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
                }
            }
        };
        let source = Bytes::of(&work.source);
        let target = Bytes::of(&work.target);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for trip in 0..TRIPS {
                    let page = target.piece(work.to[trip % 256] as usize * 4096, 4096);
                    take(reader, page);
                    reader.write_all(page).expect("write");
                }
            });
            let mut trips = Vec::new();
            for trip in 0..TRIPS {
                let begin = Instant::now();
                let page = source.piece(work.from[trip % 256] as usize * 4096, 4096);
                writer.write_all(page).expect("write");
                take(writer, page);
                trips.push(begin.elapsed().as_secs_f64() * 1e6);
            }
            trips
        })
    }
}

/// A memory of which only one thread uses any byte while a bare socket moves it.
struct Bytes {
    base: usize,
}

impl Bytes {
    fn of(memory: &Memory) -> Self {
        Self { base: memory.base().expose_provenance() }
    }

    #[allow(clippy::mut_from_ref)]
    fn piece(&self, offset: usize, bytes: usize) -> &mut [u8] {
        let at = std::ptr::with_exposed_provenance_mut::<u8>(self.base + offset);
        // SAFETY: every page of a list is named once and lies in the memory, which outlives the run; while bare
        // sockets move it no port is polled and no other thread reads or writes it.
        unsafe { std::slice::from_raw_parts_mut(at, bytes) }
    }
}

fn cpu_seconds() -> f64 {
    let ticks = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    ticks.tv_sec as f64 + ticks.tv_nsec as f64 * 1e-9
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn shuffled(seed: u64, n: usize) -> Vec<u32> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    let mut numbers: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        numbers.swap(i, next() as usize % (i + 1));
    }
    numbers
}

const POOL_BYTES: usize = 512 << 20;
const TRIPS: usize = 2000;
