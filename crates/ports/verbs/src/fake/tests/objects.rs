//! The lives of objects and events, what is told of devices, and the ways of a fabric.

use super::*;

#[test]
fn objects_in_use_cannot_be_destroyed() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let (library, here) = (&link.here.library, &link.here);
    assert_eq!(call!(library, ibv_dealloc_pd(here.pd)), libc::EBUSY);
    assert_eq!(call!(library, ibv_destroy_cq(here.cq)), libc::EBUSY);
    assert_eq!(call!(library, ibv_destroy_srq(here.srq)), libc::EBUSY);
    assert_eq!(call!(library, ibv_destroy_comp_channel(here.channel)), libc::EBUSY);
    assert_eq!(call!(library, ibv_close_device(here.context)), libc::EBUSY);
    assert_eq!(fabric.leaks().len(), 2 * 7);
    link.close();
}

#[test]
fn events_have_to_be_acknowledged_before_their_object_goes() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    fabric.break_queue_pair(0, number(link.near), None);
    let mut event = link.here.get_event().expect("an event");
    let (library, near) = (link.here.library.clone(), link.near as usize);
    let destroying = std::thread::spawn(move || call!(library, ibv_destroy_qp(near as *mut ibv_qp)));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!destroying.is_finished(), "it waits");
    call!(link.here.library, ibv_ack_async_event(&mut event));
    assert_eq!(destroying.join().unwrap(), 0);

    // Whoever never acknowledges waits for ever, and is told so here.
    fabric.break_queue_pair(1, number(link.far), None);
    let mut event = link.there.get_event().expect("an event");
    assert_eq!(link.there.destroy(link.far), libc::EINVAL);
    assert!(fabric.take_violations()[0].contains("not acknowledged"));
    call!(link.there.library, ibv_ack_async_event(&mut event));
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.close();
    link.there.close();
}

#[test]
fn an_event_that_nobody_got_goes_with_its_queue_pair() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    fabric.break_queue_pair(0, number(link.near), None);
    assert_eq!(link.here.destroy(link.near), 0);
    assert!(link.here.get_event().is_none());
    assert_eq!(link.there.destroy(link.far), 0);
    link.here.close();
    link.there.close();
}

#[test]
fn a_channel_wakes_once_for_each_arming() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let done = |id| {
        link.here.post(link.near, &[write(id, 8, link.there.at(0))]).unwrap();
        fabric.step(LONG);
    };
    done(1);
    assert_eq!(link.here.take_wake(), Err(libc::EAGAIN), "it was not armed");
    assert_eq!(link.here.arm(false), 0);
    assert_eq!(link.here.take_wake(), Err(libc::EAGAIN), "what came before does not count");
    done(2);
    done(3);
    assert_eq!(link.here.take_wake(), Ok(()));
    assert_eq!(link.here.take_wake(), Err(libc::EAGAIN));

    // The peer waits for what was sent as solicited, or failed.
    link.there.receive(0, 2).unwrap();
    assert_eq!(link.there.arm(true), 0);
    let send = |flags| Wr { flags, ..wr(4, IBV_WR_SEND_WITH_IMM, 0, (0, 0)) };
    link.here.post(link.near, &[send(0)]).unwrap();
    fabric.step(LONG);
    assert_eq!(link.there.take_wake(), Err(libc::EAGAIN));
    link.here.post(link.near, &[send(IBV_SEND_SOLICITED)]).unwrap();
    fabric.step(LONG);
    assert_eq!(link.there.take_wake(), Ok(()));
    link.close();
}

