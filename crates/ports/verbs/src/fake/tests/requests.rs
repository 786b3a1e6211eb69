//! What is refused, and which slots, keys, domains and memory a request may use.

use super::*;

#[test]
fn requests_are_refused_before_the_queue_pair_is_ready() {
    let fabric = Fabric::new(manual());
    let (here, there) = (Node::new(&fabric, 0), Node::new(&fabric, 1));
    let (near, far) = (here.pair(4), there.pair(4));
    let wiring = Wiring::default();
    let refused = |when: &str| {
        assert_eq!(here.post(near, &[write(1, 8, there.at(0))]), Err((0, libc::EINVAL)), "{when}");
    };
    refused("RESET");
    assert_eq!(here.init(near), 0);
    refused("INIT");
    assert_eq!(here.to_receive(near, &there, number(far), &wiring), 0);
    refused("RTR");
    assert_eq!(here.to_send(near, &wiring), 0);
    assert_eq!(here.post(near, &[write(1, 8, there.at(0))]), Ok(()));
    // The other end is not ready: what comes is dropped, and missed.
    fabric.step(LONG);
    assert_eq!(statuses(&here.poll()), [(1, IBV_WC_RETRY_EXC_ERR)]);
    assert_eq!(fabric.counters().resends, 3);
    here.events();
    assert_eq!((here.destroy(near), there.destroy(far)), (0, 0));
    here.close();
    there.close();
}

#[test]
fn a_change_of_state_needs_its_attributes_and_no_others() {
    let fabric = Fabric::new(manual());
    let here = Node::new(&fabric, 0);
    let pair = here.pair(4);
    let mut attributes: ibv_qp_attr = Zeroable::zeroed();
    (attributes.qp_state, attributes.port_num) = (IBV_QPS_INIT, 1);
    assert_eq!(here.modify(pair, &attributes, INIT_MASK & !IBV_QP_PORT), libc::EINVAL);
    assert_eq!(here.modify(pair, &attributes, INIT_MASK | IBV_QP_PATH_MTU), libc::EINVAL);
    attributes.port_num = 2;
    assert_eq!(here.modify(pair, &attributes, INIT_MASK), libc::EINVAL);
    assert_eq!(here.to_send(pair, &Wiring::default()), libc::EINVAL, "from RESET");
    assert_eq!(here.init(pair), 0);
    let too_many = Wiring { reads_served: 17, ..Default::default() };
    assert_eq!(here.to_receive(pair, &here, number(pair), &too_many), libc::EINVAL);
    assert_eq!(here.to_receive(pair, &here, number(pair), &Wiring::default()), 0);
    assert_eq!(here.move_to(pair, IBV_QPS_ERR), 0);
    assert_eq!(here.init(pair), libc::EINVAL, "from ERR");
    assert_eq!(here.move_to(pair, IBV_QPS_RESET), 0);
    assert_eq!(here.init(pair), 0);
    assert_eq!(here.events(), [IBV_EVENT_QP_LAST_WQE_REACHED]);
    assert_eq!(here.destroy(pair), 0);
    here.close();
}

#[test]
fn a_slot_of_the_send_queue_is_free_when_a_completion_was_polled() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let to = link.there.at(0);
    let silent = |id| Wr { flags: 0, ..write(id, 8, to) };
    let mut works: Vec<_> = (0..20).map(silent).collect();
    works[9].flags = IBV_SEND_SIGNALED;
    assert_eq!(link.here.post(link.near, &works), Err((16, libc::ENOMEM)));
    fabric.step(LONG);
    assert_eq!(link.here.post(link.near, &[silent(20)]), Err((0, libc::ENOMEM)), "all done, none polled");
    assert_eq!(statuses(&link.here.poll()), [(9, IBV_WC_SUCCESS)]);
    let again: Vec<_> = (30..50).map(silent).collect();
    assert_eq!(link.here.post(link.near, &again), Err((10, libc::ENOMEM)), "those behind it are not told of");
    link.close();
}

#[test]
fn a_slot_of_the_receive_queue_is_free_when_its_completion_was_polled() {
    let fabric = Fabric::new(manual());
    let there = NodeOptions { receives: 2, ..Default::default() };
    let link = Link::with(&fabric, &Wiring::default(), NodeOptions::default(), there);
    assert_eq!(link.there.receive(0, 3), Err(libc::ENOMEM));
    link.here.post(link.near, &[wr(1, IBV_WR_SEND_WITH_IMM, 0, (0, 0))]).unwrap();
    fabric.step(LONG);
    assert_eq!(link.there.receive(2, 1), Err(libc::ENOMEM));
    assert_eq!(statuses(&link.there.poll()), [(0, IBV_WC_SUCCESS)]);
    assert_eq!(link.there.receive(2, 2), Err(libc::ENOMEM), "room for one");
    link.close();
}

