//! Bytes, immediates and tokens arrive as they were posted.

use std::time::Duration;

use crate::common::*;
use crossdock_transport::{Access, Direction, Error, Event, GrantId, Op, Port, Posted, Shape};

const G: fn(u32) -> GrantId = |index| GrantId::new(index, 1);

#[test]
fn a_span_is_written_and_told() {
    let mut pair = Pair::new(1 << 20);
    let sent = pair.a.fill(1);
    pair.b.grant_all(G(0), Access::Write, 1 << 20);
    let op = told(pair.span(Direction::Write, G(0), (1000, 5000), 700_001), Some(42), Some(9));
    pair.post(&[op]);
    pair.until("it has arrived", |pair| pair.b.arrived() == [42] && pair.a.done() == [9]);
    let came = pair.b.bytes();
    assert_eq!(came[5000..705_001], sent[1000..701_001]);
    assert!(came[..5000].iter().chain(&came[705_001..]).all(|&byte| byte == 0));
}

#[test]
fn pages_are_written_where_the_lists_say() {
    for (page_bytes, pages) in [(64, 4096), (1152, 900), (4096, 512), (65536, 40), (1 << 20, 3)] {
        let bytes = page_bytes as usize * pages as usize;
        let mut pair = Pair::new(bytes);
        let sent = pair.a.fill(page_bytes);
        pair.b.grant_all(G(1), Access::Write, page_bytes);
        let (from, to) = (shuffled(1, pages), shuffled(2, pages));
        let op = told(pair.pages(Direction::Write, G(1), page_bytes, &from, &to), Some(5), Some(6));
        pair.post(&[op]);
        pair.until("it has arrived", |pair| pair.b.arrived() == [5] && pair.a.done() == [6]);
        let came = pair.b.bytes();
        let page =
            |bytes: &[u8], i: u32| bytes[i as usize * page_bytes as usize..][..page_bytes as usize].to_vec();
        for (&from, &to) in from.iter().zip(&to) {
            assert_eq!(page(&came, to), page(&sent, from), "page {from} to {to} of {page_bytes} bytes");
        }
    }
}

#[test]
fn strides_and_offsets_of_both_sides_are_respected() {
    let mut pair = Pair::new(1 << 16);
    let sent = pair.a.fill(3);
    pair.b.grant_all(G(0), Access::Write, 1 << 16);
    let (from, to) = ([3, 0, 9], [20, 21, 4]);
    let shape = Shape::Pages {
        local: pair.a.region,
        local_offset: 11,
        local_stride_bytes: 777,
        local_pages: &from,
        remote: pair.b_at_a.id,
        remote_offset: 13,
        remote_stride_bytes: 500,
        remote_pages: &to,
        piece_bytes: 333,
    };
    pair.post(&[Op { direction: Direction::Write, grant: G(0), shape, imm: Some(1), token: None }]);
    pair.until("it has arrived", |pair| pair.b.arrived() == [1]);
    let mut expected = vec![0; 1 << 16];
    for (from, to) in from.iter().zip(to) {
        expected[13 + 500 * to as usize..][..333].copy_from_slice(&sent[11 + 777 * *from as usize..][..333]);
    }
    assert_eq!(pair.b.bytes(), expected);
}

#[test]
fn spans_and_pages_are_read() {
    let mut pair = Pair::new(1 << 22);
    let there = pair.b.fill(4);
    pair.b.grant_all(G(2), Access::Read, 1152);
    pair.b.grant_all(G(3), Access::Read, 1 << 22);
    let pages = (1 << 21) / 1152;
    let (to, from) = (shuffled(5, pages), shuffled(6, pages));
    let half = 1 << 21;
    let ops = [
        told(pair.pages(Direction::Read, G(2), 1152, &to, &from), None, Some(1)),
        told(pair.span(Direction::Read, G(3), (half, half), half), None, Some(2)),
        told(pair.span(Direction::Read, G(3), (0, 0), 0), None, Some(3)),
    ];
    pair.post(&ops);
    pair.until("all was read", |pair| pair.a.done() == [1, 2, 3]);
    let came = pair.a.bytes();
    for (&to, &from) in to.iter().zip(&from) {
        assert_eq!(came[to as usize * 1152..][..1152], there[from as usize * 1152..][..1152]);
    }
    assert_eq!(came[half as usize..], there[half as usize..]);
    assert_eq!(pair.b.events, [], "a read says nothing at its source");
}

