//! Where bytes land: the only place of the fabric that touches memory.

use crossdock_memory::Memory;
use crossdock_transport::{
    Access, DeviceError, DeviceName, DeviceStatus, DownCause, Event, GrantId, LocalId, Refusal,
};

use crate::options::Semantics;
use crate::wire::{End, Kind, Message, Piece};
use crate::world::{Life, NodeId, PortId, World};

/// Bytes have landed in the memory of a living process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landing {
    /// When.
    pub at_ns: u64,
    /// Whose bytes they are.
    pub from: NodeId,
    /// Where they landed.
    pub to: NodeId,
    /// At which port.
    pub port: PortId,
    /// In which region of it.
    pub region: LocalId,
    /// Where in the region.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
    /// Under which grant of the other side they were posted.
    pub grant: GrantId,
    /// Whether the poster wrote them, or the process in whose memory they landed read them.
    pub access: Access,
    /// Whether the port had looked at the grant the moment before.
    pub checked: bool,
}

impl World {
    /// Takes the bytes of a message from their source.
    pub fn fill_message(&mut self, end: End, slot: u32) {
        let message = self.messages.at_mut(slot);
        message.left = true;
        if message.pieces.is_empty() {
            return;
        }
        let port = &self.ports[end.port as usize];
        let region =
            port.regions[message.local.0 as usize].as_ref().expect("a region with a part in flight stays");
        collect(&region.memory, message.pieces.iter().map(|p| (p.local_offset, p.bytes)), &mut message.bytes);
    }

    /// A message leaves its sender, who may use the source again.
    pub fn leave(&mut self, from: End, slot: u32, serial: u64) {
        let message = self.messages.at(slot);
        if message.serial != serial || message.left {
            return;
        }
        let part = message.part;
        self.fill_message(from, slot);
        self.complete(from, part);
        self.wake(from);
    }

    /// A write comes to a port that takes it, or whose device does.
    pub fn land(&mut self, from: End, message: &Message) {
        let semantics = self.port_at(from.port).options.semantics;
        let region = message.region;
        if semantics == Semantics::Verbs {
            let in_range = |piece: &Piece, bytes: usize| piece.remote_offset + piece.bytes <= bytes as u64;
            let target = self.region(message.to.port, region).map(|region| region.memory.bytes());
            if !message.pieces.iter().all(|piece| target.is_some_and(|bytes| in_range(piece, bytes))) {
                return self.refuse_access(from, message.to);
            }
        }
        let mut at = 0;
        let source = (!message.left).then(|| self.region(from.port, message.local)).flatten();
        let source = source.map(|region| region.memory.clone());
        for piece in &message.pieces {
            let bytes = at..at + piece.bytes as usize;
            at = bytes.end;
            let checked = semantics == Semantics::Checked;
            if checked {
                match self.check_access(message, piece, Access::Write) {
                    Ok(()) => {}
                    Err(Refusal::Stale) => continue,
                    Err(Refusal::Forbidden { what }) => return self.misbehaved(message.to, what),
                }
            }
            let Some(target) = self.region(message.to.port, region).map(|region| region.memory.clone())
            else {
                continue;
            };
            match &source {
                Some(source) => {
                    self.copy(source, piece.local_offset, &target, piece.remote_offset, piece.bytes)
                }
                None => put(&target, piece.remote_offset, &message.bytes[bytes]),
            }
            self.note_landing(from, message.to, region, piece, message.grant, Access::Write, checked);
        }
        self.arrive(message);
        if semantics == Semantics::Verbs {
            let slot = self.messages.make(Kind::Ack, from);
            self.messages.at_mut(slot).part = message.part;
            let due = self.due(message.to, from, 0, false);
            self.put(message.to, slot, due);
        }
    }

    /// The poster's processor stores into the peer's memory.
    pub fn store(&mut self, from: End, message: &Message) {
        if self.ports[message.to.port as usize].life == Life::Alive {
            self.copy_mapped(from, message, Access::Write);
        }
        self.complete(from, message.part);
        if self.is_joined(message.to, from) {
            self.arrive(message);
        }
    }

