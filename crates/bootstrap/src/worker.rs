//! What a worker says of itself. Every type here is checked when it is made, from Rust or from JSON, and is
//! trusted afterwards.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::group::{GROUP_SIZE_MAX, Member};

/// One worker's registration: who it is, what it does and where its control listener waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// The worker's name, the same at every start.
    pub node: NodeId,
    /// Which start of the worker this is.
    pub incarnation: Incarnation,
    /// Which half of an inference it runs.
    pub role: Role,
    /// Where its control listener accepts peers.
    pub address: Address,
    /// How long the registration holds without a renewal.
    pub ttl_ms: u64,
    /// For how long at most the worker warms up: 0 says that it is ready. The time begins with the first
    /// registration of this incarnation, and ends when it registers with 0. Until then it is listed as warming, and
    /// holds without renewals.
    #[serde(default)]
    pub warm_up_ms: u64,
    /// Its group and its ranks there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<Member>,
    /// What else its peers or a router select by.
    #[serde(default)]
    pub labels: Labels,
}

/// A worker as the registry lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// What the worker registered.
    #[serde(flatten)]
    pub worker: Worker,
    /// Whether it is ready to work.
    pub state: State,
    /// How long ago this incarnation registered first, where the registry keeps times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// How long the registration still holds, rounded up: never 0. etcd does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_ms: Option<u64>,
}

/// Whether a worker is ready to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is.
    Ready,
    /// It has asked for time to warm up, which is not over. Its silence says nothing: it may be compiling kernels.
    Warming,
}

impl State {
    /// As it stands in JSON and in URLs.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Ready => "ready",
            State::Warming => "warming",
        }
    }
}

/// The name of a worker: 1 to 128 characters out of `A-Z a-z 0-9 . _ ~ : @ -`, so that it stands in a URL as it
/// is; `.` and `..` are no names, because proxies fold them away.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// Checks and keeps a name.
    pub fn new(name: &str) -> Result<NodeId, Invalid> {
        let fits = (1..=NODE_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._~:@-".contains(&byte))
            && name != "."
            && name != "..";
        if fits { Ok(NodeId(name.into())) } else { Err(Invalid::Node { given: excerpt(name) }) }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which start of a worker: a random number, new at each start. In JSON and in URLs it is written in hex
/// digits, because many JSON readers round large numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation(u64);

impl Incarnation {
    /// The incarnation with this number.
    pub const fn new(number: u64) -> Incarnation {
        Incarnation(number)
    }

    /// The number.
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// Which half of an inference a worker runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Role {
    /// Computes the prompt's KV pages.
    Prefill,
    /// Takes the pages and generates tokens.
    Decode,
    /// Does either.
    Both,
    /// A role that the deployment named itself, made by [`Role::named`].
    Other(RoleName),
}

impl Role {
    /// The role of this name: 1 to 32 characters out of `a-z 0-9 . _ -`. Capitals are refused, so that
    /// `Prefill` is an error and not a role that nobody looks for.
    pub fn named(name: &str) -> Result<Role, Invalid> {
        match name {
            "prefill" => return Ok(Role::Prefill),
            "decode" => return Ok(Role::Decode),
            "both" => return Ok(Role::Both),
            _ => {}
        }
        let fits = (1..=ROLE_BYTES_MAX).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte));
        if fits {
            Ok(Role::Other(RoleName(name.into())))
        } else {
            Err(Invalid::Role { given: excerpt(name) })
        }
    }

    /// The role's name.
    pub fn as_str(&self) -> &str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Both => "both",
            Role::Other(RoleName(name)) => name,
        }
    }

    /// Whether a worker of this role does what `wanted` asks for: [`Role::Both`] serves prefill and decode.
    pub fn serves(&self, wanted: &Role) -> bool {
        self == wanted || (*self == Role::Both && matches!(wanted, Role::Prefill | Role::Decode))
    }
}

/// The name inside [`Role::Other`]; never the name of one of the other roles.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RoleName(Box<str>);

/// Where peers reach a worker. The wildcard address and port 0 are what a listener is told, not where it can
/// be reached, and are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(SocketAddr);

impl Address {
    /// Checks and keeps an address.
    pub fn new(address: SocketAddr) -> Result<Address, Invalid> {
        if address.port() == 0 || address.ip().is_unspecified() || address.ip().is_multicast() {
            return Err(Invalid::Unreachable { given: address });
        }
        Ok(Address(address))
    }

