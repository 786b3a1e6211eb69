//! Control streams and datagrams between nodes, as an engine sees them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::events::Due;
use crate::world::{NodeId, NodeState, World};

/// One process's side of the control network: streams of frames, in order and reliable until they break, and
/// datagrams, which may be lost. Dropping it closes its streams, as the end of a process does.
pub struct SimNet {
    world: Arc<Mutex<World>>,
    endpoint: u32,
    fresh: VecDeque<StreamEvent>,
    fresh_datagrams: VecDeque<Datagram>,
}

/// The name under which a process can be dialled.
pub type Addr = Arc<str>;

/// One process's end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// What happens to streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// Somebody dialled this process. The stream can be used.
    Accepted {
        /// This end.
        stream: StreamId,
    },
    /// Somebody answered. The stream can be used.
    Opened {
        /// The end that [`dial`](SimNet::dial) gave.
        stream: StreamId,
    },
    /// A frame has come.
    Frame {
        /// On which stream.
        stream: StreamId,
        /// Its content.
        bytes: Vec<u8>,
    },
    /// The stream has ended; nothing is said of it afterwards. Not said to who closed it.
    Closed {
        /// Which stream.
        stream: StreamId,
        /// Why.
        cause: CloseCause,
    },
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCause {
    /// The other side closed it, in order: every frame before has come.
    ByPeer,
    /// The other process is no more, or the connection broke. Frames may be missing.
    Reset,
    /// Nobody answers at that address.
    Refused,
    /// The other side could not be reached for too long.
    TimedOut,
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Too much is on its way or unread; try again later.
    #[error("the stream is full")]
    Full,
    /// The stream has ended.
    #[error("the stream is closed")]
    Closed,
}

/// A datagram that has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Whose.
    pub from: Addr,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl SimNet {
    pub(crate) fn new(world: Arc<Mutex<World>>, node: NodeId, addr: &str) -> Self {
        let endpoint = world.lock().add_endpoint(node, addr);
        Self { world, endpoint, fresh: VecDeque::new(), fresh_datagrams: VecDeque::new() }
    }

    /// The fabric's time.
    pub fn now_ns(&self) -> u64 {
        self.world.lock().now_ns
    }

    /// Begins a stream to whoever has this address. Answered by `Opened` or `Closed`; frames may be sent at once,
    /// and come if it opens.
    pub fn dial(&mut self, addr: &str) -> StreamId {
        self.world.lock().dial(self.endpoint, addr)
    }

    /// Sends a frame.
    pub fn send(&mut self, stream: StreamId, bytes: &[u8]) -> Result<(), SendError> {
        self.world.lock().send_frame(self.endpoint, stream, bytes)
    }

    /// Ends a stream, after the frames that were sent. Nothing more is said of it here.
    pub fn close(&mut self, stream: StreamId) {
        self.world.lock().close_stream(self.endpoint, stream);
    }

    /// What has happened since the last call.
    pub fn events(&mut self) -> impl Iterator<Item = StreamEvent> + '_ {
        self.world.lock().take_events(self.endpoint, &mut self.fresh);
        self.fresh.drain(..)
    }

    /// Sends a datagram, which may come late, out of order, or not at all.
    pub fn datagram(&mut self, addr: &str, bytes: &[u8]) {
        self.world.lock().send_datagram(self.endpoint, addr, bytes);
    }

    /// The datagrams that have come since the last call.
    pub fn datagrams(&mut self) -> impl Iterator<Item = Datagram> + '_ {
        let mut world = self.world.lock();
        self.fresh_datagrams.append(&mut world.net.endpoints[self.endpoint as usize].datagrams);
        drop(world);
        self.fresh_datagrams.drain(..)
    }
}

impl fmt::Debug for SimNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimNet").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Drop for SimNet {
    fn drop(&mut self) {
        self.world.lock().drop_endpoint(self.endpoint, CloseCause::ByPeer);
    }
}

