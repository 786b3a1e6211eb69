//! Hand-overs through the C ABI, and what happens when things are closed in another order than they were opened.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use crossdock_ffi::*;
use rustix::event::{PollFd, PollFlags, poll};

const LAYERS: u32 = 3;
const PAGES: u32 = 32;
const PAGE_TOKENS: u32 = 4;
const TOKENS: u32 = 30;
const PATIENCE_MS: u64 = 30_000;

fn sized<T: Zeroable>(set: impl FnOnce(&mut T, usize)) -> T {
    let mut value = T::zeroed();
    set(&mut value, size_of::<T>());
    value
}

#[track_caller]
fn ok(status: crossdock_status) {
    assert_eq!(status, CROSSDOCK_OK, "{}", last_message());
}

fn last_message() -> String {
    let mut error: crossdock_error = sized(|error: &mut crossdock_error, size| error.size = size);
    // SAFETY: it says its size; its words are valid until the next failure of this thread.
    unsafe {
        assert_eq!(crossdock_last_error(&raw mut error), CROSSDOCK_OK);
        let words = |text: *const c_char| CStr::from_ptr(text).to_string_lossy().into_owned();
        format!("{}; {}", words(error.message), words(error.advice))
    }
}

/// Calls with a place for what they give.
fn made<T: Zeroable>(call: impl FnOnce(*mut T) -> crossdock_status) -> T {
    let mut value = T::zeroed();
    ok(call(&raw mut value));
    value
}

#[derive(Clone, Copy)]
struct Worker {
    layout: u64,
    memory: u64,
    pool: u64,
    node: u64,
    base: usize,
}

#[derive(Clone, Copy, Default)]
struct Options {
    allocates: bool,
    caller: bool,
    import: Option<(usize, usize)>,
}

fn layout() -> u64 {
    let options: crossdock_layout_options = sized(|options: &mut crossdock_layout_options, size| {
        options.size = size;
        options.model = c"test".as_ptr();
        options.model_layers = LAYERS;
        options.kind = CROSSDOCK_MLA;
        options.latent_bytes = 96;
        options.rope_bytes = 32;
        options.dtype = CROSSDOCK_BF16;
        options.page_tokens = PAGE_TOKENS;
        options.pages = PAGES;
    });
    // SAFETY: what it points to lives; here and below.
    made(|to| unsafe { crossdock_layout_create(&raw const options, to) })
}

impl Worker {
    fn open(name: &CStr, worker: Options) -> Worker {
        let layout = layout();
        // SAFETY: valid pointers, here and below.
        let bytes: u64 = made(|to| unsafe { crossdock_layout_region_bytes(layout, 0, to) });
        let memory = match worker.import {
            // SAFETY: the test keeps it until the memory is closed.
            Some((base, bytes)) => {
                // SAFETY: as above.
                made(|to| unsafe { crossdock_memory_import(base as *mut c_void, bytes, to) })
            }
            // SAFETY: as above.
            None => made(|to| unsafe { crossdock_memory_allocate(bytes as usize, ptr::null(), to) }),
        };
        let mut info: crossdock_memory_info =
            sized(|info: &mut crossdock_memory_info, size| info.size = size);
        // SAFETY: as above.
        ok(unsafe { crossdock_memory_describe(memory, &raw mut info) });
        let pool = sized(|pool: &mut crossdock_pool_options, size| {
            (pool.size, pool.pages, pool.allocates) = (size, PAGES, worker.allocates.into());
        });
        // SAFETY: as above.
        let pool = made(|to| unsafe { crossdock_pool_create(&raw const pool, to) });
        let options = sized(|options: &mut crossdock_node_options, size| {
            options.size = size;
            options.name = name.as_ptr();
            options.layout = layout;
            options.memory = &raw const memory;
            options.memory_count = 1;
            options.authentication = CROSSDOCK_AUTHENTICATION_OFF;
            options.progress = worker.caller.into();
        });
        // SAFETY: as above.
        let node = made(|to| unsafe { crossdock_node_open(&raw const options, to) });
        Worker { layout, memory, pool, node, base: info.base as usize }
    }

    fn close(self) {
        ok(crossdock_node_close(self.node));
        ok(crossdock_memory_close(self.memory));
        ok(crossdock_pool_close(self.pool));
        ok(crossdock_layout_close(self.layout));
    }