#[test]
fn reads_and_writes_cross_on_one_lane() {
    let mut pair = Pair::with(|options| options.send_buffer_bytes = Some(16 << 10), 2 << 20);
    pair.a.fill(7);
    pair.b.fill(8);
    let (a, b) = (pair.a.bytes(), pair.b.bytes());
    pair.a.grant_all(G(0), Access::Read, 4096);
    pair.b.grant_all(G(0), Access::Read, 4096);
    // Both read the upper half of the other into their own lower half, at once.
    let pages: Vec<u32> = shuffled(1, 256);
    let there: Vec<u32> = pages.iter().map(|page| page + 256).collect();
    let at_a = told(pair.pages(Direction::Read, G(0), 4096, &pages, &there), None, Some(1));
    let mut at_b = at_a;
    if let Shape::Pages { local, remote, .. } = &mut at_b.shape {
        (*local, *remote) = (pair.b.region, pair.a_at_b.id);
    }
    let (mut rest_a, mut rest_b) = (Some(at_a), Some(at_b));
    until("both have read", || {
        for (end, rest) in [(&mut pair.a, &mut rest_a), (&mut pair.b, &mut rest_b)] {
            if let Some(op) = rest {
                let posted = end.port.post(end.lane, &[*op]).unwrap();
                *rest = (posted.ops == 0).then(|| op.advance(posted.within));
            }
            end.poll();
        }
        pair.a.done() == [1] && pair.b.done() == [1]
    });
    assert_eq!(pair.a.bytes()[..1 << 20], b[1 << 20..]);
    assert_eq!(pair.b.bytes()[..1 << 20], a[1 << 20..]);
}

#[test]
fn a_full_socket_makes_posts_short_within_an_op() {
    let small = |options: &mut crossdock_tcp::TcpOptions| {
        options.send_buffer_bytes = Some(4096);
        options.receive_buffer_bytes = Some(4096);
        options.send_queue_bytes = 8192;
    };
    let mut pair = Pair::with(small, 1 << 20);
    let sent = pair.a.fill(9);
    pair.b.grant_all(G(0), Access::Write, 512);
    let pages = shuffled(3, 2048);
    let mut op = told(pair.pages(Direction::Write, G(0), 512, &pages, &pages), Some(77), Some(88));
    let mut posts = 0;
    let mut within = 0;
    loop {
        let posted = pair.a.port.post(pair.a.lane, &[op]).unwrap();
        posts += 1;
        if posted == Posted::all(&[op]) {
            break;
        }
        within += posted.within;
        assert!(within < 2048);
        op = op.advance(posted.within);
        // Whoever sleeps after a short post is woken when there is room again.
        until("there is room", || {
            pair.b.poll();
            sleep(&mut pair.a.port, Duration::from_millis(1))
        });
        pair.a.poll();
    }
    assert!(posts > 10, "{posts} posts");
    pair.until("it has arrived", |pair| pair.b.arrived() == [77] && pair.a.done() == [88]);
    assert_eq!(pair.b.bytes(), sent);
}

/// What is posted after a short post ends where the op ended, and its lists are not of one length.
#[test]
fn a_rest_of_unequal_lists_is_refused() {
    const PAGES: u32 = 16 * 1024;
    for (local_cut, remote_cut) in [(0, 1), (1, 0), (3, 700), (700, 3)] {
        let mut pair = Pair::new(4096 * PAGES as usize);
        pair.b.grant_all(G(0), Access::Write, 4096);
        let sent = pair.a.fill(9);
        let pages: (Vec<u32>, Vec<u32>) = (shuffled(1, PAGES), shuffled(1, PAGES));
        let op = pair.pages(Direction::Write, G(0), 4096, &pages.0, &pages.1);
        let posted = pair.a.port.post(pair.a.lane, &[op]).unwrap();
        assert!(posted.ops == 0 && posted.within > 0, "64 MiB do not fit: {posted:?}");
        let within = posted.within as usize;
        let (local, remote) = (&pages.0[within + local_cut..], &pages.1[within + remote_cut..]);
        let bad = pair.pages(Direction::Write, G(0), 4096, local, remote);
        let refused = pair.a.port.post(pair.a.lane, &[bad]);
        assert!(matches!(refused, Err(Error::BadOp { .. })), "{refused:?}");
        // The right rest is still taken.
        pair.post(&[told(op.advance(posted.within), Some(1), None)]);
        pair.until("it arrived", |pair| pair.b.arrived() == [1]);
        assert!(pair.b.bytes() == sent);
    }
}

#[test]
fn a_span_is_cut_as_well() {
    let small = |options: &mut crossdock_tcp::TcpOptions| {
        options.send_buffer_bytes = Some(4096);
        options.send_queue_bytes = 1;
    };
    let mut pair = Pair::with(small, 2 << 20);
    let sent = pair.a.fill(10);
    pair.b.grant_all(G(0), Access::Write, 2 << 20);
    let op = told(pair.span(Direction::Write, G(0), (0, 0), 2 << 20), Some(3), Some(4));
    let posted = pair.a.port.post(pair.a.lane, &[op]).unwrap();
    assert!(posted.ops == 0 && posted.within > 0 && posted.within < 2 << 20, "{posted:?}");
    pair.post(&[op.advance(posted.within)]);
    pair.until("it has arrived", |pair| pair.b.arrived() == [3] && pair.a.done() == [4]);
    assert_eq!(pair.b.bytes(), sent);
}

