//! The nodes that a node talks to.

use std::ffi::c_char;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use bytemuck::Zeroable;
use crossdock::{Peer, PeerUp, SessionEnd, Ticket};
use parking_lot::Mutex;

use crate::arguments::{deadline, not_null, put, text, text_out};
use crate::bell::Bell;
use crate::events::{CROSSDOCK_EVENT_PEER, crossdock_event};
use crate::handles::Table;
use crate::node::{Shared, crossdock_node, shared_of};
use crate::sized::{self, Sized as _};
use crate::status::{
    CROSSDOCK_ABANDONED, CROSSDOCK_BAD_HANDLE, CROSSDOCK_PENDING, CROSSDOCK_REFUSED, CROSSDOCK_TIMED_OUT,
    CROSSDOCK_WRONG_KIND, Fault, call, crossdock_status,
};

/// A peer of a node. 0 is none.
pub type crossdock_peer = u64;

/// Who answered at a dialed address.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_peer_info {
    /// `sizeof(crossdock_peer_info)`, set by the caller.
    pub size: usize,
    /// The node's number.
    pub node: u64,
    /// Which start of the node this is.
    pub incarnation: u64,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_peer_info {
    const FIRST_BYTES: usize = 24;
}

struct Dialed {
    node: Arc<Shared>,
    handle: u64,
    peer: Peer,
    bell: Bell,
    up: Mutex<Up>,
}

enum Up {
    /// It was named by its number, and dials itself.
    NotDialed,
    /// Its handle is closed.
    Closed,
    Waiting(Ticket<Result<PeerUp, SessionEnd>>),
    /// `None`: the node is gone.
    Told {
        answer: Option<Result<PeerUp, SessionEnd>>,
        is_news: bool,
    },
}

static PEERS: Table<Dialed> = Table::new(6, "peer");

pub(crate) fn peer_of(handle: crossdock_peer) -> Result<Peer, Fault> {
    Ok(PEERS.get(handle)?.peer)
}

pub(crate) fn is_open(handle: u64) -> bool {
    PEERS.get(handle).is_ok()
}

/// Adds what this peer has to tell. Never more than one thing.
pub(crate) fn news(handle: u64, into: &mut Vec<crossdock_event>) -> bool {
    if let Ok(dialed) = PEERS.get(handle) {
        let mut up = dialed.up.lock();
        dialed.look(&mut up);
        if let Up::Told { is_news: is_news @ true, .. } = &mut *up {
            *is_news = false;
            into.push(crossdock_event { kind: CROSSDOCK_EVENT_PEER, reserved: 0, handle, user_data: 0 });
        }
    }
    false
}

impl Dialed {
    fn look(&self, up: &mut Up) {
        if let Up::Waiting(ticket) = up {
            match ticket.poll() {
                Ok(None) => {}
                Ok(Some(answer)) => *up = Up::Told { answer: Some(answer), is_news: true },
                Err(_) => *up = Up::Told { answer: None, is_news: true },
            }
        }
    }

    fn answer(&self) -> Option<Result<PeerUp, Fault>> {
        let mut up = self.up.lock();
        self.look(&mut up);
        match &*up {
            Up::Waiting(_) => None,
            Up::Closed => {
                let words = "the peer was closed meanwhile";
                Some(Err(Fault::new(CROSSDOCK_BAD_HANDLE, words, "use a handle only until it is closed")))
            }
            Up::NotDialed => {
                let words = "this peer was named by its number: it dials this node";
                Some(Err(Fault::new(CROSSDOCK_WRONG_KIND, words, "ask only about a peer that was dialed")))
            }
            Up::Told { answer: Some(Ok(peer)), .. } => Some(Ok(peer.clone())),
            Up::Told { answer: Some(Err(cause)), .. } => {
                let fault = Fault::new(CROSSDOCK_REFUSED, cause.to_string(), cause.advice());
                Some(Err(fault.retryable(cause.is_retryable())))
            }
            Up::Told { answer: None, .. } => {
                Some(Err(Fault::new(CROSSDOCK_ABANDONED, "the node is gone", "open a new node")))
            }
        }
    }
}

impl Wake for Dialed {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Who hears the peer's bell finds the event.
        self.node.events.tell(self.handle);
        self.bell.ring();
    }
}