    fn connect(&self, other: &Worker) -> u64 {
        let mut address = [0; 128];
        // SAFETY: as above.
        ok(unsafe {
            crossdock_node_address(other.node, address.as_mut_ptr(), address.len(), ptr::null_mut())
        });
        // SAFETY: as above.
        made(|to| unsafe { crossdock_connect(self.node, address.as_ptr(), to) })
    }

    fn receive(&self, peer: u64, room: u64, pages: &crossdock_page_list, deadline_ms: u64) -> u64 {
        let (status, handle) = self.try_receive(peer, room, pages, deadline_ms);
        ok(status);
        handle
    }

    fn try_receive(&self, peer: u64, room: u64, pages: &crossdock_page_list, deadline_ms: u64) -> (i32, u64) {
        let source = crossdock_source { peer, rank: 0, parts: CROSSDOCK_ALL_PARTS };
        let options = sized(|options: &mut crossdock_receive_options, size| {
            (options.size, options.room, options.tokens) = (size, room, TOKENS);
            (options.sources, options.source_count) = (&raw const source, 1);
            (options.pages, options.page_lists) = (pages, 1);
            (options.deadline_ms, options.user_data) = (deadline_ms, room + 1_000);
        });
        let mut handle = 0;
        // SAFETY: as above.
        (unsafe { crossdock_receive(self.node, &raw const options, &raw mut handle) }, handle)
    }

    fn send(&self, room: u64, pages: &crossdock_page_list) -> u64 {
        let options = sized(|options: &mut crossdock_send_options, size| {
            (options.size, options.room, options.tokens) = (size, room, TOKENS);
            (options.pages, options.page_lists) = (pages, 1);
            options.deadline_ms = PATIENCE_MS;
        });
        // SAFETY: as above.
        let handle = made(|to| unsafe { crossdock_send(self.node, &raw const options, to) });
        ok(crossdock_room_send_layers(handle, 0, LAYERS));
        // SAFETY: as above.
        ok(unsafe { crossdock_room_finish(handle, c"aux".as_ptr().cast(), 3) });
        handle
    }

    fn free(&self) -> u32 {
        self.stats().free
    }

    fn stats(&self) -> crossdock_pool_stats {
        let mut stats = sized(|stats: &mut crossdock_pool_stats, size| stats.size = size);
        // SAFETY: as above.
        ok(unsafe { crossdock_pool_get_stats(self.pool, &raw mut stats) });
        stats
    }

