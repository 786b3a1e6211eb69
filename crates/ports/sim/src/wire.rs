//! Messages between the ends of lanes: when they come, what holds them up, in which order they are heard.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crossdock_transport::{GrantId, LaneId, LocalId};

use crate::events::Due;
use crate::lane::State;
use crate::options::Semantics;
use crate::world::{Life, World};

/// One end of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct End {
    pub port: u32,
    pub lane: LaneId,
}

/// What one end tells the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// I am here, and this is my tag.
    Hello { tag: [u8; 32] },
    /// Bytes, a notification, or both.
    Write,
    /// Send me bytes.
    ReadRequest,
    /// Here they are.
    ReadReply,
    /// The write with this number has landed.
    Ack,
    /// I have stopped: nothing of mine will touch you any more.
    Close { broken: bool },
}

/// A message on its way.
#[derive(Debug)]
pub(crate) struct Message {
    pub kind: Kind,
    pub to: End,
    /// Tells this message from others that used its slot.
    pub serial: u64,
    /// Whether it has left its sender: its bytes are in `bytes`, unless it has none, and the source is free.
    pub left: bool,
    /// The sender's number for its part of an op.
    pub part: u64,
    /// The sender's region.
    pub local: LocalId,
    /// The other region, by its place among the sender's attachments, and by its owner's name.
    pub attachment: u32,
    pub region: LocalId,
    pub grant: GrantId,
    pub imm: Option<u32>,
    pub pieces: Vec<Piece>,
    pub bytes: Vec<u8>,
}

/// One stretch of bytes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub local_offset: u64,
    pub remote_offset: u64,
    pub bytes: u64,
    /// The stretch of which this is a part: a receiver that checks looks at the whole of it first.
    pub whole_offset: u64,
    pub whole_bytes: u64,
}

/// The messages of all lanes. A slot that is used again keeps its buffers.
#[derive(Default)]
pub(crate) struct Messages {
    slots: Vec<Message>,
    free: Vec<u32>,
    serial: u64,
}

/// The messages of one end in the order in which they come: when, which, where it is kept.
pub(crate) type Wire = BinaryHeap<Reverse<(u64, u64, u32)>>;

impl Messages {
    /// A message without content, for the caller to fill in.
    pub fn make(&mut self, kind: Kind, to: End) -> u32 {
        self.serial += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Message::empty());
            u32::try_from(self.slots.len() - 1).expect("fewer messages than memory holds")
        });
        let message = &mut self.slots[slot as usize];
        (message.kind, message.to, message.serial) = (kind, to, self.serial);
        slot
    }

    pub fn at(&self, slot: u32) -> &Message {
        &self.slots[slot as usize]
    }

    pub fn at_mut(&mut self, slot: u32) -> &mut Message {
        &mut self.slots[slot as usize]
    }

    /// Takes the message out, to be given back by [`recycle`](Self::recycle).
    pub fn take(&mut self, slot: u32) -> Message {
        std::mem::replace(&mut self.slots[slot as usize], Message::empty())
    }

    pub fn recycle(&mut self, slot: u32, mut message: Message) {
        message.pieces.clear();
        message.bytes.clear();
        self.slots[slot as usize] =
            Message { pieces: message.pieces, bytes: message.bytes, ..Message::empty() };
        self.free.push(slot);
    }

    pub fn discard(&mut self, slot: u32) {
        let message = self.take(slot);
        self.recycle(slot, message);
    }
}

impl Message {
    fn empty() -> Self {
        Self {
            kind: Kind::Ack,
            to: End { port: 0, lane: LaneId(0) },
            serial: 0,
            left: true,
            part: 0,
            local: LocalId(0),
            attachment: 0,
            region: LocalId(0),
            grant: GrantId::NONE,
            imm: None,
            pieces: Vec::new(),
            bytes: Vec::new(),
        }
    }

    pub fn piece_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes).sum()
    }
}

impl World {
    /// Sends a message without bytes.
    pub fn tell(&mut self, from: End, to: End, kind: Kind) {
        let slot = self.messages.make(kind, to);
        let due = self.due(from, to, 0, true);
        self.put(from, slot, due);
    }

    /// When a message that is sent now comes. In order, it comes after all that was sent before on its lane.
    pub fn due(&mut self, from: End, to: End, bytes: u64, in_order: bool) -> u64 {
        let delay = self.delay_ns(self.ports[from.port as usize].node, self.ports[to.port as usize].node);
        let port = &self.ports[from.port as usize];
        let transfer = u128::from(bytes) * 1_000_000_000 / u128::from(port.options.bytes_per_second.max(1));
        let in_order = in_order || !port.options.unordered;
        let transfer = u64::try_from(transfer).unwrap_or(u64::MAX);
        let now_ns = self.now_ns;
        let lane = self.lane_mut(from);
        let floor = if in_order { lane.last_due_ns } else { lane.first_due_ns };
        let comes = floor.max(now_ns.saturating_add(delay));
        let due = comes.saturating_add(transfer).max(self.link_takes(to, comes, bytes));
        let lane = self.lane_mut(from);
        lane.last_due_ns = lane.last_due_ns.max(due);
        due
    }

