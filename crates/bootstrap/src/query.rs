//! Which workers to list, and how that is written in a URL.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::group::{Counted, GroupId};
use crate::worker::{Incarnation, Invalid, Labels, Role, State, Worker};

/// Which workers to list: those that match everything that is asked for.
///
/// ```
/// use crossdock_bootstrap::{Query, Role};
///
/// let query = Query::all().role(Role::Decode).group("decode-0".parse()?).tp_rank(0).label("zone", "a")?;
/// # Ok::<(), crossdock_bootstrap::Invalid>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    role: Option<Role>,
    pub(crate) group: Option<GroupId>,
    tp_rank: Option<u32>,
    pp_rank: Option<u32>,
    cp_rank: Option<u32>,
    dp_rank: Option<u32>,
    state: Option<State>,
    labels: Labels,
}

impl Query {
    /// Every worker.
    pub fn all() -> Query {
        Query::default()
    }

    /// Only workers that serve this role; one that does both serves prefill and decode.
    pub fn role(mut self, role: Role) -> Query {
        self.role = Some(role);
        self
    }

    /// Only members of this group.
    pub fn group(mut self, group: GroupId) -> Query {
        self.group = Some(group);
        self
    }

    /// Only members of a group with this tensor-parallel rank.
    pub fn tp_rank(mut self, rank: u32) -> Query {
        self.tp_rank = Some(rank);
        self
    }

    /// Only members of a group that are this pipeline stage.
    pub fn pp_rank(mut self, rank: u32) -> Query {
        self.pp_rank = Some(rank);
        self
    }

    /// Only members of a group with this context-parallel rank.
    pub fn cp_rank(mut self, rank: u32) -> Query {
        self.cp_rank = Some(rank);
        self
    }

    /// Only members of a group with this data-parallel rank.
    pub fn dp_rank(mut self, rank: u32) -> Query {
        self.dp_rank = Some(rank);
        self
    }

    /// Only workers in this state. Without it those that warm up are listed, too.
    pub fn state(mut self, state: State) -> Query {
        self.state = Some(state);
        self
    }

    /// Only workers with this label.
    pub fn label(mut self, key: &str, value: &str) -> Result<Query, Invalid> {
        self.labels = self.labels.with(key, value)?;
        Ok(self)
    }

    /// Whether a worker in this state is asked for.
    pub fn matches(&self, worker: &Worker, state: State) -> bool {
        let ranks = [self.tp_rank, self.pp_rank, self.cp_rank, self.dp_rank];
        let fits = self.role.as_ref().is_none_or(|role| worker.role.serves(role))
            && self.state.is_none_or(|wanted| wanted == state)
            && worker.labels.include(&self.labels);
        let Some(member) = &worker.member else {
            return fits && self.group.is_none() && ranks == [None; 4];
        };
        let own = member.ranks();
        let own = [own.tp_rank, own.pp_rank, own.cp_rank, own.dp_rank];
        fits && self.group.as_ref().is_none_or(|group| group == member.group())
            && ranks.iter().zip(own).all(|(wanted, own)| wanted.is_none_or(|wanted| wanted == own))
    }
}

/// Reads a query as it stands in the URL of a list: `role=decode&tp_rank=0&label.zone=a`. An empty text asks for every
/// worker.
///
/// ```
/// use crossdock_bootstrap::{Query, Role};
///
/// assert_eq!("role=decode&tp_rank=0".parse(), Ok(Query::all().role(Role::Decode).tp_rank(0)));
/// assert!("rank=0".parse::<Query>().is_err());
/// ```
impl FromStr for Query {
    type Err = InvalidQuery;

    fn from_str(text: &str) -> Result<Query, InvalidQuery> {
        match read(text) {
            Ok((query, None)) => Ok(query),
            Ok((_, Some(_))) => Err(InvalidQuery { why: "a query does not say how long to wait".into() }),
            Err(fault) => Err(InvalidQuery { why: fault.to_string() }),
        }
    }
}

/// A text that is no [`Query`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct InvalidQuery {
    why: String,
}

/// Until when an answer is kept back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    pub(crate) until: Until,
    /// How long at most.
    pub(crate) time: Duration,
}