/// All streams and endpoints of a fabric.
#[derive(Default)]
pub(crate) struct Net {
    endpoints: Vec<Endpoint>,
    streams: Vec<Stream>,
    datagrams: Vec<Option<(u32, Addr, Vec<u8>)>>,
    free_datagrams: Vec<u32>,
}

struct Endpoint {
    node: NodeId,
    addr: Addr,
    gone: bool,
    events: VecDeque<StreamEvent>,
    datagrams: VecDeque<Datagram>,
}

/// A stream; end 0 dialled end 1.
struct Stream {
    addr: Addr,
    give_up_ns: u64,
    ends: [StreamEnd; 2],
}

struct StreamEnd {
    /// Unknown for end 1 until somebody answers.
    endpoint: Option<u32>,
    state: EndState,
    /// What this end has sent and the other has not been told, oldest first, with the time when it comes.
    sent: VecDeque<(u64, Item)>,
    last_due_ns: u64,
    /// Frames of this end that are on their way or unread.
    frames: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndState {
    /// Not open yet.
    Waiting,
    Open,
    /// Ended, and its process knows or will read it.
    Closed,
    /// Ended by its process, who does not want to hear of it.
    LetGo,
}

enum Item {
    Frame(Vec<u8>),
    End(CloseCause),
}

impl World {
    fn add_endpoint(&mut self, node: NodeId, addr: &str) -> u32 {
        self.meet(node);
        self.net.endpoints.push(Endpoint {
            node,
            addr: addr.into(),
            gone: false,
            events: VecDeque::new(),
            datagrams: VecDeque::new(),
        });
        u32::try_from(self.net.endpoints.len() - 1).expect("fewer endpoints than memory holds")
    }

    fn drop_endpoint(&mut self, endpoint: u32, cause: CloseCause) {
        let dropped = &mut self.net.endpoints[endpoint as usize];
        if dropped.gone {
            return;
        }
        dropped.gone = true;
        dropped.events.clear();
        dropped.datagrams.clear();
        for stream in 0..self.net.streams.len() as u32 {
            for end in [0, 1] {
                let this = &self.net.streams[stream as usize].ends[usize::from(end)];
                if this.endpoint == Some(endpoint) && matches!(this.state, EndState::Open | EndState::Waiting)
                {
                    self.end_stream(stream, end, cause);
                }
            }
        }
    }

    /// The process of a node was killed.
    pub fn kill_net(&mut self, node: NodeId) {
        for endpoint in 0..self.net.endpoints.len() {
            if self.net.endpoints[endpoint].node == node {
                self.drop_endpoint(endpoint as u32, CloseCause::Reset);
            }
        }
    }

    /// An end lets go of its stream; the other hears why, behind what was sent.
    fn end_stream(&mut self, stream: u32, end: u8, cause: CloseCause) {
        if cause == CloseCause::Reset {
            // A reset overtakes what the other side has not read: any number of the last frames are lost.
            let lost = self
                .rng
                .below(self.net.streams[stream as usize].ends[usize::from(end)].sent.len() as u64 + 1);
            let this = &mut self.net.streams[stream as usize].ends[usize::from(end)];
            this.sent.truncate(this.sent.len() - lost as usize);
        }
        self.net.streams[stream as usize].ends[usize::from(end)].state = EndState::LetGo;
        self.push_item(stream, end, Item::End(cause));
    }

    fn dial(&mut self, endpoint: u32, addr: &str) -> StreamId {
        let end = |endpoint| StreamEnd {
            endpoint,
            state: EndState::Waiting,
            sent: VecDeque::new(),
            last_due_ns: 0,
            frames: 0,
        };
        let stream = u32::try_from(self.net.streams.len()).expect("fewer streams than memory holds");
        let give_up_ns = self.now_ns + self.options.connect_ns;
        self.net.streams.push(Stream {
            addr: addr.into(),
            give_up_ns,
            ends: [end(Some(endpoint)), end(None)],
        });
        let delay = self.rng.within(self.options.delay);
        self.agenda.schedule(self.now_ns + delay, Due::Dialled { stream });
        StreamId(u64::from(stream) * 2)
    }