#[test]
fn calls_fail_as_they_are_told() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let here = &link.here;
    let refused = || std::io::Error::last_os_error().raw_os_error();
    fabric.fail(Failure::next(Function::CreateQp, libc::ENOMEM));
    assert!(call!(here.library, ibv_create_qp(here.pd, &mut here.init_attributes(1))).is_null());
    assert_eq!(refused(), Some(libc::ENOMEM));
    fabric.fail(Failure { after: 1, times: 2, ..Failure::next(Function::ResizeCq, libc::ENOSYS) });
    let resized: Vec<_> = (0..4).map(|_| call!(here.library, ibv_resize_cq(here.cq, 300))).collect();
    assert_eq!(resized, [0, libc::ENOSYS, libc::ENOSYS, 0]);
    fabric.fail(Failure { state: Some(IBV_QPS_RTR), ..Failure::next(Function::ModifyQp, libc::ETIMEDOUT) });
    let pair = here.pair(1);
    assert_eq!(here.init(pair), 0);
    assert_eq!(here.to_receive(pair, here, 1, &Wiring::default()), libc::ETIMEDOUT);
    assert_eq!(here.to_receive(pair, here, 1, &Wiring::default()), 0);
    fabric.fail(Failure::next(Function::DestroyQp, libc::EBUSY));
    assert_eq!((here.destroy(pair), here.destroy(pair)), (libc::EBUSY, 0));
    fabric.fail(Failure { accepted: 2, ..Failure::next(Function::PostSend, libc::ENOMEM) });
    let works: Vec<_> = (0..4).map(|id| write(id, 8, link.there.at(0))).collect();
    assert_eq!(here.post(link.near, &works[..2]), Ok(()), "there is no third");
    assert_eq!(here.post(link.near, &works), Err((2, libc::ENOMEM)));
    fabric.step(LONG);
    assert_eq!(here.poll().len(), 4);
    assert_eq!(fabric.counters().calls(Function::PostSend), 2);
    link.close();
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let fabric = Fabric::new(FabricOptions { seed, pace: Pace::Stepped { most: 5 }, ..manual() });
        let (here, there) = (Node::new(&fabric, 0), Node::new(&fabric, 1));
        let pairs: Vec<_> = (0..8).map(|_| (here.pair(4), there.pair(4))).collect();
        for &(near, far) in &pairs {
            connect((&here, near), (&there, far), &Wiring::default());
            here.post(near, &[write(u64::from(number(near)), 3_000, there.at(0))]).unwrap();
        }
        let mut order = Vec::new();
        while order.len() < pairs.len() {
            order.extend(here.poll().iter().map(|wc| wc.wr_id));
        }
        for (near, far) in pairs {
            assert_eq!((here.destroy(near), there.destroy(far)), (0, 0));
        }
        here.close();
        there.close();
        (order, fabric.counters().steps)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn each_fabric_has_its_own_devices() {
    let one = Fabric::new(manual());
    let devices = vec![DeviceOptions { ethernet: false, ..Default::default() }; 3];
    let other = Fabric::new(FabricOptions { devices, ..manual() });
    assert_eq!((device_count(&one.library()), device_count(&other.library())), (2, 3));
    let library = other.library();
    drop(other);
    assert_eq!(device_count(&library), 0);
    // No other fabric takes its place while the library is there.
    let fabrics: Vec<_> = (0..8).map(|_| Fabric::new(manual())).collect();
    assert_eq!(device_count(&library), 0);
    assert!(fabrics.iter().all(|fabric| device_count(&fabric.library()) == 2));
}

#[test]
fn a_fabric_lives_as_long_as_what_is_open() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::Thread, ..manual() });
    let link = Link::new(&fabric);
    let shared = Arc::downgrade(&fabric.handle.shared);
    drop(fabric);
    link.here.post(link.near, &[write(1, 8, link.there.at(0))]).unwrap();
    let begun = Instant::now();
    while link.here.poll().is_empty() {
        assert!(begun.elapsed() < PATIENCE, "the thread goes on");
        std::thread::yield_now();
    }
    link.close();
    while shared.strong_count() > 0 {
        assert!(begun.elapsed() < PATIENCE, "the thread lets go");
        std::thread::yield_now();
    }
}

#[test]
fn ports_and_addresses_are_described() {
    for ethernet in [true, false] {
        let device = DeviceOptions { ethernet, mtu_bytes: 4096, ..DeviceOptions::default() };
        let fabric = Fabric::new(FabricOptions { devices: vec![device], ..manual() });
        let node = Node::new(&fabric, 0);
        let (library, context) = (&node.library, node.context);
        let mut port = Zeroable::zeroed();
        assert_eq!(call!(library, ibv_query_port(context, 1, &mut port)), 0);
        assert_eq!((port.active_mtu, port.lid != 0), (IBV_MTU_4096, !ethernet));
        assert_eq!(call!(library, ibv_query_port(context, 2, &mut port)), libc::EINVAL);
        let mut entries: Vec<ibv_gid_entry> = vec![Zeroable::zeroed(); 8];
        let query = library._ibv_query_gid_table.unwrap();
        // SAFETY: there are so many places.
        let found = unsafe { query(context, entries.as_mut_ptr(), 8, 0, size_of::<ibv_gid_entry>()) };
        assert_eq!(found, port.gid_tbl_len as isize);
        for entry in &entries[..found as usize] {
            let mut gid = Zeroable::zeroed();
            assert_eq!(call!(library, ibv_query_gid(context, 1, entry.gid_index as i32, &mut gid)), 0);
            assert_eq!(gid, entry.gid);
        }
        assert_eq!(call!(library, ibv_query_gid(context, 1, found as i32, &mut Zeroable::zeroed())), -1);
        let mut attributes: ibv_device_attr = Zeroable::zeroed();
        assert_eq!(call!(library, ibv_query_device(context, &mut attributes)), 0);
        assert_eq!(attributes.max_qp_wr, 8192);
        node.close();
    }
}

