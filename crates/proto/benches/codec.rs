//! What it costs to encode and to decode the control messages that grow, beside a copy of the same bytes into a new
//! vector, which no codec of owned messages can undercut by much.
//!
//! ```text
//! cargo bench -p crossdock-proto --bench codec                    # nanoseconds, all messages
//! cargo bench -p crossdock-proto --bench codec -- grant-10000     # one
//! ```
//!
//! A room costs one Grant and one Finish (and a Release and a Delivered of a few bytes), a session one Setup. Encoding
//! is timed into a new vector, as for a frame that is sent. Where time is noisy, count the instructions of one encoding
//! and one decoding:
//!
//! ```text
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
//!     --toggle-collect='*there_and_back*' target/release/deps/codec-???????????????? --once grant-10000
//! ```
//!
//! Recorded with rustc 1.95 and valgrind 3.19 on x86-64: grant-0 2,138, grant-100 3,596, grant-10000 153,315, finish-1
//! 2,605, setup-1 8,562.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crossdock_proto::{Identity, Message, RegionOffer, RoomName, RoomOnWire};
use crossdock_transport::{Access, GrantId, LaneAddress, RemoteKey};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (flags, names): (Vec<_>, Vec<_>) = arguments.iter().partition(|argument| argument.starts_with("--"));
    let once = flags.iter().any(|flag| *flag == "--once");
    if !once {
        println!(
            "{:<14} {:>7} {:>24} {:>24} {:>24}",
            "ns, median (bytes a ns)", "bytes", "encode", "decode", "a copy"
        );
    }
    for (name, message) in messages() {
        if !names.is_empty() && !names.contains(&&name.to_string()) {
            continue;
        }
        match once {
            true => println!("{name}: {} bytes", there_and_back(&message)),
            false => measure(name, &message),
        }
    }
}

/// What both ends of a control stream do for one message.
#[inline(never)]
fn there_and_back(message: &Message) -> usize {
    let frame = encoded(message);
    black_box(Message::decode(&frame).expect("it was encoded here"));
    frame.len()
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut frame = Vec::new();
    black_box(message).encode(FROM, &mut frame);
    frame
}

fn measure(name: &str, message: &Message) {
    let frame = encoded(message);
    let told = |ns: f64| format!("{ns:.0} ({:.1})", frame.len() as f64 / ns);
    let encode = median_ns(|| drop(black_box(encoded(message))));
    let decode =
        median_ns(|| drop(black_box(Message::decode(black_box(&frame)).expect("it was encoded here"))));
    let copy = median_ns(|| drop(black_box(black_box(&frame).clone())));
    println!("{name:<14} {:>7} {:>24} {:>24} {:>24}", frame.len(), told(encode), told(decode), told(copy));
}

/// Of 200 batches that are long enough for the clock.
fn median_ns(mut work: impl FnMut()) -> f64 {
    let mut batch = |times: u32| {
        let begin = Instant::now();
        (0..times).for_each(|_| work());
        begin.elapsed()
    };
    let mut times = 1;
    while batch(times) < Duration::from_micros(200) {
        times *= 2;
    }
    let mut found: Vec<f64> = (0..200).map(|_| batch(times).as_nanos() as f64 / f64::from(times)).collect();
    found.sort_unstable_by(f64::total_cmp);
    found[found.len() / 2]
}

fn messages() -> Vec<(&'static str, Message)> {
    let grant = |pages: u32| Message::Grant {
        room: ROOM,
        access: Access::Write,
        attempt: 0,
        grant: GrantId::new(17, 3),
        duration_ns: 30_000_000_000,
        params: vec![0; 9],
        pages: (0..pages).map(|page| page.wrapping_mul(0x9e37_79b1) % (1 << 20)).collect(),
    };
    let finish =
        |lanes, aux| Message::Finish { room: ROOM, attempt: 0, arrivals: vec![61; lanes], aux: vec![7; aux] };
    let setup = |lanes: u8, regions: u32| Message::Setup {
        lanes: (0..lanes).map(|slot| (slot, LaneAddress::new(&[slot; 48]).expect("short"))).collect(),
        regions: (0..regions)
            .map(|region| RegionOffer {
                region,
                bytes: 64 << 30,
                keys: (0..2).map(|rail| (rail, RemoteKey::new(&[rail; 40]).expect("short"))).collect(),
            })
            .collect(),
        app: vec![3; 2048],
        held: Vec::new(),
    };
    vec![
        ("grant-0", grant(0)),
        ("grant-100", grant(100)),
        ("grant-10000", grant(10_000)),
        ("finish-1", finish(1, 16)),
        ("finish-16", finish(16, 256)),
        ("setup-1", setup(1, 1)),
        ("setup-61", setup(16, 61)),
    ]
}

const FROM: Identity = Identity { node: 1, incarnation: 2 };
const ROOM: RoomOnWire = RoomOnWire { name: RoomName { room: 7, use_count: 1, share: 0 }, serial: 9 };
