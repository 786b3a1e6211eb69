//! A user's room: all of its shares, each of which is a room of the protocol that ends by itself.

use std::ops::Range;
use std::sync::Arc;

use crossdock_engine::Promise;
use crossdock_proto::planted::{Planted, is_planted};
use crossdock_proto::{Homecoming, RoomId};

use crate::pages_ticket::AllHome;
use crate::request::{DecodePromises, Ended, Received};
use crate::{CacheLayout, Parts};

/// What is told of a user's room, once, and what it waits for.
pub(super) struct Whole {
    /// Every share that was opened.
    pub shares: Vec<RoomId>,
    /// How many of them have not ended.
    open: usize,
    /// The first end of a share that was no delivery, or else the last one.
    ended: Option<Ended>,
    told: Told,
}

enum Told {
    Decode(DecodeTold),
    Prefill(Option<Promise<Ended>>),
}

struct DecodeTold {
    end: Option<Promise<Received>>,
    aux: Vec<u8>,
    /// One for each pool.
    homes: Vec<Home>,
    /// From how many ranks the tokens come.
    sources: usize,
    /// The layers that these are to bring.
    layers: Range<u32>,
    /// The caches of the ranks whose tokens have landed.
    brought: Vec<(Arc<CacheLayout>, Parts)>,
}

/// One pool's pages, on their way home.
struct Home {
    promise: Option<Promise<AllHome>>,
    come: Vec<Homecoming>,
    /// How many peers could write them.
    writers: usize,
}

/// What a user is to be told now.
pub(super) enum Tell {
    Received(Promise<Received>, Received),
    Ended(Promise<Ended>, Ended),
}

impl Whole {
    /// Of these layers from so many ranks, each of which writes pages of each pool.
    pub fn decode(promises: DecodePromises, layers: Range<u32>, sources: usize) -> Self {
        let home =
            |promise| Home { promise: Some(promise), come: Vec::with_capacity(sources), writers: sources };
        let homes = promises.pages.into_iter().map(home).collect();
        let (end, aux, brought) = (Some(promises.end), Vec::new(), Vec::new());
        let told = DecodeTold { end, aux, homes, sources, layers, brought };
        Self::new(Told::Decode(told))
    }

    pub fn prefill(end: Promise<Ended>) -> Self {
        Self::new(Told::Prefill(Some(end)))
    }

    fn new(told: Told) -> Self {
        Self { shares: Vec::with_capacity(1), open: 0, ended: None, told }
    }

    pub fn opened(&mut self, share: RoomId) {
        self.shares.push(share);
        self.open += 1;
    }

    /// Whether nothing of it is open and everything has been told.
    pub fn is_over(&self) -> bool {
        let is_told = match &self.told {
            Told::Decode(told) => told.end.is_none() && told.homes.iter().all(|home| home.promise.is_none()),
            Told::Prefill(end) => end.is_none(),
        };
        self.open == 0 && is_told
    }

    /// The tokens of a rank with this cache have landed. Whether all that `here` keeps of the room's layers has come, once
    /// the last rank has brought its share.
    pub fn is_brought(&mut self, here: &CacheLayout, cache: &Arc<CacheLayout>, parts: Parts) -> Option<bool> {
        let Told::Decode(told) = &mut self.told else { return None };
        told.brought.push((cache.clone(), parts));
        (told.brought.len() == told.sources).then(|| here.is_covered_by(&told.layers, &told.brought))
    }

    /// A share has ended. On the decode side the room ends with the first share that fails, since nothing makes up for
    /// it, else with the last; on the prefill side with the last, so that the others are not disturbed.
    pub fn share_ended(&mut self, ended: Ended, aux: Vec<u8>) -> Option<Tell> {
        self.open -= 1;
        if self.ended.as_ref().is_none_or(Ended::is_delivered) {
            self.ended = Some(ended);
        }
        let ended = self.ended.as_ref()?;
        match &mut self.told {
            Told::Decode(told) => {
                if told.aux.is_empty() {
                    told.aux = aux;
                }
                if self.open > 0 && ended.is_delivered() && !is_planted(Planted::FirstShareDelivers) {
                    return None;
                }
                // Nobody may believe what was not proven.
                let aux = if ended.is_delivered() { std::mem::take(&mut told.aux) } else { Vec::new() };
                Some(Tell::Received(told.end.take()?, Received { ended: ended.clone(), aux }))
            }
            Told::Prefill(end) => match self.open {
                0 => Some(Tell::Ended(end.take()?, ended.clone())),
                _ if is_planted(Planted::FirstFailureEndsAll) && !ended.is_delivered() => {
                    Some(Tell::Ended(end.take()?, ended.clone()))
                }
                _ => None,
            },
        }
    }

    /// One of the shares was not opened, and no more are.
    pub fn refuse(&mut self, ended: Ended) -> Option<Tell> {
        self.open += 1;
        self.share_ended(ended, Vec::new())
    }

    /// A peer can write a pool's pages no more. What is to be told, if that was the last.
    pub fn home(&mut self, pool: usize, pages: Homecoming) -> Option<(Promise<AllHome>, AllHome)> {
        let Told::Decode(told) = &mut self.told else { return None };
        let home = &mut told.homes[pool];
        home.come.push(pages);
        match home.come.len() == home.writers {
            true => Some((home.promise.take()?, AllHome(std::mem::take(&mut home.come)))),
            false => None,
        }
    }
}