/// What an answer waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// So many workers match.
    Count(usize),
    /// Something in the registry is not as it was when it had this mark.
    Changed(Mark),
}

/// Names a state of a registry. Within one epoch the revision grows; a registry that has forgotten everyone has a new
/// epoch, or begins to count anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Mark {
    pub(crate) epoch: u64,
    pub(crate) revision: u64,
}

impl Mark {
    /// Whether the registry of this mark has forgotten what the one of an earlier mark knew.
    pub(crate) fn forgot(&self, before: &Mark) -> bool {
        self.epoch != before.epoch || self.revision < before.revision
    }
}

impl TryFrom<String> for Mark {
    type Error = QueryFault;

    fn try_from(text: String) -> Result<Mark, QueryFault> {
        let fault = || QueryFault::Mark { given: text.chars().take(64).collect() };
        let (epoch, revision) = text.split_once('.').ok_or_else(fault)?;
        let epoch: Incarnation = epoch.parse().map_err(|_| fault())?;
        Ok(Mark { epoch: epoch.number(), revision: revision.parse().map_err(|_| fault())? })
    }
}

impl From<Mark> for String {
    fn from(Mark { epoch, revision }: Mark) -> String {
        format!("{}.{revision}", Incarnation::new(epoch))
    }
}

/// Why the part of a URL after the question mark was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueryFault {
    #[error("{text:?} has a % without two hex digits after it, or is not UTF-8")]
    Encoding { text: String },
    #[error("there is no parameter {name:?} here")]
    Name { name: String },
    #[error("parameter {name:?} is there twice")]
    Twice { name: String },
    #[error("parameter {name:?} is missing")]
    Missing { name: &'static str },
    #[error("parameter {name:?} is not a number that fits: {given:?}")]
    Number { name: String, given: String },
    #[error("parameters \"count\" and \"seen\" wait for different things: give one of them")]
    TwoWaits,
    #[error("{given:?} is not a mark that a list came with")]
    Mark { given: String },
    #[error("parameter \"count\" is not ready or all: {given:?}")]
    Counted { given: String },
    #[error(transparent)]
    Value(#[from] Invalid),
}

/// Writes the parameters of `GET /v1/workers`, with the question mark unless there are none.
pub(crate) fn write(query: &Query, wait: Option<&Wait>) -> String {
    let mut text = String::new();
    let mut add = |key: &str, value: &str| {
        text.push(if text.is_empty() { '?' } else { '&' });
        text.push_str(key);
        text.push('=');
        for &byte in value.as_bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                text.push(char::from(byte));
            } else {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    };
    if let Some(role) = &query.role {
        add("role", role.as_str());
    }
    if let Some(group) = &query.group {
        add("group", group.as_str());
    }
    let Query { tp_rank, pp_rank, cp_rank, dp_rank, .. } = *query;
    for (name, rank) in
        [("tp_rank", tp_rank), ("pp_rank", pp_rank), ("cp_rank", cp_rank), ("dp_rank", dp_rank)]
    {
        if let Some(rank) = rank {
            add(name, &rank.to_string());
        }
    }
    if let Some(state) = query.state {
        add("state", state.as_str());
    }
    for (key, value) in query.labels.iter() {
        add(&format!("{LABEL_PREFIX}{key}"), value);
    }
    if let Some(Wait { until, time }) = wait {
        match until {
            Until::Count(count) => add("count", &count.to_string()),
            Until::Changed(mark) => add("seen", &String::from(mark.clone())),
        }
        add("wait_ms", &time.as_millis().to_string());
    }
    text
}

/// Reads the parameters of `GET /v1/workers`.
pub(crate) fn read(text: &str) -> Result<(Query, Option<Wait>), QueryFault> {
    let mut query = Query::all();
    let (mut count, mut seen, mut wait_ms) = (None, None, None);
    for (name, value) in pairs(text)? {
        match name.as_str() {
            "role" => query = query.role(Role::named(&value)?),
            "group" => query = query.group(value.parse()?),
            "tp_rank" => query = query.tp_rank(number(&name, &value)?),
            "pp_rank" => query = query.pp_rank(number(&name, &value)?),
            "cp_rank" => query = query.cp_rank(number(&name, &value)?),
            "dp_rank" => query = query.dp_rank(number(&name, &value)?),
            "state" => query = query.state(value.parse()?),
            "seen" => seen = Some(Mark::try_from(value)?),
            "count" => count = Some(number(&name, &value)?),
            "wait_ms" => wait_ms = Some(number(&name, &value)?),
            // A parameter that is not known would select nothing, and the list would hold workers that the
            // caller meant to leave out.
            _ => match name.strip_prefix(LABEL_PREFIX) {
                Some(key) => query = query.label(key, &value)?,
                None => return Err(QueryFault::Name { name }),
            },
        }
    }
    let until = match (count, seen) {
        (Some(_), Some(_)) => return Err(QueryFault::TwoWaits),
        (Some(count), None) => Some(Until::Count(count)),
        (None, Some(seen)) => Some(Until::Changed(seen)),
        (None, None) => None,
    };
    let wait = match (until, wait_ms) {
        (Some(until), Some(ms)) => Some(Wait { until, time: Duration::from_millis(ms) }),
        (None, None) => None,
        (Some(_), None) => return Err(QueryFault::Missing { name: "wait_ms" }),
        (None, Some(_)) => return Err(QueryFault::Missing { name: "count" }),
    };
    Ok((query, wait))
}

/// Reads the parameters of `GET /v1/groups/{group}`: who counts, and how long to wait for completeness.
pub(crate) fn read_group(text: &str) -> Result<(Counted, Duration), QueryFault> {
    let (mut counted, mut wait) = (Counted::default(), Duration::ZERO);
    for (name, value) in pairs(text)? {
        match name.as_str() {
            "count" => counted = read_counted(&value)?,
            "wait_ms" => wait = Duration::from_millis(number(&name, &value)?),
            _ => return Err(QueryFault::Name { name }),
        }
    }
    Ok((counted, wait))
}

/// Writes the parameters of `GET /v1/groups/{group}`.
pub(crate) fn write_group(counted: Counted, wait: Duration) -> String {
    let counted = match counted {
        Counted::Ready => "ready",
        Counted::ReadyAndWarming => "all",
    };
    format!("?count={counted}&wait_ms={}", wait.as_millis())
}

fn read_counted(value: &str) -> Result<Counted, QueryFault> {
    match value {
        "ready" => Ok(Counted::Ready),
        "all" => Ok(Counted::ReadyAndWarming),
        _ => Err(QueryFault::Counted { given: value.chars().take(32).collect() }),
    }
}

/// Reads the one parameter of `DELETE /v1/workers/{node}`.
pub(crate) fn read_incarnation(text: &str) -> Result<Incarnation, QueryFault> {
    let mut incarnation = None;
    for (name, value) in pairs(text)? {
        match name.as_str() {
            "incarnation" => incarnation = Some(value.parse()?),
            _ => return Err(QueryFault::Name { name }),
        }
    }
    incarnation.ok_or(QueryFault::Missing { name: "incarnation" })
}

/// Undoes percent-encoding. Nothing is guessed: what is not well-formed is refused.
pub(crate) fn percent_decode(text: &str) -> Result<Cow<'_, str>, QueryFault> {
    if !text.contains('%') {
        return Ok(text.into());
    }
    let fault = || QueryFault::Encoding { text: text.chars().take(64).collect() };
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || bytes.next().and_then(|digit| char::from(digit).to_digit(16));
            let (high, low) = (digit().ok_or_else(fault)?, digit().ok_or_else(fault)?);
            decoded.push((high * 16 + low) as u8);
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).map(Cow::Owned).map_err(|_| fault())
}