#[test]
fn a_completion_queue_that_overflows_ends_its_queue_pairs() {
    let fabric = Fabric::new(manual());
    let here = NodeOptions { completions: 3, ..Default::default() };
    let link = Link::with(&fabric, &Wiring::default(), here, NodeOptions::default());
    let works: Vec<_> = (0..4).map(|id| write(id, 8, link.there.at(0))).collect();
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    assert_eq!(link.here.events(), [IBV_EVENT_CQ_ERR, IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED]);
    assert_eq!(state(&fabric, 0, link.near), IBV_QPS_ERR);
    assert_eq!(link.here.poll().len(), 3);
    assert_eq!(fabric.counters().completions_lost, 1);
    link.close();
}

#[test]
fn a_completion_queue_can_be_resized_but_not_below_what_it_holds() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let works: Vec<_> = (0..4).map(|id| write(id, 8, link.there.at(0))).collect();
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    let resize = |entries| call!(link.here.library, ibv_resize_cq(link.here.cq, entries));
    assert_eq!((resize(3), resize(4), resize(1 << 21)), (libc::EINVAL, 0, libc::EINVAL));
    // SAFETY: the queue exists.
    assert_eq!(unsafe { (*link.here.cq).cqe }, 4);
    assert_eq!(link.here.poll().len(), 4);
    link.close();
}

#[test]
fn inline_bytes_are_taken_at_once_and_others_when_they_are_sent() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let inline = Wr { flags: IBV_SEND_SIGNALED | IBV_SEND_INLINE, ..write(1, 64, link.there.at(0)) };
    let longer = Wr { bytes: 65, ..inline.clone() };
    assert_eq!(link.here.post(link.near, &[longer]), Err((0, libc::EINVAL)));
    let before = link.here.bytes(0, 64);
    let wrong_key = Wr { local_key: Some(0), ..inline };
    link.here.post(link.near, &[wrong_key, write(2, 64, link.there.at(64))]).unwrap();
    link.here.memory.fill(0, 64, 0x11).unwrap();
    fabric.step(LONG);
    assert_eq!(link.here.poll().len(), 2, "the key of inline bytes is not looked at");
    assert_eq!(link.there.bytes(0, 64), before);
    assert_eq!(link.there.bytes(64, 64), [0x11; 64]);
    link.close();
}

#[test]
fn a_key_opens_its_own_bytes_only_and_everything_behind_is_flushed() {
    let beyond = |link: &Link| write(1, 9, link.there.at(MEMORY_BYTES as u64 - 8));
    let before = |link: &Link| write(1, 8, (link.there.at(0).0 - 1, link.there.at(0).1));
    let local_key = |link: &Link| write(1, 8, (link.there.at(0).0, link.there.local_key()));
    let own_key = |link: &Link| write(1, 8, (link.there.at(0).0, link.here.at(0).1 + 1));
    let read = |link: &Link| wr(1, IBV_WR_RDMA_READ, 9, link.there.at(MEMORY_BYTES as u64 - 8));
    type Wrong<'a> = &'a dyn Fn(&Link) -> Wr;
    for wrong in [&beyond as Wrong<'_>, &before, &local_key, &own_key, &read] {
        let fabric = Fabric::new(manual());
        let link = Link::new(&fabric);
        let ok = |id| write(id, 8, link.there.at(0));
        let silent = Wr { flags: 0, ..ok(3) };
        link.here.post(link.near, &[ok(0), wrong(&link), ok(2), silent]).unwrap();
        fabric.step(LONG);
        let done = link.here.poll();
        let expected = [
            (0, IBV_WC_SUCCESS),
            (1, IBV_WC_REM_ACCESS_ERR),
            (2, IBV_WC_WR_FLUSH_ERR),
            (3, IBV_WC_WR_FLUSH_ERR),
        ];
        assert_eq!(statuses(&done), expected);
        assert!(done.iter().all(|wc| wc.qp_num == number(link.near)));
        assert_eq!(link.there.events(), [IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_LAST_WQE_REACHED]);
        assert_eq!(link.here.events(), [IBV_EVENT_QP_LAST_WQE_REACHED]);
        assert_eq!(link.there.bytes(8, MEMORY_BYTES - 8), vec![0xee; MEMORY_BYTES - 8]);
        // In error, requests are taken, and come back.
        link.here.post(link.near, &[ok(4)]).unwrap();
        fabric.step(LONG);
        assert_eq!(statuses(&link.here.poll()), [(4, IBV_WC_WR_FLUSH_ERR)]);
        link.close();
    }
}

#[test]
fn completions_of_errors_hold_rubbish() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    link.here.move_to(link.near, IBV_QPS_ERR);
    let works: Vec<_> = (0..16).map(|id| write(id, 8, link.there.at(0))).collect();
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    let opcodes: std::collections::BTreeSet<u32> = link.here.poll().iter().map(|wc| wc.opcode).collect();
    assert!(opcodes.len() > 8, "{opcodes:?}");
    link.close();
}