#[test]
fn thousands_of_small_ops_keep_their_order() {
    let mut pair = Pair::new(1 << 20);
    let sent = pair.a.fill(11);
    pair.b.grant_all(G(0), Access::Write, 64);
    pair.b.poll_room = 3;
    let ops: Vec<Op<'_>> = (0..8000)
        .map(|i| match i % 4 {
            0 => told(Op::notify(i), Some(i), None),
            1 => told(Op::notify(i), None, Some(u64::from(i))),
            _ => {
                let op = pair.span(Direction::Write, G(0), (u64::from(i) * 64, u64::from(i) * 64), 64);
                told(op, Some(i), (i % 10 == 3).then_some(u64::from(i)))
            }
        })
        .collect();
    pair.post(&ops);
    let imms: Vec<u32> = ops.iter().filter_map(|op| op.imm).collect();
    let tokens: Vec<u64> = ops.iter().filter_map(|op| Some(op.token?.0)).collect();
    pair.until("all are told", |pair| {
        pair.b.arrived().len() == imms.len() && pair.a.done().len() == tokens.len()
    });
    assert_eq!(pair.b.arrived(), imms);
    assert_eq!(pair.a.done(), tokens);
    let came = pair.b.bytes();
    for i in (0..8000).filter(|i| i % 4 > 1) {
        assert_eq!(came[i * 64..][..64], sent[i * 64..][..64], "op {i}");
    }
}

#[test]
fn one_token_covers_all_ops_before_it() {
    let mut pair = Pair::new(4 << 20);
    let there = pair.b.fill(12);
    pair.b.grant_all(G(0), Access::Read, 4 << 20);
    pair.b.grant_all(G(1), Access::Write, 4 << 20);
    let ops = [
        pair.span(Direction::Read, G(0), (0, 0), 3 << 20),
        pair.span(Direction::Write, G(1), (3 << 20, 3 << 20), 1 << 20),
        told(Op::notify(1), Some(1), Some(5)),
    ];
    pair.post(&ops);
    pair.until("the token is said", |pair| !pair.a.done().is_empty());
    assert_eq!(pair.a.bytes()[..3 << 20], there[..3 << 20], "the read before the token has landed");
}

#[test]
fn ops_that_make_no_sense_are_refused_before_anything_moves() {
    let mut pair = Pair::new(1 << 16);
    pair.a.fill(13);
    pair.b.grant_all(G(0), Access::Write, 4096);
    let good = pair.span(Direction::Write, G(0), (0, 0), 16);
    let many: Vec<u32> = (0..2000).map(|i| if i == 1999 { 16 } else { i % 16 }).collect();
    let fine: Vec<u32> = (0..2000).map(|i| i % 16).collect();
    let shape = |change: &dyn Fn(&mut Shape<'static>)| {
        let mut op = good;
        change(&mut op.shape);
        op
    };
    let refused = [
        told(pair.span(Direction::Read, G(0), (0, 0), 16), Some(1), None),
        pair.span(Direction::Write, G(0), (65_530, 0), 16),
        pair.span(Direction::Write, G(0), (0, 65_530), 16),
        pair.span(Direction::Write, G(0), (u64::MAX, 0), 16),
        pair.pages(Direction::Write, G(0), 4096, &many, &fine),
        pair.pages(Direction::Write, G(0), 4096, &fine, &many),
        pair.pages(Direction::Write, G(0), 4096, &fine, &many[1..]),
        pair.pages(Direction::Write, G(0), u64::MAX / 2, &[0, 3], &[0, 3]),
        shape(&|shape| {
            if let Shape::Span { local, .. } = shape {
                local.0 += 1;
            }
        }),
        shape(&|shape| {
            if let Shape::Span { remote, .. } = shape {
                remote.0 += 1;
            }
        }),
    ];
    for (i, op) in refused.iter().enumerate() {
        let error = pair.a.port.post(pair.a.lane, &[*op]).expect_err("refused");
        let expected = match i {
            1 | 2 | 4 | 5 => matches!(error, Error::OutOfRange { .. }),
            8 | 9 => matches!(error, Error::UnknownRegion { .. }),
            _ => matches!(error, Error::BadOp { .. }),
        };
        assert!(expected, "op {i}: {error:?}");
        // Behind a good op, the good one is taken and the bad one is not.
        let posted = pair.a.port.post(pair.a.lane, &[told(good, Some(i as u32), None), *op]);
        assert_eq!(posted, Ok(Posted { ops: 1, within: 0 }), "op {i}");
    }
    pair.until("the good ones arrived", |pair| pair.b.arrived().len() == refused.len());
    let came = pair.b.bytes();
    assert!(came[16..].iter().all(|&byte| byte == 0), "nothing of the bad ops moved");
}

