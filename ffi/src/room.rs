//! Hand-overs: pages from a prefill worker's memory into a decode worker's.

mod state;
mod structures;

use std::ffi::c_char;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use crossdock::{
    Ended, GatherRequest, Handle, NotTaken, Parts, ScatterRequest, ScatterServeRequest, SendError, Sending,
    Source,
};
use parking_lot::Mutex;
use smallvec::SmallVec;

use self::state::{Control, Home, List, ROOMS, Room, State, abandoned, closed};
pub(crate) use self::state::{is_open, news};
pub use self::structures::*;
use crate::arguments::{copy_out, deadline, list, milliseconds, not_null, put, text_out};
use crate::bell::Bell;
use crate::layout::{CROSSDOCK_ALL_PARTS, CROSSDOCK_SHARED_PARTS};
use crate::node::{Shared, crossdock_node, shared_of};
use crate::peer::peer_of;
use crate::pool::{self, crossdock_page_list, crossdock_pages};
use crate::sized::Sized as _;
use crate::status::{
    CROSSDOCK_FINISHED, CROSSDOCK_PENDING, CROSSDOCK_TIMED_OUT, CROSSDOCK_WRONG_KIND, Fault, call,
    crossdock_status,
};

const USUAL_DEADLINE: Duration = Duration::from_secs(30);

/// Opens the decode end of a push: the prefill side writes into the pages. Pages that were given by a handle are the room's
/// when the answer is `CROSSDOCK_OK`; with `CROSSDOCK_BUSY` and `CROSSDOCK_STOPPED` they are back in their pool, and the
/// handle is closed too; with other answers it stays.
///
/// # Safety
/// `options` points to a structure that says its size, and what it points to can be read; `room` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_receive(
    node: crossdock_node,
    options: *const crossdock_receive_options,
    room: *mut crossdock_room,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { decode(node, options, room, false) })
}

/// Opens the decode end of a pull: this side reads from the pages that the prefill side serves.
///
/// # Safety
/// As [`crossdock_receive`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_fetch(
    node: crossdock_node,
    options: *const crossdock_receive_options,
    room: *mut crossdock_room,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { decode(node, options, room, true) })
}

/// # Safety
/// As [`crossdock_receive`].
unsafe fn decode(
    node: crossdock_node,
    options: *const crossdock_receive_options,
    room: *mut crossdock_room,
    pull: bool,
) -> Result<(), Fault> {
    not_null("room", room)?;
    let node = shared_of(node)?;
    // SAFETY: as the caller promises, here and below.
    let options = unsafe { crossdock_receive_options::read(options) }?;
    // SAFETY: as above.
    let sources = unsafe { list("sources", options.sources, options.source_count) }?;
    let source = |source: &crossdock_source| {
        let parts = match source.parts {
            CROSSDOCK_ALL_PARTS => Parts::All,
            CROSSDOCK_SHARED_PARTS => Parts::Shared,
            other => return Err(Fault::argument(format!("parts is {other}, which this library has not"))),
        };
        Ok(Source { peer: peer_of(source.peer)?, rank: source.rank, parts })
    };
    let sources = sources.iter().map(source).collect::<Result<Vec<_>, _>>()?;
    if sources.is_empty() {
        return Err(Fault::argument("sources is empty: a room needs somebody to bring something"));
    }
    // SAFETY: as above.
    let lists = unsafe { list("pages", options.pages, options.page_lists) }?;
    node.check_lists(lists.len())?;
    let mut taken: SmallVec<[pool::Taken; 2]> = SmallVec::new();
    for list in lists {
        // SAFETY: as above.
        match unsafe { pool::take(list) } {
            Ok(pages) => taken.push(pages),
            Err(fault) => {
                taken.into_iter().for_each(pool::Taken::put_back);
                return Err(fault);
            }
        }
    }
    let is_kept: SmallVec<[bool; 8]> = taken.iter().map(pool::Taken::is_by_handle).collect();
    let layers = options.first_layer..options.first_layer.saturating_add(options.layers);
    let request = GatherRequest {
        sources,
        room: options.room,
        use_count: options.use_count,
        tokens: options.tokens,
        skip_tokens: options.skip_tokens,
        layers: (options.layers != 0).then_some(layers),
        pages: taken.into_iter().map(pool::Taken::give).collect(),
        deadline: milliseconds(options.deadline_ms, USUAL_DEADLINE),
    };
    let mut receiving = match pull {
        true => node.handle.fetch(request)?,
        false => node.handle.receive(request)?,
    };
    let first = std::mem::take(&mut receiving.pages);
    let tickets = std::iter::once(first).chain(std::mem::take(&mut receiving.state));
    let pages = tickets.zip(is_kept).map(|(ticket, is_kept)| List { is_kept, pages: Home::Waiting(ticket) });
    let state =
        State { control: Control::Receiving(receiving), end: None, lists: pages.collect(), news: Vec::new() };
    // SAFETY: as above.
    unsafe { begin(node, options.user_data, state, room) }
}