/// Dials a peer (`"ip:port"`; names are to be resolved before), now and whenever the session with it is lost. Returns at
/// once: rooms may be opened before it has answered, which `crossdock_peer_wait` tells.
///
/// # Safety
/// `address` ends with a NUL; `peer` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_connect(
    node: crossdock_node,
    address: *const c_char,
    peer: *mut crossdock_peer,
) -> crossdock_status {
    call(|| {
        not_null("peer", peer)?;
        let shared = shared_of(node)?;
        // SAFETY: as the caller promises.
        let (dialed, ticket) = shared.handle.connect(unsafe { text("address", address) }?)?;
        let made = insert(&shared, dialed, Up::Waiting(ticket)).inspect_err(|_| {
            // Nobody could name it any more.
            let _ = shared.handle.disconnect(dialed);
        })?;
        let mut up = made.up.lock();
        if let Up::Waiting(ticket) = &mut *up
            && let Poll::Ready(answer) =
                Pin::new(ticket).poll(&mut Context::from_waker(&Waker::from(made.clone())))
        {
            *up = Up::Told { answer: answer.ok(), is_news: true };
            shared.events.tell(made.handle);
        }
        // SAFETY: as the caller promises.
        unsafe { put("peer", peer, made.handle) }
    })
}

/// Names a peer that dials this node, by its node number.
///
/// # Safety
/// `peer` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_peer_by_number(
    node: crossdock_node,
    number: u64,
    peer: *mut crossdock_peer,
) -> crossdock_status {
    call(|| {
        not_null("peer", peer)?;
        let made = insert(&shared_of(node)?, Peer::node(number), Up::NotDialed)?;
        // SAFETY: as the caller promises.
        unsafe { put("peer", peer, made.handle) }
    })
}

fn insert(node: &Arc<Shared>, peer: Peer, up: Up) -> Result<Arc<Dialed>, Fault> {
    let up = Mutex::new(up);
    let handle = PEERS
        .insert(|handle| Arc::new(Dialed { node: node.clone(), handle, peer, bell: Bell::new(), up }))?;
    node.events.opened();
    PEERS.get(handle)
}

/// Whether a dialed peer has answered: `CROSSDOCK_PENDING`, `CROSSDOCK_OK` with who it is, or `CROSSDOCK_REFUSED` if it
/// never will.
///
/// # Safety
/// `info` is NULL or points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_peer_poll(
    peer: crossdock_peer,
    info: *mut crossdock_peer_info,
) -> crossdock_status {
    call(|| {
        let answer = PEERS.get(peer)?.answer();
        // SAFETY: as the caller promises.
        unsafe { tell(answer.ok_or(Fault::quiet(CROSSDOCK_PENDING))??, info) }
    })
}

/// As `crossdock_peer_poll`, and waits for the answer.
///
/// # Safety
/// As [`crossdock_peer_poll`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_peer_wait(
    peer: crossdock_peer,
    timeout_ms: u64,
    info: *mut crossdock_peer_info,
) -> crossdock_status {
    call(|| {
        let dialed = PEERS.get(peer)?;
        let answer = dialed.bell.wait(deadline(timeout_ms), || dialed.answer());
        // SAFETY: as the caller promises.
        unsafe { tell(answer.ok_or(Fault::quiet(CROSSDOCK_TIMED_OUT))??, info) }
    })
}

/// # Safety
/// `info` is NULL or points to a structure that says its size.
unsafe fn tell(peer: PeerUp, info: *mut crossdock_peer_info) -> Result<(), Fault> {
    if info.is_null() {
        return Ok(());
    }
    let PeerUp { identity, .. } = peer;
    let told = crossdock_peer_info { size: 0, node: identity.node, incarnation: identity.incarnation };
    // SAFETY: as the caller promises.
    unsafe { crossdock_peer_info::write(info, told) }
}

/// The name of a peer that has answered, with a NUL; `length` does not count it.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_peer_name(
    peer: crossdock_peer,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    call(|| {
        let answer = PEERS.get(peer)?.answer().ok_or(Fault::quiet(CROSSDOCK_PENDING))?;
        // SAFETY: as the caller promises.
        unsafe { text_out(&answer?.name, buffer, capacity, length) }
    })
}

/// Ends the session with a dialed peer and dials it no more; the handle is closed in any case. A peer that was named by
/// its number is only forgotten.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_peer_close(peer: crossdock_peer) -> crossdock_status {
    call(|| {
        let dialed = PEERS.remove(peer)?;
        // What is left of it lets go of the ticket, and so of itself.
        let up = std::mem::replace(&mut *dialed.up.lock(), Up::Closed);
        dialed.bell.ring();
        dialed.node.events.closed();
        if !matches!(up, Up::NotDialed) {
            // A node that has stopped dials nobody.
            match dialed.node.handle.disconnect(dialed.peer) {
                Err(crossdock::NotTaken::Stopped) | Ok(()) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })
}