#[test]
fn memory_has_other_addresses_for_devices_if_it_is_told() {
    let fabric = Fabric::new(manual());
    let link = Link::new(&fabric);
    let there = &link.there;
    let (register, dma_buf) =
        (there.library.ibv_reg_mr_iova2.unwrap(), there.library.ibv_reg_dmabuf_mr.unwrap());
    let base = there.memory.base();
    let access = ALL_ACCESS | IBV_ACCESS_RELAXED_ORDERING;
    // SAFETY: the memory outlives the region.
    let by_iova = unsafe { register(there.pd, base.cast(), 4_096, 1 << 40, access) };
    assert!(call!(there.library, ibv_reg_mr(there.pd, base.cast(), 64, access as i32)).is_null());
    let file = Memory::allocate(8_192, &AllocateOptions::default()).unwrap();
    let fd = file.fd().expect("memory with a file").as_fd().as_raw_fd();
    // SAFETY: the descriptor is open.
    let by_file = unsafe { dma_buf(there.pd, 4_096, 4_096, 0, fd, ALL_ACCESS as i32) };
    // SAFETY: both exist.
    let (iova_key, file_key) = unsafe { ((*by_iova).rkey, (*by_file).rkey) };
    let works = [write(1, 100, ((1 << 40) + 50, iova_key)), write(2, 100, (7, file_key))];
    link.here.post(link.near, &works).unwrap();
    fabric.step(LONG);
    assert_eq!(link.here.poll().len(), 2);
    assert_eq!(there.bytes(50, 100), link.here.bytes(0, 100));
    let mut landed = vec![0; 100];
    file.read(4_096 + 7, &mut landed).unwrap();
    assert_eq!(landed, link.here.bytes(0, 100));
    assert_eq!(call!(there.library, ibv_dereg_mr(by_iova)), 0);
    assert_eq!(call!(there.library, ibv_dereg_mr(by_file)), 0);
    link.close();
}

#[test]
fn an_old_library_lacks_what_came_later() {
    let fabric = Fabric::new(FabricOptions { old_library: true, ..manual() });
    let library = fabric.library();
    assert!(library.ibv_reg_mr_iova2.is_none() && library._ibv_query_gid_table.is_none());
}

#[test]
fn the_use_of_a_destroyed_object_is_found_out() {
    let fabric = Fabric::new(manual());
    let node = Node::new(&fabric, 0);
    let pair = node.pair(1);
    assert_eq!(node.destroy(pair), 0);
    assert_eq!(node.destroy(pair), libc::EINVAL);
    assert_eq!(node.post(pair, &[write(1, 8, (0, 0))]), Err((0, libc::EINVAL)));
    node.close();
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(fabric)));
    let said = dropped.expect_err("the last handle panics");
    let said = said.downcast_ref::<String>().unwrap();
    assert!(said.contains("ibv_destroy_qp") && said.contains("ibv_post_send"), "{said}");
}

#[test]
fn what_is_weightless_is_done_without_its_bytes() {
    let fabric = Fabric::new(FabricOptions { pace: Pace::Weightless, ..manual() });
    let link = Link::new(&fabric);
    link.there.receive(0, 2).unwrap();
    let to = link.there.at(0);
    let silent = Wr { flags: 0, ..write(1, 900, to) };
    let with_imm = wr(4, IBV_WR_RDMA_WRITE_WITH_IMM, 900, to);
    let read = wr(3, IBV_WR_RDMA_READ, 900, to);
    let works =
        [silent.clone(), silent.clone(), write(2, 900, to), read, with_imm, wr(5, IBV_WR_SEND, 44, to)];
    link.here.post(link.near, &works).unwrap();
    let done = statuses(&link.here.poll());
    assert_eq!(done, [2, 3, 4, 5].map(|id| (id, IBV_WC_SUCCESS)));
    let arrived: Vec<_> = link.there.poll().iter().map(|wc| (wc.wr_id, wc.byte_len)).collect();
    assert_eq!(arrived, [(0, 0), (1, 44)]);
    assert_eq!(link.there.bytes(0, 1_000), [0xee; 1_000]);
    assert_eq!(link.there.bytes(RECEIVES_AT as usize + 1_024, 44), link.here.bytes(0, 44));
    assert_eq!(fabric.counters().sends_posted, 6);
    // The queue is as long as it is, here too.
    assert_eq!(link.here.post(link.near, &vec![silent; 17]), Err((16, libc::ENOMEM)));
    link.close();
}
