//! Many prefill ranks push into one decode rank at once, over a link that is as fast as each of theirs.

use std::time::Duration;

use crossdock_kv::{ReceiveRequest, Receiving, SendRequest, Sending};
use crossdock_proto::End;

use crate::cluster::{Cluster, LINK_BYTES_PER_SECOND, MS, Options, US};
use crate::is_full;

const MINUTE: Duration = Duration::from_secs(60);
const LAYERS: u32 = 4;
const PAGE_TOKENS: u32 = 16;
const TOKEN_BYTES: u32 = 1152;

/// What an incast has come to.
struct Fell {
    /// When the rooms of each prefill rank were delivered, counted from the first post.
    done_ns: Vec<u64>,
    bytes: u64,
    sessions: u64,
    pings: u64,
}

#[test]
fn an_incast_is_fair_and_fills_the_link() {
    let sizes: &[usize] = if is_full() { &[32, 72] } else { &[24] };
    for &prefills in sizes {
        let (rooms, pages) = (4, 16);
        let fell = fall(prefills, rooms, pages);
        let (first, last) = (fell.done_ns.iter().min().unwrap(), fell.done_ns.iter().max().unwrap());
        let limit_ns = fell.bytes as f64 / LINK_BYTES_PER_SECOND as f64 * 1e9;
        let goodput = limit_ns / *last as f64;
        // Jain's index of the rates: 1 if all are equal.
        let rates: Vec<f64> = fell.done_ns.iter().map(|&ns| 1.0 / ns as f64).collect();
        let (sum, squares) = (rates.iter().sum::<f64>(), rates.iter().map(|rate| rate * rate).sum::<f64>());
        let fairness = sum * sum / (squares * rates.len() as f64);
        println!(
            "{prefills} prefills into one decode, {} MB in rooms of {pages} pages of {LAYERS} layers: first done after {} us, \
             last after {} us, fairness {fairness:.4}; goodput {goodput:.3} of the link's; {} pings were answered",
            fell.bytes / 1_000_000,
            first / US,
            last / US,
            fell.pings,
        );
        assert!(goodput > 0.9 && goodput <= 1.0, "{goodput} of the link");
        assert!(fairness > 0.95, "{fairness}");
        // That is no proof against load: here heartbeats and control messages have a way of their own, and what fills the
        // link does not delay them. It says that a turn full of arrivals looks after its peers in time.
        assert_eq!(fell.sessions, prefills as u64, "no session is lost");
        assert!(fell.pings > 0, "it lasts for heartbeats");
    }
}

/// Pushes so many rooms of each prefill rank into one decode rank.
fn fall(prefills: usize, rooms: usize, pages: u32) -> Fell {
    let all = prefills as u32 * rooms as u32 * pages;
    let options = Options {
        layers: LAYERS,
        page_tokens: PAGE_TOKENS,
        token_bytes: TOKEN_BYTES,
        prefill_pages: pages,
        decode_pages: all,
        heartbeat_ns: MS,
        window: 4,
        ..Options::mesh(prefills, 1)
    };
    let mut cluster = Cluster::joined(options);
    let tokens = pages * PAGE_TOKENS;
    let mut sides: Vec<(usize, Sending, Receiving)> = Vec::new();
    for prefill in 0..prefills {
        let source = cluster.nodes[prefill].pool.take(pages).expect("as many pages as a room has").share();
        for nth in 0..rooms {
            let room = (prefill * rooms + nth) as u64;
            let source = source.clone();
            let sending = cluster.ask(prefill, |node| {
                let request = SendRequest { room, use_count: 0, tokens, pages: source, deadline: MINUTE };
                node.handle.open(request).expect("the queue of commands has room")
            });
            let receiving = cluster.ask(prefills, |node| {
                let (peer, set) =
                    (node.peers[prefill], node.pool.take(pages).expect("as many pages as all rooms have"));
                let request = ReceiveRequest {
                    peer,
                    room,
                    use_count: 0,
                    tokens,
                    skip_tokens: 0,
                    pages: set,
                    deadline: MINUTE,
                };
                node.handle.receive(request).expect("the queue of commands has room")
            });
            sides.push((prefill, sending, receiving));
        }
    }
    cluster.run_for(MS);
    let (began_ns, before) = (cluster.now_ns, cluster.counters());
    for (prefill, sending, _) in &mut sides {
        cluster.ask(*prefill, |_| {
            sending.send(0..LAYERS, 0..tokens).expect("the queue of commands has room");
            sending.finish(Vec::new()).expect("the queue of commands has room");
        });
    }
    let mut done_ns = vec![0; prefills];
    let sent = sides.len() as u64;
    cluster.run_until("the last room", |cluster| {
        sides.retain_mut(|(prefill, _, receiving)| match receiving.end.poll().expect("a room ends") {
            Some(received) => {
                assert_eq!(received.ended.end, End::Delivered);
                done_ns[*prefill] = cluster.now_ns - began_ns;
                false
            }
            None => true,
        });
        sides.is_empty()
    });
    let counters = cluster.counters();
    // Beside a finish and a delivery of each room there are only heartbeats' questions and answers.
    let pings = (counters.messages_out - before.messages_out - 2 * sent) / 2;
    let page_bytes = u64::from(PAGE_TOKENS * TOKEN_BYTES);
    let decode = &mut cluster.nodes[prefills];
    Fell {
        done_ns,
        bytes: u64::from(all * LAYERS) * page_bytes,
        sessions: decode.worker.stats().sessions as u64,
        pings,
    }
}