    fn wait_until_free(&self, pages: u32) {
        let deadline = Instant::now() + Duration::from_millis(PATIENCE_MS);
        while self.free() != pages {
            assert!(Instant::now() < deadline, "{} pages are free", self.free());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn fill(&self, value: u8) {
        let mut bytes = 0;
        // SAFETY: as above.
        ok(unsafe { crossdock_layout_region_bytes(self.layout, 0, &raw mut bytes) });
        // SAFETY: the memory is as long, and nothing writes it meanwhile.
        unsafe { ptr::write_bytes(self.base as *mut u8, value, bytes as usize) };
    }

    /// Every byte of the pages, in every layer.
    fn bytes(&self, ids: &[u32]) -> Vec<u8> {
        let mut found = Vec::new();
        for layer in 0..LAYERS {
            // SAFETY: as above.
            let buffer: crossdock_layer_buffer =
                made(|to| unsafe { crossdock_layout_find(self.layout, 0, 0, layer, to, ptr::null_mut()) });
            for &id in ids {
                let at = self.base + buffer.offset as usize + id as usize * buffer.stride_bytes as usize;
                // SAFETY: the page lies in the memory, and nothing writes it any more.
                found.extend_from_slice(unsafe { std::slice::from_raw_parts(at as *const u8, 512) });
            }
        }
        found
    }
}

fn named(worker: &Worker, ids: &[u32]) -> crossdock_page_list {
    let mut list = crossdock_page_list::zeroed();
    (list.pool, list.ids, list.count) = (worker.pool, ids.as_ptr().cast(), ids.len());
    list
}

#[track_caller]
fn end_of(room: u64) -> crossdock_end {
    let mut end = sized(|end: &mut crossdock_end, size| end.size = size);
    // SAFETY: it says its size.
    ok(unsafe { crossdock_room_wait(room, PATIENCE_MS, &raw mut end) });
    end
}

type Tell = unsafe extern "C" fn(u64, *mut c_char, usize, *mut usize) -> crossdock_status;

/// What is said in words of a room that has ended.
#[track_caller]
fn told(room: u64, tell: Tell) -> String {
    let mut words = [0; 512];
    // SAFETY: so many can be written.
    ok(unsafe { tell(room, words.as_mut_ptr(), words.len(), ptr::null_mut()) });
    // SAFETY: it ends with a NUL.
    unsafe { CStr::from_ptr(words.as_ptr()) }.to_str().expect("text").to_owned()
}

#[track_caller]
fn delivered(room: u64) {
    let end = end_of(room);
    let words = told(room, crossdock_room_message);
    assert_eq!(end.outcome, CROSSDOCK_DELIVERED, "{words}");
    ok(crossdock_room_wait_pages(room, PATIENCE_MS));
}

#[test]
fn pages_are_taken_by_their_numbers_when_no_room_has_them() {
    let (prefill, decode) =
        (Worker::open(c"prefill", Options::default()), Worker::open(c"decode", Options::default()));
    prefill.fill(7);
    let peer = decode.connect(&prefill);
    let ids = [0u32, 1, 2, 3, 4, 5, 6, 7];
    let list = named(&prefill, &ids);
    // SAFETY: the list and its numbers live; NULL is allowed.
    let adopt = |list: &crossdock_page_list, to: *mut u64| unsafe { crossdock_pool_adopt(list, to) };
    let sending = prefill.send(0, &list);
    let mut pages = 0;
    assert_eq!(adopt(&list, &raw mut pages), CROSSDOCK_PAGE_IN_USE);
    let receiving = decode.receive(peer, 0, &named(&decode, &ids), PATIENCE_MS);
    let mut word = [0; 4];
    // SAFETY: so many can be written, here and below.
    let mut peer_of =
        |room| unsafe { crossdock_room_peer(room, word.as_mut_ptr(), word.len(), ptr::null_mut()) };
    let pending = decode.receive(peer, 99, &named(&decode, &[20]), PATIENCE_MS);
    assert_eq!(peer_of(pending), CROSSDOCK_PENDING);
    ok(crossdock_room_close(pending));
    delivered(receiving);
    assert_eq!(peer_of(receiving), CROSSDOCK_BUFFER_TOO_SMALL);
    assert_eq!(end_of(sending).outcome, CROSSDOCK_DELIVERED);
    assert_eq!(
        (told(sending, crossdock_room_peer), told(sending, crossdock_room_port)),
        ("decode".into(), "shm".into())
    );
    assert_eq!(told(receiving, crossdock_room_peer), "prefill");
    for room in [sending, receiving] {
        ok(crossdock_room_close(room));
    }
    prefill.wait_until_free(PAGES);
    ok(adopt(&list, &raw mut pages));
    // The handle has them now; it can be sent, and twice they cannot be had.
    let mut again = 0;
    assert_eq!(adopt(&list, &raw mut again), CROSSDOCK_PAGE_IN_USE);
    let by_handle = crossdock_page_list { pages, ..list };
    assert_eq!(adopt(&by_handle, &raw mut again), CROSSDOCK_BAD_ARGUMENT);
    assert_eq!(adopt(&list, ptr::null_mut()), CROSSDOCK_BAD_ARGUMENT);
    ok(crossdock_pages_close(pages));
    ok(adopt(&list, &raw mut again));
    ok(crossdock_pages_close(again));
    // A pool that allocates names its pages itself.
    let allocating = Worker::open(c"other", Options { allocates: true, ..Options::default() });
    assert_eq!(adopt(&named(&allocating, &ids), &raw mut again), CROSSDOCK_WRONG_KIND);
    for worker in [prefill, decode, allocating] {
        worker.close();
    }
}

#[test]
fn taken_pages_go_through_a_room_and_come_back_by_a_handle() {
    let allocates = Options { allocates: true, ..Options::default() };
    let (prefill, decode) = (Worker::open(c"prefill", allocates), Worker::open(c"decode", allocates));
    prefill.fill(7);
    let peer = decode.connect(&prefill);
    // SAFETY: valid pointers, here and below.
    let from = made(|to| unsafe { crossdock_pool_take(prefill.pool, 8, to) });
    // SAFETY: as above.
    let to = made(|pages| unsafe { crossdock_pool_take(decode.pool, 8, pages) });
    let lists = [from, to].map(|pages| crossdock_page_list { pages, ..crossdock_page_list::zeroed() });
    for room in 0..2 {
        // The same pages are sent twice at once.
        let list = crossdock_page_list { pages: from, ..crossdock_page_list::zeroed() };
        let sending = [prefill.send(room, &list), prefill.send(room + 10, &list)];
        // SAFETY: as above.
        let other = made(|pages| unsafe { crossdock_pool_take(decode.pool, 8, pages) });
        let other = crossdock_page_list { pages: other, ..crossdock_page_list::zeroed() };
        let own = match room {
            0 => lists[1],
            // SAFETY: as above.
            _ => crossdock_page_list {
                // SAFETY: as above.
                pages: made(|pages| unsafe { crossdock_pool_take(decode.pool, 8, pages) }),
                ..crossdock_page_list::zeroed()
            },
        };
        let receiving = [
            decode.receive(peer, room, &own, PATIENCE_MS),
            decode.receive(peer, room + 10, &other, PATIENCE_MS),
        ];
        let mut stale = [0u32; 8];
        // SAFETY: as above.
        let asked = unsafe { crossdock_pages_ids(own.pages, stale.as_mut_ptr(), 8, ptr::null_mut()) };
        assert_eq!(asked, CROSSDOCK_BAD_HANDLE, "the room has consumed the handle");
        for handle in receiving {
            delivered(handle);
            // SAFETY: as above.
            let home: u64 = made(|pages| unsafe { crossdock_room_take_pages(handle, 0, pages) });
            let mut ids = [0u32; 8];
            // SAFETY: as above.
            ok(unsafe { crossdock_pages_ids(home, ids.as_mut_ptr(), 8, ptr::null_mut()) });
            assert!(decode.bytes(&ids[..7]).iter().all(|&byte| byte == 7));
            let mut again = 0;
            // SAFETY: as above.
            let twice = unsafe { crossdock_room_take_pages(handle, 0, &raw mut again) };
            assert_eq!(twice, CROSSDOCK_FINISHED);
            ok(crossdock_pages_close(home));
            ok(crossdock_room_close(handle));
        }
        for handle in sending {
            delivered(handle);
            ok(crossdock_room_close(handle));
        }
    }
    assert_eq!(decode.free(), PAGES);
    ok(crossdock_pages_close(from));
    prefill.wait_until_free(PAGES);
    decode.close();
    prefill.close();
}

#[test]
fn every_width_of_page_numbers_is_taken_and_what_no_pool_has_is_not() {
    let worker = Worker::open(c"decode", Options::default());
    // SAFETY: valid pointers.
    let peer = made(|to| unsafe { crossdock_peer_by_number(worker.node, 9, to) });
    let mut list = named(&worker, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let room = worker.receive(peer, 1, &list, PATIENCE_MS);
    assert_eq!(worker.try_receive(peer, 2, &list, PATIENCE_MS).0, CROSSDOCK_PAGE_IN_USE);
    let wide: [i64; 8] = [11, 12, 13, 14, 15, 16, 17, 18];
    (list.ids, list.id_bytes) = (wide.as_ptr().cast(), 8);
    let other = worker.receive(peer, 2, &list, PATIENCE_MS);
    for (bad, status) in [
        (-1i64, CROSSDOCK_PAGE_OUT_OF_RANGE),
        (1 << 40, CROSSDOCK_PAGE_OUT_OF_RANGE),
        (i64::from(PAGES), CROSSDOCK_PAGE_OUT_OF_RANGE),
        (12, CROSSDOCK_PAGE_IN_USE),
    ] {
        let wide = [20, bad];
        (list.ids, list.count) = (wide.as_ptr().cast(), 2);
        assert_eq!(worker.try_receive(peer, 3, &list, PATIENCE_MS).0, status, "{}", last_message());
    }
    list.id_bytes = 3;
    assert_eq!(worker.try_receive(peer, 3, &list, PATIENCE_MS).0, CROSSDOCK_WRONG_KIND);
    list.id_bytes = 4;
    let (two, source) = ([list, list], crossdock_source { peer, rank: 0, parts: CROSSDOCK_ALL_PARTS });
    let options = sized(|options: &mut crossdock_receive_options, size| {
        (options.size, options.room, options.tokens) = (size, 3, TOKENS);
        (options.sources, options.source_count) = (&raw const source, 1);
        (options.pages, options.page_lists) = (two.as_ptr(), 2);
    });
    let mut handle = 0;
    // SAFETY: what they point to lives.
    let refused = unsafe { crossdock_receive(worker.node, &raw const options, &raw mut handle) };
    assert_eq!(refused, CROSSDOCK_BAD_ARGUMENT, "one pool has one list");
    assert_eq!(worker.free(), PAGES - 16);
    ok(crossdock_room_close(room));
    ok(crossdock_room_cancel(other));
    assert_eq!(end_of(other).outcome, CROSSDOCK_CANCELLED);
    ok(crossdock_room_close(other));
    worker.wait_until_free(PAGES);
    worker.close();
}

#[test]
fn the_event_descriptor_is_readable_while_there_are_events() {
    let (prefill, decode) =
        (Worker::open(c"prefill", Options::default()), Worker::open(c"decode", Options::default()));
    // SAFETY: valid pointers, here and below.
    let fd: i32 = made(|to| unsafe { crossdock_node_event_fd(decode.node, to) });
    // SAFETY: the node owns it, and outlives this.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let readable = |wait_ms: i64| {
        let time = rustix::time::Timespec { tv_sec: wait_ms / 1_000, tv_nsec: wait_ms % 1_000 * 1_000_000 };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time)).expect("poll") == 1
    };
    let events = || {
        let mut events = [crossdock_event { kind: 0, reserved: 0, handle: 0, user_data: 0 }; 1];
        let mut count = 0;
        // SAFETY: as above.
        ok(unsafe { crossdock_node_poll(decode.node, events.as_mut_ptr(), 1, &raw mut count) });
        (count == 1).then_some(events[0])
    };
    assert!(!readable(0));
    let peer = decode.connect(&prefill);
    assert!(readable(PATIENCE_MS as i64));
    assert_eq!(events().map(|event| (event.kind, event.handle)), Some((CROSSDOCK_EVENT_PEER, peer)));
    assert!(!readable(0) && events().is_none());
    let from = named(&prefill, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let ids: Vec<u32> = (0..24).collect();
    let mut rooms = Vec::new();
    for room in 0..3u64 {
        rooms.push((
            prefill.send(room, &from),
            decode.receive(peer, room, &named(&decode, &ids[room as usize * 8..][..8]), PATIENCE_MS),
        ));
    }
    // Two events a room, one taken at a time: it stays readable while one is left.
    let mut seen = Vec::new();
    while seen.len() < 6 {
        assert!(readable(PATIENCE_MS as i64));
        seen.extend(events().map(|event| (event.user_data, event.kind)));
    }
    // What has told twice is told of once, and asking finds that out.
    assert!(events().is_none() && !readable(20));
    seen.sort_unstable();
    let expected =
        [1_000, 1_001, 1_002].map(|data| [(data, CROSSDOCK_EVENT_ENDED), (data, CROSSDOCK_EVENT_PAGES_HOME)]);
    assert_eq!(seen, expected.concat());
    for (sending, receiving) in rooms {
        delivered(sending);
        delivered(receiving);
        ok(crossdock_room_close(sending));
        ok(crossdock_room_close(receiving));
    }
    decode.close();
    prefill.close();
}

#[test]
fn whoever_waits_hears_that_the_node_is_closed() {
    let worker = Worker::open(c"decode", Options::default());
    // SAFETY: valid pointers.
    let peer = made(|to| unsafe { crossdock_peer_by_number(worker.node, 9, to) });
    let room = worker.receive(peer, 1, &named(&worker, &[1, 2, 3, 4, 5, 6, 7, 8]), PATIENCE_MS);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let end = end_of(room);
                assert_eq!((end.outcome, end.user_data), (CROSSDOCK_PEER_LOST, 1_001));
                ok(crossdock_room_wait_pages(room, PATIENCE_MS));
            });
        }
        scope.spawn(|| {
            let mut event = [crossdock_event { kind: 0, reserved: 0, handle: 0, user_data: 0 }; 4];
            let (mut count, mut seen) = (0, 0);
            // The room's end and its pages; then there is nothing more to wait for.
            let stopped = loop {
                // SAFETY: so many can be written.
                let answer = unsafe {
                    crossdock_node_wait(worker.node, PATIENCE_MS, event.as_mut_ptr(), 4, &raw mut count)
                };
                match answer {
                    CROSSDOCK_OK => seen += count,
                    other => break other,
                }
            };
            assert!(seen <= 2);
            assert!(stopped == CROSSDOCK_STOPPED || stopped == CROSSDOCK_BAD_HANDLE, "{stopped}");
        });
        std::thread::sleep(Duration::from_millis(30));
        ok(crossdock_node_close(worker.node));
    });
    assert_eq!(worker.try_receive(peer, 2, &named(&worker, &[9]), 1).0, CROSSDOCK_BAD_HANDLE);
    ok(crossdock_room_cancel(room).min(0));
    ok(crossdock_room_close(room));
    ok(crossdock_peer_close(peer));
    assert_eq!(worker.free(), PAGES);
}