/// Opens the prefill end of a push: layers are sent by `crossdock_room_send_layers` as they are computed, then
/// `crossdock_room_finish` finishes it.
///
/// # Safety
/// As [`crossdock_receive`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_send(
    node: crossdock_node,
    options: *const crossdock_send_options,
    room: *mut crossdock_room,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { send(node, options, room, Handle::open) })
}

/// As `crossdock_send`, before all pages are known: the lists name the first ones, or none, and
/// `crossdock_room_add_pages` names the others, before their tokens are sent. So a prompt that is computed in chunks is sent
/// in chunks, of which each has its pages when its turn comes.
///
/// # Safety
/// As [`crossdock_receive`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_send_ahead(
    node: crossdock_node,
    options: *const crossdock_send_options,
    room: *mut crossdock_room,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { send(node, options, room, Handle::open_ahead) })
}

/// # Safety
/// As [`crossdock_receive`].
unsafe fn send(
    node: crossdock_node,
    options: *const crossdock_send_options,
    room: *mut crossdock_room,
    open: impl FnOnce(&Handle, ScatterRequest) -> Result<Sending, NotTaken>,
) -> Result<(), Fault> {
    not_null("room", room)?;
    let node = shared_of(node)?;
    // SAFETY: as the caller promises, here and below.
    let (options, request) = unsafe { offered(&node, options) }?;
    if options.aux_bytes != 0 {
        return Err(Fault::argument("aux is given by crossdock_room_finish where layers are sent"));
    }
    let sending = open(&node.handle, request)?;
    let state =
        State { control: Control::Sending(sending), end: None, lists: SmallVec::new(), news: Vec::new() };
    // SAFETY: as above.
    unsafe { begin(node, options.user_data, state, room) }
}

/// Opens the prefill end of a pull: pages that are filled, for the peer that asks for the room to read.
///
/// # Safety
/// As [`crossdock_receive`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_serve(
    node: crossdock_node,
    options: *const crossdock_send_options,
    room: *mut crossdock_room,
) -> crossdock_status {
    call(|| {
        not_null("room", room)?;
        let node = shared_of(node)?;
        // SAFETY: as the caller promises, here and below.
        let (options, request) = unsafe { offered(&node, options) }?;
        // SAFETY: as above.
        let aux = unsafe { list("aux", options.aux, options.aux_bytes) }?.to_vec();
        let serving = node.handle.serve(ScatterServeRequest { request, aux })?;
        let state =
            State { control: Control::Serving(serving), end: None, lists: SmallVec::new(), news: Vec::new() };
        // SAFETY: as above.
        unsafe { begin(node, options.user_data, state, room) }
    })
}