#[test]
fn memory_that_peers_may_not_touch_stays_untouched() {
    for (access, opcode) in [
        (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ, IBV_WR_RDMA_WRITE),
        (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, IBV_WR_RDMA_READ),
    ] {
        let fabric = Fabric::new(manual());
        let there = NodeOptions { access, ..Default::default() };
        let link = Link::with(&fabric, &Wiring::default(), NodeOptions::default(), there);
        link.here.post(link.near, &[wr(1, opcode, 8, link.there.at(0))]).unwrap();
        fabric.step(LONG);
        assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_REM_ACCESS_ERR)]);
        link.close();
    }
}

#[test]
fn a_domain_is_not_open_to_the_queue_pairs_of_another() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let library = &link.there.library;
    let other = call!(library, ibv_alloc_pd(link.there.context));
    let mut memory = vec![0u8; 64];
    let base = memory.as_mut_ptr();
    let mr = call!(library, ibv_reg_mr(other, base.cast(), 64, ALL_ACCESS as i32));
    // SAFETY: the region exists.
    let remote = unsafe { (base as u64, (*mr).rkey) };
    link.here.post(link.near, &[write(1, 8, remote)]).unwrap();
    fabric.step(LONG);
    assert_eq!(statuses(&link.here.poll()), [(1, IBV_WC_REM_ACCESS_ERR)]);
    assert_eq!(call!(library, ibv_dealloc_pd(other)), libc::EBUSY);
    assert_eq!(call!(library, ibv_dereg_mr(mr)), 0);
    assert_eq!(call!(library, ibv_dealloc_pd(other)), 0);
    assert_eq!(memory, [0; 64]);
    link.close();
}

#[test]
fn a_wrong_local_key_fails_here_when_all_before_is_done() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let ok = |id| write(id, 5_000, link.there.at(0));
    let wrong = Wr { local_key: Some(77), ..ok(2) };
    link.here.post(link.near, &[ok(1), wrong, ok(3)]).unwrap();
    fabric.step(LONG);
    let expected = [(1, IBV_WC_SUCCESS), (2, IBV_WC_LOC_PROT_ERR), (3, IBV_WC_WR_FLUSH_ERR)];
    assert_eq!(statuses(&link.here.poll()), expected);
    assert_eq!(state(&fabric, 1, link.far), IBV_QPS_RTS, "the peer does not know yet");
    link.close();
}

#[test]
fn no_byte_moves_through_a_region_after_it_was_deregistered() {
    for steps in 0..60 {
        let fabric = Fabric::new(FabricOptions { seed: steps, ..manual() });
        let mut link = Link::new(&fabric);
        let read = Wr { local: 20_000, ..wr(2, IBV_WR_RDMA_READ, 10_000, link.there.at(0)) };
        link.here.post(link.near, &[write(1, 10_000, link.there.at(0)), read]).unwrap();
        fabric.step(steps);
        let was_done = fabric.queue_pairs()[0].outstanding == 0;
        assert_eq!(call!(link.there.library, ibv_dereg_mr(link.there.mr)), 0);
        let (before, moved) = (link.there.bytes(0, MEMORY_BYTES), fabric.counters().bytes_moved);
        fabric.step(LONG);
        assert_eq!(link.there.bytes(0, MEMORY_BYTES), before, "after {steps} steps");
        // What was read before may still be on its way back.
        assert!(fabric.counters().bytes_moved - moved <= 10_000);
        // Packets with the last bytes may have left before.
        let has_failed = link.here.poll().iter().any(|wc| wc.status == IBV_WC_REM_ACCESS_ERR);
        assert!(has_failed || was_done || steps > 30, "after {steps} steps");
        let base = link.there.memory.base().cast();
        link.there.mr =
            call!(link.there.library, ibv_reg_mr(link.there.pd, base, MEMORY_BYTES, ALL_ACCESS as i32));
        link.close();
    }
}

#[test]
fn no_byte_moves_through_a_queue_pair_after_it_was_destroyed() {
    for steps in 0..60 {
        let fabric = Fabric::new(FabricOptions { seed: steps, ..manual() });
        let link = Link::new(&fabric);
        let read = Wr { local: 20_000, ..wr(2, IBV_WR_RDMA_READ, 10_000, link.there.at(0)) };
        link.here.post(link.near, &[write(1, 10_000, link.there.at(0)), read]).unwrap();
        fabric.step(steps);
        let was_done = fabric.queue_pairs()[0].outstanding == 0;
        assert_eq!(link.there.destroy(link.far), 0);
        let before = link.there.bytes(0, MEMORY_BYTES);
        fabric.step(LONG);
        assert_eq!(link.there.bytes(0, MEMORY_BYTES), before, "after {steps} steps");
        let has_failed = link.here.poll().iter().any(|wc| wc.status == IBV_WC_RETRY_EXC_ERR);
        assert!(has_failed || was_done || steps > 30, "after {steps} steps");
        link.here.events();
        assert_eq!(link.here.destroy(link.near), 0);
        link.here.close();
        link.there.close();
    }
}