#[test]
fn two_threads_move_both_ways_and_sleep_in_between() {
    const PAGES: u32 = 512;
    const ROUNDS: u32 = 20;
    let mut pair = Pair::new(4096 * PAGES as usize * 2);
    pair.a.fill(14);
    pair.b.fill(15);
    pair.a.grant_all(G(0), Access::Write, 4096);
    pair.b.grant_all(G(0), Access::Write, 4096);
    let Pair { a, b, a_at_b, b_at_a } = pair;
    let side = |mut end: End, remote: crossdock_transport::RemoteId| {
        move || {
            // The lower half goes to the upper half of the other side.
            let (from, to): (Vec<u32>, Vec<u32>) =
                (shuffled(1, PAGES), shuffled(2, PAGES).iter().map(|page| page + PAGES).collect());
            let shape = Shape::Pages {
                local: end.region,
                local_offset: 0,
                local_stride_bytes: 4096,
                local_pages: &from,
                remote,
                remote_offset: 0,
                remote_stride_bytes: 4096,
                remote_pages: &to,
                piece_bytes: 4096,
            };
            let whole = Op { direction: Direction::Write, grant: G(0), shape, imm: None, token: None };
            let mut rest = None;
            let mut posted_rounds = 0;
            while end.arrived().len() < ROUNDS as usize || end.done().len() < ROUNDS as usize {
                while rest.is_some() || posted_rounds < ROUNDS {
                    let op = rest.take().unwrap_or_else(|| {
                        posted_rounds += 1;
                        told(whole, Some(posted_rounds), Some(u64::from(posted_rounds)))
                    });
                    let posted = end.port.post(end.lane, &[op]).unwrap();
                    if posted.ops == 0 {
                        rest = Some(op.advance(posted.within));
                        break;
                    }
                }
                assert!(sleep(&mut end.port, Duration::from_secs(10)), "{:?}", end.events);
                end.poll();
                assert_eq!(end.down(), None);
            }
            (end, from, to)
        }
    };
    let a = std::thread::spawn(side(a, b_at_a.id));
    let b = std::thread::spawn(side(b, a_at_b.id));
    let ((a, from, to), (b, ..)) = (a.join().unwrap(), b.join().unwrap());
    let (a, b) = (a.bytes(), b.bytes());
    for (&from, &to) in from.iter().zip(&to) {
        assert_eq!(a[to as usize * 4096..][..4096], b[from as usize * 4096..][..4096]);
        assert_eq!(b[to as usize * 4096..][..4096], a[from as usize * 4096..][..4096]);
    }
}

#[test]
fn nothing_to_do_means_sleep() {
    let mut pair = Pair::new(4096);
    for _ in 0..3 {
        pair.poll();
    }
    assert!(!sleep(&mut pair.a.port, Duration::from_millis(20)));
    pair.b.port.post(pair.b.lane, &[Op::notify(3)]).unwrap();
    assert!(sleep(&mut pair.a.port, Duration::from_secs(5)));
    pair.a.poll();
    assert_eq!(pair.a.events, [Event::Arrived { lane: pair.a.lane, imm: 3 }]);
}

#[test]
fn room_is_told_to_a_sleeper_even_if_a_poll_came_in_between() {
    let mut pair = Pair::with(|options| options.send_buffer_bytes = Some(4096), 1 << 20);
    let sent = pair.a.fill(16);
    pair.b.grant_all(G(0), Access::Write, 1 << 20);
    let reader = std::thread::spawn({
        let mut b = pair.b;
        move || {
            while b.arrived().is_empty() {
                assert!(sleep(&mut b.port, Duration::from_secs(10)));
                b.poll();
            }
            b
        }
    });
    let shape = Shape::Span {
        local: pair.a.region,
        local_offset: 0,
        remote: pair.b_at_a.id,
        remote_offset: 0,
        bytes: 1 << 20,
    };
    let mut op = Op { direction: Direction::Write, grant: G(0), shape, imm: Some(1), token: None };
    loop {
        let posted = pair.a.port.post(pair.a.lane, &[op]).unwrap();
        if posted.ops == 1 {
            break;
        }
        op = op.advance(posted.within);
        // The poll finds the room, and says nothing.
        pair.a.poll();
        assert!(sleep(&mut pair.a.port, Duration::from_secs(10)));
    }
    while !reader.is_finished() {
        pair.a.poll();
    }
    assert_eq!(reader.join().unwrap().bytes(), sent);
}