/// Pages that are not home are not told as such, whoever closes the room.
#[test]
fn whoever_waits_for_a_room_hears_that_it_is_closed() {
    let worker = Worker::open(c"decode", Options::default());
    // SAFETY: valid pointers, here and below.
    let peer = made(|to| unsafe { crossdock_peer_by_number(worker.node, 9, to) });
    let room = worker.receive(peer, 1, &named(&worker, &[1, 2, 3, 4, 5, 6, 7, 8]), PATIENCE_MS);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let pages = scope.spawn(|| crossdock_room_wait_pages(room, PATIENCE_MS));
        // SAFETY: NULL is allowed.
        let end = scope.spawn(|| unsafe { crossdock_room_wait(room, PATIENCE_MS, ptr::null_mut()) });
        std::thread::sleep(Duration::from_millis(30));
        ok(crossdock_room_close(room));
        assert_eq!(
            (pages.join().unwrap(), end.join().unwrap()),
            (CROSSDOCK_BAD_HANDLE, CROSSDOCK_BAD_HANDLE)
        );
    });
    let dialed = worker.connect(&worker);
    std::thread::scope(|scope| {
        // SAFETY: as above.
        let waits = scope.spawn(|| unsafe { crossdock_peer_wait(dialed, PATIENCE_MS, ptr::null_mut()) });
        std::thread::sleep(Duration::from_millis(30));
        ok(crossdock_peer_close(dialed));
        // It dials itself, which is refused, if that was quicker.
        assert!([CROSSDOCK_BAD_HANDLE, CROSSDOCK_REFUSED].contains(&waits.join().unwrap()));
    });
    assert!(begun.elapsed() < Duration::from_millis(PATIENCE_MS));
    ok(crossdock_peer_close(peer));
    worker.wait_until_free(PAGES);
    worker.close();
}

