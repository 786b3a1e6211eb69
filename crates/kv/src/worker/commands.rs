//! What users ask for.

use std::sync::Arc;

use crossdock_engine::{Promise, duration_ns};
use crossdock_memory::PageSet;
use crossdock_proto::{
    End, Fetch, LinkCause, Misfit, PeerName, Receive, RoomError, RoomId, RoomRefusal, Send, Serve,
    SessionEnd, Who,
};

use super::Worker;
use super::room::{Decode, Item, Kind, MAX_ITEMS, Room, SendingRoom, ServingRoom, USUAL_ITEMS};
use crate::PageTable;
use crate::params::Ask;
use crate::request::{
    Command, Ended, Peer, PeerKey, ReceiveRequest, Received, SendRequest, ServeRequest, name,
};

impl Worker {
    pub(super) fn take_commands(&mut self, now: u64) -> bool {
        for taken in 0..COMMANDS {
            let Some(command) = self.shared.next() else { return taken > 0 };
            self.command(now, command);
        }
        true
    }

    fn command(&mut self, now: u64, command: Command) {
        match command {
            Command::Connect { up, .. } if self.targets.len() >= self.max_targets => {
                let cause = LinkCause::Limit { what: "dialed addresses", limit: self.max_targets as u64 };
                self.tell(up, Err(SessionEnd::Unreachable { cause }));
            }
            Command::Connect { key, address, up } => {
                let target = self.engine.proto().connect(now, address.as_str());
                self.targets.insert(key, target);
                self.addresses.insert(target, address);
                self.dialing.insert(target, up);
            }
            Command::Disconnect { key } => {
                if let Some(target) = self.targets.remove(&key) {
                    self.dialing.remove(&target);
                    self.addresses.remove(&target);
                    self.engine.proto().disconnect(now, target);
                }
            }
            Command::Receive { key, request, asked_ns, pull, told } => {
                let (end, home) = (Some(told.end), Some(told.pages));
                let role = if pull { "fetch" } else { "receive" };
                let span = span(role, request.room, request.use_count, request.tokens);
                let ask = Ask {
                    tokens: request.tokens,
                    skip_tokens: request.skip_tokens,
                    checksums: self.verify.covers(request.room),
                };
                let pages: Arc<[u32]> = request.pages.ids().into();
                let mut decode = Decode {
                    ask,
                    pages,
                    aux: Vec::new(),
                    end,
                    home,
                    arrivals: told.arrivals,
                    reads: None,
                    proof: None,
                };
                match self.open_decode(now, asked_ns.unwrap_or(now), request, ask, pull) {
                    Ok(room) => {
                        self.keys.insert(key, room);
                        self.rooms
                            .insert(room, Room { key, span, is_ready: false, kind: Kind::Decode(decode) });
                    }
                    Err((end, pages)) => {
                        if let Some(home) = decode.home.take() {
                            self.tell(home, pages.into());
                        }
                        if let Some(promise) = decode.end.take() {
                            self.tell(promise, Received { ended: Ended::alone(end), aux: Vec::new() });
                        }
                    }
                }
            }
            Command::Open { key, request, asked_ns, end } => {
                self.open_sending(now, asked_ns.unwrap_or(now), key, request, end);
            }
            Command::Send { key, layers, tokens } => {
                let Some((id, room)) = self.room_of(key) else { return };
                if let Kind::Sending(sending) = &mut room.kind {
                    if !sending.add(Item { layers, tokens }) {
                        let misfit = Misfit::TooManyPieces { limit: MAX_ITEMS };
                        return self.engine.proto().mismatch(now, id, misfit);
                    }
                    self.wake(id);
                }
            }
            Command::Finish { key, aux } => {
                let Some((id, room)) = self.room_of(key) else { return };
                if let Kind::Sending(sending) = &mut room.kind {
                    sending.finish = Some(aux);
                    self.wake(id);
                }
            }
            Command::Serve { key, request, asked_ns, end } => {
                self.open_serving(now, asked_ns.unwrap_or(now), key, request, end);
            }
            Command::Cancel { key } => {
                if let Some((id, _)) = self.room_of(key) {
                    self.engine.proto().cancel(now, id);
                }
            }
            Command::Stats { told } => {
                let stats = self.stats();
                self.tell(told, stats);
            }
            Command::Stop => self.stopped = true,
        }
    }