/// # Safety
/// As [`crossdock_receive`].
unsafe fn offered(
    node: &Shared,
    options: *const crossdock_send_options,
) -> Result<(crossdock_send_options, ScatterRequest), Fault> {
    // SAFETY: as the caller promises, here and below.
    let options = unsafe { crossdock_send_options::read(options) }?;
    // SAFETY: as above.
    let (ranks, lists) = unsafe {
        (list("ranks", options.ranks, options.rank_count)?, list("pages", options.pages, options.page_lists)?)
    };
    node.check_lists(lists.len())?;
    let request = ScatterRequest {
        ranks: if ranks.is_empty() { vec![0] } else { ranks.to_vec() },
        room: options.room,
        use_count: options.use_count,
        tokens: options.tokens,
        // SAFETY: as above.
        pages: lists.iter().map(|list| unsafe { pool::lend(list) }).collect::<Result<_, _>>()?,
        deadline: milliseconds(options.deadline_ms, USUAL_DEADLINE),
    };
    Ok((options, request))
}

/// # Safety
/// `to` can be written.
unsafe fn begin(
    node: Arc<Shared>,
    user_data: u64,
    state: State,
    to: *mut crossdock_room,
) -> Result<(), Fault> {
    let mut state = Some(state);
    let shared = node.clone();
    let mut made = None;
    let handle = ROOMS
        .insert(|handle| {
            let state = Mutex::new(state.take().expect("made once"));
            let room = Arc::new(Room { node: shared, handle, user_data, bell: Bell::new(), state });
            made.insert(room).clone()
        })
        .inspect_err(|_| {
            // Nobody could name it: it ends, and its pages go home to their pool.
            state.iter().for_each(|state| drop(state.control.cancel()));
        })?;
    let room = made.expect("inserted");
    node.events.opened();
    let mut state = room.state.lock();
    state.listen(&Waker::from(room.clone()));
    if !state.news.is_empty() {
        node.events.tell(handle);
    }
    // SAFETY: as the caller promises.
    unsafe { put("room", to, handle) }
}

/// Appends to the pages of a pool, in a room that `crossdock_send_ahead` has opened. They may be filled later than this, but
/// before their tokens are sent. More than the pool has are refused. With an answer that is not `CROSSDOCK_OK` the room has
/// not got them.
///
/// # Safety
/// `pages` points to a list, and what it names can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_add_pages(
    room: crossdock_room,
    pool: u32,
    pages: *const crossdock_page_list,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises.
        let pages = unsafe { list("pages", pages, 1) }?;
        // SAFETY: as above.
        let pages = unsafe { pool::lend(&pages[0]) }?;
        sending(room, |room| room.add_pages(pool as usize, pages))
    })
}

/// Sends all tokens of these layers, whose pages are filled.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_room_send_layers(
    room: crossdock_room,
    first_layer: u32,
    layers: u32,
) -> crossdock_status {
    call(|| sending(room, |room| room.send_layers(first_layer..first_layer.saturating_add(layers))))
}

/// Sends these tokens of these layers, whose pages are filled: a chunk of a prompt that is computed in pieces. Each layer's
/// tokens go in order, each once.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_room_send_tokens(
    room: crossdock_room,
    first_layer: u32,
    layers: u32,
    first_token: u32,
    tokens: u32,
) -> crossdock_status {
    call(|| {
        let layers = first_layer..first_layer.saturating_add(layers);
        sending(room, |room| room.send(layers, first_token..first_token.saturating_add(tokens)))
    })
}

/// Everything has been sent: the peer may rely on the pages once it has them all. `aux` travels with it: the first token,
/// its probabilities.
///
/// # Safety
/// So many bytes can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_finish(
    room: crossdock_room,
    aux: *const u8,
    aux_bytes: usize,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises.
        let aux = unsafe { list("aux", aux, aux_bytes) }?.to_vec();
        sending(room, |room| room.finish(aux))
    })
}