#[test]
fn a_room_that_is_closed_early_is_cancelled_and_its_pages_come_home() {
    let (prefill, decode) =
        (Worker::open(c"prefill", Options::default()), Worker::open(c"decode", Options::default()));
    let peer = decode.connect(&prefill);
    let ids = [1, 2, 3, 4, 5, 6, 7, 8];
    for room in 0..300 {
        let handle = decode.receive(peer, room, &named(&decode, &ids), PATIENCE_MS);
        ok(crossdock_room_close(handle));
        assert_eq!(crossdock_room_close(handle), CROSSDOCK_BAD_HANDLE);
        decode.wait_until_free(PAGES);
    }
    decode.close();
    prefill.close();
}

#[test]
fn imported_memory_is_the_callers_again_when_no_node_has_it() {
    let mut bytes = vec![0u8; 64 << 10].into_boxed_slice();
    let import = Some((bytes.as_mut_ptr() as usize, bytes.len()));
    let (prefill, decode) = (
        Worker::open(c"prefill", Options { import, ..Options::default() }),
        Worker::open(c"decode", Options::default()),
    );
    prefill.fill(9);
    let peer = decode.connect(&prefill);
    let ids = [3, 2, 1, 9, 8, 7, 6, 5];
    let sending = prefill.send(1, &named(&prefill, &ids));
    let receiving = decode.receive(peer, 1, &named(&decode, &ids), PATIENCE_MS);
    delivered(receiving);
    delivered(sending);
    assert!(decode.bytes(&ids[..7]).iter().all(|&byte| byte == 9));
    assert_eq!(crossdock_memory_close(prefill.memory), CROSSDOCK_BUSY);
    decode.close();
    prefill.close();
    assert!(bytes.contains(&9));
    ok(crossdock_room_close(sending));
    ok(crossdock_room_close(receiving));
}

