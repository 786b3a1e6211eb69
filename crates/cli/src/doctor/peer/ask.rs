//! The machine that asks.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crossdock_transport::{Error, LaneAddress, RemoteKey};

use super::rail::{self, Rail, Stuck};
use super::talk::{ANSWER_PATIENCE, Answer, Offer, Question, Talk, from_hex, to_hex};
use super::{Alone, MEASURED_MS, Measured, Pair, Peer, Trouble, VERIFIED_BYTES};

/// Tries every rail of this machine with every one of the peer's that it can reach.
pub fn ask(address: &str) -> Peer {
    let mut peer = Peer { address: address.into(), error: None, pairs: Vec::new(), alone: Vec::new() };
    if let Err(error) = ask_all(&mut peer) {
        peer.error = Some(error.to_string());
    }
    peer
}

fn ask_all(peer: &mut Peer) -> io::Result<()> {
    let stream = connect(&peer.address)?;
    let (mut rails, refused) = rail::all(stream.local_addr()?.ip());
    peer.alone.extend(refused.into_iter().map(|(rail, error)| Alone { rail, why: error.to_string() }));
    let mut talk = Talk::new(stream, ANSWER_PATIENCE)?;
    let Answer::Rails(theirs) = talk.ask(&Question::Rails, None)? else { return Err(other_version()) };
    for rail in &mut rails {
        let offer = rail.offer();
        let reached: Vec<(usize, &Offer)> = theirs
            .iter()
            .enumerate()
            .filter(|(_, theirs)| theirs.kind == offer.kind && theirs.reach == offer.reach)
            .collect();
        if reached.is_empty() {
            let why = format!("the peer has no {} port that it can reach", offer.kind);
            peer.alone.push(Alone { rail: offer.name.clone(), why });
        }
        for (at, theirs) in reached {
            let result = try_pair(rail, at, &mut talk)?;
            let (measured, error) = match result {
                Ok(measured) => (Some(measured), None),
                Err(trouble) => (None, Some(trouble)),
            };
            let (kind, ours, theirs) = (offer.kind.clone(), offer.name.clone(), theirs.name.clone());
            peer.pairs.push(Pair { kind, ours, theirs, error, measured });
        }
    }
    Ok(())
}