    /// The dialler's first message comes to whoever has the address.
    pub fn dialled(&mut self, stream: u32) {
        let this = &self.net.streams[stream as usize];
        let addr = this.addr.clone();
        let Some(dialler) = this.ends[0].endpoint else { return };
        let Some(callee) = self.net.endpoints.iter().rposition(|e| !e.gone && e.addr == addr) else {
            return self.answer_later(stream);
        };
        let (here, there) = (self.net.endpoints[dialler as usize].node, self.net.endpoints[callee].node);
        if self.are_apart(here, there) {
            if self.now_ns >= self.net.streams[stream as usize].give_up_ns {
                return self.close_end(stream, 0, CloseCause::TimedOut);
            }
            let again = self.now_ns + self.options.connect_ns / 8 + 1;
            return self.agenda.schedule(again, Due::Dialled { stream });
        }
        let id = StreamId(u64::from(stream) * 2 + 1);
        let end = &mut self.net.streams[stream as usize].ends[1];
        end.endpoint = Some(callee as u32);
        end.state = EndState::Open;
        self.net.endpoints[callee].events.push_back(StreamEvent::Accepted { stream: id });
        self.watch_stream(stream);
        self.stream_wake(stream, 0);
        self.answer_later(stream);
    }

    fn answer_later(&mut self, stream: u32) {
        let delay = self.rng.within(self.options.delay);
        self.agenda.schedule(self.now_ns + delay, Due::Answered { stream });
    }

    /// The dialler hears what became of its call.
    pub fn answered(&mut self, stream: u32) {
        let [dialler, callee] = &self.net.streams[stream as usize].ends;
        if dialler.state != EndState::Waiting {
            return;
        }
        if callee.endpoint.is_none() {
            return self.close_end(stream, 0, CloseCause::Refused);
        }
        if self.is_stream_cut(stream) {
            if self.now_ns >= self.net.streams[stream as usize].give_up_ns {
                return self.close_end(stream, 0, CloseCause::TimedOut);
            }
            let again = self.now_ns + self.options.connect_ns / 8 + 1;
            return self.agenda.schedule(again, Due::Answered { stream });
        }
        let dialler = &mut self.net.streams[stream as usize].ends[0];
        dialler.state = EndState::Open;
        let endpoint = dialler.endpoint.expect("who dials is known");
        let id = StreamId(u64::from(stream) * 2);
        self.net.endpoints[endpoint as usize].events.push_back(StreamEvent::Opened { stream: id });
        self.watch_stream(stream);
        self.stream_wake(stream, 1);
    }

    fn send_frame(&mut self, endpoint: u32, stream: StreamId, bytes: &[u8]) -> Result<(), SendError> {
        let limit = self.options.stream_frames;
        let (stream, end) = self.stream_end(endpoint, stream).ok_or(SendError::Closed)?;
        let this = &mut self.net.streams[stream as usize].ends[usize::from(end)];
        if !matches!(this.state, EndState::Open | EndState::Waiting) {
            return Err(SendError::Closed);
        }
        if this.frames >= limit {
            return Err(SendError::Full);
        }
        this.frames += 1;
        self.push_item(stream, end, Item::Frame(bytes.to_vec()));
        Ok(())
    }

    fn close_stream(&mut self, endpoint: u32, stream: StreamId) {
        let Some((stream, end)) = self.stream_end(endpoint, stream) else { return };
        match self.net.streams[stream as usize].ends[usize::from(end)].state {
            EndState::Open | EndState::Waiting => self.end_stream(stream, end, CloseCause::ByPeer),
            EndState::Closed => {
                self.net.streams[stream as usize].ends[usize::from(end)].state = EndState::LetGo
            }
            EndState::LetGo => {}
        }
    }

