//! The registry against a plain model: every answer to every sequence of calls is the one that a list with all
//! its history would give.

use std::time::Duration;

use crossdock_bootstrap::{
    Incarnation, Labels, Limits, Listed, NodeId, Query, Rank, Refusal, Registered, Registry, Role, Worker,
};
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
            for index in 0..NODES {
                let shown = registry.worker(model.now, &node(index));
                prop_assert!(shown.iter().all(|listed| (1..=listed.worker.ttl_ms).contains(&listed.remaining_ms)));
                prop_assert_eq!(shown, model.worker(&node(index)));
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
    /// The incarnations before it, oldest first.
    before: Vec<Incarnation>,
}

impl Model {
    fn register(&mut self, worker: Worker) -> Result<Registered, Refusal> {
        if !limits().ttl_ms.contains(&worker.ttl_ms) {
            return Err(Refusal::Ttl { given: worker.ttl_ms, allowed: limits().ttl_ms });
        }
        let now = self.now;
        let expires = now + Duration::from_millis(worker.ttl_ms);
        let live = self.nodes.iter().filter(|node| node.live(now)).count();
        let full = Err(Refusal::Full { workers: live });
        let Some(node) = self.nodes.iter_mut().find(|node| node.name == worker.node) else {
            if live == limits().workers {
                return full;
            }
            let name = worker.node.clone();
            self.nodes.push(Node { name, last: worker, since: now, expires, before: Vec::new() });
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
        if !same_incarnation {
            node.before.push(node.last.incarnation);
        }
        if matches!(outcome, Registered::Created | Registered::Replaced) {
            node.since = now;
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
        self.held(name, incarnation)?.expires = now;
        Ok(())
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
        let matching = self.nodes.iter().filter(|node| query.matches(&node.last));
        let mut found: Vec<Listed> = matching.filter_map(|node| self.worker(&node.name)).collect();
        found.sort_by(|a, b| a.worker.node.cmp(&b.worker.node));
        found
    }

    fn worker(&self, name: &NodeId) -> Option<Listed> {
        let node = self.nodes.iter().find(|node| node.name == *name && node.live(self.now))?;
        Some(Listed {
            worker: node.last.clone(),
            age_ms: (self.now - node.since).as_millis() as u64,
            remaining_ms: (node.expires - self.now).as_micros().div_ceil(1_000) as u64,
        })
    }
}

impl Node {
    fn live(&self, now: Duration) -> bool {
        now < self.expires
    }

    fn stale(&self, now: Duration, incarnation: Incarnation) -> Refusal {
        let held = self.live(now).then_some(self.last.incarnation);
        Refusal::Stale { node: self.name.clone(), incarnation, held }
    }
}

/// Few enough workers that the registry fills up; more of the past than these runs have.
fn limits() -> Limits {
    Limits { workers: 3, remembered_nodes: 64, remembered_incarnations: 64, ttl_ms: 2..=20 }
}

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

fn any_step() -> impl Strategy<Value = Step> {
    let worker = (any_node(), any_incarnation(), any_role(), 0..2u32, 1..23u64, any_labels()).prop_map(
        |(node, incarnation, role, rank, ttl_ms, labels)| {
            let rank = Rank::new(rank, 2).unwrap();
            let address = "10.0.0.1:7000".parse().unwrap();
            Worker { node, incarnation, role, rank, address, ttl_ms, labels }
        },
    );
    let query = (proptest::option::of(any_role()), proptest::option::of(0..2u32), any_labels()).prop_map(
        |(role, rank, labels)| {
            let mut query = Query::all();
            if let Some(role) = role {
                query = query.role(role);
            }
            if let Some(rank) = rank {
                query = query.rank(rank);
            }
            labels.iter().fold(query, |query, (key, value)| query.label(key, value).unwrap())
        },
    );
    prop_oneof![
        4 => worker.prop_map(Step::Register),
        2 => (any_node(), any_incarnation()).prop_map(|(node, incarnation)| Step::Renew(node, incarnation)),
        1 => (any_node(), any_incarnation()).prop_map(|(node, incarnation)| Step::Deregister(node, incarnation)),
        1 => query.prop_map(Step::Find),
        3 => (0..9_000u64).prop_map(|us| Step::Pass(Duration::from_micros(us))),
    ]
}