#[test]
fn a_caller_can_make_progress_itself() {
    let caller = Options { caller: true, ..Options::default() };
    let (prefill, decode) = (Worker::open(c"prefill", caller), Worker::open(c"decode", caller));
    prefill.fill(3);
    let peer = decode.connect(&prefill);
    let ids = [3, 2, 1, 9, 8, 7, 6, 5];
    let sending = prefill.send(1, &named(&prefill, &ids));
    let receiving = decode.receive(peer, 1, &named(&decode, &ids), PATIENCE_MS);
    let deadline = Instant::now() + Duration::from_millis(PATIENCE_MS);
    let is_pending = |room| {
        // SAFETY: NULL is allowed.
        unsafe { crossdock_room_poll(room, ptr::null_mut()) == CROSSDOCK_PENDING }
    };
    while is_pending(receiving) || is_pending(sending) {
        assert!(Instant::now() < deadline);
        for worker in [prefill, decode] {
            // SAFETY: as above.
            ok(unsafe { crossdock_node_progress(worker.node, ptr::null_mut()) });
        }
    }
    delivered(receiving);
    assert!(decode.bytes(&ids[..7]).iter().all(|&byte| byte == 3));
    ok(crossdock_node_park(decode.node, 1));
    let threaded = Worker::open(c"other", Options::default());
    assert_eq!(crossdock_node_park(threaded.node, 1), CROSSDOCK_WRONG_KIND);
    // Who is parked does not keep the node from being closed.
    std::thread::scope(|scope| {
        let parked = scope.spawn(|| crossdock_node_park(decode.node, PATIENCE_MS));
        std::thread::sleep(Duration::from_millis(50));
        ok(crossdock_node_close(decode.node));
        assert!([CROSSDOCK_OK, CROSSDOCK_STOPPED].contains(&parked.join().unwrap()));
    });
    assert!(Instant::now() < deadline);
    ok(crossdock_room_close(sending));
    ok(crossdock_room_close(receiving));
    ok(crossdock_memory_close(decode.memory));
    ok(crossdock_pool_close(decode.pool));
    ok(crossdock_layout_close(decode.layout));
    [threaded, prefill].into_iter().for_each(Worker::close);
}