    /// Which stream and end that is, if it belongs to the endpoint.
    fn stream_end(&self, endpoint: u32, stream: StreamId) -> Option<(u32, u8)> {
        let (at, end) = (u32::try_from(stream.0 / 2).ok()?, (stream.0 % 2) as u8);
        let stream = self.net.streams.get(at as usize)?;
        (stream.ends[usize::from(end)].endpoint == Some(endpoint)).then_some((at, end))
    }

    fn push_item(&mut self, stream: u32, sender: u8, item: Item) {
        let delay = match self.stream_nodes(stream) {
            Some((here, there)) => self.delay_ns(here, there),
            None => self.rng.within(self.options.delay),
        };
        let now_ns = self.now_ns;
        let this = &mut self.net.streams[stream as usize].ends[usize::from(sender)];
        let due_ns = this.last_due_ns.max(now_ns + delay);
        this.last_due_ns = due_ns;
        this.sent.push_back((due_ns, item));
        self.agenda.schedule(due_ns, Due::StreamWake { stream, sender });
    }

    /// Hands over what has come from one end of a stream to the other.
    pub fn stream_wake(&mut self, stream: u32, sender: u8) {
        let (sender, receiver) = (usize::from(sender), usize::from(1 - sender));
        let receiver_end = 1 - sender as u8;
        loop {
            let cut = self.is_stream_cut(stream);
            let this = &mut self.net.streams[stream as usize];
            if cut || this.ends[receiver].state == EndState::Waiting {
                return;
            }
            let Some((due_ns, _)) = this.ends[sender].sent.front() else { return };
            if *due_ns > self.now_ns {
                return;
            }
            let Some((_, item)) = this.ends[sender].sent.pop_front() else { return };
            match item {
                Item::Frame(bytes) if this.ends[receiver].state == EndState::Open => {
                    self.fingerprint = self.fingerprint.wrapping_mul(31).wrapping_add(bytes.len() as u64);
                    let id = StreamId(u64::from(stream) * 2 + u64::from(receiver_end));
                    let endpoint = this.ends[receiver].endpoint.expect("an open end has an endpoint");
                    let events = &mut self.net.endpoints[endpoint as usize].events;
                    events.push_back(StreamEvent::Frame { stream: id, bytes });
                }
                Item::Frame(_) => this.ends[sender].frames -= 1,
                Item::End(cause) => self.close_end(stream, receiver_end, cause),
            }
        }
    }

    /// An end is told that its stream has ended, unless it knows.
    fn close_end(&mut self, stream: u32, end: u8, cause: CloseCause) {
        let this = &mut self.net.streams[stream as usize].ends[usize::from(end)];
        if !matches!(this.state, EndState::Open | EndState::Waiting) {
            return;
        }
        this.state = EndState::Closed;
        let id = StreamId(u64::from(stream) * 2 + u64::from(end));
        if let Some(endpoint) = this.endpoint {
            self.net.endpoints[endpoint as usize].events.push_back(StreamEvent::Closed { stream: id, cause });
        }
    }

    pub fn stream_fails(&mut self, stream: u32, end: u8) {
        self.close_end(stream, end, CloseCause::Reset);
    }

    /// Both ends of a stream give up if it still crosses that partition.
    pub fn stream_silence(&mut self, stream: u32, partition: u64) {
        let nodes = self.stream_nodes(stream);
        if nodes.is_some_and(|(one, other)| self.partition(one, other) == Some(partition)) {
            self.close_end(stream, 0, CloseCause::TimedOut);
            self.close_end(stream, 1, CloseCause::TimedOut);
        }
    }

    pub fn watch_stream(&mut self, stream: u32) {
        let Some((one, other)) = self.stream_nodes(stream) else { return };
        if let Some(partition) = self.partition(one, other) {
            let patience = self.patience_ns();
            self.agenda.schedule(self.now_ns + patience, Due::StreamSilence { stream, partition });
        }
    }