    /// When the link of the port at `to` has taken in so many bytes that come at `comes_ns`, behind all that was posted
    /// before.
    fn link_takes(&mut self, to: End, comes_ns: u64, bytes: u64) -> u64 {
        let port = &mut self.ports[to.port as usize];
        let Some(bytes_per_second) = port.options.link_bytes_per_second.filter(|_| bytes > 0) else {
            return 0;
        };
        let taking_ns = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_second.max(1));
        let taking_ns = u64::try_from(taking_ns).unwrap_or(u64::MAX);
        port.link_free_ns = port.link_free_ns.max(comes_ns).saturating_add(taking_ns);
        port.link_free_ns
    }

    /// Puts a message on the wire.
    pub fn put(&mut self, from: End, slot: u32, due_ns: u64) {
        let serial = self.messages.at(slot).serial;
        self.lane_mut(from).wire.push(Reverse((due_ns, serial, slot)));
        self.agenda.schedule(due_ns, Due::Wake(from));
    }

    /// Delivers what has come, as far as nothing holds it up.
    pub fn wake(&mut self, from: End) {
        while let Some(&Reverse((due_ns, _, slot))) = self.lane(from).wire.peek() {
            if due_ns > self.now_ns || self.is_held_up(from, slot) {
                return;
            }
            self.lane_mut(from).wire.pop();
            let message = self.messages.take(slot);
            self.deliver(from, &message);
            self.messages.recycle(slot, message);
        }
    }

    /// Whether a message cannot come now, whatever its time.
    fn is_held_up(&self, from: End, slot: u32) -> bool {
        let message = self.messages.at(slot);
        let [sender, receiver] = [from, message.to].map(|end| &self.ports[end.port as usize]);
        let semantics = sender.options.semantics;
        let is_own_access = semantics.is_mapped() && matches!(message.kind, Kind::Write | Kind::ReadRequest);
        let apart = semantics != Semantics::Mapped && self.are_apart(sender.node, receiver.node);
        // Devices answer for stopped processes; everything else needs the receiver's processor.
        let needs_receiver = match message.kind {
            Kind::Hello { .. } | Kind::Close { .. } => true,
            Kind::Write | Kind::ReadRequest | Kind::ReadReply | Kind::Ack => semantics == Semantics::Checked,
        };
        // What has not left is held up by its sender, who leaves it when it runs again.
        let not_left = semantics == Semantics::Checked && !message.left;
        apart
            || not_left
            || (is_own_access && self.is_stopped(sender.node))
            || (needs_receiver && self.is_stopped(receiver.node))
    }

    fn deliver(&mut self, from: End, message: &Message) {
        let mapped = self.ports[from.port as usize].options.semantics.is_mapped();
        match message.kind {
            Kind::Hello { tag } => self.hear_hello(message.to, from, tag),
            Kind::Close { broken } => self.hear_close(message.to, from, broken),
            Kind::Write if mapped => self.store(from, message),
            Kind::ReadRequest if mapped => self.load(from, message),
            _ if !self.is_joined(message.to, from) => {}
            Kind::Write => self.land(from, message),
            Kind::ReadRequest => self.serve_read(from, message),
            Kind::ReadReply => self.land_reply(message),
            Kind::Ack => self.complete(message.to, message.part),
        }
    }

    /// Whether `end` still takes what comes from `from`.
    pub fn is_joined(&self, end: End, from: End) -> bool {
        let port = &self.ports[end.port as usize];
        let lane = port.lanes.get(end.lane.0 as usize);
        port.life == Life::Alive
            && lane.is_some_and(|lane| lane.remote == Some(from) && lane.was_up && lane.state != State::Down)
    }

    /// Takes back what has not left: the memory of `end` is not looked at any more. What follows a message that was
    /// taken back does not come either, as nothing comes out of order.
    pub fn cut(&mut self, end: End) {
        let mapped = self.ports[end.port as usize].options.semantics.is_mapped();
        let wire = std::mem::take(&mut self.lane_mut(end).wire);
        let messages = &mut self.messages;
        let first_kept_back = match mapped {
            true => None,
            false => wire.iter().filter(|held| !messages.at(held.0.2).left).map(|held| held.0.1).min(),
        };
        let wire: Vec<_> = wire.into_vec();
        let kept = wire.into_iter().filter(|&Reverse((_, serial, slot))| {
            let kind = messages.at(slot).kind;
            let keep = match mapped {
                true => !matches!(kind, Kind::Write | Kind::ReadRequest),
                false => first_kept_back.is_none_or(|first| serial < first),
            };
            if !keep {
                messages.discard(slot);
            }
            keep
        });
        self.lane_mut(end).wire = kept.collect();
    }
}
