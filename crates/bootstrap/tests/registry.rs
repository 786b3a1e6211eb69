//! The registry against a plain model: every answer to every sequence of calls is the one that a list with all
//! its history would give.

use std::time::Duration;

use crossdock_bootstrap::{
    Counted, GroupId, Incarnation, Labels, Limits, Listed, Member, Misfit, NodeId, Query, Ranks, Refusal,
    Registered, Registry, Role, State, Tag, Topology, Worker,
};
use proptest::option;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Register(Worker),
    Renew(NodeId, Incarnation),
    Deregister(NodeId, Incarnation),
    Find(Query),
    Pass(Duration),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn the_registry_answers_as_the_model_does(steps in proptest::collection::vec(any_step(), 1..80)) {
        let mut registry = Registry::new(limits());
        let mut model = Model { now: Duration::ZERO, nodes: Vec::new() };
        let mut told: Option<(u64, Vec<(Worker, State)>)> = None;
        for step in steps {
            match step {
                Step::Register(worker) => {
                    let answer = registry.register(model.now, worker.clone());
                    prop_assert_eq!(answer, model.register(worker));
                }
                Step::Renew(node, incarnation) => {
                    let answer = registry.renew(model.now, &node, incarnation);
                    prop_assert_eq!(answer, model.renew(&node, incarnation));
                }
                Step::Deregister(node, incarnation) => {
                    let answer = registry.deregister(model.now, &node, incarnation);
                    prop_assert_eq!(answer, model.deregister(&node, incarnation));
                }
                Step::Find(query) => {
                    let found = registry.find(model.now, &query);
                    prop_assert_eq!(registry.count(model.now, &query), found.len());
                    prop_assert_eq!(found, model.find(&query));
                }
                Step::Pass(time) => model.now += time,
            }
            let mut shown = Vec::new();
            for index in 0..NODES {
                let listed = registry.worker(model.now, &node(index));
                let most = |worker: &Worker| worker.ttl_ms.max(worker.warm_up_ms).max(WARM_UP_MS);
                let bounded = |listed: &Listed| (1..=most(&listed.worker)).contains(&listed.remaining_ms.unwrap());
                prop_assert!(listed.iter().all(bounded));
                prop_assert_eq!(&listed, &model.worker(&node(index)));
                shown.extend(listed);
            }
            // What is to be heard of by those that wait: a revision of its own for each list.
            let plain: Vec<_> = shown.iter().map(|listed| (listed.worker.clone(), listed.state)).collect();
            let revision = registry.revision(model.now);
            if let Some((before, listed)) = &told {
                prop_assert!(*before <= revision);
                prop_assert!(before != &revision || listed == &plain, "{listed:?} {plain:?}");
            }
            told = Some((revision, plain));
            let next = registry.next_change();
            prop_assert_eq!(next.is_none(), shown.is_empty());
            prop_assert!(next.is_none_or(|next| next > model.now));
            for group in ["g", "h"] {
                let group = GroupId::new(group).unwrap();
                let members = shown.iter().filter(|listed| in_group(&listed.worker, &group));
                let ready = members.clone().filter(|listed| listed.state == State::Ready).count() as u32;
                let all = members.clone().count() as u32;
                let summed = registry.group(model.now, &group, Counted::Ready);
                prop_assert_eq!(summed.is_none(), all == 0);
                if let Some(summed) = summed {
                    prop_assert_eq!((summed.ready, summed.warming), (ready, all - ready));
                    prop_assert_eq!(summed.missing_count, summed.size - ready);
                    let mut ranks: Vec<Ranks> =
                        members.map(|listed| listed.worker.member.as_ref().unwrap().ranks()).collect();
                    ranks.sort();
                    ranks.dedup();
                    prop_assert_eq!(ranks.len() as u32, all, "two have the same ranks");
                }
            }
        }
    }
}

/// All that ever happened to each node, as plainly as it can be kept.
struct Model {
    now: Duration,
    nodes: Vec<Node>,
}

struct Node {
    name: NodeId,
    /// The last registration, with its first and its last moment.
    last: Worker,
    since: Duration,
    expires: Duration,
    warm_until: Duration,
    /// The incarnations before it, oldest first.
    before: Vec<Incarnation>,
}