fn sending(
    room: crossdock_room,
    act: impl FnOnce(&mut Sending) -> Result<(), SendError>,
) -> Result<(), Fault> {
    let room = ROOMS.get(room)?;
    let mut state = room.state.lock();
    match &mut state.control {
        Control::Sending(sending) => Ok(act(sending)?),
        _ => Err(Fault::new(
            CROSSDOCK_WRONG_KIND,
            "nothing is sent in this room from here",
            "send in a room that crossdock_send has opened",
        )),
    }
}

/// Ends a room here. Its end is told as ever; pages of a room that receives come home when the peer has stopped.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_room_cancel(room: crossdock_room) -> crossdock_status {
    call(|| Ok(ROOMS.get(room)?.state.lock().control.cancel()?))
}

/// Whether a room has ended: `CROSSDOCK_PENDING`, or `CROSSDOCK_OK` with how it did. It may be asked again.
///
/// # Safety
/// `end` is NULL or points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_poll(
    room: crossdock_room,
    end: *mut crossdock_end,
) -> crossdock_status {
    call(|| {
        let room = ROOMS.get(room)?;
        // SAFETY: as the caller promises.
        unsafe { tell(room.end().ok_or(Fault::quiet(CROSSDOCK_PENDING))??, end) }
    })
}

/// As `crossdock_room_poll`, and waits for the end.
///
/// # Safety
/// As [`crossdock_room_poll`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_wait(
    room: crossdock_room,
    timeout_ms: u64,
    end: *mut crossdock_end,
) -> crossdock_status {
    call(|| {
        let room = ROOMS.get(room)?;
        let told = room.bell.wait(deadline(timeout_ms), || room.end());
        // SAFETY: as the caller promises.
        unsafe { tell(told.ok_or(Fault::quiet(CROSSDOCK_TIMED_OUT))??, end) }
    })
}

/// Waits until nobody else can write the pages of a room that receives: until then they must not be used for anything
/// else. `timeout_ms` of 0 only asks. `CROSSDOCK_ABANDONED` if they never come home.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_room_wait_pages(room: crossdock_room, timeout_ms: u64) -> crossdock_status {
    call(|| {
        let room = ROOMS.get(room)?;
        let home = || {
            let mut state = room.state.lock();
            state.look();
            if matches!(state.control, Control::Closed) {
                return Some(Err(closed()));
            }
            let is_lost = state.lists.iter().any(|list| matches!(list.pages, Home::Abandoned));
            state.is_home().then(|| if is_lost { Err(abandoned()) } else { Ok(()) })
        };
        room.bell.wait(deadline(timeout_ms), home).ok_or(Fault::quiet(CROSSDOCK_TIMED_OUT))?
    })
}

/// The pages of a room that received, once they are home, of the list at `list`: those that were given by a handle. They are
/// the caller's again, by a new handle.
///
/// # Safety
/// `pages` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_take_pages(
    room: crossdock_room,
    list: usize,
    pages: *mut crossdock_pages,
) -> crossdock_status {
    call(|| {
        not_null("pages", pages)?;
        let room = ROOMS.get(room)?;
        let mut state = room.state.lock();
        state.look();
        let Some(found) = state.lists.get_mut(list) else {
            return Err(Fault::argument(format!("the room has {} lists of pages", state.lists.len())));
        };
        match std::mem::replace(&mut found.pages, Home::Gone) {
            Home::Here(home) => {
                let handle = pool::insert(home)?;
                // SAFETY: as the caller promises.
                unsafe { put("pages", pages, handle) }
            }
            Home::Gone => {
                let words = "these pages are back in their pool, or were taken";
                Err(Fault::new(CROSSDOCK_FINISHED, words, "name pages that the pool allocates by a handle"))
            }
            home @ Home::Waiting(_) => {
                found.pages = home;
                Err(Fault::quiet(CROSSDOCK_PENDING))
            }
            Home::Abandoned => {
                found.pages = Home::Abandoned;
                Err(abandoned())
            }
        }
    })
}

