//! Groups: the workers that serve one copy of a model together, how the model is cut among them, and whether all
//! of them are there.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::worker::{Invalid, NodeId, Role, State, Worker};

/// A worker's place in a group. All members of a group have the same topology and role; each has ranks of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MemberWire", into = "MemberWire")]
pub struct Member {
    group: GroupId,
    topology: Topology,
    ranks: Ranks,
}

impl Member {
    /// Checks that the ranks lie within the sizes, and that the sizes are ones that a registry takes.
    pub fn new(group: GroupId, topology: Topology, ranks: Ranks) -> Result<Member, Invalid> {
        let sizes = topology.sizes();
        let size = sizes.iter().try_fold(1u32, |product, (_, size)| product.checked_mul(*size));
        if !size.is_some_and(|size| (1..=GROUP_SIZE_MAX).contains(&size)) {
            return Err(Invalid::GroupSize { sizes: sizes.map(|(_, size)| size) });
        }
        for ((axis, ranks), (_, rank)) in sizes.into_iter().zip(ranks.axes()) {
            if rank >= ranks {
                return Err(Invalid::Rank { axis, rank, ranks });
            }
        }
        if topology.page_tokens == 0 {
            return Err(Invalid::PageTokens);
        }
        Ok(Member { group, topology, ranks })
    }

    /// The group's name.
    pub fn group(&self) -> &GroupId {
        &self.group
    }

    /// What all members have in common.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// This worker's own ranks.
    pub fn ranks(&self) -> Ranks {
        self.ranks
    }
}

/// How a group cuts its model, and what its pages hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Tensor-parallel ranks.
    #[serde(default = "one")]
    pub tp_size: u32,
    /// Pipeline stages.
    #[serde(default = "one")]
    pub pp_size: u32,
    /// Context-parallel ranks.
    #[serde(default = "one")]
    pub cp_size: u32,
    /// Data-parallel ranks.
    #[serde(default = "one")]
    pub dp_size: u32,
    /// Tokens in a page of the cache.
    pub page_tokens: u32,
    /// What an element of the cache is, like `bf16` or `fp8_e4m3`.
    pub dtype: Tag,
    /// The model's name.
    pub model: Tag,
    /// How a room finds its data-parallel rank.
    #[serde(default)]
    pub rooms: RoomPolicy,
}

impl Topology {
    /// The sizes that cut a model into one piece.
    pub fn single(model: Tag, dtype: Tag, page_tokens: u32) -> Topology {
        let (tp_size, pp_size, cp_size, dp_size) = (1, 1, 1, 1);
        Topology { tp_size, pp_size, cp_size, dp_size, page_tokens, dtype, model, rooms: RoomPolicy::Follow }
    }

    /// How many workers a complete group has.
    pub fn ranks(&self) -> u32 {
        self.sizes().iter().map(|(_, size)| size).product()
    }

    /// All ranks of a complete group, in order.
    pub fn all_ranks(&self) -> impl Iterator<Item = Ranks> + '_ {
        (0..self.ranks()).map(|index| {
            let (rest, tp_rank) = (index / self.tp_size, index % self.tp_size);
            let (rest, cp_rank) = (rest / self.cp_size, rest % self.cp_size);
            let (dp_rank, pp_rank) = (rest / self.pp_size, rest % self.pp_size);
            Ranks { dp_rank, pp_rank, cp_rank, tp_rank }
        })
    }

    fn sizes(&self) -> [(&'static str, u32); 4] {
        [("tp", self.tp_size), ("pp", self.pp_size), ("cp", self.cp_size), ("dp", self.dp_size)]
    }

    /// The first field in which two topologies differ, with both values.
    fn difference(&self, other: &Topology) -> Option<(&'static str, String, String)> {
        let fields = |topology: &Topology| {
            [
                ("tp_size", topology.tp_size.to_string()),
                ("pp_size", topology.pp_size.to_string()),
                ("cp_size", topology.cp_size.to_string()),
                ("dp_size", topology.dp_size.to_string()),
                ("page_tokens", topology.page_tokens.to_string()),
                ("dtype", topology.dtype.to_string()),
                ("model", topology.model.to_string()),
                ("rooms", topology.rooms.to_string()),
            ]
        };
        let both = fields(self).into_iter().zip(fields(other));
        both.filter(|(one, two)| one != two).map(|((field, one), (_, two))| (field, one, two)).next()
    }
}