impl Model {
    fn register(&mut self, worker: Worker) -> Result<Registered, Refusal> {
        if !limits().ttl_ms.contains(&worker.ttl_ms) {
            return Err(Refusal::Ttl { given: worker.ttl_ms, allowed: limits().ttl_ms });
        }
        if worker.warm_up_ms > WARM_UP_MS {
            return Err(Refusal::WarmUp { given: worker.warm_up_ms, most: WARM_UP_MS });
        }
        let now = self.now;
        let expires = now + Duration::from_millis(worker.ttl_ms);
        let warm_until = now + Duration::from_millis(worker.warm_up_ms);
        let misfit = self.misfit(&worker);
        let live = self.nodes.iter().filter(|node| node.live(now)).count();
        let full = Err(Refusal::Full { workers: live });
        let Some(node) = self.nodes.iter_mut().find(|node| node.name == worker.node) else {
            if live == limits().workers {
                return full;
            }
            misfit?;
            let name = worker.node.clone();
            self.nodes.push(Node { name, last: worker, since: now, expires, warm_until, before: Vec::new() });
            return Ok(Registered::Created);
        };
        let same_incarnation = node.last.incarnation == worker.incarnation;
        if !same_incarnation && node.before.contains(&worker.incarnation) {
            return Err(node.stale(now, worker.incarnation));
        }
        if !node.live(now) && live == limits().workers {
            return full;
        }
        let outcome = match (node.live(now), same_incarnation) {
            (false, _) => Registered::Created,
            (true, false) => Registered::Replaced,
            (true, true) if node.last == worker => Registered::Renewed,
            (true, true) => Registered::Updated,
        };
        misfit?;
        if !same_incarnation {
            node.before.push(node.last.incarnation);
        }
        if matches!(outcome, Registered::Created | Registered::Replaced) {
            (node.since, node.warm_until) = (now, warm_until);
        } else if worker.warm_up_ms == 0 {
            node.warm_until = now;
        }
        (node.last, node.expires) = (worker, expires);
        Ok(outcome)
    }

    fn renew(&mut self, name: &NodeId, incarnation: Incarnation) -> Result<(), Refusal> {
        let now = self.now;
        let node = self.held(name, incarnation)?;
        node.expires = now + Duration::from_millis(node.last.ttl_ms);
        Ok(())
    }

    fn deregister(&mut self, name: &NodeId, incarnation: Incarnation) -> Result<(), Refusal> {
        let now = self.now;
        let node = self.held(name, incarnation)?;
        (node.expires, node.warm_until) = (now, now);
        Ok(())
    }

    /// In what a worker does not fit to the first other of its group, or to the one that has its ranks.
    fn misfit(&self, worker: &Worker) -> Result<(), Refusal> {
        let Some(member) = &worker.member else { return Ok(()) };
        let (group, node) = (member.group().clone(), worker.node.clone());
        let live = self.nodes.iter().filter(|node| node.live(self.now) && node.name != worker.node);
        let mut others: Vec<&Worker> =
            live.map(|node| &node.last).filter(|other| in_group(other, &group)).collect();
        let ranks = |worker: &Worker| worker.member.as_ref().unwrap().ranks();
        others.sort_by_key(|other| ranks(other));
        let Some(first) = others.first() else { return Ok(()) };
        let held = first.member.as_ref().unwrap().topology();
        let differs = |field, given: String, held: String| {
            let by = first.node.clone();
            let (group, node) = (group.clone(), node.clone());
            Err(Misfit::Topology { group, node, field, given, held, by }.into())
        };
        if worker.role != first.role {
            return differs("role", worker.role.to_string(), first.role.to_string());
        }
        if member.topology().tp_size != held.tp_size {
            return differs("tp_size", member.topology().tp_size.to_string(), held.tp_size.to_string());
        }
        match others.iter().find(|other| ranks(other) == member.ranks()) {
            Some(other) => {
                Err(Misfit::RankTaken { group, node, ranks: member.ranks(), by: other.node.clone() }.into())
            }
            None => Ok(()),
        }
    }

    fn held(&mut self, name: &NodeId, incarnation: Incarnation) -> Result<&mut Node, Refusal> {
        let now = self.now;
        let unknown = Refusal::Unknown { node: name.clone() };
        let node = self.nodes.iter_mut().find(|node| node.name == *name).ok_or(unknown.clone())?;
        let same = node.last.incarnation == incarnation;
        match (node.live(now), same) {
            (true, true) => Ok(node),
            (true, false) => Err(node.stale(now, incarnation)),
            (false, false) if node.before.contains(&incarnation) => Err(node.stale(now, incarnation)),
            (false, _) => Err(unknown),
        }
    }

    fn find(&self, query: &Query) -> Vec<Listed> {
        let matching = self.nodes.iter().filter(|node| query.matches(&node.last, node.state(self.now)));
        let mut found: Vec<Listed> = matching.filter_map(|node| self.worker(&node.name)).collect();
        found.sort_by(|a, b| a.worker.node.cmp(&b.worker.node));
        found
    }

