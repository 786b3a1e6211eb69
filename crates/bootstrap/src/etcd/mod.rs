//! The registry that an etcd cluster keeps, for deployments that have one and want a registry that no single process
//! takes with it.
//!
//! Every client decides here what crossdock's own server decides there, by the same rules, and puts its decision through
//! as a transaction that holds only if nobody else has decided meanwhile. Leases take the place of the server's clock.

mod gateway;
mod record;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::backend::Backend;
use crate::backoff::{Backoff, random};
use crate::client::ClientConfig;
use crate::error::{Error, InvalidServer, Stage};
use crate::exchange::Deadline;
use crate::group::{Counted, Group, GroupId, RoomPolicy, Topology, fits};
use crate::problem::Problem;
use crate::query::{Mark, Query, Until, Wait};
use crate::registry::{Limits, Refusal, Registered};
use crate::rooms::{self, DpRank, RoomRefusal};
use crate::wire::{Health, Workers};
use crate::worker::{Incarnation, Listed, NodeId, Worker};

use gateway::{Gateway, Header, Op, Range, Unchanged};
use record::{Entry, Keys, Past, Standing};

/// Speaks to one etcd cluster.
#[derive(Debug)]
pub(crate) struct Etcd {
    gateway: Gateway,
    keys: Keys,
    limits: Limits,
}

impl Etcd {
    pub(crate) fn new(config: ClientConfig) -> Result<Etcd, InvalidServer> {
        let ClientConfig { server, token, answer_bytes, limits, .. } = config;
        let (members, prefix) = gateway::parse(&server)?;
        Ok(Etcd { gateway: Gateway::new(members, token, answer_bytes), keys: Keys::new(prefix), limits })
    }
}

impl Backend for Etcd {
    fn name(&self) -> &str {
        self.gateway.name()
    }

    fn health(&self, by: Deadline) -> Result<Health, Error> {
        let version = self.gateway.version(by)?;
        let workers = self.live(None, by)?.1.len();
        Ok(Health { status: "ok".to_owned(), workers, uptime_ms: None, version })
    }

    fn register(&self, worker: &Worker, by: Deadline) -> Result<Registered, Error> {
        self.limits.check(worker).map_err(|refusal| self.refused(refusal))?;
        let mut leases = Leases::default();
        let mut in_vain = false;
        // An eighth of the time is left to give the leases back.
        let settled_by = by.remaining().map_or(by, |left| by.within(left - left / 8));
        let done = self.until_settled(settled_by, || {
            let seen = self.look(worker, by)?;
            let plan = Plan::new(worker, &seen).map_err(|refusal| self.refused(refusal))?;
            let carried_out = self.carry_out(worker, &seen, plan, &mut leases, by);
            in_vain = matches!(carried_out, Ok(None));
            carried_out
        });
        let refused = matches!(done, Err(Error::Refused { .. } | Error::Etcd { status: ..500, .. }));
        if done.is_err() && (refused || in_vain) {
            // After any other failure the transaction may have been made, and what it put hangs on them.
            self.give_back(&mut leases, by);
        }
        done
    }

    fn renew(&self, node: &NodeId, incarnation: Incarnation, by: Deadline) -> Result<(), Error> {
        self.until_settled(by, || {
            let (past, revision, entry) = self.held_by(node, incarnation, by)?;
            if let Some((_, lease)) = entry.kept
                && self.gateway.keep_alive(lease, by)?
            {
                // What was before this incarnation is remembered for a day from the last renewal, about.
                if random().is_multiple_of(4) {
                    self.gateway.keep_alive(past.lease, by)?;
                }
                return Ok(Some(()));
            }
            // Its time to live was over, and it is here because it warms up.
            let Some((worker, _)) = entry.warming else {
                return Err(self.refused(Refusal::Unknown { node: node.clone() }));
            };
            let lease = self.gateway.grant(Duration::from_millis(worker.ttl_ms), by)?;
            let key = self.keys.kept(past.group.as_ref(), node);
            let put = Op::Put { key: &key, value: &record::encode(&worker), lease };
            let done = self.gateway.transact(&[Unchanged(&self.keys.past(node), revision)], &[put], by)?;
            Ok(done.succeeded.then_some(()))
        })
    }

