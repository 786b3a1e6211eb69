//! Whether pages come home when they may, and with what in them.

use std::ops::Range;

use crossdock_engine::Abandoned;
use crossdock_kv::ContextShare;
use crossdock_memory::{PageSet, PoolError};
use crossdock_proto::{End, Who};

use crate::cache::{self, BEFORE, Mask, SCRIBBLED};
use crate::ledger::Holder;
use crate::room::{Computing, Part, Room};
use crate::rules::{Held, Rule, Violation, broken};
use crate::world::World;

impl World {
    /// Whether the pages of a decode side have come home, and with what in them.
    pub fn check_home(&mut self, node: usize, at: usize, nth: usize) -> Held {
        let room = &mut self.rooms[at];
        let decode = room.decodes[nth].as_mut().expect("opened");
        if decode.side.is_settled {
            return Ok(());
        }
        let process = self.nodes[node].process.as_ref().expect("runs");
        let is_delivered = matches!(&decode.side.told, Some((_, End::Delivered)));
        let still_out = || match is_delivered {
            true => broken(Rule::Pool, format!("room {at} is delivered, and its pages are not home")),
            false => Ok(()),
        };
        let set = match decode.receiving.pages.poll() {
            Ok(None) => return still_out(),
            Ok(Some(set)) => set,
            // Nobody holds the ticket, or the room was refused at once and the pages were given back.
            Err(Abandoned) => {
                let refused = matches!(
                    &decode.side.told,
                    Some((_, End::Refused { by: Who::Here, .. } | End::PeerLost { .. }))
                );
                if !decode.is_careless && !refused {
                    return broken(Rule::Pool, format!("room {at}: its pages will never be told of"));
                }
                // No pages at all can be taken back at any time.
                if decode.side.told.is_none() {
                    return Ok(());
                }
                match adopt(process.pool.adopt(&decode.side.pages))? {
                    Some(set) => set,
                    None => return still_out(),
                }
            }
        };
        if set.ids() != decode.side.pages {
            return broken(Rule::Pool, format!("room {at}: {:?} came home, not its pages", set.ids()));
        }
        if decode.side.told.is_none() {
            return broken(Rule::Pool, format!("room {at}: pages came home before its end"));
        }
        decode.side.is_settled = true;
        if is_delivered {
            self.check_bytes(node, at, nth)?;
        }
        let pages = self.rooms[at].side(Part::Decode(nth)).map(|side| side.pages.clone()).unwrap_or_default();
        self.log(|| format!("room {at}: the pages {pages:?} of node {node} are home"));
        let process = self.nodes[node].process.as_ref().expect("runs");
        process.cache.poison(&pages);
        process.watch.lock().ledger.give(&pages, Holder::Home);
        drop(set);
        Ok(())
    }

    /// Whether the source of a room is free again.
    pub fn check_source(&mut self, node: usize, at: usize, nth: usize) -> Held {
        let prefill = self.rooms[at].prefills[nth].as_mut().expect("opened");
        if prefill.side.told.is_none() {
            return Ok(());
        }
        prefill.to_come = None;
        let process = self.nodes[node].process.as_ref().expect("runs");
        let Some(set) = adopt(process.pool.adopt(&prefill.side.pages))? else { return Ok(()) };
        prefill.side.is_settled = true;
        process.cache.poison(&prefill.side.pages);
        process.watch.lock().ledger.give(&prefill.side.pages, Holder::Home);
        drop(set);
        Ok(())
    }

    /// In a delivered room the bytes are those that were sent, and no others have changed.
    fn check_bytes(&self, node: usize, at: usize, nth: usize) -> Held {
        let Room { plan, decodes, .. } = &self.rooms[at];
        let Some(decode) = &decodes[nth] else { return Ok(()) };
        let cache = &self.nodes[node].process.as_ref().expect("runs").cache;
        let is_verified = self.scenario.nodes[node].verify.covers(plan.number);
        let first_page = cache.layout.context().held_before(plan.skip_tokens) / cache.layout.page_tokens();
        let moved = plan.skip_tokens..plan.tokens;
        let kept = Mask::of(&cache.layout);
        let sources: Vec<(Range<u32>, ContextShare, Mask, &Computing)> = plan.decodes[nth]
            .peers
            .iter()
            .map(|&peer| {
                let layout = &self.scenario.nodes[plan.prefills[peer].node].layout;
                let brought = kept.and(Mask::of(layout));
                (layout.layers(), layout.context(), brought, &plan.computing[peer])
            })
            .collect();
        let mut wrong = None;
        for layer in cache.layout.layers() {
            cache.for_each_token(&decode.side.pages, first_page, |page, in_page, token| {
                let found = cache.read(layer, page, in_page);
                let (mut untouched, mut is_right) = (kept, true);
                for (layers, context, brought, computing) in &sources {
                    if !layers.contains(&layer) || !moved.contains(&token) || !cache::holds(context, token) {
                        continue;
                    }
                    untouched = untouched.without(*brought);
                    let sent = cache::content(plan.salt, layer, token);
                    is_right &= match computing.scribbles.contains(&(layer, token)) {
                        false => brought.is_alike(&found, &sent),
                        // What was changed after it was sent may have been moved before or after the change, or in part;
                        // but where there is a checksum, it says which.
                        true => {
                            let changed = cache::content(plan.salt ^ SCRIBBLED, layer, token);
                            brought.is_alike(&found, &changed)
                                || (!is_verified && brought.is_mixture(&found, &changed, &sent))
                        }
                    };
                }
                is_right &= untouched.is_alike(&found, &cache::content(plan.salt ^ BEFORE, layer, token));
                if !is_right {
                    wrong.get_or_insert((layer, token));
                }
            });
        }
        match wrong {
            None => Ok(()),
            Some((layer, token)) => {
                broken(Rule::Bytes, format!("room {at}: wrong bytes in layer {layer}, token {token}"))
            }
        }
    }
}

/// Pages that somebody still holds are not an error, but anything else is.
fn adopt(adopted: Result<PageSet, PoolError>) -> Result<Option<PageSet>, Violation> {
    match adopted {
        Ok(set) => Ok(Some(set)),
        Err(PoolError::PageInUse { .. } | PoolError::PageInQuarantine { .. }) => Ok(None),
        Err(error) => broken(Rule::Pool, error.to_string()),
    }
}
