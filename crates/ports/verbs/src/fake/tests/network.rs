//! What the network and the devices do to packets: loss, links, frozen and failed devices, dead processes.

use super::*;

#[test]
fn packets_outlive_the_queue_pair_that_sent_them() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    // Sent, and not arrived: the peer takes nothing now.
    fabric.freeze(1, 1_000);
    fabric.step(3);
    assert_eq!(fabric.counters().packets, 1);
    assert_eq!(link.here.destroy(link.near), 0);
    fabric.freeze(1, 0);
    fabric.step(LONG);
    assert_eq!(link.there.bytes(0, 8), link.here.bytes(0, 8));
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.close();
    link.there.close();
}

#[test]
fn numbers_of_queue_pairs_come_again_at_once() {
    let fabric = Fabric::new(manual());
    let node = Node::new(&fabric, 0);
    let (one, two) = (node.pair(1), node.pair(1));
    let first = number(one);
    assert_ne!(first, number(two));
    assert_eq!(node.destroy(one), 0);
    let three = node.pair(1);
    assert_eq!(number(three), first);
    assert_eq!((node.destroy(two), node.destroy(three)), (0, 0));
    node.close();
}

#[test]
fn everything_arrives_once_and_in_order_though_packets_are_lost() {
    for seed in 0..20 {
        let faults = Faults { lost_one_in: 6 };
        let fabric = Fabric::new(FabricOptions { seed, faults, ..manual() });
        let wiring = Wiring { retries: 7, ..Default::default() };
        let link = Link::with(&fabric, &wiring, NodeOptions::default(), NodeOptions::default());
        link.there.receive(0, 8).unwrap();
        let bytes: Vec<u8> = (0..5_000).map(|at| (at % 199) as u8).collect();
        link.there.memory.write(10_000, &bytes).unwrap();
        for round in 0..4 {
            let to = link.there.at(round * 2_500);
            let read = Wr { local: 20_000, ..wr(3, IBV_WR_RDMA_READ, 5_000, link.there.at(10_000)) };
            link.here
                .post(
                    link.near,
                    &[
                        Wr { local: round * 2_500, ..write(0, 2_500, to) },
                        wr(1, IBV_WR_RDMA_WRITE_WITH_IMM, 0, to),
                        wr(2, IBV_WR_SEND_WITH_IMM, 44, to),
                        read,
                    ],
                )
                .unwrap();
            fabric.step(LONG);
            let done = statuses(&link.here.poll());
            assert_eq!(done, (0..4).map(|id| (id, IBV_WC_SUCCESS)).collect::<Vec<_>>(), "seed {seed}");
            assert_eq!(link.here.bytes(20_000, 5_000), bytes);
            link.here.memory.fill(20_000, 5_000, 0).unwrap();
        }
        assert_eq!(link.there.bytes(0, 10_000), link.here.bytes(0, 10_000));
        let arrived: Vec<_> =
            link.there.poll().iter().map(|wc| (wc.wr_id, u32::from_be(wc.imm_data))).collect();
        let expected: Vec<_> = (0..8).map(|id| (id, 1 + id as u32 % 2)).collect();
        assert_eq!(arrived, expected);
        assert!(fabric.counters().resends > 0);
        link.close();
    }
}

#[test]
fn a_link_that_comes_back_in_time_is_only_a_delay() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let port_state = |node: &Node| {
        let mut port = Zeroable::zeroed();
        assert_eq!(call!(node.library, ibv_query_port(node.context, 1, &mut port)), 0);
        port.state
    };
    fabric.set_link(1, false);
    assert_eq!((link.there.events(), link.here.events()), (vec![IBV_EVENT_PORT_ERR], vec![]));
    assert_eq!((port_state(&link.there), port_state(&link.here)), (IBV_PORT_DOWN, IBV_PORT_ACTIVE));
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    // Until the first packet was sent again.
    while fabric.counters().resends == 0 {
        fabric.step(1);
    }
    fabric.set_link(1, true);
    assert_eq!(link.there.events(), [IBV_EVENT_PORT_ACTIVE]);
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_SUCCESS)]);
    fabric.set_link(0, false);
    link.here.post(link.near, &[write(2, 8, link.there.at(0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(2, IBV_WC_RETRY_EXC_ERR)]);
    link.close();
}

#[test]
fn a_frozen_device_answers_late_or_too_late() {
    for (steps, status) in [(200, IBV_WC_SUCCESS), (100_000, IBV_WC_RETRY_EXC_ERR)] {
        let fabric = Fabric::new(manual());
        let link = Link::new(&fabric);
        fabric.freeze(1, steps);
        link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
        fabric.step(LONG);
        assert_eq!(statuses(&link.here.poll()), [(1, status)]);
        link.close();
    }
}

#[test]
fn a_process_that_is_killed_is_gone_for_its_peers() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let there = fabric.contexts()[1];
    assert_eq!((there.device, there.queue_pairs, there.regions), (1, 1, 1));
    link.here.post(link.near, &[write(1, 30_000, link.there.at(0))]).unwrap();
    fabric.step(10);
    fabric.kill(there.id);
    let before = link.there.bytes(0, MEMORY_BYTES);
    fabric.step(LONG);
    assert_eq!(link.there.bytes(0, MEMORY_BYTES), before);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_RETRY_EXC_ERR)]);
    // Its number is another's at once.
    let other = Node::new(&fabric, 1);
    let pair = other.pair(1);
    assert_eq!(number(pair), number(link.far));
    assert_eq!(other.destroy(pair), 0);
    other.close();
    assert!(call!(link.there.library, ibv_alloc_pd(link.there.context)).is_null());
    // What the process would still do is of no consequence, in whichever order.
    assert_eq!(call!(link.there.library, ibv_dealloc_pd(link.there.pd)), 0);
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.events();
    assert_eq!(link.here.destroy(link.near), 0);
    link.here.close();
    assert_eq!(fabric.leaks(), [""; 0]);
    let Node { library, context, .. } = link.there;
    assert_eq!(call!(library, ibv_close_device(context)), 0);
}

#[test]
fn a_device_that_fails_flushes_and_lets_itself_be_closed() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    fabric.fail_device(0);
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_WR_FLUSH_ERR)]);
    assert_eq!(link.here.events(), [IBV_EVENT_DEVICE_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED]);
    assert!(call!(link.here.library, ibv_alloc_pd(link.here.context)).is_null());
    assert_eq!(link.there.bytes(0, 8), [0xee; 8]);
    link.close();
}

#[test]
fn a_queue_pair_that_breaks_is_reported() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    fabric.break_queue_pair(0, number(link.near), Some(IBV_EVENT_QP_FATAL));
    assert_eq!(link.here.events(), [IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED]);
    link.close();
}