    fn worker(&self, name: &NodeId) -> Option<Listed> {
        let node = self.nodes.iter().find(|node| node.name == *name && node.live(self.now))?;
        Some(Listed {
            worker: node.last.clone(),
            state: node.state(self.now),
            age_ms: Some((self.now - node.since).as_millis() as u64),
            remaining_ms: Some((node.lapses() - self.now).as_micros().div_ceil(1_000) as u64),
        })
    }
}

impl Node {
    fn live(&self, now: Duration) -> bool {
        now < self.lapses()
    }

    fn lapses(&self) -> Duration {
        self.expires.max(self.warm_until)
    }

    fn state(&self, now: Duration) -> State {
        if now < self.warm_until { State::Warming } else { State::Ready }
    }

    fn stale(&self, now: Duration, incarnation: Incarnation) -> Refusal {
        let held = self.live(now).then_some(self.last.incarnation);
        Refusal::Stale { node: self.name.clone(), incarnation, held }
    }
}

/// Few enough workers that the registry fills up; more of the past than these runs have.
fn limits() -> Limits {
    Limits {
        workers: 3,
        remembered_nodes: 64,
        remembered_incarnations: 64,
        ttl_ms: 2..=20,
        warm_up_ms: WARM_UP_MS,
        ..Limits::default()
    }
}

fn in_group(worker: &Worker, group: &GroupId) -> bool {
    worker.member.as_ref().is_some_and(|member| member.group() == group)
}

const WARM_UP_MS: u64 = 25;

const NODES: usize = 5;

fn node(index: usize) -> NodeId {
    NodeId::new(&format!("node-{index}")).unwrap()
}

fn any_node() -> impl Strategy<Value = NodeId> {
    (0..NODES).prop_map(node)
}

fn any_incarnation() -> impl Strategy<Value = Incarnation> {
    (0..4u64).prop_map(Incarnation::new)
}

fn any_role() -> impl Strategy<Value = Role> {
    prop_oneof![Just(Role::Prefill), Just(Role::Decode), Just(Role::Both), Just("x".parse().unwrap())]
}

fn any_labels() -> impl Strategy<Value = Labels> {
    proptest::collection::btree_map("[ab]", "[xy]", 0..2).prop_map(|labels| labels.try_into().unwrap())
}

fn any_member() -> impl Strategy<Value = Option<Member>> {
    let member =
        ("[gh]", prop_oneof![4 => Just(3u32), 1 => Just(2)], 0..3u32).prop_map(|(group, tp_size, rank)| {
            let single = Topology::single(Tag::new("m").unwrap(), Tag::new("bf16").unwrap(), 16);
            let ranks = Ranks::tp(rank.min(tp_size - 1));
            Member::new(group.parse().unwrap(), Topology { tp_size, ..single }, ranks).unwrap()
        });
    option::of(member)
}

fn any_step() -> impl Strategy<Value = Step> {
    let warm_up = prop_oneof![3 => Just(0), 1 => 1..27u64];
    let worker = (any_node(), any_incarnation(), any_role(), any_member(), 1..23u64, warm_up, any_labels())
        .prop_map(|(node, incarnation, role, member, ttl_ms, warm_up_ms, labels)| {
            let address = "10.0.0.1:7000".parse().unwrap();
            Worker { node, incarnation, role, address, ttl_ms, warm_up_ms, member, labels }
        });
    let state = prop_oneof![Just(State::Ready), Just(State::Warming)];
    let query =
        (option::of(any_role()), option::of(0..2u32), option::of("[gh]"), option::of(state), any_labels())
            .prop_map(|(role, rank, group, state, labels)| {
                let mut query = Query::all();
                if let Some(role) = role {
                    query = query.role(role);
                }
                if let Some(rank) = rank {
                    query = query.tp_rank(rank);
                }
                if let Some(group) = group {
                    query = query.group(group.parse().unwrap());
                }
                if let Some(state) = state {
                    query = query.state(state);
                }
                labels.iter().fold(query, |query, (key, value)| query.label(key, value).unwrap())
            });
    prop_oneof![
        4 => worker.prop_map(Step::Register),
        2 => (any_node(), any_incarnation()).prop_map(|(node, incarnation)| Step::Renew(node, incarnation)),
        1 => (any_node(), any_incarnation()).prop_map(|(node, incarnation)| Step::Deregister(node, incarnation)),
        1 => query.prop_map(Step::Find),
        3 => (0..9_000u64).prop_map(|us| Step::Pass(Duration::from_micros(us))),
    ]
}
