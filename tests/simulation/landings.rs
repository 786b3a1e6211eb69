//! Whether bytes land only where they may.

use crossdock_sim::Landing;
use crossdock_transport::Access;

use crate::faults::{Fault, Trouble};
use crate::ledger::Holder;
use crate::rules::{Held, Rule, broken};
use crate::world::World;

impl World {
    /// No byte lands where it must not.
    pub fn check_landings(&mut self) -> Held {
        let mut ghosts = Vec::new();
        for landing in self.fabric.landings() {
            let node = landing.to.0 as usize;
            self.log(|| format!("{landing:?}"));
            let Some(process) = &self.nodes[node].process else { continue };
            if !process.ports.contains(&landing.port) {
                continue;
            }
            let watch = process.watch.lock();
            let Some(pages) = watch.ledger.touched(landing.region, landing.offset, landing.bytes) else {
                return broken(Rule::HomePages, format!("bytes beside all pages: {landing:?}"));
            };
            let rail = process.ports.iter().position(|port| *port == landing.port);
            let is_mapped = rail.is_some_and(|rail| self.scenario.rails[rail].semantics.is_mapped());
            for page in pages {
                self.check_landing(&landing, page.holder, page.is_granted(landing.grant))?;
                if let Holder::Destination(at) = page.holder
                    && landing.access == Access::Write
                    && is_mapped
                {
                    let Some(part) = self.rooms[at].plan.decode_at(node) else { continue };
                    let has_one_writer = !self.rooms[at].plan.is_shared(part);
                    match self.rooms[at].side(part).and_then(|side| side.told.as_ref()) {
                        // It troubles the room that it was meant for, too.
                        Some((ended_ns, _)) => ghosts.push((node, landing.from.0 as usize, *ended_ns)),
                        None if page.is_outdated(landing.grant, has_one_writer) => {
                            ghosts.push((node, landing.from.0 as usize, landing.at_ns));
                        }
                        None => {}
                    }
                }
            }
        }
        ghosts.dedup();
        for (node, from, from_ns) in ghosts {
            let (fault, nodes, until_ns) = (Fault::GhostWrite, vec![node, from], self.now_ns);
            self.troubles.push(Trouble { fault, nodes, from_ns, until_ns });
        }
        Ok(())
    }

    fn check_landing(&self, landing: &Landing, holder: Holder, is_granted: bool) -> Held {
        let Holder::Destination(at) = holder else {
            return broken(Rule::HomePages, format!("in a page that is {holder:?}: {landing:?}"));
        };
        let plan = &self.rooms[at].plan;
        let right_way = match landing.access {
            Access::Write => !plan.is_pull && is_granted,
            Access::Read => plan.is_pull,
        };
        let mut writers = plan.decode_at(landing.to.0 as usize).into_iter().flat_map(|part| plan.peers(part));
        match right_way && writers.any(|writer| plan.node(writer) == landing.from.0 as usize) {
            true => Ok(()),
            false => broken(Rule::HomePages, format!("in a page of room {at}: {landing:?}")),
        }
    }
}
