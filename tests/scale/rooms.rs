//! As many rooms at once as a deployment has, open and idle, and then delivered: what each takes in memory and in
//! control bytes, and that a turn does no more for them while nothing happens.

use std::time::{Duration, Instant};

use crossdock_kv::{ReceiveRequest, Receiving, SendRequest, Sending};
use crossdock_proto::End;

use crate::cluster::{Cluster, MS, Options};
use crate::counting::{Owner, allocated};
use crate::is_full;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Both ends of the rooms of a cluster.
struct Rooms {
    cluster: Cluster,
    pages: u32,
    /// By prefill rank.
    sending: Vec<(usize, Sending)>,
    receiving: Vec<Receiving>,
}

/// What some rooms have taken.
#[derive(Debug)]
struct Taken {
    rooms: u64,
    /// What all of them take of memory while they are open, at each side.
    prefill_bytes: i64,
    decode_bytes: i64,
    /// Of all of them, from their opening to their end, without heartbeats' messages.
    control_bytes: u64,
    messages: u64,
    took: Duration,
    idle: Idle,
    /// What turns have visited from their opening to their end, without the second of idleness: rooms, sessions, grants,
    /// targets and streams.
    visits: u64,
}

/// What a second of nothing but heartbeats takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Idle {
    turns: u64,
    allocations: u64,
    looks: u64,
    visits: u64,
}

/// On one pair of nodes, so that each has as many rooms as there are: rooms of 16, 128 and 1,024 pages.
#[test]
fn rooms_of_one_pair_take_their_pages_ids_and_no_turns() {
    let rooms = if is_full() { 36_864 } else { 2_048 };
    let few = take(1, 1, 16, 128);
    let [short, usual, long] =
        [(rooms, 16), (rooms, 128), (rooms / 16, 1024)].map(|(rooms, pages)| take(1, 1, rooms, pages));
    for (taken, pages) in [(&short, 16), (&usual, 128), (&long, 1024), (&few, 128)] {
        // A grant, a finish, a delivery, and the release of the grant.
        assert_eq!(taken.messages, 3 * taken.rooms);
        let bits = u64::from((taken.rooms * pages).ilog2() + 1);
        let lists = (pages * bits).div_ceil(8) * taken.rooms;
        let beside = taken.control_bytes.saturating_sub(lists);
        assert!(beside <= BESIDE_PAGES * taken.rooms, "{beside} bytes beside the page lists of {taken:?}");
    }
    for (taken, pages) in [(&short, 16), (&usual, 128), (&long, 1024), (&few, 128)] {
        let each = (taken.prefill_bytes + taken.decode_bytes) / taken.rooms as i64;
        let most = MEMORY_BESIDE_PAGES + MEMORY_A_PAGE * pages;
        println!("{} rooms of {pages} pages: {each} bytes of memory a room on both sides", taken.rooms);
        assert!(each <= most, "{each} bytes of memory a room, and not {most}");
    }
    for taken in [&short, &usual, &long] {
        // Idle turns do the same for many rooms as for few, as far as that can be counted.
        assert_eq!(taken.idle, few.idle, "{taken:?}");
        // And what is done for a room is not done for the others again.
        let [each, of_few] = [taken, &few].map(|taken| taken.visits as f64 / taken.rooms as f64);
        assert!(each < 1.1 * of_few, "{each} visits a room among many, {of_few} among few");
    }
    let [few, many] =
        [&few, &usual].map(|taken| (taken.prefill_bytes + taken.decode_bytes) / taken.rooms as i64);
    assert!(many < 2 * few, "a room takes {many} bytes among many, and {few} among few");
}

/// The rooms of all pairs of a mesh.
#[test]
fn rooms_of_a_mesh_take_what_rooms_of_a_pair_do() {
    let (prefills, decodes) = if is_full() { (32, 72) } else { (4, 9) };
    let taken = take(prefills, decodes, (prefills * decodes * 16) as u64, 128);
    assert_eq!(taken.messages, 3 * taken.rooms);
    assert!(taken.control_bytes <= 4 * 128 * taken.rooms, "over four bytes a page: {taken:?}");
}

/// Bytes of control messages that a room has beside the list of its pages, of which each takes as many bits as the pool's
/// last one.
const BESIDE_PAGES: u64 = 256;

/// What a room takes of memory on both sides together, with a fifth more than it does.
const MEMORY_BESIDE_PAGES: i64 = 11_500;
const MEMORY_A_PAGE: i64 = 45;