    fn deregister(&self, node: &NodeId, incarnation: Incarnation, by: Deadline) -> Result<(), Error> {
        let lease = self.until_settled(by, || {
            let (past, revision, entry) = self.held_by(node, incarnation, by)?;
            let group = past.group.as_ref();
            let [kept, warming] = [self.keys.kept(group, node), self.keys.warming(group, node)];
            let ops = [Op::Delete(&kept), Op::Delete(&warming)];
            let done = self.gateway.transact(&[Unchanged(&self.keys.past(node), revision)], &ops, by)?;
            Ok(done.succeeded.then_some(entry.kept.map(|(_, lease)| lease)))
        })?;
        // Nothing hangs on it any more. Where this fails it ends by itself.
        if let Some(lease) = lease {
            let _ = self.gateway.revoke(lease, by);
        }
        Ok(())
    }

    fn worker(&self, node: &NodeId, by: Deadline) -> Result<Option<Listed>, Error> {
        let past = self.gateway.transact(&[], &[Op::Get(&self.keys.past(node))], by)?;
        let Some((past, _)) = past.ranges().next().and_then(Past::read) else { return Ok(None) };
        let entry = self.entry(past.group.as_ref(), node, by)?;
        Ok(entry.listed())
    }

    fn find(&self, query: &Query, wait: Option<&Wait>, by: Deadline) -> Result<Workers, Error> {
        let group = query.group.as_ref();
        let over = wait.map(|wait| by.within(wait.time));
        if let (Some(Wait { until: Until::Changed(seen), .. }), Some(over)) = (wait, over) {
            let now = self.gateway.transact(&[], &[Op::Get(&self.keys.live(group))], by)?.header;
            if !mark(now).forgot(seen) {
                let seen = i64::try_from(seen.revision).unwrap_or(i64::MAX - 1);
                self.changed(&self.keys.live(group), seen, over)?;
            }
        }
        let enough = |workers: &Workers| match wait.map(|wait| &wait.until) {
            Some(Until::Count(count)) => workers.workers.len() >= *count,
            _ => true,
        };
        self.look_until(&self.keys.live(group), over, enough, || {
            let (header, entries) = self.live(group, by)?;
            let listed = entries.into_iter().filter_map(|entry| entry.listed());
            let matching = listed.filter(|listed| query.matches(&listed.worker, listed.state));
            let mut workers: Vec<Listed> = matching.collect();
            workers.sort_by(|a, b| a.worker.node.cmp(&b.worker.node));
            Ok((header, Workers { workers, mark: mark(header) }))
        })
    }

    fn group(&self, group: &GroupId, counted: Counted, wait: Duration, by: Deadline) -> Result<Group, Error> {
        let over = (!wait.is_zero()).then(|| by.within(wait));
        let complete = |group: &Option<Group>| group.as_ref().is_some_and(|group| group.complete);
        let found = self.look_until(&self.keys.live(Some(group)), over, complete, || {
            let (header, entries) = self.live(Some(group), by)?;
            Ok((header, sum_up(&entries, counted)))
        })?;
        found.ok_or_else(|| self.room_refused(RoomRefusal::UnknownGroup { group: group.clone() }))
    }

    fn groups(&self, counted: Counted, by: Deadline) -> Result<Vec<Group>, Error> {
        let mut groups: BTreeMap<GroupId, Vec<Entry>> = BTreeMap::new();
        for entry in self.live(None, by)?.1 {
            if let Some(group) = entry.group() {
                groups.entry(group.clone()).or_default().push(entry);
            }
        }
        Ok(groups.values().filter_map(|members| sum_up(members, counted)).collect())
    }

