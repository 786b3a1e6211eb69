//! How users' rooms begin: each as the shares of which it consists.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crossdock_engine::{Promise, duration_ns};
use crossdock_proto::{
    End, Fetch, Homecoming, Misfit, PeerName, Receive, RoomError, RoomId, RoomName, RoomRefusal, Send, Serve,
    SessionEnd, Who,
};

use super::Worker;
use super::room::{Decode, Kind, Room, SendingRoom, ServingRoom};
use super::whole::Whole;
use crate::params::Ask;
use crate::request::{DecodePromises, Ended, GatherRequest, Peer, PeerKey, ScatterRequest, name};
use crate::{CacheLayout, Extent};

/// What the prefill side does with its pages.
pub(super) enum Offer {
    /// It sends them; ahead of some that it does not know yet.
    Send { is_ahead: bool },
    /// Readers fetch them, and are handed this with the bytes.
    Serve { aux: Vec<u8> },
}

/// When a user has asked for a room, and by which number.
pub(super) struct Asked {
    pub now: u64,
    pub key: u64,
    pub asked_ns: Option<u64>,
}

impl Asked {
    fn deadline_ns(&self, deadline: Duration) -> u64 {
        self.asked_ns.unwrap_or(self.now).saturating_add(duration_ns(deadline))
    }
}

impl Worker {
    /// Opens a share with each source and for each pool.
    pub(super) fn open_decode(
        &mut self,
        asked: &Asked,
        request: GatherRequest,
        pull: bool,
        told: DecodePromises,
    ) {
        let &Asked { now, key, .. } = asked;
        if let Err(end) = self.check_gather(&request) {
            return told.refuse(request.pages, Ended::alone(end));
        }
        let GatherRequest { sources, room, use_count, tokens, skip_tokens, layers, pages, deadline } =
            request;
        let deadline_ns = asked.deadline_ns(deadline);
        let checksums = self.verify.covers(room);
        let arrivals = told.arrivals.clone();
        let layers = layers.unwrap_or_else(|| self.layout.layers());
        let mut whole = Whole::decode(told, layers, sources.len());
        let mut refusal = None;
        for (pool, pages) in pages.into_iter().enumerate() {
            let ask = Ask { checksums, ..self.layout.ask(pool, tokens, skip_tokens, pages.len()) };
            let ids: Arc<[u32]> = pages.ids().into();
            let granted = pages.grant();
            let mut values: Vec<_> = sources[1..].iter().map(|_| granted.another_writer()).collect();
            values.push(granted);
            for (source, pages) in sources.iter().zip(values) {
                let share = name(room, use_count, (source.rank, self.layout.rank(), pool));
                let ask = Ask { parts: source.parts, ..ask };
                let (rank, params) = (Some(source.rank), ask.encode());
                let opened = match (self.peer_name(source.peer), &refusal) {
                    (Some(peer), None) if pull => self
                        .engine
                        .proto()
                        .fetch(now, Fetch { peer, rank, room: share, pages, params, deadline_ns }),
                    (Some(peer), None) => {
                        let buffers = self.buffers[pool].clone();
                        let receive =
                            Receive { peer, rank, room: share, pages, buffers, params, deadline_ns };
                        self.engine.proto().receive(now, receive)
                    }
                    _ => {
                        refusal.get_or_insert_with(gone);
                        tell_home(self, &mut whole, pool, Homecoming::new(pages));
                        continue;
                    }
                };
                match opened {
                    Ok(id) => {
                        let role = if pull { "fetch" } else { "receive" };
                        let decode = Decode {
                            ask,
                            pages: ids.clone(),
                            aux: Vec::new(),
                            is_home: false,
                            arrivals: arrivals.clone(),
                            arrived: 0,
                            reads: None,
                            proof: None,
                        };
                        whole.opened(id);
                        self.add_share(key, id, pool, span(role, share, tokens), Kind::Decode(decode));
                    }
                    Err(unopened) => {
                        refusal.get_or_insert(refused(unopened.error));
                        tell_home(self, &mut whole, pool, unopened.pages);
                    }
                }
            }
        }
        self.begin(now, key, whole, refusal);
    }

    fn check_gather(&self, request: &GatherRequest) -> Result<(), End> {
        let GatherRequest { sources, tokens, skip_tokens, layers, pages, .. } = request;
        let (tokens, skip_tokens) = (*tokens, *skip_tokens);
        if skip_tokens > tokens {
            return Err(misfit(Misfit::Skipped { tokens, skip_tokens }));
        }
        let kept = self.layout.layers();
        if let Some(&Range { start: first, end }) = layers.as_ref()
            && (first >= end || first < kept.start || end > kept.end)
        {
            return Err(misfit(Misfit::Layers { first, end }));
        }
        self.check_lists(pages.len(), sources.iter().map(|source| source.rank))?;
        for (pool, pages) in pages.iter().enumerate() {
            let ask = self.layout.ask(pool, tokens, skip_tokens, pages.len());
            let table = self.layout.decode_table(&ask, pages.ids());
            if table.covering(&self.layout.moved(&ask)).is_err() {
                return Err(misfit(Misfit::Pages { whose: Who::Here }));
            }
        }
        Ok(())
    }