    pub fn break_streams(&mut self, one: NodeId, other: NodeId) {
        for stream in self.streams_between(one, other) {
            for end in [0, 1] {
                let notice = self.rng.within(self.options.delay);
                self.agenda.schedule(self.now_ns + notice, Due::StreamFails { stream, end });
            }
        }
    }

    pub fn streams_between(&self, one: NodeId, other: NodeId) -> Vec<u32> {
        let streams = 0..self.net.streams.len() as u32;
        let joins = |nodes| nodes == (one, other) || nodes == (other, one);
        streams.filter(|&stream| self.stream_nodes(stream).is_some_and(joins)).collect()
    }

    fn is_stream_cut(&self, stream: u32) -> bool {
        self.stream_nodes(stream).is_some_and(|(one, other)| self.are_apart(one, other))
    }

    fn stream_nodes(&self, stream: u32) -> Option<(NodeId, NodeId)> {
        let [one, other] = &self.net.streams[stream as usize].ends;
        let node = |endpoint: u32| self.net.endpoints[endpoint as usize].node;
        Some((node(one.endpoint?), node(other.endpoint?)))
    }

    /// Whether something has happened to a stream of a node that has not been taken.
    pub fn has_stream_events(&self, node: NodeId) -> bool {
        self.net.endpoints.iter().any(|endpoint| endpoint.node == node && !endpoint.events.is_empty())
    }

    fn take_events(&mut self, endpoint: u32, into: &mut VecDeque<StreamEvent>) {
        let events = std::mem::take(&mut self.net.endpoints[endpoint as usize].events);
        for event in events {
            let (StreamEvent::Accepted { stream: id }
            | StreamEvent::Opened { stream: id }
            | StreamEvent::Frame { stream: id, .. }
            | StreamEvent::Closed { stream: id, .. }) = &event;
            let (stream, end) = ((id.0 / 2) as usize, (id.0 % 2) as usize);
            let ends = &mut self.net.streams[stream].ends;
            if matches!(event, StreamEvent::Frame { .. }) {
                ends[1 - end].frames -= 1;
            }
            if ends[end].state != EndState::LetGo {
                into.push_back(event);
            }
        }
    }

    fn send_datagram(&mut self, endpoint: u32, addr: &str, bytes: &[u8]) {
        if self.rng.happens(self.options.datagram_loss) {
            return;
        }
        let slot = self.net.free_datagrams.pop().unwrap_or_else(|| {
            self.net.datagrams.push(None);
            u32::try_from(self.net.datagrams.len() - 1).expect("fewer datagrams than memory holds")
        });
        self.net.datagrams[slot as usize] = Some((endpoint, addr.into(), bytes.to_vec()));
        let from = self.net.endpoints[endpoint as usize].node;
        let delay = self.delay_ns(from, from);
        self.agenda.schedule(self.now_ns + delay, Due::Datagram { slot });
    }

    pub fn datagram_arrives(&mut self, slot: u32) {
        self.net.free_datagrams.push(slot);
        let Some((endpoint, addr, bytes)) = self.net.datagrams[slot as usize].take() else { return };
        let Some(to) = self.net.endpoints.iter().rposition(|e| !e.gone && e.addr == addr) else { return };
        let sender = &self.net.endpoints[endpoint as usize];
        let (from, here) = (sender.addr.clone(), sender.node);
        let there = self.net.endpoints[to].node;
        let dead = self.nodes[there.0 as usize].state == NodeState::Dead;
        let receiver = &self.net.endpoints[to];
        if dead || self.are_apart(here, there) || receiver.datagrams.len() >= self.options.datagrams_unread {
            return;
        }
        self.net.endpoints[to].datagrams.push_back(Datagram { from, bytes });
    }
}
