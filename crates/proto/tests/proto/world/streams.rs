//! Control streams: ordered, delayed, and cut where the test says so.

use std::collections::{BTreeSet, VecDeque};

use crossdock_proto::{Identity, LinkCause, LinkId, Message};

use super::{BAD_ADDRESS, Channel, NO_ADDRESS, UNREACHED, World, address};

#[derive(Default)]
pub struct Streams {
    pub all: Vec<Stream>,
}

/// One control stream. End 0 dialed.
pub struct Stream {
    pub ends: [End; 2],
    pub is_held: [bool; 2],
    /// What was said to the test.
    heard: Vec<(Identity, Message)>,
    towards: [VecDeque<(u64, u64, Event)>; 2],
}

pub enum End {
    Node(usize, LinkId),
    /// The test itself speaks.
    Raw,
    /// Nobody any more.
    Closed,
}

enum Event {
    Opened,
    Accepted,
    Frame(Vec<u8>),
    Closed,
}

/// An address at which the test itself answers.
pub const RAW: &str = "raw";

impl Streams {
    pub fn fronts(&self, stopped: &BTreeSet<usize>) -> Vec<(u64, u64, Channel)> {
        let mut fronts = Vec::new();
        for (at, stream) in self.all.iter().enumerate() {
            for end in [0, 1] {
                let runs = !matches!(stream.ends[end], End::Node(node, _) if stopped.contains(&node));
                if let (true, false, Some((due_ns, cause, _))) =
                    (runs, stream.is_held[end], stream.towards[end].front())
                {
                    fronts.push((*due_ns, *cause, Channel::Stream(at, end)));
                }
            }
        }
        fronts
    }

    /// The streams that a node holds an end of: which, and which end.
    pub fn of(&self, node: usize) -> Vec<(usize, usize)> {
        let is_of = |end: &End| matches!(end, End::Node(n, _) if *n == node);
        let ends = self.all.iter().enumerate().flat_map(|(at, s)| [(at, 0, &s.ends[0]), (at, 1, &s.ends[1])]);
        ends.filter(|(_, _, end)| is_of(end)).map(|(at, end, _)| (at, end)).collect()
    }

    /// The last stream that was dialed and has not ended.
    pub fn last(&self) -> usize {
        let open = |s: &Stream| !s.ends.iter().any(|end| matches!(end, End::Closed));
        self.all.iter().rposition(open).expect("an open stream")
    }
}

impl Stream {
    fn new(ends: [End; 2]) -> Self {
        Self { ends, is_held: [false; 2], heard: Vec::new(), towards: Default::default() }
    }
}

impl World {
    pub fn dial(&mut self, node: usize, to: &str) -> Result<LinkId, LinkCause> {
        let stream = self.streams.all.len();
        let other = match (0..self.nodes.len()).find(|&other| address(other) == to) {
            Some(other) if self.nodes[other].is_alive => {
                End::Node(other, self.nodes[other].add_link(stream, 1))
            }
            Some(_) => return Err(UNREACHED),
            None if to == RAW => End::Raw,
            None if to == NO_ADDRESS => return Err(BAD_ADDRESS),
            None => return Err(UNREACHED),
        };
        let link = self.nodes[node].add_link(stream, 0);
        let ends = [End::Node(node, link), other];
        self.streams.all.push(Stream::new(ends));
        self.put(stream, 0, Event::Opened);
        self.put(stream, 1, Event::Accepted);
        Ok(link)
    }

    /// Lets the test speak in the place of a node, which is heard no more; its ports still answer.
    pub fn take_over(&mut self, node: usize, peer: usize) -> usize {
        let (stream, end) = self.stream(node, peer);
        self.streams.all[stream].ends[end] = End::Raw;
        self.nodes[node].links.clear();
        stream
    }

    /// Dials a node from the test itself.
    pub fn raw_dial(&mut self, node: usize) -> usize {
        let stream = self.streams.all.len();
        let link = self.nodes[node].add_link(stream, 1);
        let ends = [End::Raw, End::Node(node, link)];
        self.streams.all.push(Stream::new(ends));
        self.put(stream, 1, Event::Accepted);
        stream
    }

    /// Says something to the node at the other end of a stream that the test speaks on.
    pub fn raw_send(&mut self, stream: usize, from: Identity, message: &Message) {
        let mut frame = Vec::new();
        message.encode(from, &mut frame);
        self.raw_frame(stream, frame);
    }

    pub fn raw_frame(&mut self, stream: usize, frame: Vec<u8>) {
        let end = self.streams.all[stream].ends.iter().position(|end| matches!(end, End::Node(..)));
        self.put(stream, end.expect("a node that listens"), Event::Frame(frame));
    }