    /// The poster's processor loads from the peer's memory.
    pub fn load(&mut self, from: End, message: &Message) {
        self.copy_mapped(from, message, Access::Read);
        self.complete(from, message.part);
    }

    fn copy_mapped(&mut self, from: End, message: &Message, access: Access) {
        if message.pieces.is_empty() {
            return;
        }
        let attachment = self.lane(from).attachments[message.attachment as usize].clone();
        let there = attachment.mapped.expect("ports that map have mapped what they attached");
        let here = self.region(from.port, message.local).expect("a region with a part in flight stays");
        let here = here.memory.clone();
        for piece in &message.pieces {
            match access {
                Access::Write => {
                    self.copy(&here, piece.local_offset, &there, piece.remote_offset, piece.bytes);
                    self.note_landing(
                        from,
                        message.to,
                        attachment.region,
                        piece,
                        message.grant,
                        access,
                        false,
                    );
                }
                Access::Read => {
                    self.copy(&there, piece.remote_offset, &here, piece.local_offset, piece.bytes);
                    let landed = Piece { remote_offset: piece.local_offset, ..*piece };
                    self.note_landing(message.to, from, message.local, &landed, message.grant, access, false);
                }
            }
        }
    }

    /// A peer asks for bytes.
    pub fn serve_read(&mut self, from: End, message: &Message) {
        let region = message.region;
        let checked = self.port_at(from.port).options.semantics == Semantics::Checked;
        for piece in message.pieces.iter().filter(|_| checked) {
            // Sources are revoked only after the reader has released them: an honest reader is never late.
            let what = match self.check_access(message, piece, Access::Read) {
                Ok(()) => continue,
                Err(Refusal::Stale) => "read under a grant that is gone",
                Err(Refusal::Forbidden { what }) => what,
            };
            return self.misbehaved(message.to, what);
        }
        let source = self.region(message.to.port, region).map(|region| region.memory.clone());
        let in_range = |piece: &Piece| {
            let end = piece.remote_offset + piece.bytes;
            source.as_ref().is_some_and(|memory| end <= memory.bytes() as u64)
        };
        if !message.pieces.iter().all(in_range) {
            return self.refuse_access(from, message.to);
        }
        let slot = self.messages.make(Kind::ReadReply, from);
        let reply = self.messages.at_mut(slot);
        reply.part = message.part;
        reply.local = message.local;
        reply.grant = message.grant;
        reply.pieces.extend_from_slice(&message.pieces);
        if let Some(source) = source {
            collect(&source, message.pieces.iter().map(|p| (p.remote_offset, p.bytes)), &mut reply.bytes);
        }
        let due = self.due(message.to, from, message.piece_bytes(), false);
        self.put(message.to, slot, due);
    }

    /// The bytes that were asked for come.
    pub fn land_reply(&mut self, message: &Message) {
        let reader = message.to;
        let from = self.lane(reader).remote.expect("a lane that is joined has a remote end");
        let mut at = 0;
        for piece in &message.pieces {
            let bytes = at..at + piece.bytes as usize;
            at = bytes.end;
            let target =
                self.region(reader.port, message.local).expect("a region with a part in flight stays");
            put(&target.memory, piece.local_offset, &message.bytes[bytes]);
            let landed = Piece { remote_offset: piece.local_offset, ..*piece };
            self.note_landing(from, reader, message.local, &landed, message.grant, Access::Read, false);
        }
        self.complete(reader, message.part);
    }

    /// A part of an op is done; so is every earlier one, when all of them are.
    pub fn complete(&mut self, end: End, part: u64) {
        let port = &mut self.ports[end.port as usize];
        let lane = &mut port.lanes[end.lane.0 as usize];
        let at = part.wrapping_sub(lane.first_part) as usize;
        // The parts of a lane that is down are forgotten.
        let Some(part) = lane.parts.get_mut(at).filter(|part| !part.done) else { return };
        part.done = true;
        if let Some(region) = part.local.and_then(|local| port.regions[local.0 as usize].as_mut()) {
            region.parts_in_flight -= 1;
        }
        while let Some(part) = lane.parts.front().copied().filter(|part| part.done) {
            lane.parts.pop_front();
            lane.first_part += 1;
            lane.pieces_in_flight -= part.pieces;
            if let Some(token) = part.token
                && port.life == Life::Alive
            {
                port.events.push_back(Event::Done { lane: end.lane, token });
            }
        }
    }