    /// The address, to connect to.
    pub fn socket(self) -> SocketAddr {
        self.0
    }
}

/// Names with values that a query can select by: at most 16, a key of 1 to 64 characters out of
/// `A-Z a-z 0-9 . _ / -`, a value of at most 256 bytes without control characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// No labels.
    pub fn none() -> Labels {
        Labels::default()
    }

    /// These labels and one more; a key that is there already takes the new value.
    pub fn with(mut self, key: &str, value: &str) -> Result<Labels, Invalid> {
        self.0.insert(key.to_owned(), value.to_owned());
        Labels::try_from(self.0)
    }

    /// The value of one label.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// All labels, ordered by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Whether all of `wanted` is among these labels, with the same values.
    pub fn include(&self, wanted: &Labels) -> bool {
        wanted.iter().all(|(key, value)| self.value(key) == Some(value))
    }
}

/// Why something about a worker was refused before it was used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The node's name is empty, too long or has a character that a URL would change.
    #[error("node {given:?} is not 1 to {NODE_BYTES_MAX} characters out of A-Z a-z 0-9 . _ ~ : @ -")]
    Node {
        /// The beginning of what was given.
        given: String,
    },
    /// The incarnation is not written as expected.
    #[error("incarnation {given:?} is not 1 to 16 hex digits in a string")]
    Incarnation {
        /// The beginning of what was given.
        given: String,
    },
    /// The role's name is empty, too long or has another character.
    #[error("role {given:?} is not 1 to {ROLE_BYTES_MAX} characters out of a-z 0-9 . _ -")]
    Role {
        /// The beginning of what was given.
        given: String,
    },
    /// The group's name is empty, too long or has a character that a URL would change.
    #[error("group {given:?} is not 1 to {NODE_BYTES_MAX} characters out of A-Z a-z 0-9 . _ ~ : @ -")]
    Group {
        /// The beginning of what was given.
        given: String,
    },
    /// A rank is not one of the group's.
    #[error("{axis}_rank {rank} is not below {axis}_size {ranks}")]
    Rank {
        /// Along which axis: `tp`, `pp`, `cp` or `dp`.
        axis: &'static str,
        /// The rank.
        rank: u32,
        /// The group's size along this axis.
        ranks: u32,
    },
    /// A size is 0, or all of them together make a group that is too large.
    #[error("sizes {sizes:?} (tp, pp, cp, dp) do not make 1 to {GROUP_SIZE_MAX} ranks")]
    GroupSize {
        /// The sizes.
        sizes: [u32; 4],
    },
    /// A page has no token.
    #[error("page_tokens is 0")]
    PageTokens,
    /// The name of a model or of a data type is empty, too long or not printable.
    #[error("{given:?} is not 1 to 128 printable ASCII characters")]
    Tag {
        /// The beginning of what was given.
        given: String,
    },
    /// A state that no worker has.
    #[error("state {given:?} is not ready or warming")]
    State {
        /// The beginning of what was given.
        given: String,
    },
    /// The address is not an IP address with a port.
    #[error("address {given:?} is not an IP address with a port, like 10.0.0.1:7000 or [fd00::1]:7000")]
    Address {
        /// The beginning of what was given.
        given: String,
    },
    /// No peer can connect to this address.
    #[error("address {given} is not one that a peer can connect to")]
    Unreachable {
        /// The address.
        given: SocketAddr,
    },
    /// There are too many labels.
    #[error("{count} labels are more than {LABELS_MAX}")]
    LabelCount {
        /// How many were given.
        count: usize,
    },
    /// A label's key is empty, too long or has another character.
    #[error("label key {given:?} is not 1 to {LABEL_KEY_BYTES_MAX} characters out of A-Z a-z 0-9 . _ / -")]
    LabelKey {
        /// The beginning of what was given.
        given: String,
    },
    /// A label's value is too long or has a control character.
    #[error("the value of label {key:?} has control characters or more than {LABEL_VALUE_BYTES_MAX} bytes")]
    LabelValue {
        /// The label's key.
        key: String,
    },
}

impl TryFrom<String> for NodeId {
    type Error = Invalid;

    fn try_from(name: String) -> Result<NodeId, Invalid> {
        NodeId::new(&name)
    }
}