#[test]
fn what_is_sent_out_of_order_is_refused_and_the_room_goes_on() {
    let (prefill, decode) =
        (Worker::open(c"prefill", Options::default()), Worker::open(c"decode", Options::default()));
    let peer = decode.connect(&prefill);
    let ids = [3, 2, 1, 9, 8, 7, 6, 5];
    let list = named(&prefill, &ids);
    let options = sized(|options: &mut crossdock_send_options, size| {
        (options.size, options.room, options.tokens) = (size, 5, TOKENS);
        (options.pages, options.page_lists) = (&raw const list, 1);
    });
    // SAFETY: valid pointers, here and below.
    let sending = made(|to| unsafe { crossdock_send(prefill.node, &raw const options, to) });
    let receiving = decode.receive(peer, 5, &named(&decode, &ids), PATIENCE_MS);
    ok(crossdock_room_send_tokens(sending, 0, 1, 0, 10));
    assert_eq!(crossdock_room_send_tokens(sending, 0, 1, 12, 4), CROSSDOCK_OUT_OF_ORDER);
    assert_eq!(crossdock_room_send_layers(sending, LAYERS, 1), CROSSDOCK_BAD_ARGUMENT);
    assert_eq!(crossdock_room_send_layers(receiving, 0, 1), CROSSDOCK_WRONG_KIND);
    // SAFETY: NULL and nothing.
    assert_eq!(unsafe { crossdock_room_finish(sending, ptr::null(), 0) }, CROSSDOCK_NOT_COMPLETE);
    ok(crossdock_room_send_tokens(sending, 0, 1, 10, TOKENS - 10));
    ok(crossdock_room_send_layers(sending, 1, LAYERS - 1));
    // SAFETY: as above.
    ok(unsafe { crossdock_room_finish(sending, ptr::null(), 0) });
    // SAFETY: as above.
    assert_eq!(unsafe { crossdock_room_finish(sending, ptr::null(), 0) }, CROSSDOCK_FINISHED);
    delivered(receiving);
    delivered(sending);
    ok(crossdock_room_close(sending));
    ok(crossdock_room_close(receiving));
    decode.close();
    prefill.close();
}