    /// What the node at the other end has said since the test last asked.
    pub fn raw_heard(&mut self, stream: usize) -> Vec<(Identity, Message)> {
        std::mem::take(&mut self.streams.all[stream].heard)
    }

    /// Whether the node at the other end of a stream of the test's has hung up.
    pub fn is_closed(&self, stream: usize) -> bool {
        self.streams.all[stream].ends.iter().any(|end| matches!(end, End::Closed))
    }

    /// Sends a frame that the node's protocol did not: it comes after what was sent before.
    pub fn forge(&mut self, node: usize, peer: usize, message: &Message) {
        let from = self.nodes[node].proto.identity();
        self.forge_as(from, node, peer, message);
    }

    pub fn forge_as(&mut self, from: Identity, node: usize, peer: usize, message: &Message) {
        let (stream, end) = self.stream(node, peer);
        let mut frame = Vec::new();
        message.encode(from, &mut frame);
        self.put(stream, 1 - end, Event::Frame(frame));
    }

    /// The stream between two nodes: which, and which end is the first one's.
    pub fn stream(&self, node: usize, peer: usize) -> (usize, usize) {
        let is = |end: &End, of: usize| matches!(end, End::Node(n, _) if *n == of);
        let mut found = self.streams.of(node).into_iter();
        found.rfind(|&(at, end)| is(&self.streams.all[at].ends[1 - end], peer)).expect("a stream")
    }

    /// Stops what a node sends to another from arriving; or lets it.
    pub fn hold(&mut self, from: usize, to: usize, is_held: bool) {
        let (stream, end) = self.stream(from, to);
        self.streams.all[stream].is_held[1 - end] = is_held;
    }

    /// Breaks the stream between two nodes: what was on its way is lost.
    pub fn cut(&mut self, a: usize, b: usize) {
        let (stream, _) = self.stream(a, b);
        for end in [0, 1] {
            self.cut_end(stream, end);
        }
    }

    /// Lets one end find the stream broken, while the other hears nothing.
    pub fn cut_end(&mut self, stream: usize, end: usize) {
        self.streams.all[stream].towards[end].clear();
        self.streams.all[stream].is_held[end] = false;
        self.put(stream, end, Event::Closed);
    }

    pub fn send_frame(&mut self, node: usize, link: LinkId, frame: Vec<u8>) {
        // A link that has ended takes frames and loses them, as the engine's network does.
        if let Some(&(stream, end)) = self.nodes[node].links.get(&link) {
            self.put(stream, 1 - end, Event::Frame(frame));
        }
    }

    pub fn close_stream(&mut self, node: usize, link: LinkId) {
        let Some((stream, end)) = self.nodes[node].links.remove(&link) else { return };
        self.put(stream, 1 - end, Event::Closed);
        self.streams.all[stream].ends[end] = End::Closed;
        self.nodes[node].proto.link_closed(self.now_ns, link, LinkCause::ClosedHere);
    }

    pub fn end_streams_of(&mut self, node: usize) {
        for (stream, end) in self.streams.of(node) {
            self.streams.all[stream].ends[end] = End::Closed;
            self.put(stream, 1 - end, Event::Closed);
        }
    }

    pub fn deliver_stream(&mut self, stream: usize, end: usize) {
        let Some((_, _, event)) = self.streams.all[stream].towards[end].pop_front() else { return };
        match (&self.streams.all[stream].ends[end], event) {
            (End::Raw, Event::Frame(frame)) => {
                let message = Message::decode(&frame).expect("what a node sends can be read");
                self.streams.all[stream].heard.push(message);
            }
            (End::Raw, Event::Closed) => self.streams.all[stream].ends[end] = End::Closed,
            (End::Raw, _) | (End::Closed, _) => {}
            (&End::Node(node, link), event) => match event {
                Event::Opened => self.call(node, |proto, now| proto.link_opened(now, link)),
                Event::Accepted => self.call(node, |proto, now| proto.link_accepted(now, link)),
                Event::Frame(frame) => self.call(node, |proto, now| proto.frame(now, link, &frame)),
                Event::Closed => {
                    self.nodes[node].links.remove(&link);
                    self.streams.all[stream].ends[end] = End::Closed;
                    self.call(node, |proto, now| proto.link_closed(now, link, LinkCause::ClosedByPeer));
                }
            },
        }
    }

    fn put(&mut self, stream: usize, end: usize, event: Event) {
        if matches!(self.streams.all[stream].ends[end], End::Closed) {
            return;
        }
        let (due_ns, cause) = self.cause();
        self.streams.all[stream].towards[end].push_back((due_ns, cause, event));
    }
}
