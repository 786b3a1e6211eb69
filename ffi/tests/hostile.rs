//! Every function with handles that are stale, of another kind or made up, with null pointers, sizes that are wrong and
//! numbers that make no sense, from many threads: an error code, and never a crash.
//!
//! What C itself cannot check is left out: pointers that are neither NULL nor valid.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crossdock_ffi::*;
use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};

/// What calls are made of. All threads put the handles that they get into one bag, and draw from it.
struct Draw<'a> {
    random: TestRng,
    bag: &'a [AtomicU64],
    /// Structures and buffers; larger than anything that is written.
    bytes: Box<[u64; 64]>,
    /// Rows of tokens.
    rows: Box<[u64; 512]>,
    imported: Box<[u8; 4096]>,
    texts: Vec<CString>,
}

impl<'a> Draw<'a> {
    fn new(seed: u64, bag: &'a [AtomicU64]) -> Draw<'a> {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let texts = [
            "",
            "a",
            "127.0.0.1:0",
            "127.0.0.1:9",
            "shm",
            "tcp,shm",
            "nonsense",
            "role=decode",
            "{}",
            "é",
            "\u{1}",
        ];
        let mut texts: Vec<CString> = texts.iter().map(|text| CString::new(*text).unwrap()).collect();
        texts.push(CString::new(vec![0xff, 0xfe]).unwrap());
        texts.push(CString::new("a".repeat(5_000)).unwrap());
        Draw {
            random: TestRng::from_seed(RngAlgorithm::ChaCha, &bytes),
            bag,
            bytes: Box::new([0; 64]),
            rows: Box::new([0; 512]),
            imported: Box::new([0; 4096]),
            texts,
        }
    }

    fn below(&mut self, most: u64) -> u64 {
        self.random.next_u64() % most
    }

    /// Mostly one of this kind, which may be closed already.
    fn handle(&mut self, kind: u64) -> u64 {
        match self.below(12) {
            0 => 0,
            1 => self.random.next_u64(),
            // The kind of one and the place of another.
            2 => self.below(KINDS) << 56 | 1 << 24 | self.below(8),
            3 => {
                let at = self.below(self.bag.len() as u64) as usize;
                self.bag[at].load(Relaxed)
            }
            _ => {
                let at = kind * SHELF + self.below(SHELF);
                self.bag[at as usize].load(Relaxed)
            }
        }
    }

    fn number(&mut self) -> u32 {
        match self.below(8) {
            0 => 0,
            1 => u32::MAX,
            2 => self.random.next_u32(),
            _ => self.below(20) as u32,
        }
    }

    /// Half of the time what makes sense.
    fn text_or(&mut self, sound: &'static CStr) -> *const c_char {
        if self.below(2) == 0 { sound.as_ptr() } else { self.text() }
    }

    fn text(&mut self) -> *const c_char {
        let at = self.below(self.texts.len() as u64 + 1) as usize;
        self.texts.get(at).map_or(ptr::null(), |text| text.as_ptr())
    }

    /// A structure of any bytes that are valid: its pointers are NULL or point into buffers that are long enough for the
    /// counts beside them.
    fn sized<T>(&mut self, value: T, set_size: impl FnOnce(&mut T, usize)) -> T {
        let size = match self.below(12) {
            0 => 0,
            1 => self.random.next_u64() as usize,
            2 => size_of::<T>() - 1,
            _ => size_of::<T>(),
        };
        // Of one that says more than it has, the rest would be read: only sizes that are refused are larger.
        let size = if (size_of::<T>() + 1..=4096).contains(&size) { size_of::<T>() } else { size };
        let mut value = value;
        set_size(&mut value, size);
        value
    }

    fn out<T>(&mut self) -> *mut T {
        match self.below(8) {
            0 => ptr::null_mut(),
            _ => self.bytes.as_mut_ptr().cast(),
        }
    }

    /// A place where a handle is written: kept, if it was.
    fn keep(&mut self, call: impl FnOnce(&mut Draw<'_>, *mut u64) -> crossdock_status) -> crossdock_status {
        let mut handle = 0;
        let to = if self.below(12) == 0 { ptr::null_mut() } else { &raw mut handle };
        let status = call(self, to);
        if handle != 0 {
            assert_eq!(status, CROSSDOCK_OK);
            let at = (handle >> 56) * SHELF + self.below(SHELF);
            // What lay there before is closed, if nobody has: so that not too much is open.
            close(self.bag[at as usize].swap(handle, Relaxed));
        }
        status
    }

    fn layout_options(&mut self) -> crossdock_layout_options {
        let mut made: crossdock_layout_options = bytemuck::Zeroable::zeroed();
        made.model = self.text();
        made.model_layers = self.number();
        made.first_layer = self.number();
        made.layers = self.number();
        made.kind = self.below(4) as u32;
        made.latent_bytes = self.number();
        made.rope_bytes = self.number();
        made.heads = self.number();
        made.first_head = self.number();
        made.local_heads = self.number();
        made.head_bytes = self.number();
        made.head_order = self.below(3) as u32;
        made.dtype = self.below(9) as u32;
        made.page_tokens = self.number();
        made.pages = self.number();
        made.placement = self.below(4) as u32;
        made.region = self.below(3) as u32;
        made.buffers = self.bytes.as_ptr().cast();
        made.buffer_count = self.below(8) as usize;
        made.rank = self.number();
        made.context_ranks = self.below(4) as u32;
        made.context_rank = self.below(4) as u32;
        // Mostly one that is sound.
        if self.below(2) == 0 {
            made.model = c"m".as_ptr();
            (made.model_layers, made.first_layer, made.layers, made.kind) = (2, 0, 0, CROSSDOCK_MLA);
            (made.latent_bytes, made.rope_bytes, made.dtype, made.page_tokens, made.pages) = (64, 0, 1, 4, 8);
            (made.placement, made.region, made.rank, made.context_rank, made.context_ranks) = (0, 0, 0, 0, 0);
        }
        self.sized(made, |made, size| made.size = size)
    }

    fn part(&mut self) -> crossdock_part_options {
        let mut made: crossdock_part_options = bytemuck::Zeroable::zeroed();
        made.name = self.text();
        made.heads = self.number();
        made.head_bytes = self.number();
        made.layers = self.bytes.as_ptr().cast();
        made.buffers = self.bytes.as_ptr().cast();
        made.layer_count = self.below(8) as usize;
        if self.below(2) == 0 {
            (made.name, made.heads, made.head_bytes, made.layer_count) = (c"p".as_ptr(), 0, 16, 1);
            (made.layers, made.buffers) = (&raw const FIRST_LAYER, &raw const FAR_AWAY);
        }
        self.sized(made, |made, size| made.size = size)
    }

    fn parallelism(&mut self) -> crossdock_parallelism {
        let mut made: crossdock_parallelism = bytemuck::Zeroable::zeroed();
        made.tp = self.number();
        made.context = self.below(4) as u32;
        made.kv_heads = self.number();
        made.model_layers = self.number();
        made.stage_layers = self.bytes.as_ptr().cast();
        made.stages = self.below(6) as usize;
        if self.below(2) == 0 {
            (made.tp, made.context, made.kv_heads, made.model_layers, made.stages) = (2, 1, 0, 2, 0);
        }
        self.sized(made, |made, size| made.size = size)
    }

    fn group_options(&mut self) -> crossdock_group_options {
        static LIMITS: [u32; 3] = [2, 2, 2];
        let mut made: crossdock_group_options = bytemuck::Zeroable::zeroed();
        (made.max_tokens, made.ranks) = (LIMITS.as_ptr(), self.below(4) as usize);
        (made.experts, made.top_k, made.hidden) =
            (self.number(), self.below(4) as u32, [0, 7, 64, 128][self.below(4) as usize]);
        (made.rows, made.row_bytes, made.scale_bytes) =
            (self.below(6) as u32, self.below(64) as u32, self.number());
        (made.slots, made.verify) = (self.below(4) as u32, self.below(2) as u32);
        (made.rank, made.lost, made.least_ranks) =
            (self.below(3) as u32, self.below(4) as u32, self.below(3) as u32);
        made.authentication = self.below(4) as u32;
        (made.bind, made.ports, made.name) = (self.text(), self.text(), self.text());
        if self.below(2) == 0 {
            (made.experts, made.top_k, made.hidden, made.rows, made.slots) =
                (4, 2, 64, CROSSDOCK_ROWS_BF16, 2);
            (made.ranks, made.rank, made.lost, made.authentication) =
                (1 + self.below(2) as usize, 0, 0, CROSSDOCK_AUTHENTICATION_OFF);
            (made.bind, made.ports, made.name) = (ptr::null(), ptr::null(), ptr::null());
        }
        (made.deadline_ms, made.warm_up_ms) = (3, 3);
        self.sized(made, |made, size| made.size = size)
    }

    fn page_list(&mut self) -> crossdock_page_list {
        let mut made: crossdock_page_list = bytemuck::Zeroable::zeroed();
        made.pool = self.handle(POOL);
        made.pages = if self.below(2) == 0 { 0 } else { self.handle(PAGES) };
        made.ids = if self.below(8) == 0 { ptr::null() } else { self.bytes.as_ptr().cast() };
        made.count = self.below(4) as usize;
        made.id_bytes = [0, 4, 8, 5][self.below(4) as usize];
        if self.below(2) == 0 {
            made.ids = &raw const SOME_PAGES[self.below(6) as usize] as *const c_void;
            (made.pages, made.count, made.id_bytes) = (0, 1, 4);
        }
        made
    }
}

/// Makes one call, and says which.
fn step(draw: &mut Draw<'_>, call: usize) -> crossdock_status {
    for word in draw.bytes.iter_mut() {
        *word = draw.random.next_u64() % 8;
    }
    let (handle, number) = (draw.handle(kind_of(call)), draw.number());
    let capacity = draw.below(64) as usize;
    // SAFETY: for all calls, pointers are NULL, or point to memory that is long enough and lives as long as the call; texts
    // end with a NUL; structures say sizes that they have, or such as are refused. Imported memory lives as long as its
    // thread, which closes what is open at the end.
    unsafe {
        match call {
            0 => {
                crossdock_abi_version();
                assert!(!crossdock_version().is_null());
                CROSSDOCK_OK
            }
            1 => {
                assert!(!crossdock_status_name(number as i32).is_null());
                CROSSDOCK_OK
            }
            2 => {
                let error = bytemuck::Zeroable::zeroed();
                let mut error: crossdock_error = draw.sized(error, |error, size| error.size = size);
                let status = crossdock_last_error(&raw mut error);
                if status == CROSSDOCK_OK {
                    assert!(!CStr::from_ptr(error.message).to_bytes().contains(&0));
                    assert!(!error.advice.is_null());
                }
                status
            }
            3 => {
                let options = draw.layout_options();
                draw.keep(|_, to| crossdock_layout_create(&raw const options, to))
            }
            4 => {
                let (options, parallelism) = (draw.layout_options(), draw.parallelism());
                draw.keep(|_, to| {
                    crossdock_layout_of_rank(&raw const options, &raw const parallelism, number, to)
                })
            }
            5 => {
                let part = draw.part();
                crossdock_layout_add_part(handle, &raw const part)
            }
            6 => {
                let part = draw.part();
                let parts = [&raw const part, ptr::null()];
                let mut pool: crossdock_cache_pool_options = bytemuck::Zeroable::zeroed();
                (pool.name, pool.extent, pool.window) = (draw.text(), draw.below(4) as u32, draw.number());
                (pool.page_tokens, pool.pages) = (draw.number(), draw.number());
                (pool.parts, pool.part_count) = (parts.as_ptr(), draw.below(3) as usize);
                if draw.below(2) == 0 {
                    (pool.name, pool.extent, pool.page_tokens, pool.pages, pool.part_count) =
                        (c"q".as_ptr(), 2, 1, 4, 1);
                }
                let pool = draw.sized(pool, |pool, size| pool.size = size);
                crossdock_layout_add_pool(handle, &raw const pool)
            }
            7 => {
                let info = bytemuck::Zeroable::zeroed();
                let mut info: crossdock_layout_info = draw.sized(info, |info, size| info.size = size);
                crossdock_layout_describe(handle, &raw mut info)
            }
            8 => crossdock_layout_region_bytes(handle, number, draw.out()),
            9 => crossdock_layout_pages_for(handle, number, draw.out()),
            10 => {
                let (pool, part) = (draw.number(), draw.number());
                crossdock_layout_find(handle, pool, part, number, draw.out(), ptr::null_mut())
            }
            11 => crossdock_layout_close(handle),
            12 => {
                let (one, other, spread) = (draw.parallelism(), draw.parallelism(), draw.random.next_u64());
                let (out, most) = (draw.out(), capacity.min(32));
                crossdock_sources(
                    &raw const one,
                    &raw const other,
                    number,
                    spread,
                    out,
                    most,
                    ptr::null_mut(),
                )
            }
            13 => {
                let (one, other, spread) = (draw.parallelism(), draw.parallelism(), draw.random.next_u64());
                let (out, most) = (draw.out(), capacity.min(32));
                crossdock_destinations(
                    &raw const one,
                    &raw const other,
                    number,
                    spread,
                    out,
                    most,
                    ptr::null_mut(),
                )
            }
            14 => {
                let mut options: crossdock_memory_options = bytemuck::Zeroable::zeroed();
                (options.name, options.huge_pages) = (draw.text(), draw.below(4) as u32);
                let options = draw.sized(options, |options, size| options.size = size);
                let bytes =
                    [0, 1, 4096, usize::MAX, 1 << 16, 1 << 16, 1 << 16, 1 << 16][draw.below(8) as usize];
                let options = if number == 3 { ptr::null() } else { &raw const options };
                draw.keep(|_, to| crossdock_memory_allocate(bytes, options, to))
            }
            15 => {
                let base =
                    if number == 3 { ptr::null_mut() } else { draw.imported.as_mut_ptr().cast::<c_void>() };
                // Its own threads alone draw it, and it lives as long as they do.
                let mut handle = 0;
                let bytes = [0, 1, 4096][draw.below(3) as usize];
                let status = crossdock_memory_import(base, bytes, &raw mut handle);
                if status == CROSSDOCK_OK {
                    assert_eq!(crossdock_memory_close(handle), CROSSDOCK_OK);
                    assert_eq!(crossdock_memory_close(handle), CROSSDOCK_BAD_HANDLE);
                }
                status
            }
            16 => draw.keep(|_, to| crossdock_memory_import_cuda(1 << 40, 4096, number as i32, to)),
            17 => {
                let info = bytemuck::Zeroable::zeroed();
                let mut info: crossdock_memory_info = draw.sized(info, |info, size| info.size = size);
                crossdock_memory_describe(handle, &raw mut info)
            }
            18 => crossdock_memory_close(handle),
            19 => {
                let mut options: crossdock_node_options = bytemuck::Zeroable::zeroed();
                let memory = [draw.handle(MEMORY), draw.handle(MEMORY)];
                let key = [7u8; 32];
                (options.name, options.layout) = (draw.text(), draw.handle(LAYOUT));
                (options.memory, options.memory_count) = (memory.as_ptr(), draw.below(3) as usize);
                options.authentication = draw.below(4) as u32;
                (options.key, options.key_bytes) = (key.as_ptr(), draw.below(33) as usize);
                options.progress = draw.below(3) as u32;
                (options.bind, options.ports) = (draw.text(), draw.text());
                (options.max_rooms, options.max_frame_bytes) = (draw.below(4) as u32, draw.below(2) << 20);
                if draw.below(2) == 0 {
                    (options.name, options.bind, options.ports) = (c"n".as_ptr(), ptr::null(), ptr::null());
                    (options.authentication, options.key_bytes) = (CROSSDOCK_AUTHENTICATION_OFF, 0);
                    options.memory_count = 1;
                    (options.max_rooms, options.max_frame_bytes) = (0, 0);
                }
                let options = draw.sized(options, |options, size| options.size = size);
                draw.keep(|_, to| crossdock_node_open(&raw const options, to))
            }
            20 => crossdock_node_close(handle),
            21 => crossdock_node_address(handle, draw.out(), capacity, ptr::null_mut()),
            22 => crossdock_node_ports(handle, draw.out(), capacity, ptr::null_mut()),
            23 => crossdock_node_identity(handle, draw.out(), ptr::null_mut()),
            24 => crossdock_node_event_fd(handle, draw.out()),
            25 => {
                let mut count = 0;
                crossdock_node_poll(handle, draw.out(), capacity.min(16), &raw mut count)
            }
            26 => {
                let mut count = 0;
                crossdock_node_wait(handle, draw.below(3), draw.out(), capacity.min(16), &raw mut count)
            }
            27 => crossdock_node_progress(handle, draw.out()),
            28 => crossdock_node_park(handle, draw.below(2)),
            29 => {
                let stats = bytemuck::Zeroable::zeroed();
                let mut stats: crossdock_node_stats = draw.sized(stats, |stats, size| stats.size = size);
                crossdock_node_get_stats(handle, draw.below(5), &raw mut stats)
            }
            30 => crossdock_node_write_flight(handle, c"/nowhere/at/all".as_ptr(), draw.below(5)),
            31 => {
                let address = draw.text_or(c"127.0.0.1:9");
                draw.keep(|_, to| crossdock_connect(handle, address, to))
            }
            32 => draw.keep(|_, to| crossdock_peer_by_number(handle, number.into(), to)),
            33 => crossdock_peer_poll(handle, ptr::null_mut()),
            34 => {
                let info = bytemuck::Zeroable::zeroed();
                let mut info: crossdock_peer_info = draw.sized(info, |info, size| info.size = size);
                crossdock_peer_wait(handle, draw.below(3), &raw mut info)
            }
            35 => crossdock_peer_name(handle, draw.out(), capacity, ptr::null_mut()),
            36 => crossdock_peer_close(handle),
            37 => {
                let mut options: crossdock_pool_options = bytemuck::Zeroable::zeroed();
                options.pages = [0, 1, 8, 8, 8, CROSSDOCK_MOST_PAGES + 1][draw.below(6) as usize];
                (options.allocates, options.low_watermark) = (draw.below(3) as u32, number);
                let options = draw.sized(options, |options, size| options.size = size);
                draw.keep(|_, to| crossdock_pool_create(&raw const options, to))
            }
            38 => {
                let stats = bytemuck::Zeroable::zeroed();
                let mut stats: crossdock_pool_stats = draw.sized(stats, |stats, size| stats.size = size);
                crossdock_pool_get_stats(handle, &raw mut stats)
            }
            39 => crossdock_pool_close(handle),
            40 => draw.keep(|_, to| crossdock_pool_take(handle, number, to)),
            41 => crossdock_pages_ids(handle, draw.out(), capacity, ptr::null_mut()),
            42 => crossdock_pages_close(handle),
            43 | 44 => {
                let sources = [crossdock_source {
                    peer: draw.handle(PEER),
                    rank: draw.below(3) as u32,
                    parts: draw.below(3) as u32,
                }; 2];
                let lists = [draw.page_list(), draw.page_list()];
                let mut options: crossdock_receive_options = bytemuck::Zeroable::zeroed();
                (options.sources, options.source_count) = (sources.as_ptr(), draw.below(3) as usize);
                (options.room, options.tokens, options.skip_tokens) =
                    (draw.below(4), draw.number(), draw.number());
                (options.first_layer, options.layers) = (draw.number(), draw.number());
                (options.pages, options.page_lists) = (lists.as_ptr(), draw.below(3) as usize);
                options.deadline_ms = draw.below(50);
                if draw.below(2) == 0 {
                    (options.source_count, options.page_lists, options.tokens, options.skip_tokens) =
                        (1, 1, 4, 0);
                    (options.first_layer, options.layers) = (0, 0);
                }
                let options = draw.sized(options, |options, size| options.size = size);
                draw.keep(|_, to| match call {
                    43 => crossdock_receive(handle, &raw const options, to),
                    _ => crossdock_fetch(handle, &raw const options, to),
                })
            }
            45 | 46 => {
                let ranks = [draw.number(), draw.number()];
                let lists = [draw.page_list(), draw.page_list()];
                let mut options: crossdock_send_options = bytemuck::Zeroable::zeroed();
                (options.ranks, options.rank_count) = (ranks.as_ptr(), draw.below(3) as usize);
                (options.room, options.tokens) = (draw.below(4), draw.number());
                (options.pages, options.page_lists) = (lists.as_ptr(), draw.below(3) as usize);
                (options.aux, options.aux_bytes) = (draw.bytes.as_ptr().cast(), draw.below(2) as usize * 9);
                options.deadline_ms = draw.below(50);
                if draw.below(2) == 0 {
                    (options.rank_count, options.page_lists, options.tokens, options.aux_bytes) =
                        (0, 1, 4, 0);
                }
                let options = draw.sized(options, |options, size| options.size = size);
                draw.keep(|_, to| match call {
                    45 if number % 2 == 0 => crossdock_send(handle, &raw const options, to),
                    45 => crossdock_send_ahead(handle, &raw const options, to),
                    _ => crossdock_serve(handle, &raw const options, to),
                })
            }
            47 if draw.below(3) == 0 => {
                let list = draw.page_list();
                crossdock_room_add_pages(handle, number % 3, &raw const list)
            }
            47 if draw.below(2) == 0 => crossdock_room_send_layers(handle, number % 3, 1 + number % 2),
            47 => {
                let (layers, token, tokens) = (draw.number(), draw.number(), draw.number());
                crossdock_room_send_tokens(handle, number, layers, token, tokens)
            }
            48 => crossdock_room_finish(handle, draw.bytes.as_ptr().cast(), capacity),
            49 => crossdock_room_cancel(handle),
            50 => {
                let end = bytemuck::Zeroable::zeroed();
                let mut end: crossdock_end = draw.sized(end, |end, size| end.size = size);
                crossdock_room_poll(handle, &raw mut end)
            }
            51 => crossdock_room_wait(handle, draw.below(3), ptr::null_mut()),
            52 => crossdock_room_wait_pages(handle, draw.below(3)),
            53 => {
                let list = draw.below(3) as usize;
                draw.keep(|_, to| crossdock_room_take_pages(handle, list, to))
            }
            54 => crossdock_room_aux(handle, draw.out(), capacity, ptr::null_mut()),
            55 => match number % 3 {
                0 => crossdock_room_message(handle, draw.out(), capacity, ptr::null_mut()),
                1 => crossdock_room_peer(handle, draw.out(), capacity, ptr::null_mut()),
                _ => crossdock_room_port(handle, draw.out(), capacity, ptr::null_mut()),
            },
            56 => crossdock_room_advice(handle, draw.out(), capacity, ptr::null_mut()),
            57 => crossdock_room_arrivals(handle, draw.out()),
            58 => crossdock_room_close(handle),
            59 => {
                let (bind, token) = (draw.text(), draw.text());
                draw.keep(|_, to| crossdock_registry_start(bind, token, to))
            }
            60 => crossdock_registry_address(handle, draw.out(), capacity, ptr::null_mut()),
            61 => crossdock_registry_close(handle),
            62 => {
                let (server, token) = (draw.text_or(c"127.0.0.1:9"), draw.text());
                draw.keep(|_, to| crossdock_registry_connect(server, token, 1 + u64::from(number % 9), to))
            }
            63 => {
                let worker = draw.text_or(WORKER);
                draw.keep(|_, to| crossdock_registry_register(handle, worker, to))
            }
            64 => crossdock_registration_wait(handle, draw.below(2)),
            65 => crossdock_registration_ready(handle),
            66 => crossdock_registration_close(handle),
            67 => {
                let query = draw.text();
                crossdock_registry_find(
                    handle,
                    query,
                    draw.below(2) as usize,
                    1,
                    draw.out(),
                    capacity,
                    ptr::null_mut(),
                )
            }
            68 => {
                let group = draw.text();
                crossdock_registry_wait_for_group(handle, group, 1, draw.out(), capacity, ptr::null_mut())
            }
            69 => crossdock_registry_disconnect(handle),
            105 => {
                let mut options: crossdock_endpoint_options = bytemuck::Zeroable::zeroed();
                let key = [7u8; 32];
                (options.name, options.authentication) = (draw.text_or(c"e"), draw.below(4) as u32);
                (options.key, options.key_bytes) = (key.as_ptr(), draw.below(33) as usize);
                (options.bind, options.ports) = (draw.text(), draw.text());
                (options.lanes_per_rail, options.max_transfers) = (draw.number(), draw.below(3) as u32);
                if draw.below(2) == 0 {
                    (options.name, options.bind, options.ports) = (c"e".as_ptr(), ptr::null(), ptr::null());
                    (options.authentication, options.lanes_per_rail) = (CROSSDOCK_AUTHENTICATION_OFF, 0);
                }
                let options = draw.sized(options, |options, size| options.size = size);
                draw.keep(|_, to| crossdock_endpoint_open(&raw const options, to))
            }
            106 => crossdock_endpoint_address(handle, draw.out(), capacity, ptr::null_mut()),
            107 => crossdock_endpoint_register(handle, draw.handle(MEMORY), draw.below(30)),
            108 => crossdock_endpoint_unregister(handle, draw.random.next_u64(), draw.below(30)),
            109 => crossdock_endpoint_close(handle),
            110 => {
                let mut options: crossdock_transfer_options = bytemuck::Zeroable::zeroed();
                (options.peer, options.direction) = (draw.text_or(c"127.0.0.1:9"), draw.below(3) as u32);
                (options.local, options.remote) = (draw.bytes.as_ptr(), draw.rows.as_ptr());
                options.bytes = if number == 3 { ptr::null() } else { draw.bytes.as_ptr() };
                (options.count, options.deadline_ms) = (draw.below(9) as usize, 1 + draw.below(20));
                let options = draw.sized(options, |options, size| options.size = size);
                draw.keep(|_, to| crossdock_transfer_begin(handle, &raw const options, to))
            }
            111 => crossdock_transfer_poll(handle),
            112 => crossdock_transfer_wait(handle, draw.below(5)),
            113 => crossdock_transfer_wait_quiet(handle, draw.below(5)),
            114 => crossdock_transfer_close(handle),
            104 => {
                let info = bytemuck::Zeroable::zeroed();
                let mut info: crossdock_group_info = draw.sized(info, |info, size| info.size = size);
                crossdock_group_describe(handle, &raw mut info)
            }
            70 => {
                let options = draw.group_options();
                let sizes = bytemuck::Zeroable::zeroed();
                let mut sizes: crossdock_group_sizes = draw.sized(sizes, |sizes, size| sizes.size = size);
                crossdock_group_needs(&raw const options, &raw mut sizes)
            }
            71 => {
                let options = draw.group_options();
                draw.keep(|_, to| crossdock_group_open(&raw const options, to))
            }
            72 => {
                let mut options = draw.group_options();
                // As many handles are written as there are ranks.
                let mut groups = [0; 3];
                options.ranks = options.ranks.min(groups.len());
                let status = crossdock_group_in_process(&raw const options, groups.as_mut_ptr());
                for handle in groups.into_iter().filter(|&handle| handle != 0) {
                    assert_eq!(status, CROSSDOCK_OK);
                    draw.keep(|_, to| match to.is_null() {
                        true => crossdock_group_close(handle),
                        false => {
                            to.write(handle);
                            CROSSDOCK_OK
                        }
                    });
                }
                status
            }
            73 => crossdock_group_address(handle, draw.out(), capacity, ptr::null_mut()),
            74 => {
                let addresses = [draw.text_or(c"127.0.0.1:9"), draw.text_or(c"127.0.0.1:9")];
                crossdock_group_meet(handle, addresses.as_ptr(), draw.below(3) as usize, draw.below(4))
            }
            75 => crossdock_group_masked(handle, draw.out(), capacity, ptr::null_mut()),
            76 => crossdock_group_mark_dead(handle, number),
            77 => crossdock_group_close(handle),
            78 | 79 => {
                let (form, row_bytes, scale_bytes) = (draw.below(6) as u32, draw.number(), draw.number());
                let form = if draw.below(2) == 0 { CROSSDOCK_ROWS_BF16 } else { form };
                let order = draw.below(3) as u32;
                draw.keep(|_, to| match call {
                    78 => crossdock_latency_outputs_create(handle, form, row_bytes, scale_bytes, order, to),
                    _ => crossdock_throughput_outputs_create(handle, form, row_bytes, scale_bytes, to),
                })
            }
            80 => {
                let info = bytemuck::Zeroable::zeroed();
                let mut info: crossdock_latency_outputs = draw.sized(info, |info, size| info.size = size);
                crossdock_latency_outputs_describe(handle, &raw mut info)
            }
            81 => {
                let info = bytemuck::Zeroable::zeroed();
                let mut info: crossdock_throughput_outputs = draw.sized(info, |info, size| info.size = size);
                crossdock_throughput_outputs_describe(handle, &raw mut info)
            }
            82 => crossdock_outputs_ranges(handle, draw.out(), capacity, ptr::null_mut()),
            83 => crossdock_throughput_outputs_counts(handle, number, draw.out(), capacity, ptr::null_mut()),
            84 => crossdock_outputs_close(handle),
            85 => {
                let mut tokens: crossdock_tokens = bytemuck::Zeroable::zeroed();
                tokens.count = draw.below(3) as usize;
                tokens.rows = if number == 3 { ptr::null() } else { draw.rows.as_ptr().cast() };
                tokens.choices = draw.bytes.as_ptr().cast();
                tokens.weights = if draw.below(2) == 0 { ptr::null() } else { draw.rows.as_ptr().cast() };
                (tokens.form, tokens.is_made) = (draw.below(6) as u32, draw.below(2) as u32);
                (tokens.scale_rule, tokens.row_bytes) = (draw.below(3) as u32, draw.below(3) as u32 * 16);
                (tokens.scale_bytes, tokens.scale_element_bytes) = (draw.number(), draw.number());
                (tokens.scales, tokens.scales_bytes) = (draw.rows.as_ptr().cast(), draw.below(64) as usize);
                (tokens.scale_token_stride, tokens.scale_element_stride) =
                    (draw.number() as usize, draw.number() as usize);
                tokens.route = if draw.below(4) == 0 { draw.handle(ROUTE) } else { 0 };
                if draw.below(2) == 0 {
                    (tokens.form, tokens.is_made, tokens.route) = (CROSSDOCK_ROWS_BF16, 0, 0);
                }
                let tokens = draw.sized(tokens, |tokens, size| tokens.size = size);
                crossdock_dispatch(handle, number % 3, &raw const tokens, ptr::null_mut())
            }
            86 => crossdock_latency_receive(handle, number % 3, draw.handle(OUTPUTS)),
            87 => {
                let expert = draw.below(3) as u32;
                crossdock_latency_results(handle, number % 3, expert, draw.out(), ptr::null_mut())
            }
            88 => {
                let count = draw.below(600) as usize;
                crossdock_latency_copy_results(handle, number % 3, draw.rows.as_ptr().cast(), count)
            }
            89 => crossdock_latency_combine(handle, number % 3),
            90 => {
                let (weights, values) = (draw.below(5) as usize, draw.below(3) as usize * 128);
                let (from, to) = (draw.bytes.as_ptr().cast(), draw.rows.as_mut_ptr().cast());
                crossdock_latency_finish(handle, number % 3, from, weights, to, values, ptr::null_mut())
            }
            91 => crossdock_throughput_receive(handle, number % 3, draw.handle(OUTPUTS)),
            92 => crossdock_throughput_results(handle, number % 3, draw.out(), ptr::null_mut()),
            93 => {
                let weights = if draw.below(2) == 0 { ptr::null() } else { draw.bytes.as_ptr().cast() };
                crossdock_throughput_combine(handle, number % 3, weights, draw.below(8) as usize)
            }
            94 => {
                let values = draw.below(3) as usize * 128;
                let bias = if draw.below(2) == 0 { ptr::null() } else { draw.imported.as_ptr().cast() };
                let to = draw.rows.as_mut_ptr().cast();
                let (none, no_report) = (ptr::null_mut(), ptr::null_mut());
                crossdock_throughput_finish(
                    handle,
                    number % 3,
                    bias,
                    ptr::null(),
                    none,
                    0,
                    to,
                    values,
                    no_report,
                )
            }
            95 => crossdock_slot_abandon(handle, number % 3),
            96 => crossdock_slot_waits(handle, number % 3, draw.out(), capacity, ptr::null_mut()),
            97 => crossdock_slot_lost(handle, number % 3, draw.out(), capacity, ptr::null_mut()),
            98 => {
                let (choices, count) = (draw.bytes.as_ptr().cast(), draw.below(5) as usize);
                draw.keep(|_, to| crossdock_route_create(handle, number % 3, choices, count, to))
            }
            99 => draw.keep(|_, to| crossdock_route_of_dispatch(handle, number % 3, to)),
            100 => crossdock_route_write(handle, draw.out(), 512, ptr::null_mut()),
            101 => {
                let (bytes, count) = (draw.bytes.as_ptr().cast(), draw.below(64) as usize);
                draw.keep(|_, to| crossdock_route_read(handle, bytes, count, to))
            }
            102 => crossdock_route_close(handle),
            103 => {
                let (choices, count) = (draw.bytes.as_ptr().cast(), draw.below(5) as usize);
                crossdock_spread(handle, choices, count, draw.out(), ptr::null_mut(), ptr::null_mut())
            }
            115 => {
                let list = draw.page_list();
                draw.keep(|_, to| crossdock_pool_adopt(&raw const list, to))
            }
            _ => unreachable!("there are {CALLS} calls"),
        }
    }
}

const CALLS: usize = 116;

const WORKER: &CStr =
    cr#"{"node":"n","incarnation":"1","role":"decode","address":"127.0.0.1:1","ttl_ms":1000}"#;

static SOME_PAGES: [u32; 6] = [0, 1, 2, 3, 4, 5];
static FIRST_LAYER: u32 = 0;
static FAR_AWAY: crossdock_layer_buffer =
    crossdock_layer_buffer { region: 0, reserved: 0, offset: 1 << 14, stride_bytes: 64 };

/// Calls that close something.
const CLOSING: [usize; 15] = [11, 18, 20, 36, 39, 42, 58, 61, 66, 69, 77, 84, 102, 109, 114];

/// How many handles of a kind are in the bag.
const SHELF: u64 = 6;
const KINDS: u64 = 16;
const MEMORY: u64 = 1;
const POOL: u64 = 2;
const PAGES: u64 = 3;
const LAYOUT: u64 = 4;
const NODE: u64 = 5;
const PEER: u64 = 6;
const ROOM: u64 = 7;
const REGISTRY: u64 = 8;
const CLIENT: u64 = 9;
const REGISTRATION: u64 = 10;
const GROUP: u64 = 11;
const OUTPUTS: u64 = 12;
const ROUTE: u64 = 13;
const ENDPOINT: u64 = 14;
const TRANSFER: u64 = 15;

/// What the first argument of a call is a handle of.
fn kind_of(call: usize) -> u64 {
    match call {
        17 | 18 => MEMORY,
        38..=40 => POOL,
        41 | 42 => PAGES,
        5..=11 => LAYOUT,
        20..=32 | 43..=46 => NODE,
        33..=36 => PEER,
        47..=58 => ROOM,
        60 | 61 => REGISTRY,
        63 | 67..=69 => CLIENT,
        64..=66 => REGISTRATION,
        73..=79 | 85..=99 | 101 | 103 | 104 => GROUP,
        80..=84 => OUTPUTS,
        100 | 102 => ROUTE,
        106..=110 => ENDPOINT,
        111..=114 => TRANSFER,
        _ => 0,
    }
}

/// Closes whatever there is, as what it is.
fn close(handle: u64) {
    for close in [
        crossdock_room_close,
        crossdock_peer_close,
        crossdock_node_close,
        crossdock_pages_close,
        crossdock_pool_close,
        crossdock_layout_close,
        crossdock_registration_close,
        crossdock_registry_disconnect,
        crossdock_registry_close,
        crossdock_group_close,
        crossdock_outputs_close,
        crossdock_route_close,
        crossdock_transfer_close,
        crossdock_endpoint_close,
        crossdock_memory_close,
    ] {
        close(handle);
    }
}

#[test]
fn no_call_crashes_whatever_it_is_given() {
    let steps =
        std::env::var("CROSSDOCK_FFI_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(20_000);
    let seed = std::env::var("CROSSDOCK_FFI_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20);
    eprintln!("CROSSDOCK_FFI_SEED={seed}");
    let bag: Vec<AtomicU64> = (0..KINDS * SHELF).map(|_| AtomicU64::new(0)).collect();
    let counts: Vec<[AtomicU64; 2]> = (0..CALLS).map(|_| Default::default()).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (bag, counts) = (&bag, &counts);
            scope.spawn(move || {
                let mut draw = Draw::new(seed + thread, bag);
                for _ in 0..steps {
                    let call = draw.below(CALLS as u64) as usize;
                    // So that something is open most of the time.
                    if CLOSING.contains(&call) && draw.below(8) > 0 {
                        continue;
                    }
                    let status = step(&mut draw, call);
                    assert!(status != CROSSDOCK_INTERNAL, "call {call}: {}", words());
                    counts[call][usize::from(status == CROSSDOCK_OK)].fetch_add(1, Relaxed);
                }
                // Nodes are closed before the memory that was imported goes.
                bag.iter().for_each(|handle| close(handle.load(Relaxed)));
            });
        }
    });
    // Each was refused and each but a few succeeded: so the hostility does not end at the door.
    let never: Vec<usize> = (0..CALLS).filter(|&call| counts[call][1].load(Relaxed) == 0).collect();
    // One that this library cannot do yet, and those whose path or registry is not there.
    let hopeless = [16, 30, 64, 67, 68, 74, 101, 108, 111, 112];
    let never: Vec<&usize> = never.iter().filter(|call| !hopeless.contains(call)).collect();
    eprintln!("calls that never succeeded: {never:?}");
    assert!(never.len() <= CALLS / 5, "calls that never succeed: {never:?}");
}

fn words() -> String {
    let mut error: crossdock_error = bytemuck::Zeroable::zeroed();
    error.size = size_of::<crossdock_error>();
    // SAFETY: it says its size; its message is valid until the next failure of this thread.
    unsafe {
        assert_eq!(crossdock_last_error(&raw mut error), CROSSDOCK_OK);
        CStr::from_ptr(error.message).to_string_lossy().into_owned()
    }
}

/// A function that is new has to be made hostile calls to as well.
#[test]
fn every_function_is_called() {
    let header =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/include/crossdock.h")).unwrap();
    let here = include_str!("hostile.rs");
    let functions = header.split("crossdock_").skip(1).filter_map(|rest| {
        let name = rest.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').next()?;
        rest[name.len()..].starts_with('(').then_some(name)
    });
    let mut found = 0;
    for name in functions {
        found += 1;
        assert!(
            here.contains(&format!("crossdock_{name}(")) || here.contains(&format!("crossdock_{name},")),
            "crossdock_{name}"
        );
    }
    assert!(found >= CALLS, "{found} functions were found");
}