/// Opens so many rooms, spread over all pairs of nodes, lets them be idle for a second, and then delivers them.
fn take(prefills: usize, decodes: usize, rooms: u64, pages: u32) -> Taken {
    let per_decode = rooms as usize / decodes;
    let options = Options {
        prefill_pages: pages,
        decode_pages: per_decode as u32 * pages,
        ..Options::mesh(prefills, decodes)
    };
    let cluster = Cluster::joined(options);
    let mut open = Rooms { cluster, pages, sending: Vec::new(), receiving: Vec::new() };
    let (before, counters, visits) = (allocated(), open.cluster.counters(), open.cluster.visits());
    let began = Instant::now();
    open.open_all(rooms);
    let held = allocated().since(&before);
    let told = open.cluster.counters();
    let sent = |owner, of: &mut Cluster| -> i64 {
        let nodes = of.nodes.iter_mut().filter(|node| node.owner == owner);
        nodes.map(|node| node.counters().control_bytes_out as i64).sum()
    };
    // A frame is the sender's until it is read, and then freed on the reader's behalf.
    let crossed = sent(Owner::Decode, &mut open.cluster) - sent(Owner::Prefill, &mut open.cluster);
    let opening = open.cluster.visits() - visits;
    let idle = open.idles();
    let (mut control_bytes, mut messages) =
        (told.control_bytes_out - counters.control_bytes_out, told.messages_out - counters.messages_out);
    let (resting, rested) = (open.cluster.counters(), open.cluster.visits());
    open.deliver_all();
    let took = began.elapsed();
    let ended = open.cluster.counters();
    assert_eq!((ended.delivered, ended.undelivered), (2 * rooms, 0));
    control_bytes += ended.control_bytes_out - resting.control_bytes_out;
    messages += ended.messages_out - resting.messages_out;
    let taken = Taken {
        rooms,
        prefill_bytes: held.live(Owner::Prefill) + crossed,
        decode_bytes: held.live(Owner::Decode) - crossed,
        control_bytes,
        messages,
        took,
        idle,
        visits: opening + open.cluster.visits() - rested,
    };
    println!(
        "{rooms} rooms of {pages} pages over {prefills} x {decodes}: {} bytes a room at the prefill side and {} at \
         the decode side; {} messages and {} bytes of control a room, {:.2} a page; {:.1} visits a room; idle for a \
         second, {:?}; {} ms",
        taken.prefill_bytes / rooms as i64,
        taken.decode_bytes / rooms as i64,
        taken.messages / rooms,
        taken.control_bytes / rooms,
        taken.control_bytes as f64 / (rooms * u64::from(pages)) as f64,
        taken.visits as f64 / rooms as f64,
        taken.idle,
        taken.took.as_millis(),
    );
    taken
}

impl Rooms {
    fn open_all(&mut self, rooms: u64) {
        let (prefills, decodes) = (self.cluster.options.prefills, self.cluster.options.decodes);
        let (pages, tokens) = (self.pages, self.pages);
        let shared: Vec<_> =
            self.cluster.nodes[..prefills].iter().map(|node| node.pool.take(pages)).collect();
        let shared: Vec<_> =
            shared.into_iter().map(|set| set.expect("as many pages as a room has").share()).collect();
        for room in 0..rooms {
            let (prefill, decode) = (room as usize % prefills, room as usize / prefills % decodes);
            let source = shared[prefill].clone();
            let sending = self.cluster.ask(prefill, |node| {
                let request = SendRequest { room, use_count: 0, tokens, pages: source, deadline: DAY };
                node.handle.open(request).expect("the queue of commands has room")
            });
            self.sending.push((prefill, sending));
            let receiving = self.cluster.ask(prefills + decode, |node| {
                let set = node.pool.take(pages).expect("as many pages as all rooms have");
                let peer = node.peers[prefill];
                let request = ReceiveRequest {
                    peer,
                    room,
                    use_count: 0,
                    tokens,
                    skip_tokens: 0,
                    pages: set,
                    deadline: DAY,
                };
                node.handle.receive(request).expect("the queue of commands has room")
            });
            self.receiving.push(receiving);
            if room % 256 == 255 {
                self.cluster.step();
            }
        }
        let opened = |cluster: &mut Cluster, rooms| {
            cluster.nodes.iter_mut().map(|node| node.worker.stats().rooms as u64).sum::<u64>() == 2 * rooms
        };
        self.cluster.run_until("every room", |cluster| opened(cluster, rooms));
        // The last grants are heard.
        self.cluster.run_for(MS);
    }

    /// What a second of nothing but heartbeats takes, on all nodes together.
    fn idles(&mut self) -> Idle {
        let so_far = |cluster: &mut Cluster| Idle {
            turns: cluster.turns,
            allocations: allocated().times,
            looks: cluster.looks(),
            visits: cluster.visits(),
        };
        let before = so_far(&mut self.cluster);
        idles(&mut self.cluster);
        let after = so_far(&mut self.cluster);
        Idle {
            turns: after.turns - before.turns,
            allocations: after.allocations - before.allocations,
            looks: after.looks - before.looks,
            visits: after.visits - before.visits,
        }
    }

    fn deliver_all(&mut self) {
        let (tokens, mut sending) = (self.pages, std::mem::take(&mut self.sending));
        let tickets = sending.len() as u64;
        for (at, (prefill, room)) in sending.iter_mut().enumerate() {
            self.cluster.ask(*prefill, |_| {
                room.send(0..1, 0..tokens).expect("the queue of commands has room");
                room.finish(Vec::new()).expect("the queue of commands has room");
            });
            if at % 128 == 127 {
                self.cluster.step();
            }
        }
        let (receiving, delivered) = (&mut self.receiving, 2 * tickets);
        let is_delivered = move |cluster: &mut Cluster| cluster.counters().delivered == delivered;
        self.cluster.run_until("every delivery", |cluster| {
            if !is_delivered(cluster) {
                return false;
            }
            receiving.retain_mut(|room| match room.end.poll().expect("a room ends") {
                Some(received) => {
                    assert_eq!(received.ended.end, End::Delivered);
                    drop(room.pages.poll().expect("pages come home").expect("with the end"));
                    false
                }
                None => true,
            });
            receiving.is_empty()
        });
        self.cluster.run_until("every sender's end", |_| {
            sending.retain_mut(|(_, room)| room.end.poll().expect("a room ends").is_none());
            sending.is_empty()
        });
    }
}

/// By itself, so that its instructions can be counted.
#[inline(never)]
fn idles(cluster: &mut Cluster) {
    cluster.run_for(1000 * MS);
}