fn pairs(text: &str) -> Result<BTreeMap<String, String>, QueryFault> {
    let mut pairs = BTreeMap::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let [name, value] = [name, value].map(|text| text.replace('+', " "));
        let (name, value) = (percent_decode(&name)?.into_owned(), percent_decode(&value)?.into_owned());
        if pairs.insert(name.clone(), value).is_some() {
            return Err(QueryFault::Twice { name });
        }
    }
    Ok(pairs)
}

fn number<N: FromStr>(name: &str, value: &str) -> Result<N, QueryFault> {
    let fault = || QueryFault::Number { name: name.to_owned(), given: value.chars().take(32).collect() };
    value.parse().map_err(|_| fault())
}

const LABEL_PREFIX: &str = "label.";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_query() -> impl Strategy<Value = (Query, Option<Wait>)> {
        let role = proptest::option::of("[a-z0-9._-]{1,32}");
        let group = proptest::option::of("[A-Za-z0-9_~:@-]{1,128}");
        let state = proptest::option::of(prop_oneof![Just(State::Ready), Just(State::Warming)]);
        let labels = proptest::collection::btree_map("[A-Za-z0-9._/-]{1,64}", "\\PC{0,60}", 0..8);
        let until = prop_oneof![
            any::<u16>().prop_map(|count| Until::Count(count.into())),
            any::<(u64, u64)>().prop_map(|(epoch, revision)| Until::Changed(Mark { epoch, revision })),
        ];
        let wait = proptest::option::of((until, any::<u32>()));
        (role, group, any::<[Option<u32>; 4]>(), state, labels, wait).prop_map(
            |(role, group, [tp_rank, pp_rank, cp_rank, dp_rank], state, labels, wait)| {
                let role = role.map(|role| Role::named(&role).unwrap());
                let group = group.map(|group| group.parse().unwrap());
                let labels = Labels::try_from(labels).unwrap();
                let wait = wait.map(|(until, ms)| Wait { until, time: Duration::from_millis(ms.into()) });
                (Query { role, group, tp_rank, pp_rank, cp_rank, dp_rank, state, labels }, wait)
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again((query, wait) in any_query()) {
            let text = write(&query, wait.as_ref());
            prop_assert!(text.is_ascii());
            prop_assert_eq!(read(text.strip_prefix('?').unwrap_or("")), Ok((query, wait)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,80}", cut in "([a-z_.]{0,9}=?[%0-9a-fA-F+&]{0,9}){0,4}") {
            for text in [text, cut] {
                let _ = read(&text);
                let _ = read_incarnation(&text);
                let _ = read_group(&text);
            }
        }
    }

    #[test]
    fn each_fault_is_told_apart() {
        let name = |name: &str| name.to_owned();
        for (text, fault) in [
            ("role=%", QueryFault::Encoding { text: name("%") }),
            ("role=%f", QueryFault::Encoding { text: name("%f") }),
            ("role=%ff", QueryFault::Encoding { text: name("%ff") }),
            ("role=%+f", QueryFault::Encoding { text: name("% f") }),
            ("roles=decode", QueryFault::Name { name: name("roles") }),
            ("dp_rank=1&dp_rank=1", QueryFault::Twice { name: name("dp_rank") }),
            ("count=1&seen=1.2&wait_ms=1", QueryFault::TwoWaits),
            ("seen=1&wait_ms=1", QueryFault::Mark { given: name("1") }),
            ("seen=1.x&wait_ms=1", QueryFault::Mark { given: name("1.x") }),
            ("count=1", QueryFault::Missing { name: "wait_ms" }),
            ("wait_ms=1", QueryFault::Missing { name: "count" }),
            ("tp_rank=-1", QueryFault::Number { name: name("tp_rank"), given: name("-1") }),
            ("pp_rank=4294967296", QueryFault::Number { name: name("pp_rank"), given: name("4294967296") }),
            ("group=a/b", QueryFault::Value(Invalid::Group { given: name("a/b") })),
            ("state=up", QueryFault::Value(Invalid::State { given: name("up") })),
            ("role=", QueryFault::Value(Invalid::Role { given: name("") })),
            ("label.=x", QueryFault::Value(Invalid::LabelKey { given: name("") })),
        ] {
            assert_eq!(read(text), Err(fault), "{text}");
        }
        assert_eq!(read_incarnation(""), Err(QueryFault::Missing { name: "incarnation" }));
        assert_eq!(read_incarnation("incarnation=0f"), Ok(Incarnation::new(15)));
        assert_eq!(read_group(""), Ok((Counted::Ready, Duration::ZERO)));
        assert_eq!(read_group("count=some"), Err(QueryFault::Counted { given: name("some") }));
        for counted in [Counted::Ready, Counted::ReadyAndWarming] {
            let wait = Duration::from_millis(7);
            assert_eq!(read_group(&write_group(counted, wait)[1..]), Ok((counted, wait)));
        }
    }
}