    fn tell_rooms(
        &self,
        group: &GroupId,
        rooms: &[(u64, u32)],
        keep: Duration,
        by: Deadline,
    ) -> Result<(), Error> {
        self.limits.check_keep(keep).map_err(|refusal| self.room_refused(refusal))?;
        let topology = self.topology(group, by)?;
        rooms::admit(group, &topology, rooms).map_err(|refusal| self.room_refused(refusal))?;
        if rooms.is_empty() {
            return Ok(());
        }
        let lease = self.gateway.grant(keep, by)?;
        // One transaction may not put a key twice; what was said last holds.
        let rooms: BTreeMap<u64, u32> = rooms.iter().copied().collect();
        let pairs: Vec<(String, String)> =
            rooms.iter().map(|(room, rank)| (self.keys.room(group, *room), rank.to_string())).collect();
        for part in pairs.chunks(OPS_PER_TRANSACTION) {
            let put = part.iter().map(|(key, rank)| Op::Put { key, value: rank.as_bytes(), lease });
            let ops: Vec<Op> = put.collect();
            self.gateway.transact(&[], &ops, by)?;
        }
        Ok(())
    }

    fn dp_ranks(
        &self,
        group: &GroupId,
        rooms: &[u64],
        wait: Duration,
        by: Deadline,
    ) -> Result<Vec<DpRank>, Error> {
        let over = (!wait.is_zero()).then(|| by.within(wait));
        let topology = self.topology(group, by)?;
        if topology.rooms == RoomPolicy::Follow {
            return Ok(rooms.iter().map(|room| rooms::follow(*room, &topology)).collect());
        }
        let known = |ranks: &Vec<DpRank>| !ranks.contains(&DpRank::NotYet);
        self.look_until(&self.keys.rooms(group), over, known, || {
            let (header, ranks) = self.told(group, rooms, by)?;
            Ok((header, ranks.into_iter().map(|rank| rooms::within(rank, &topology)).collect()))
        })
    }
}

impl Etcd {
    /// All live entries, or those of one group.
    fn live(&self, group: Option<&GroupId>, by: Deadline) -> Result<(Header, Vec<Entry>), Error> {
        let done = self.gateway.transact(&[], &[Op::GetAll(&self.keys.live(group))], by)?;
        let header = done.header;
        let entries = done.ranges().next().map(|range| self.keys.entries(range)).unwrap_or_default();
        Ok((header, entries.into_values().collect()))
    }

    /// The live entry of one node, empty if there is none.
    fn entry(&self, group: Option<&GroupId>, node: &NodeId, by: Deadline) -> Result<Entry, Error> {
        let done = self.gateway.transact(&[], &[Op::GetAll(&self.keys.node(group, node))], by)?;
        let found = done.ranges().next().map(|range| self.keys.entries(range)).unwrap_or_default();
        Ok(found.into_values().next().unwrap_or_default())
    }

    /// A group's topology. All members agree on it, so one of them is asked, as a rule: rooms are looked up at each
    /// request, and groups may be large.
    fn topology(&self, group: &GroupId, by: Deadline) -> Result<Topology, Error> {
        let done = self.gateway.transact(&[], &[Op::GetFirst(&self.keys.live(Some(group)))], by)?;
        let first = done.ranges().next().map(|range| self.keys.entries(range)).unwrap_or_default();
        let member = first.values().find_map(|entry| entry.worker()?.member.as_ref());
        match member {
            Some(member) => Ok(member.topology().clone()),
            // Nobody is there, or what somebody else wrote is the first.
            None => Ok(self.group(group, Counted::ReadyAndWarming, Duration::ZERO, by)?.topology),
        }
    }