/// What the prefill side sent beside the pages, of a room that received and was delivered.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_aux(
    room: crossdock_room,
    buffer: *mut u8,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    call(|| {
        let room = ROOMS.get(room)?;
        let mut state = room.state.lock();
        state.look();
        let end = state.end.as_ref().ok_or(Fault::quiet(CROSSDOCK_PENDING))?;
        // SAFETY: as the caller promises.
        unsafe { copy_out(&end.aux, buffer, capacity, length) }
    })
}

/// How a room ended, in words, with peer and port: for logs. With a NUL, which `length` does not count.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_message(
    room: crossdock_room,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { words(room, buffer, capacity, length, |ended| ended.to_string()) })
}

/// The peer of a room that has ended, by the name that it gave itself; empty if the room had come to no session. Of a room
/// between several ranks, the peer that its end is about.
///
/// # Safety
/// As [`crossdock_room_message`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_peer(
    room: crossdock_room,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    let peer = |ended: &Ended| ended.peer.as_deref().unwrap_or_default().to_owned();
    // SAFETY: as the caller promises.
    call(|| unsafe { words(room, buffer, capacity, length, peer) })
}

/// The port between the two sides of a room that has ended (`shm`, `tcp`, `verbs`); empty if the room had come to no
/// session.
///
/// # Safety
/// As [`crossdock_room_message`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_port(
    room: crossdock_room,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    let port = |ended: &Ended| ended.port.unwrap_or_default().to_owned();
    // SAFETY: as the caller promises.
    call(|| unsafe { words(room, buffer, capacity, length, port) })
}

/// What a person can do about how a room ended.
///
/// # Safety
/// As [`crossdock_room_message`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_advice(
    room: crossdock_room,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { words(room, buffer, capacity, length, |ended| ended.end.advice().to_owned()) })
}

/// # Safety
/// As [`crossdock_room_message`].
unsafe fn words(
    room: crossdock_room,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
    say: impl FnOnce(&Ended) -> String,
) -> Result<(), Fault> {
    let room = ROOMS.get(room)?;
    let mut state = room.state.lock();
    state.look();
    let end = state.end.as_ref().ok_or(Fault::quiet(CROSSDOCK_PENDING))?;
    // SAFETY: as the caller promises.
    unsafe { text_out(&say(&end.ended), buffer, capacity, length) }
}

/// How many batches have landed in the current attempt of a room that receives: grows while the room moves.
///
/// # Safety
/// `arrivals` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_room_arrivals(
    room: crossdock_room,
    arrivals: *mut u64,
) -> crossdock_status {
    call(|| {
        let found = match &ROOMS.get(room)?.state.lock().control {
            Control::Receiving(receiving) => receiving.arrivals(),
            _ => 0,
        };
        // SAFETY: as the caller promises.
        unsafe { put("arrivals", arrivals, found) }
    })
}

/// Forgets a room; one that has not ended is cancelled. Pages that nobody has taken go back to their pool when they come
/// home.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_room_close(room: crossdock_room) -> crossdock_status {
    call(|| {
        let room = ROOMS.remove(room)?;
        let mut state = room.state.lock();
        state.look();
        if state.end.is_none() {
            // A full queue: the room goes on to its deadline, unheard. A node that has stopped has ended it.
            let _ = state.control.cancel();
        }
        // The tickets hold on to this room until they are told: they are let go here.
        let left = (std::mem::replace(&mut state.control, Control::Closed), std::mem::take(&mut state.lists));
        drop(state);
        room.bell.ring();
        drop(left);
        room.node.events.closed();
        Ok(())
    })
}

/// # Safety
/// `to` is NULL or points to a structure that says its size.
unsafe fn tell(end: crossdock_end, to: *mut crossdock_end) -> Result<(), Fault> {
    if to.is_null() {
        return Ok(());
    }
    // SAFETY: as the caller promises.
    unsafe { crossdock_end::write(to, end) }
}