    /// There is a list for each pool, and ranks that can be named, each once.
    fn check_lists(&self, lists: usize, ranks: impl Iterator<Item = u32>) -> Result<(), End> {
        let pools = self.layout.pools().len();
        if lists != pools {
            return Err(misfit(Misfit::Lists { lists, pools }));
        }
        let mut ranks: Vec<u32> = ranks.collect();
        ranks.sort_unstable();
        let is_sound = !ranks.is_empty()
            && ranks.is_sorted_by(|a, b| a < b)
            && ranks.iter().all(|&rank| rank < CacheLayout::MAX_RANKS);
        if is_sound { Ok(()) } else { Err(misfit(Misfit::Ranks)) }
    }

    /// Of a room that is opened ahead of its pages, no list is too short.
    fn check_scatter(&self, request: &ScatterRequest, is_ahead: bool) -> Result<(), End> {
        let ScatterRequest { ranks, tokens, pages, .. } = request;
        self.check_lists(pages.len(), ranks.iter().copied())?;
        for (pool, pages) in pages.iter().enumerate() {
            let limit = self.layout.pools()[pool].pages();
            if pages.len() > limit as usize {
                return Err(misfit(Misfit::TooManyPages { pages: pages.len(), limit }));
            }
            let ask = self.layout.ask(pool, *tokens, 0, pages.len());
            let table = self.layout.prefill_table(&ask, pages.ids());
            if !is_ahead && table.covering(&self.layout.moved(&ask)).is_err() {
                return Err(misfit(Misfit::Pages { whose: Who::Here }));
            }
        }
        Ok(())
    }

    /// Opens a share for each rank and pool.
    pub(super) fn open_prefill(
        &mut self,
        asked: &Asked,
        request: ScatterRequest,
        offer: &Offer,
        end: Promise<Ended>,
    ) {
        let &Asked { now, key, .. } = asked;
        let role = if matches!(offer, Offer::Serve { .. }) { "serve" } else { "send" };
        let is_ahead = matches!(offer, Offer::Send { is_ahead: true });
        if let Err(why) = self.check_scatter(&request, is_ahead) {
            return self.tell(end, Ended::alone(why));
        }
        let ScatterRequest { ranks, room, use_count, tokens, pages, deadline } = request;
        let deadline_ns = asked.deadline_ns(deadline);
        let mut whole = Whole::prefill(end);
        for (pool, shared) in pages.into_iter().enumerate() {
            let ask = self.layout.ask(pool, tokens, 0, shared.len());
            let is_counted = !is_ahead || self.layout.pools()[pool].extent() != Extent::Entries;
            let ids: Arc<[u32]> = shared.ids().into();
            for &rank in &ranks {
                let (share, pages) =
                    (name(room, use_count, (self.layout.rank(), rank, pool)), shared.clone());
                let (rank, room) = (Some(rank), share);
                let opened = match offer {
                    Offer::Send { .. } => {
                        self.engine.proto().send_room(now, Send { room, rank, pages, deadline_ns })
                    }
                    Offer::Serve { .. } => {
                        let buffers = self.buffers[pool].clone();
                        self.engine.proto().serve(now, Serve { room, rank, pages, buffers, deadline_ns })
                    }
                };
                match opened {
                    Ok(id) => {
                        let tokens = ask.tokens;
                        let kind = match offer {
                            Offer::Send { .. } => {
                                Kind::Sending(SendingRoom::new(is_counted.then_some(tokens), ids.to_vec()))
                            }
                            Offer::Serve { aux } => {
                                // What goes with the pages goes with those of the tokens.
                                let aux = if pool == 0 { aux.clone() } else { Vec::new() };
                                Kind::Serving(ServingRoom {
                                    tokens,
                                    pages: ids.clone(),
                                    aux,
                                    ask,
                                    sums: None,
                                })
                            }
                        };
                        whole.opened(id);
                        self.add_share(key, id, pool, span(role, share, tokens), kind);
                    }
                    Err(error) => return self.begin(now, key, whole, Some(refused(error))),
                }
            }
        }
        self.begin(now, key, whole, None);
    }

    fn add_share(&mut self, key: u64, id: RoomId, pool: usize, span: tracing::Span, kind: Kind) {
        self.rooms.insert(id, Room { key, pool, span, is_ready: false, has_ended: false, kind });
    }

    /// Every share has been opened, or one was refused: then the others are given up.
    fn begin(&mut self, now: u64, key: u64, mut whole: Whole, refusal: Option<End>) {
        let shares = refusal.is_some().then(|| whole.shares.clone());
        if let Some(end) = refusal
            && let Some(told) = whole.refuse(Ended::alone(end))
        {
            self.tell_end(told);
        }
        if !whole.is_over() {
            self.wholes.insert(key, whole);
        }
        for share in shares.into_iter().flatten() {
            self.engine.proto().cancel(now, share);
        }
    }

    fn peer_name(&self, peer: Peer) -> Option<PeerName> {
        match peer.0 {
            PeerKey::Dialed(key) => self.targets.get(&key).copied().map(PeerName::Target),
            PeerKey::Node(node) => Some(PeerName::Node(node)),
        }
    }
}

/// A pool's pages that a peer was never told of.
fn tell_home(worker: &Worker, whole: &mut Whole, pool: usize, pages: Homecoming) {
    if let Some((promise, home)) = whole.home(pool, pages) {
        worker.tell(promise, home);
    }
}

fn gone() -> End {
    End::PeerLost { cause: SessionEnd::ClosedHere }
}

fn span(role: &'static str, name: RoomName, tokens: u32) -> tracing::Span {
    use tracing::field::Empty;
    let RoomName { room, use_count, share } = name;
    tracing::debug_span!("room", role, room, use_count, share, tokens, peer = Empty, port = Empty)
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