    /// What is known of a node and its group before it registers.
    fn look(&self, worker: &Worker, by: Deadline) -> Result<Seen, Error> {
        let group = worker.member.as_ref().map(|member| member.group());
        let past = self.keys.past(&worker.node);
        let fence = group.map(|group| self.keys.fence(group));
        let others = match group {
            Some(group) => self.keys.live(Some(group)),
            None => self.keys.node(None, &worker.node),
        };
        let mut ops = vec![Op::Get(&past), Op::GetAll(&others)];
        ops.extend(fence.as_deref().map(Op::Get));
        let mut found = self.gateway.transact(&[], &ops, by)?.ranges();
        let mut next = || found.next().unwrap_or_default();
        let (past, mut entries, fence) = (Past::read(next()), self.keys.entries(next()), next());
        let mut own = entries.remove(&worker.node).unwrap_or_default();
        if let Some((past, _)) = &past
            && past.group.as_ref() != group
            && own.is_empty()
        {
            own = self.entry(past.group.as_ref(), &worker.node, by)?;
        }
        let fence = fence.kvs.first().map_or(0, |pair| pair.mod_revision);
        Ok(Seen { past, own, others: entries.into_values().collect(), fence })
    }

    fn carry_out(
        &self,
        worker: &Worker,
        seen: &Seen,
        plan: Plan,
        leases: &mut Leases,
        by: Deadline,
    ) -> Result<Option<Registered>, Error> {
        let Worker { node, incarnation, ttl_ms, warm_up_ms, .. } = worker;
        let group = worker.member.as_ref().map(|member| member.group());
        let grant = |held: &mut Option<i64>, time| match *held {
            Some(lease) => Ok(lease),
            None => self.gateway.grant(time, by).map(|lease| *held.insert(lease)),
        };
        let kept_lease = grant(&mut leases.kept, Duration::from_millis(*ttl_ms))?;
        let record = record::encode(worker);
        let (kept, warming) = (self.keys.kept(group, node), self.keys.warming(group, node));
        let mut ops = vec![Op::Put { key: &kept, value: &record, lease: kept_lease }];
        match plan.warming {
            Warming::Begins => {
                let lease = grant(&mut leases.warming, Duration::from_millis(*warm_up_ms))?;
                ops.push(Op::Put { key: &warming, value: &record, lease });
            }
            Warming::GoesOn(lease) => ops.push(Op::Put { key: &warming, value: &record, lease }),
            Warming::Not => ops.push(Op::Delete(&warming)),
        }
        let before = seen.past.as_ref().and_then(|(past, _)| past.group.as_ref());
        let elsewhere = (seen.past.is_some() && before != group)
            .then(|| [self.keys.kept(before, node), self.keys.warming(before, node)]);
        ops.extend(elsewhere.iter().flatten().map(|key| Op::Delete(key)));

        let (past_key, past_revision) =
            (self.keys.past(node), seen.past.as_ref().map_or(0, |(_, revision)| *revision));
        let past = seen.past.as_ref().map(|(past, _)| past);
        // The node goes on with the lease that it has: one for a day is not to be left behind by each attempt that fails.
        let past_lease = match past {
            Some(past) if past.lease != 0 && self.gateway.keep_alive(past.lease, by)? => past.lease,
            _ => grant(&mut leases.past, PAST_TIME)?,
        };
        let past = Past::after(past, *incarnation, group, self.limits.remembered_incarnations);
        let past = record::encode(&past);
        ops.push(Op::Put { key: &past_key, value: &past, lease: past_lease });
        let mut only_if = vec![Unchanged(&past_key, past_revision)];
        let fence = group.map(|group| self.keys.fence(group));
        if let Some(fence) = &fence {
            only_if.push(Unchanged(fence, seen.fence));
            ops.push(Op::Put { key: fence, value: b"", lease: past_lease });
        }
        match self.gateway.transact(&only_if, &ops, by) {
            // A lease is over: the warm-up has just ended, or others were in the way for longer than the time to live.
            Err(Error::Etcd { status: 404, .. }) => {
                self.give_back(leases, by);
                Ok(None)
            }
            done => Ok(done?.succeeded.then_some(plan.outcome)),
        }
    }