/// A worker's ranks, each counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Ranks {
    /// Its data-parallel rank.
    pub dp_rank: u32,
    /// Its pipeline stage.
    pub pp_rank: u32,
    /// Its context-parallel rank.
    pub cp_rank: u32,
    /// Its tensor-parallel rank.
    pub tp_rank: u32,
}

impl Ranks {
    /// The ranks of a worker that differs from others by its tensor-parallel rank alone.
    pub fn tp(tp_rank: u32) -> Ranks {
        Ranks { tp_rank, ..Ranks::default() }
    }

    fn axes(self) -> [(&'static str, u32); 4] {
        [("tp", self.tp_rank), ("pp", self.pp_rank), ("cp", self.cp_rank), ("dp", self.dp_rank)]
    }
}

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ranks { dp_rank, pp_rank, cp_rank, tp_rank } = self;
        write!(f, "dp {dp_rank} pp {pp_rank} cp {cp_rank} tp {tp_rank}")
    }
}

/// How a room finds the data-parallel rank that serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoomPolicy {
    /// The room's number modulo the group's `dp_size`: nobody needs to be told.
    #[default]
    Follow,
    /// The group tells the registry for each room, since a scheduler of its own decides.
    Told,
}

impl fmt::Display for RoomPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RoomPolicy::Follow => "follow",
            RoomPolicy::Told => "told",
        })
    }
}

/// The name of a group, in the form of a [`NodeId`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupId(NodeId);