#[test]
fn pages_may_follow_their_room() {
    let (prefill, decode) =
        (Worker::open(c"prefill", Options::default()), Worker::open(c"decode", Options::default()));
    prefill.fill(5);
    let peer = decode.connect(&prefill);
    let ids = [3, 2, 1, 9, 8, 7, 6, 5];
    let (known, more, none) =
        (named(&prefill, &ids[..3]), named(&prefill, &ids[3..]), named(&prefill, &ids[..0]));
    let options = sized(|options: &mut crossdock_send_options, size| {
        (options.size, options.room, options.tokens) = (size, 5, TOKENS);
        (options.pages, options.page_lists) = (&raw const none, 1);
    });
    // SAFETY: valid pointers, here and below.
    let sending = made(|to| unsafe { crossdock_send_ahead(prefill.node, &raw const options, to) });
    let receiving = decode.receive(peer, 5, &named(&decode, &ids), PATIENCE_MS);
    // SAFETY: as above.
    let add = |room, pool, list: *const _| unsafe { crossdock_room_add_pages(room, pool, list) };
    ok(add(sending, 0, &raw const known));
    ok(crossdock_room_send_tokens(sending, 0, LAYERS, 0, 10));
    assert_eq!(add(sending, 1, &raw const more), CROSSDOCK_BAD_ARGUMENT);
    assert_eq!(add(sending, 0, ptr::null()), CROSSDOCK_BAD_ARGUMENT);
    assert_eq!(add(receiving, 0, &raw const more), CROSSDOCK_WRONG_KIND);
    let same = named(&prefill, &[3; PAGES as usize]);
    assert_eq!(add(sending, 0, &raw const same), CROSSDOCK_BAD_ARGUMENT, "more than the pool has");
    let strange = named(&prefill, &[PAGES]);
    assert_eq!(add(sending, 0, &raw const strange), CROSSDOCK_PAGE_OUT_OF_RANGE);
    ok(add(sending, 0, &raw const more));
    ok(crossdock_room_send_tokens(sending, 0, LAYERS, 10, TOKENS - 10));
    // SAFETY: NULL and nothing.
    ok(unsafe { crossdock_room_finish(sending, ptr::null(), 0) });
    assert_eq!(add(sending, 0, &raw const more), CROSSDOCK_FINISHED);
    delivered(receiving);
    delivered(sending);
    assert!(decode.bytes(&ids[..7]).iter().all(|&byte| byte == 5));
    ok(crossdock_room_close(sending));
    ok(crossdock_room_close(receiving));
    prefill.wait_until_free(PAGES);
    decode.close();
    prefill.close();
}

/// Threads that open, wait and close beside each other, on one pair of nodes.
#[test]
fn many_threads_share_a_node() {
    let (prefill, decode) =
        (Worker::open(c"prefill", Options::default()), Worker::open(c"decode", Options::default()));
    prefill.fill(5);
    let peer = decode.connect(&prefill);
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            scope.spawn(move || {
                let ids: Vec<u32> = (thread * 8..thread * 8 + 8).collect();
                for round in 0..25 {
                    let room = u64::from(thread * 1_000 + round);
                    let receiving = decode.receive(peer, room, &named(&decode, &ids), PATIENCE_MS);
                    // All threads send the same pages.
                    let sending = prefill.send(room, &named(&prefill, &[0, 1, 2, 3, 4, 5, 6, 7]));
                    delivered(receiving);
                    delivered(sending);
                    ok(crossdock_room_close(receiving));
                    ok(crossdock_room_close(sending));
                }
                assert!(decode.bytes(&ids[..7]).iter().all(|&byte| byte == 5));
            });
        }
    });
    prefill.wait_until_free(PAGES);
    assert_eq!(decode.free(), PAGES);
    decode.close();
    prefill.close();
}