    /// Ends the leases of a registration on which nothing hangs. They would end by themselves; this spares etcd the wait.
    fn give_back(&self, leases: &mut Leases, by: Deadline) {
        let Leases { kept, warming, past } = std::mem::take(leases);
        for lease in [kept, warming, past].into_iter().flatten() {
            let _ = self.gateway.revoke(lease, by);
        }
    }

    /// The entry of a node, if this incarnation holds it, with what is remembered of the node.
    fn held_by(
        &self,
        node: &NodeId,
        incarnation: Incarnation,
        by: Deadline,
    ) -> Result<(Past, i64, Entry), Error> {
        let unknown = || self.refused(Refusal::Unknown { node: node.clone() });
        let found = self.gateway.transact(&[], &[Op::Get(&self.keys.past(node))], by)?;
        let (past, revision) = found.ranges().next().and_then(Past::read).ok_or_else(unknown)?;
        let entry = self.entry(past.group.as_ref(), node, by)?;
        let held = entry.listed().map(|listed| listed.worker.incarnation);
        match (past.standing(incarnation), held) {
            (Standing::Latest, Some(held)) if held == incarnation => Ok((past, revision, entry)),
            (Standing::Superseded, held) | (_, held @ Some(_)) => {
                Err(self.refused(Refusal::Stale { node: node.clone(), incarnation, held }))
            }
            (_, None) => Err(unknown()),
        }
    }

    fn told(&self, group: &GroupId, rooms: &[u64], by: Deadline) -> Result<(Header, Vec<DpRank>), Error> {
        let keys: Vec<String> = rooms.iter().map(|room| self.keys.room(group, *room)).collect();
        let (mut header, mut ranks) = (Header::default(), Vec::with_capacity(rooms.len()));
        for part in keys.chunks(OPS_PER_TRANSACTION) {
            let ops: Vec<Op> = part.iter().map(|key| Op::Get(key)).collect();
            let done = self.gateway.transact(&[], &ops, by)?;
            // A change after the first part was read is to be seen by whoever waits for the next.
            if ranks.is_empty() {
                header = done.header;
            }
            ranks.extend(done.ranges().take(part.len()).map(|range| rank(&range)));
        }
        Ok((header, ranks))
    }

    /// Looks again at each change below a prefix, until it is enough or the time is over. Without a time it looks once.
    /// What was read is not lost where etcd goes away after it.
    fn look_until<T>(
        &self,
        prefix: &str,
        over: Option<Deadline>,
        enough: impl Fn(&T) -> bool,
        look: impl Fn() -> Result<(Header, T), Error>,
    ) -> Result<T, Error> {
        let mut before = None;
        loop {
            let (header, found) = match (look(), before.take()) {
                (Err(error), Some(before)) if error.retry_helps() => return Ok(before),
                (looked, _) => looked?,
            };
            match over.filter(|over| over.remaining().is_some()) {
                Some(over) if !enough(&found) && self.changed(prefix, header.revision, over)? => {}
                _ => return Ok(found),
            }
            before = Some(found);
        }
    }

    /// Whether a watch lasted until there was something new or the time was over. Where it failed, what there is should be
    /// answered early: whoever waits for more asks again after a pause.
    fn changed(&self, prefix: &str, after_revision: i64, over: Deadline) -> Result<bool, Error> {
        match self.gateway.changed(prefix, after_revision, over) {
            Err(error) if error.retry_helps() => Ok(false),
            watched => watched.map(|()| true),
        }
    }

    /// Decides again whenever somebody else has decided meanwhile.
    fn until_settled<T>(
        &self,
        by: Deadline,
        mut decide: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let mut backoff = Backoff::new(CONFLICT_PAUSE_MIN, CONFLICT_PAUSE_MAX);
        loop {
            if let Some(settled) = decide()? {
                return Ok(settled);
            }
            let late = || Error::Deadline {
                server: self.gateway.name().to_owned(),
                stage: Stage::Receive,
                time_ms: by.time_ms(),
            };
            std::thread::sleep(backoff.pause(random()).min(by.remaining().ok_or_else(late)?));
        }
    }