/// To the first address of a name that answers.
fn connect(address: &str) -> io::Result<TcpStream> {
    let mut refused = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for to in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&to, CONNECT_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

fn try_pair(rail: &mut Rail, theirs: usize, talk: &mut Talk) -> io::Result<Result<Measured, Trouble>> {
    let result = measure(rail, theirs, talk);
    rail.close();
    match result {
        Ok(measured) => {
            talk.ask(&Question::Close, Some(rail))?;
            Ok(Ok(measured))
        }
        Err(Failed::Talk(error)) => Err(error),
        Err(Failed::Here(stuck)) => {
            // The peer says how it went there, or that it has closed; either is only for the log.
            talk.ask(&Question::Close, Some(rail))?;
            Ok(Err(Trouble { says: stuck.to_string(), advice: stuck.advice().into() }))
        }
        Err(Failed::There(trouble)) => {
            talk.ask(&Question::Close, Some(rail))?;
            Ok(Err(trouble))
        }
    }
}

enum Failed {
    Talk(io::Error),
    Here(Stuck),
    There(Trouble),
}

fn measure(rail: &mut Rail, theirs: usize, talk: &mut Talk) -> Result<Measured, Failed> {
    let address = to_hex(rail.open()?.bytes());
    let (address, key) = match talk.ask(&Question::Open { rail: theirs, address }, Some(rail))? {
        Answer::Opened { address, key } => (address, key),
        answer => return Err(unexpected(answer)),
    };
    let connected = LaneAddress::new(&from_hex(&address).unwrap_or_default())
        .and_then(|address| rail.connect(&address, true))
        .map_err(Stuck::from)
        .and_then(|()| rail.wait_up());
    // The peer tells in any case whether it came up there.
    let there = talk.answer(Some(rail))?;
    connected?;
    good(there)?;
    rail.attach(&RemoteKey::new(&from_hex(&key).unwrap_or_default())?)?;
    let mut arrivals = verify(rail, talk)?;
    let gb_per_s = bandwidth(rail, talk, &mut arrivals)?;
    let latency_us_p50 = latency(rail, talk)?;
    Ok(Measured { verified_bytes: VERIFIED_BYTES, gb_per_s, latency_us_p50 })
}

/// Writes a pattern, has it compared, and says how many immediates that took.
fn verify(rail: &mut Rail, talk: &mut Talk) -> Result<u32, Failed> {
    // The peer has cleared its region, and no other pair of this or another run writes the same.
    let seed = RandomState::new().build_hasher().finish();
    rail.fill(seed);
    for number in 0..VERIFIED_BYTES / CHUNK_BYTES {
        rail.write(number * CHUNK_BYTES, CHUNK_BYTES, number)?;
    }
    let arrivals = (VERIFIED_BYTES / CHUNK_BYTES) as u32;
    good(talk.ask(&Question::Count { arrivals }, Some(rail))?)?;
    match talk.ask(&Question::Verify { seed }, Some(rail))? {
        Answer::Done { good: true } => Ok(arrivals),
        Answer::Done { good: false } => Err(Failed::There(Trouble {
            says: "other bytes arrived than were sent".into(),
            advice: "do not use this rail: suspect memory, the device, or its driver".into(),
        })),
        answer => Err(unexpected(answer)),
    }
}

/// Large writes for a while, until the last has arrived.
fn bandwidth(rail: &mut Rail, talk: &mut Talk, arrivals: &mut u32) -> Result<f64, Failed> {
    let begun = Instant::now();
    let first = u64::from(*arrivals);
    let mut number = first;
    while begun.elapsed() < Duration::from_millis(MEASURED_MS) || number == first {
        let offset = number % (VERIFIED_BYTES / LARGE_BYTES) * LARGE_BYTES;
        rail.write(offset, LARGE_BYTES, number)?;
        number += 1;
        rail.wait(|rail| number - rail.done.max(first) < OUT_AT_ONCE)?;
    }
    *arrivals = number as u32;
    good(talk.ask(&Question::Count { arrivals: *arrivals }, Some(rail))?)?;
    let bytes = (number - first) * LARGE_BYTES;
    Ok(bytes as f64 / begun.elapsed().as_secs_f64() / 1e9)
}

/// Small writes that the peer answers, one at a time; the median of half the time of each.
fn latency(rail: &mut Rail, talk: &mut Talk) -> Result<f64, Failed> {
    good(talk.ask(&Question::Echo { rounds: ROUNDS }, Some(rail))?)?;
    let begun = rail.arrived;
    let mut times = Vec::with_capacity(ROUNDS as usize);
    for round in 1..=u64::from(ROUNDS) {
        let sent = Instant::now();
        rail.write(0, 8, u64::from(u32::MAX) + round)?;
        rail.wait(|rail| rail.arrived >= begun + round)?;
        times.push(sent.elapsed());
    }
    good(talk.answer(Some(rail))?)?;
    times.sort_unstable();
    Ok(times[times.len() / 2].as_secs_f64() * 1e6 / 2.0)
}

fn good(answer: Answer) -> Result<(), Failed> {
    match answer {
        Answer::Done { good: true } => Ok(()),
        answer => Err(unexpected(answer)),
    }
}

fn unexpected(answer: Answer) -> Failed {
    match answer {
        Answer::Failed { says, advice } => {
            Failed::There(Trouble { says: format!("at the peer: {says}"), advice })
        }
        _ => Failed::Talk(other_version()),
    }
}

fn other_version() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the other side is not the same version of crossdock doctor")
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Talk(error)
    }
}

impl From<Stuck> for Failed {
    fn from(stuck: Stuck) -> Self {
        Self::Here(stuck)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Here(error.into())
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const CHUNK_BYTES: u64 = 64 << 10;
const LARGE_BYTES: u64 = 1 << 20;
/// How many large writes are under way.
const OUT_AT_ONCE: u64 = 4;
const ROUNDS: u32 = 200;