impl GroupId {
    /// Checks and keeps a name.
    pub fn new(name: &str) -> Result<GroupId, Invalid> {
        match NodeId::new(name) {
            Ok(name) => Ok(GroupId(name)),
            Err(Invalid::Node { given }) => Err(Invalid::Group { given }),
            Err(other) => Err(other),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// A short name: 1 to 128 printable ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag(Arc<str>);

impl Tag {
    /// Checks and keeps a name.
    pub fn new(name: &str) -> Result<Tag, Invalid> {
        let fits = (1..=TAG_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if fits { Ok(Tag(name.into())) } else { Err(Invalid::Tag { given: crate::worker::excerpt(name) }) }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A group as the registry sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The group's name.
    pub group: GroupId,
    /// The role of all its members.
    pub role: Role,
    /// What all its members have in common.
    pub topology: Topology,
    /// Whether every rank is there, by what was asked to be counted.
    pub complete: bool,
    /// How many ranks a complete group has.
    pub size: u32,
    /// How many of them are ready.
    pub ready: u32,
    /// How many of them are there, and still warm up.
    pub warming: u32,
    /// How many of them are missing, by what was asked to be counted.
    pub missing_count: u32,
    /// Which are missing: the first 64 of them.
    pub missing: Vec<Ranks>,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Group { group, size, ready, warming, missing_count, missing, .. } = self;
        write!(f, "group {group}: {ready} of {size} ranks ready, {warming} warming up")?;
        for (index, ranks) in missing.iter().enumerate() {
            write!(f, "{} {ranks}", if index == 0 { "; missing:" } else { "," })?;
        }
        let more = (*missing_count as usize).saturating_sub(missing.len());
        if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
    }
}

/// Which workers count when a group is asked whether it is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counted {
    /// Those that are ready.
    #[default]
    Ready,
    /// Those that still warm up, too.
    ReadyAndWarming,
}

impl Group {
    /// Sums up the members of one group. None at all make no group: its topology is not known.
    pub(crate) fn of<'a>(
        members: impl IntoIterator<Item = (&'a Worker, State)>,
        counted: Counted,
    ) -> Option<Group> {
        let (mut first, mut present) = (None, BTreeMap::new());
        for (worker, state) in members {
            let Some(member) = &worker.member else { continue };
            let (held, role) = *first.get_or_insert((member, &worker.role));
            // What lies in etcd may be by somebody who keeps to no rule: who disagrees with the first fills no rank, and of
            // two with the same ranks one counts.
            if member.topology == held.topology && worker.role == *role {
                let counted = present.entry(member.ranks).or_insert(state);
                if state == State::Ready {
                    *counted = state;
                }
            }
        }
        let (Member { group, topology, .. }, role) = first?;
        let ready = present.values().filter(|state| **state == State::Ready).count() as u32;
        let warming = present.len() as u32 - ready;
        if counted == Counted::Ready {
            present.retain(|_, state| *state == State::Ready);
        }
        // A member's ranks lie within its sizes, and those are the group's.
        let missing_count = topology.ranks() - present.len() as u32;
        let missing: Vec<Ranks> =
            topology.all_ranks().filter(|ranks| !present.contains_key(ranks)).take(MISSING_NAMED).collect();
        Some(Group {
            group: group.clone(),
            role: role.clone(),
            topology: topology.clone(),
            complete: missing_count == 0,
            size: topology.ranks(),
            ready,
            warming,
            missing_count,
            missing,
        })
    }
}

/// Why a worker does not fit into its group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// It disagrees with another member on something that all have in common.
    #[error("group {group} has {field} {held} by node {by}, and node {node} says {given}")]
    Topology {
        /// The group.
        group: GroupId,
        /// The worker that was refused.
        node: NodeId,
        /// In what they differ.
        field: &'static str,
        /// What it said.
        given: String,
        /// What the group has.
        held: String,
        /// A member that said so.
        by: NodeId,
    },
    /// Another node has its ranks.
    #[error("the ranks {ranks} of group {group} are held by node {by}, and node {node} claims them")]
    RankTaken {
        /// The group.
        group: GroupId,
        /// The worker that was refused.
        node: NodeId,
        /// The ranks.
        ranks: Ranks,
        /// Who has them.
        by: NodeId,
    },
}

/// Whether a worker fits to one other member of its group; the node's own earlier registration does not count.
pub(crate) fn fits(worker: &Worker, other: &Worker) -> Result<(), Misfit> {
    let (Some(member), Some(held)) = (&worker.member, &other.member) else { return Ok(()) };
    if member.group != held.group || worker.node == other.node {
        return Ok(());
    }
    let (group, node, by) = (member.group.clone(), worker.node.clone(), other.node.clone());
    let role = || ("role", worker.role.to_string(), other.role.to_string());
    let differs = (worker.role != other.role).then(role);
    if let Some((field, given, held)) = differs.or_else(|| member.topology.difference(&held.topology)) {
        return Err(Misfit::Topology { group, node, field, given, held, by });
    }
    if member.ranks == held.ranks {
        return Err(Misfit::RankTaken { group, node, ranks: member.ranks, by });
    }
    Ok(())
}

/// The form of a member in JSON.
#[derive(Serialize, Deserialize)]
struct MemberWire {
    group: GroupId,
    #[serde(flatten)]
    ranks: Ranks,
    #[serde(flatten)]
    topology: Topology,
}

impl TryFrom<MemberWire> for Member {
    type Error = Invalid;

    fn try_from(wire: MemberWire) -> Result<Member, Invalid> {
        Member::new(wire.group, wire.topology, wire.ranks)
    }
}

impl From<Member> for MemberWire {
    fn from(member: Member) -> MemberWire {
        let Member { group, topology, ranks } = member;
        MemberWire { group, ranks, topology }
    }
}

impl TryFrom<String> for GroupId {
    type Error = Invalid;

    fn try_from(name: String) -> Result<GroupId, Invalid> {
        GroupId::new(&name)
    }
}

impl From<GroupId> for String {
    fn from(group: GroupId) -> String {
        group.as_str().to_owned()
    }
}

impl FromStr for GroupId {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<GroupId, Invalid> {
        GroupId::new(name)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl TryFrom<String> for Tag {
    type Error = Invalid;

    fn try_from(name: String) -> Result<Tag, Invalid> {
        Tag::new(&name)
    }
}

impl From<Tag> for String {
    fn from(tag: Tag) -> String {
        tag.as_str().to_owned()
    }
}

impl FromStr for Tag {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Tag, Invalid> {
        Tag::new(name)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn one() -> u32 {
    1
}

/// More ranks than any deployment has, and few enough to look through.
pub(crate) const GROUP_SIZE_MAX: u32 = 65_536;
const TAG_BYTES_MAX: usize = 128;
const MISSING_NAMED: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::{Incarnation, Labels};

    fn topology() -> Topology {
        let single = Topology::single(Tag::new("deepseek-r1").unwrap(), Tag::new("bf16").unwrap(), 64);
        Topology { tp_size: 2, pp_size: 3, dp_size: 2, ..single }
    }

    fn worker(node: &str, topology: Topology, ranks: Ranks) -> Worker {
        Worker {
            node: NodeId::new(node).unwrap(),
            incarnation: Incarnation::new(1),
            role: Role::Prefill,
            address: "10.0.0.1:7000".parse().unwrap(),
            ttl_ms: 1_000,
            warm_up_ms: 0,
            member: Some(Member::new(GroupId::new("g").unwrap(), topology, ranks).unwrap()),
            labels: Labels::none(),
        }
    }

    #[test]
    fn a_group_names_what_is_missing_until_nothing_is() {
        let all: Vec<Ranks> = topology().all_ranks().collect();
        assert_eq!(all.len(), 12);
        assert!(all.is_sorted_by(|a, b| a < b));
        let mut members = Vec::new();
        assert_eq!(Group::of([], Counted::Ready), None);
        for (index, ranks) in all.iter().enumerate() {
            members.push(worker(&format!("n{index}"), topology(), *ranks));
            let group =
                |state, counted| Group::of(members.iter().map(|worker| (worker, state)), counted).unwrap();
            let there = group(State::Ready, Counted::Ready);
            assert_eq!((there.ready, there.warming, there.size), (index as u32 + 1, 0, 12));
            assert_eq!(there.missing, all[index + 1..]);
            assert_eq!(there.complete, index == 11);
            let warming = group(State::Warming, Counted::Ready);
            assert_eq!((warming.missing_count, warming.complete), (12, false));
            assert_eq!(group(State::Warming, Counted::ReadyAndWarming).complete, index == 11);
        }
        let shown = Group::of([(&members[0], State::Ready)], Counted::Ready).unwrap().to_string();
        assert!(shown.contains("1 of 12 ranks ready") && shown.contains("dp 1 pp 2 cp 0 tp 1"), "{shown}");
    }

    #[test]
    fn who_disagrees_with_the_first_or_has_its_ranks_fills_no_rank() {
        let two = Topology { tp_size: 2, pp_size: 1, dp_size: 1, ..topology() };
        let first = worker("a", two.clone(), Ranks::tp(0));
        let strangers = [
            worker("b", topology(), Ranks::tp(1)),
            worker("c", topology(), Ranks { pp_rank: 2, ..Ranks::tp(1) }),
            worker("d", Topology { page_tokens: 1, ..two.clone() }, Ranks::tp(1)),
            Worker { role: Role::Decode, ..worker("e", two.clone(), Ranks::tp(1)) },
            worker("f", two.clone(), Ranks::tp(0)),
        ];
        for state in [State::Ready, State::Warming] {
            let members = [&first].into_iter().chain(&strangers).map(|worker| (worker, state));
            let group = Group::of(members, Counted::ReadyAndWarming).unwrap();
            assert_eq!((group.ready + group.warming, group.missing_count), (1, 1));
            assert_eq!((group.missing, group.complete), (vec![Ranks::tp(1)], false));
        }
        let both = [(&first, State::Warming), (&strangers[4], State::Ready), (&first, State::Warming)];
        let group = Group::of(both, Counted::Ready).unwrap();
        assert_eq!((group.ready, group.warming, group.missing_count), (1, 0, 1));
    }

    #[test]
    fn a_large_group_names_some_of_what_is_missing_and_counts_all() {
        let large = Topology { tp_size: 256, pp_size: 256, dp_size: 1, ..topology() };
        let group = Group::of([(&worker("n", large, Ranks::tp(0)), State::Ready)], Counted::Ready).unwrap();
        assert_eq!((group.missing.len(), group.missing_count), (MISSING_NAMED, 65_535));
        assert!(group.to_string().ends_with("and 65471 more"), "{group}");
    }

    #[test]
    fn who_disagrees_is_told_on_what_and_with_whom() {
        let held = worker("a", topology(), Ranks::tp(0));
        let tag = |text| Tag::new(text).unwrap();
        for (field, other) in [
            ("tp_size", Topology { tp_size: 4, ..topology() }),
            ("pp_size", Topology { pp_size: 4, ..topology() }),
            ("cp_size", Topology { cp_size: 4, ..topology() }),
            ("dp_size", Topology { dp_size: 4, ..topology() }),
            ("page_tokens", Topology { page_tokens: 16, ..topology() }),
            ("dtype", Topology { dtype: tag("fp8_e4m3"), ..topology() }),
            ("model", Topology { model: tag("llama"), ..topology() }),
            ("rooms", Topology { rooms: RoomPolicy::Told, ..topology() }),
        ] {
            let misfit = fits(&worker("b", other.clone(), Ranks::tp(1)), &held).unwrap_err();
            assert!(matches!(&misfit, Misfit::Topology { field: told, .. } if *told == field), "{misfit}");
            assert!(misfit.to_string().contains("node a"), "{misfit}");
            fits(&worker("a", other, Ranks::tp(1)), &held).expect("a node may change what it alone has said");
        }
        let decode = Worker { role: Role::Decode, ..worker("b", topology(), Ranks::tp(1)) };
        assert!(fits(&decode, &held).unwrap_err().to_string().contains("role prefill"));
        let taken = fits(&worker("b", topology(), Ranks::tp(0)), &held).unwrap_err();
        assert!(matches!(&taken, Misfit::RankTaken { .. }), "{taken}");
        fits(&worker("b", topology(), Ranks::tp(1)), &held).unwrap();
    }

    #[test]
    fn sizes_and_ranks_are_checked() {
        let group = GroupId::new("g").unwrap();
        let member = |topology, ranks| Member::new(group.clone(), topology, ranks).map(drop);
        let huge = Topology { tp_size: u32::MAX, pp_size: u32::MAX, ..topology() };
        for sizes in [huge, Topology { cp_size: 0, ..topology() }, Topology { tp_size: 65_537, ..topology() }]
        {
            assert!(matches!(member(sizes, Ranks::default()), Err(Invalid::GroupSize { .. })));
        }
        for (axis, ranks) in [
            ("tp", Ranks::tp(2)),
            ("pp", Ranks { pp_rank: 3, ..Ranks::default() }),
            ("cp", Ranks { cp_rank: 1, ..Ranks::default() }),
            ("dp", Ranks { dp_rank: 2, ..Ranks::default() }),
        ] {
            let wrong = member(topology(), ranks).unwrap_err();
            assert!(matches!(wrong, Invalid::Rank { axis: told, .. } if told == axis), "{wrong}");
        }
        let nothing = Topology { page_tokens: 0, ..topology() };
        assert_eq!(member(nothing, Ranks::default()), Err(Invalid::PageTokens));
    }

    #[test]
    fn a_member_survives_json_and_leaves_out_what_is_one() {
        let member = worker("n", topology(), Ranks::tp(1)).member.unwrap();
        let text = serde_json::to_string(&member).unwrap();
        assert_eq!(serde_json::from_str::<Member>(&text).unwrap(), member);
        let short = r#"{"group":"g","page_tokens":64,"dtype":"bf16","model":"m","tp_size":2,"tp_rank":1}"#;
        let short: Member = serde_json::from_str(short).unwrap();
        assert_eq!(
            (short.topology.ranks(), short.ranks, short.topology.rooms),
            (2, Ranks::tp(1), RoomPolicy::Follow)
        );
    }
}
