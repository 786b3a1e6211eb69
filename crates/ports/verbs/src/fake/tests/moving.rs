//! What is moved: when, in which order, and what reads and immediates wait for.

use super::*;

#[test]
fn writes_land_when_steps_are_made_and_not_before() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(7, 10_000, link.there.at(100))]).unwrap();
    assert!(link.here.poll().is_empty());
    assert_eq!(link.there.bytes(100, 10_000), vec![0xee; 10_000]);
    fabric.step(LONG);
    let done = link.here.poll();
    assert_eq!(statuses(&done), [(7, IBV_WC_SUCCESS)]);
    assert_eq!((done[0].opcode, done[0].qp_num), (IBV_WC_RDMA_WRITE, number(link.near)));
    assert_eq!(link.there.bytes(100, 10_000), link.here.bytes(0, 10_000));
    assert_eq!(link.there.bytes(10_100, 10), [0xee; 10]);
    assert_eq!(fabric.counters().bytes_moved, 10_000);
    assert!(link.there.poll().is_empty(), "the peer is told nothing of a write");
    assert_eq!(link.there.events(), [], "what has come to RTS has no need of IBV_EVENT_COMM_EST");
    link.close();
    assert_eq!(fabric.leaks(), [""; 0]);
    let counted = fabric.counters();
    assert_eq!((counted.pairs_created, counted.pairs_destroyed), (2, 2));
}

#[test]
fn at_once_everything_happens_within_the_call() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::AtOnce, ..manual() });
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(7, 5_000, link.there.at(0))]).unwrap();
    assert_eq!(link.there.bytes(0, 5_000), link.here.bytes(0, 5_000));
    assert_eq!(statuses(&link.here.poll()), [(7, IBV_WC_SUCCESS)]);
    link.close();
}

#[test]
fn polls_make_steps() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::Stepped { most: 3 }, ..manual() });
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(7, 20_000, link.there.at(0))]).unwrap();
    let polls = (0..).take_while(|_| link.here.poll().is_empty()).count();
    assert!(polls > 10, "{polls} polls for 20 packets and their acknowledgements");
    link.close();
}

#[test]
fn a_thread_moves_what_sleepers_wait_for() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::Thread, ..manual() });
    let link = Link::new(&fabric);
    rustix::io::ioctl_fionbio(link.here.channel_fd(), false).unwrap();
    for round in 0..20 {
        assert_eq!(link.here.arm(false), 0);
        link.here.post(link.near, &[write(round, 9_000, link.there.at(0))]).unwrap();
        link.here.take_wake().unwrap();
        assert_eq!(statuses(&link.here.poll()), [(round, IBV_WC_SUCCESS)]);
    }
    link.close();
}

#[test]
fn an_immediate_takes_a_receive_and_comes_after_its_bytes() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.there.receive(50, 2).unwrap();
    let with_imm = wr(0x0102_0304, IBV_WR_RDMA_WRITE_WITH_IMM, 3_000, link.there.at(0));
    link.here.post(link.near, &[with_imm]).unwrap();
    let arrived = (0..LONG).find_map(|_| {
        fabric.step(1);
        link.there.poll().pop()
    });
    let arrived = arrived.expect("it arrives");
    assert_eq!((arrived.wr_id, arrived.status), (50, IBV_WC_SUCCESS));
    assert_eq!((arrived.opcode, arrived.byte_len), (IBV_WC_RECV_RDMA_WITH_IMM, 3_000));
    assert_eq!((u32::from_be(arrived.imm_data), arrived.wc_flags), (0x0102_0304, IBV_WC_WITH_IMM));
    assert_eq!(arrived.qp_num, number(link.far));
    assert_eq!(link.there.bytes(0, 3_000), link.here.bytes(0, 3_000));
    link.close();
}