    fn open_decode(
        &mut self,
        now: u64,
        asked_ns: u64,
        request: ReceiveRequest,
        ask: Ask,
        pull: bool,
    ) -> Result<RoomId, (End, PageSet)> {
        let Some(peer) = self.peer_name(request.peer) else {
            return Err((End::PeerLost { cause: SessionEnd::ClosedHere }, request.pages));
        };
        let first = request.skip_tokens / self.layout.page_tokens();
        let table = PageTable { layout: &self.layout, first_page: first, pages: request.pages.ids() };
        let (tokens, skip_tokens) = (request.tokens, request.skip_tokens);
        if skip_tokens > tokens {
            return Err((misfit(Misfit::Skipped { tokens, skip_tokens }), request.pages));
        }
        if table.covering(&(skip_tokens..tokens)).is_err() {
            return Err((misfit(Misfit::Pages { whose: Who::Here }), request.pages));
        }
        let room = name(request.room, request.use_count);
        let deadline_ns = asked_ns.saturating_add(duration_ns(request.deadline));
        let (pages, params) = (request.pages, ask.encode());
        let opened = match pull {
            false => {
                let buffers = self.buffers.clone();
                let receive = Receive { peer, room, pages, buffers, params, deadline_ns };
                self.engine.proto().receive(now, receive)
            }
            true => self.engine.proto().fetch(now, Fetch { peer, room, pages, params, deadline_ns }),
        };
        opened.map_err(|unopened| (refused(unopened.error), unopened.pages))
    }

    fn open_sending(&mut self, now: u64, asked_ns: u64, key: u64, request: SendRequest, end: Promise<Ended>) {
        let span = span("send", request.room, request.use_count, request.tokens);
        let pages: Arc<[u32]> = request.pages.ids().into();
        let fits = PageTable::new(&self.layout, &pages).covering(&(0..request.tokens)).is_ok();
        let opened = match fits {
            true => {
                let deadline_ns = asked_ns.saturating_add(duration_ns(request.deadline));
                let room = name(request.room, request.use_count);
                let send = Send { room, pages: request.pages, deadline_ns };
                self.engine.proto().send_room(now, send).map_err(refused)
            }
            false => Err(misfit(Misfit::Pages { whose: Who::Here })),
        };
        match opened {
            Ok(room) => {
                self.keys.insert(key, room);
                let sending = SendingRoom {
                    tokens: request.tokens,
                    pages,
                    items: Vec::with_capacity(USUAL_ITEMS),
                    finish: None,
                    end: Some(end),
                    run: None,
                };
                self.rooms.insert(room, Room { key, span, is_ready: false, kind: Kind::Sending(sending) });
            }
            Err(why) => self.tell(end, Ended::alone(why)),
        }
    }

    fn open_serving(
        &mut self,
        now: u64,
        asked_ns: u64,
        key: u64,
        request: ServeRequest,
        end: Promise<Ended>,
    ) {
        let span = span("serve", request.room, request.use_count, request.tokens);
        let pages: Arc<[u32]> = request.pages.ids().into();
        let fits = PageTable::new(&self.layout, &pages).covering(&(0..request.tokens)).is_ok();
        let opened = match fits {
            true => {
                let deadline_ns = asked_ns.saturating_add(duration_ns(request.deadline));
                let room = name(request.room, request.use_count);
                let serve = Serve { room, pages: request.pages, buffers: self.buffers.clone(), deadline_ns };
                self.engine.proto().serve(now, serve).map_err(refused)
            }
            false => Err(misfit(Misfit::Pages { whose: Who::Here })),
        };
        match opened {
            Ok(room) => {
                self.keys.insert(key, room);
                let ServeRequest { tokens, aux, .. } = request;
                let serving = ServingRoom { tokens, pages, aux, end: Some(end), sums: None };
                self.rooms.insert(room, Room { key, span, is_ready: false, kind: Kind::Serving(serving) });
            }
            Err(why) => self.tell(end, Ended::alone(why)),
        }
    }

    fn peer_name(&self, peer: Peer) -> Option<PeerName> {
        match peer.0 {
            PeerKey::Dialed(key) => self.targets.get(&key).copied().map(PeerName::Target),
            PeerKey::Node(node) => Some(PeerName::Node(node)),
        }
    }

    fn room_of(&mut self, key: u64) -> Option<(RoomId, &mut Room)> {
        let id = *self.keys.get(&key)?;
        Some((id, self.rooms.get_mut(&id)?))
    }
}

fn span(role: &'static str, room: u64, use_count: u32, tokens: u32) -> tracing::Span {
    use tracing::field::Empty;
    tracing::debug_span!("room", role, room, use_count, tokens, peer = Empty, port = Empty)
}

fn misfit(misfit: Misfit) -> End {
    End::Refused { by: Who::Here, why: RoomRefusal::Mismatch(misfit) }
}

fn refused(error: RoomError) -> End {
    let why = match error {
        RoomError::Duplicate { .. } => RoomRefusal::Duplicate,
        RoomError::UnknownPeer => return End::PeerLost { cause: SessionEnd::ClosedHere },
        RoomError::TooLong { bytes, limit } => RoomRefusal::TooLong { bytes, limit },
        _ => RoomRefusal::Busy,
    };
    End::Refused { by: Who::Here, why }
}

/// Commands taken in one turn.
const COMMANDS: usize = 256;