    fn refused(&self, refusal: Refusal) -> Error {
        self.problem(refusal.into())
    }

    fn room_refused(&self, refusal: RoomRefusal) -> Error {
        self.problem(refusal.into())
    }

    fn problem(&self, problem: Problem) -> Error {
        let status = problem.error.status();
        Error::Refused { server: self.gateway.name().to_owned(), status, problem }
    }
}

/// What a worker that wants to register finds.
struct Seen {
    /// What is remembered of its node, and the revision of that.
    past: Option<(Past, i64)>,
    own: Entry,
    /// The others of its group.
    others: Vec<Entry>,
    /// The revision in which its group was changed last.
    fence: i64,
}

/// What is to be put down when a worker registers.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    outcome: Registered,
    warming: Warming,
}

#[derive(Debug, PartialEq, Eq)]
enum Warming {
    Begins,
    /// With the lease that it has.
    GoesOn(i64),
    Not,
}

impl Plan {
    /// The rules of [`Registry::register`](crate::Registry::register).
    fn new(worker: &Worker, seen: &Seen) -> Result<Plan, Refusal> {
        let Worker { node, incarnation, .. } = worker;
        let held = seen.own.listed().map(|listed| listed.worker);
        let standing = seen.past.as_ref().map_or(Standing::New, |(past, _)| past.standing(*incarnation));
        let wanted = if worker.warm_up_ms > 0 { Warming::Begins } else { Warming::Not };
        let (outcome, warming) = match &held {
            Some(held) if held.incarnation == *incarnation => {
                // It may end its warm-up and not prolong it.
                let warming = match &seen.own.warming {
                    Some((_, lease)) if worker.warm_up_ms > 0 => Warming::GoesOn(*lease),
                    _ => Warming::Not,
                };
                (if held == worker { Registered::Renewed } else { Registered::Updated }, warming)
            }
            Some(_) if standing == Standing::New => (Registered::Replaced, wanted),
            None if standing != Standing::Superseded => (Registered::Created, wanted),
            _ => {
                let held = held.map(|held| held.incarnation);
                return Err(Refusal::Stale { node: node.clone(), incarnation: *incarnation, held });
            }
        };
        // In the order of ranks, as the server does it: all of them agree, so the first speaks for all.
        let mut others: Vec<&Worker> = seen.others.iter().filter_map(Entry::worker).collect();
        others.sort_by_key(|other| other.member.as_ref().map(|member| member.ranks()));
        for other in others {
            fits(worker, other)?;
        }
        Ok(Plan { outcome, warming })
    }
}

/// The leases that were granted for one registration, kept while it is tried again.
#[derive(Default)]
struct Leases {
    kept: Option<i64>,
    warming: Option<i64>,
    past: Option<i64>,
}

fn sum_up(entries: &[Entry], counted: Counted) -> Option<Group> {
    let listed: Vec<Listed> = entries.iter().filter_map(Entry::listed).collect();
    Group::of(listed.iter().map(|listed| (&listed.worker, listed.state)), counted)
}

fn rank(range: &Range) -> DpRank {
    let text = range.kvs.first().and_then(|pair| std::str::from_utf8(&pair.value).ok());
    text.and_then(|text| text.parse().ok()).map_or(DpRank::NotYet, DpRank::Known)
}

fn mark(header: Header) -> Mark {
    Mark { epoch: header.cluster_id, revision: u64::try_from(header.revision).unwrap_or(0) }
}

/// etcd takes 128 operations unless told otherwise.
const OPS_PER_TRANSACTION: usize = 100;
const PAST_TIME: Duration = Duration::from_secs(24 * 60 * 60);
const CONFLICT_PAUSE_MIN: Duration = Duration::from_millis(5);
const CONFLICT_PAUSE_MAX: Duration = Duration::from_millis(200);