#[test]
fn messages_land_in_receives_in_order() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.there.receive(0, 3).unwrap();
    let send = |id, bytes| wr(id, IBV_WR_SEND_WITH_IMM, bytes, (0, 0));
    let plain = Wr { opcode: IBV_WR_SEND, ..send(2, 1_024) };
    link.here.post(link.near, &[send(1, 44), plain, send(3, 0)]).unwrap();
    fabric.step(LONG);
    let arrived = link.there.poll();
    let lengths: Vec<_> = arrived.iter().map(|wc| (wc.wr_id, wc.opcode, wc.byte_len, wc.wc_flags)).collect();
    assert_eq!(lengths, [(0, IBV_WC_RECV, 44, 2), (1, IBV_WC_RECV, 1_024, 0), (2, IBV_WC_RECV, 0, 2)]);
    assert_eq!(link.there.bytes(RECEIVES_AT as usize, 44), link.here.bytes(0, 44));
    assert_eq!(link.there.bytes(RECEIVES_AT as usize + 1_024, 1_024), link.here.bytes(0, 1_024));
    assert!(link.here.poll().iter().all(|wc| wc.opcode == IBV_WC_SEND));
    link.close();
}

#[test]
fn a_message_too_long_for_its_receive_fails_at_both_ends() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.there.receive(9, 1).unwrap();
    link.here.post(link.near, &[wr(1, IBV_WR_SEND, 1_025, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.there.poll()), [(9, IBV_WC_LOC_LEN_ERR)]);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_REM_INV_REQ_ERR)]);
    assert_eq!((state(&fabric, 0, link.near), state(&fabric, 1, link.far)), (IBV_QPS_ERR, IBV_QPS_ERR));
    link.close();
}

#[test]
fn without_a_receive_the_requester_waits() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[wr(1, IBV_WR_SEND_WITH_IMM, 0, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert!(link.here.poll().is_empty() && link.there.poll().is_empty());
    assert!(fabric.counters().receivers_not_ready > 7, "for ever, and not seven times");
    link.there.receive(5, 1).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_SUCCESS)]);
    assert_eq!(statuses(&link.there.poll()), [(5, IBV_WC_SUCCESS)]);
    link.close();
}

#[test]
fn without_a_receive_patience_ends_where_it_is_limited() {
    let fabric = Fabric::new(manual());
    let wiring = Wiring { rnr_retries: 2, ..Default::default() };
    let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
    link.here.post(link.near, &[wr(1, IBV_WR_SEND_WITH_IMM, 0, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_RNR_RETRY_EXC_ERR)]);
    assert_eq!(fabric.counters().receivers_not_ready, 3);
    link.close();
}

#[test]
fn reads_bring_bytes_and_wait_for_each_other() {
    let fabric = Fabric::new(manual());
    let wiring = Wiring { reads: 2, reads_served: 2, ..Default::default() };
    let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
    let expected: Vec<u8> = (0..30_000).map(|at| (at % 251) as u8).collect();
    link.there.memory.write(0, &expected).unwrap();
    let read =
        |id: u64| Wr { local: id * 3_000, ..wr(id, IBV_WR_RDMA_READ, 3_000, link.there.at(id * 3_000)) };
    // The peer would refuse a third at a time.
    link.here.post(link.near, &(0..10).map(read).collect::<Vec<_>>()).unwrap();
    fabric.step(LONG);
    let done = link.here.poll();
    assert_eq!(statuses(&done), (0..10).map(|id| (id, IBV_WC_SUCCESS)).collect::<Vec<_>>());
    assert!(done.iter().all(|wc| (wc.opcode, wc.byte_len) == (IBV_WC_RDMA_READ, 3_000)));
    assert_eq!(link.here.bytes(0, 30_000), expected);
    link.close();
}

#[test]
fn reads_beyond_what_either_end_allows_fail() {
    for (reads, reads_served, count, status) in
        [(0, 4, 1, IBV_WC_LOC_QP_OP_ERR), (4, 1, 4, IBV_WC_REM_INV_REQ_ERR)]
    {
        let fabric = Fabric::new(manual());
        let wiring = Wiring { reads, reads_served, retries: 7, ..Default::default() };
        let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
        // Long enough that the first is being answered when the others come.
        let read = |id| wr(id, IBV_WR_RDMA_READ, 30_000, link.there.at(0));
        link.here.post(link.near, &(0..count).map(read).collect::<Vec<_>>()).unwrap();
        fabric.step(LONG);
        let done = link.here.poll();
        let failed = done.iter().find(|wc| wc.status != IBV_WC_SUCCESS).expect("one fails");
        // The refusal may come before the responses that are owed, which are then missed.
        assert!([status, IBV_WC_RETRY_EXC_ERR].contains(&failed.status), "{failed:?}");
        assert_eq!(state(&fabric, 0, link.near), IBV_QPS_ERR);
        link.close();
    }
}