impl From<NodeId> for String {
    fn from(node: NodeId) -> String {
        node.as_str().to_owned()
    }
}

impl FromStr for NodeId {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<NodeId, Invalid> {
        NodeId::new(name)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Incarnation {
    type Err = Invalid;

    fn from_str(digits: &str) -> Result<Incarnation, Invalid> {
        // The digits are checked first: from_str_radix would also take a sign.
        let hex = (1..=16).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u64::from_str_radix(digits, 16) {
            Ok(number) if hex => Ok(Incarnation(number)),
            _ => Err(Invalid::Incarnation { given: excerpt(digits) }),
        }
    }
}

impl TryFrom<String> for Incarnation {
    type Error = Invalid;

    fn try_from(digits: String) -> Result<Incarnation, Invalid> {
        digits.parse()
    }
}

impl From<Incarnation> for String {
    fn from(incarnation: Incarnation) -> String {
        incarnation.to_string()
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Incarnation({self})")
    }
}

impl FromStr for Role {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Role, Invalid> {
        Role::named(name)
    }
}

impl TryFrom<String> for Role {
    type Error = Invalid;

    fn try_from(name: String) -> Result<Role, Invalid> {
        Role::named(&name)
    }
}

impl From<Role> for String {
    fn from(role: Role) -> String {
        role.as_str().to_owned()
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for State {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<State, Invalid> {
        match name {
            "ready" => Ok(State::Ready),
            "warming" => Ok(State::Warming),
            _ => Err(Invalid::State { given: excerpt(name) }),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Address, Invalid> {
        text.parse()
    }
}

impl FromStr for Address {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Address, Invalid> {
        let address = text.parse().map_err(|_| Invalid::Address { given: excerpt(text) })?;
        Address::new(address)
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = Invalid;

    fn try_from(labels: BTreeMap<String, String>) -> Result<Labels, Invalid> {
        if labels.len() > LABELS_MAX {
            return Err(Invalid::LabelCount { count: labels.len() });
        }
        for (key, value) in &labels {
            let fits = (1..=LABEL_KEY_BYTES_MAX).contains(&key.len())
                && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte));
            if !fits {
                return Err(Invalid::LabelKey { given: excerpt(key) });
            }
            if value.len() > LABEL_VALUE_BYTES_MAX || value.chars().any(char::is_control) {
                return Err(Invalid::LabelValue { key: key.clone() });
            }
        }
        Ok(Labels(labels))
    }
}

impl From<Labels> for BTreeMap<String, String> {
    fn from(labels: Labels) -> BTreeMap<String, String> {
        labels.0
    }
}

/// Enough of a refused text to recognise it; the whole of it would come back in the answer and in logs.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(64).collect()
}

const NODE_BYTES_MAX: usize = 128;
const ROLE_BYTES_MAX: usize = 32;
const LABELS_MAX: usize = 16;
const LABEL_KEY_BYTES_MAX: usize = 64;
const LABEL_VALUE_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::group::Ranks;

    fn json(change: impl FnOnce(&mut serde_json::Value)) -> Result<Worker, String> {
        let mut value = serde_json::json!({
            "node": "prefill-0", "incarnation": "00c0ffee", "role": "prefill",
            "address": "10.0.0.1:7000", "ttl_ms": 10_000, "warm_up_ms": 60_000, "labels": {"zone": "a"},
            "member": {
                "group": "prefill", "tp_rank": 1, "tp_size": 8, "page_tokens": 64, "dtype": "bf16",
                "model": "deepseek-r1",
            },
        });
        change(&mut value);
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn a_worker_survives_json() {
        let worker = json(|_| {}).unwrap();
        assert_eq!(worker.incarnation, Incarnation::new(0xc0ffee));
        assert_eq!(worker.member.as_ref().unwrap().ranks(), Ranks::tp(1));
        let text = serde_json::to_string(&worker).unwrap();
        assert!(text.contains(r#""incarnation":"0000000000c0ffee""#), "{text}");
        assert_eq!(serde_json::from_str::<Worker>(&text).unwrap(), worker);
    }

    #[test]
    fn the_largest_incarnation_survives_json() {
        let text = serde_json::to_string(&Incarnation::new(u64::MAX)).unwrap();
        assert_eq!(text, r#""ffffffffffffffff""#);
        assert_eq!(serde_json::from_str::<Incarnation>(&text).unwrap().number(), u64::MAX);
    }

    #[test]
    fn what_is_optional_may_be_left_out_and_fields_of_later_versions_are_passed_over() {
        let worker = json(|value| {
            for optional in ["labels", "member", "warm_up_ms"] {
                value.as_object_mut().unwrap().remove(optional);
            }
            value["zone"] = "b".into();
        });
        let worker = worker.unwrap();
        assert_eq!((worker.labels, worker.member, worker.warm_up_ms), (Labels::none(), None, 0));
    }

    #[test]
    fn every_field_is_checked() {
        for (field, wrong) in [
            ("node", "".into()),
            ("node", "a/b".into()),
            ("node", "..".into()),
            ("node", "n".repeat(129).into()),
            ("node", 7.into()),
            ("incarnation", 7.into()),
            ("incarnation", "".into()),
            ("incarnation", "+7".into()),
            ("incarnation", "0x7".into()),
            ("incarnation", "10000000000000000".into()),
            ("role", "Prefill".into()),
            ("role", "".into()),
            ("role", "r".repeat(33).into()),
            ("warm_up_ms", (-1).into()),
            ("member", "prefill".into()),
            ("member", serde_json::json!({"group": "g"})),
            ("address", "10.0.0.1".into()),
            ("address", "10.0.0.1:0".into()),
            ("address", "0.0.0.0:7000".into()),
            ("address", "[::]:7000".into()),
            ("address", "224.0.0.1:7000".into()),
            ("address", "prefill-0:7000".into()),
            ("ttl_ms", (-1).into()),
            ("ttl_ms", 1.5.into()),
            ("labels", serde_json::json!({"": "empty key"})),
            ("labels", serde_json::json!({"a b": "space"})),
            ("labels", serde_json::json!({"a": "line\nbreak"})),
            ("labels", serde_json::json!({"a": "v".repeat(257)})),
            ("labels", serde_json::json!({"a": 1})),
            ("labels", (0..17).map(|i| (format!("k{i}"), serde_json::Value::from("v"))).collect()),
        ] as [(&str, serde_json::Value); 30]
        {
            json(|value| value[field] = wrong.clone()).expect_err(&format!("{field} = {wrong}"));
        }
    }

    proptest! {
        /// A worker's JSON with one part exchanged for anything.
        #[test]
        fn any_json_is_a_worker_that_survives_it_or_is_refused(
            at in prop_oneof![
                proptest::sample::select(vec!["node", "incarnation", "role", "address", "ttl_ms", "warm_up_ms", "member"]),
                proptest::sample::select(vec!["group", "tp_size", "dp_rank", "page_tokens", "dtype", "model", "rooms"]),
            ],
            with in prop_oneof![
                any::<i64>().prop_map(serde_json::Value::from),
                (0..9u32).prop_map(serde_json::Value::from),
                "\\PC{0,12}".prop_map(serde_json::Value::from),
                "[a-z0-9.:]{1,12}".prop_map(serde_json::Value::from),
                Just(serde_json::Value::Null),
                Just(serde_json::json!([])),
                Just(serde_json::json!({})),
            ],
        ) {
            let read = json(|value| {
                let top = value.get(at).is_some();
                let place = if top { &mut value[at] } else { &mut value["member"][at] };
                *place = with;
            });
            if let Ok(worker) = read {
                let text = serde_json::to_string(&worker).unwrap();
                prop_assert_eq!(serde_json::from_str::<Worker>(&text).unwrap(), worker);
            }
        }
    }

    #[test]
    fn a_refusal_shows_what_was_given_but_not_all_of_a_long_text() {
        let shown = json(|value| value["role"] = "R".repeat(1_000).into()).unwrap_err();
        assert!(shown.contains("RRRR") && shown.len() < 200, "{shown}");
    }

    #[test]
    fn both_serves_prefill_and_decode_and_nothing_else() {
        let other = Role::named("encoder").unwrap();
        for (role, wanted, serves) in [
            (&Role::Both, &Role::Prefill, true),
            (&Role::Both, &Role::Decode, true),
            (&Role::Both, &Role::Both, true),
            (&Role::Both, &other, false),
            (&Role::Prefill, &Role::Both, false),
            (&Role::Prefill, &Role::Decode, false),
            (&other, &other, true),
        ] {
            assert_eq!(role.serves(wanted), serves, "{role} for {wanted}");
        }
    }
}