    /// The immediate of a message is told to its receiver.
    fn arrive(&mut self, message: &Message) {
        if let Some(imm) = message.imm {
            self.push_event(message.to.port, Event::Arrived { lane: message.to.lane, imm });
        }
    }

    fn check_access(&mut self, message: &Message, piece: &Piece, access: Access) -> Result<(), Refusal> {
        let region = message.region;
        let port = &mut self.ports[message.to.port as usize];
        let peer = port.lanes[message.to.lane.0 as usize].peer;
        let (offset, bytes) = (piece.whole_offset, piece.whole_bytes);
        if region.0 as usize >= port.regions.len() {
            return Err(Refusal::Forbidden { what: "a region that never was" });
        }
        port.grants.check(message.grant, peer, access, region, offset, bytes)
    }

    /// A receiver that checks ends the lane of a peer that reached for what it was not granted.
    fn misbehaved(&mut self, end: End, what: &'static str) {
        self.begin_close(end, DownCause::PeerMisbehaved { what }, true);
        self.finish_close(end);
    }

    /// A device refuses an access: both ends are in error.
    fn refuse_access(&mut self, poster: End, target: End) {
        self.fail(poster, device_error(REMOTE_ACCESS_ERROR, &REFUSED_THERE));
        self.fail(target, device_error(LOCAL_ACCESS_ERROR, &REFUSED_HERE));
    }

    fn copy(&mut self, from: &Memory, from_offset: u64, to: &Memory, to_offset: u64, bytes: u64) {
        let bytes = bytes as usize;
        if self.scratch.len() < bytes {
            self.scratch.resize(bytes, 0);
        }
        let through = &mut self.scratch[..bytes];
        from.read(from_offset as usize, through).expect("the op's range was checked when it was posted");
        put(to, to_offset, through);
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of a landing, at the one place that makes them"
    )]
    fn note_landing(
        &mut self,
        from: End,
        to: End,
        region: LocalId,
        piece: &Piece,
        grant: GrantId,
        access: Access,
        checked: bool,
    ) {
        let landing = Landing {
            at_ns: self.now_ns,
            from: self.node_of(from),
            to: self.node_of(to),
            port: PortId(to.port),
            region,
            offset: piece.remote_offset,
            bytes: piece.bytes,
            grant,
            access,
            checked,
        };
        self.fold(landing.offset);
        self.fold(landing.bytes);
        if self.options.note_landings {
            self.landings.push(landing);
        }
    }
}

/// Reads pieces of a memory, one behind the other.
fn collect(memory: &Memory, pieces: impl Iterator<Item = (u64, u64)>, into: &mut Vec<u8>) {
    into.clear();
    for (offset, bytes) in pieces {
        let at = into.len();
        into.resize(at + bytes as usize, 0);
        memory.read(offset as usize, &mut into[at..]).expect("the op's range was checked when it was posted");
    }
}

fn put(memory: &Memory, offset: u64, bytes: &[u8]) {
    memory.write(offset as usize, bytes).expect("the op's range was checked before it lands");
}

/// The codes that a verbs device gives.
/// What a device says of an access that it has refused. This one has neither numbers nor addresses.
fn device_error(status: u32, meaning: &'static DeviceStatus) -> DownCause {
    let device = DeviceName::new("sim");
    DownCause::Device(DeviceError { device, status, meaning, vendor: 0, queue_pair: 0, peer: [0; 16] })
}

static REFUSED_HERE: DeviceStatus =
    DeviceStatus { name: "IBV_WC_LOC_ACCESS_ERR", advice: "look for writes outside of what was granted" };
static REFUSED_THERE: DeviceStatus =
    DeviceStatus { name: "IBV_WC_REM_ACCESS_ERR", advice: "look for writes outside of what was granted" };
const LOCAL_ACCESS_ERROR: u32 = 8;
const REMOTE_ACCESS_ERROR: u32 = 10;
