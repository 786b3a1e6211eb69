//! Which workers to list, and how that is written in a URL.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use crate::worker::{Incarnation, Invalid, Labels, Role, Worker};

/// Which workers to list: those that match everything that is asked for.
///
/// ```
/// use crossdock_bootstrap::{Query, Role};
///
/// let query = Query::all().role(Role::Decode).rank(0).label("model", "deepseek-r1")?;
/// # Ok::<(), crossdock_bootstrap::Invalid>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    role: Option<Role>,
    rank: Option<u32>,
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

    /// Only workers of this rank.
    pub fn rank(mut self, rank: u32) -> Query {
        self.rank = Some(rank);
        self
    }

    /// Only workers with this label.
    pub fn label(mut self, key: &str, value: &str) -> Result<Query, Invalid> {
        self.labels = self.labels.with(key, value)?;
        Ok(self)
    }

    /// Whether a worker is asked for.
    pub fn matches(&self, worker: &Worker) -> bool {
        self.role.as_ref().is_none_or(|role| worker.role.serves(role))
            && self.rank.is_none_or(|rank| worker.rank.rank() == rank)
            && worker.labels.include(&self.labels)
    }
}

/// Asks the server to keep the answer back until enough workers match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    /// How many workers are enough.
    pub(crate) count: usize,
    /// How long to wait for them.
    pub(crate) time: Duration,
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
    #[error(transparent)]
    Value(#[from] Invalid),
}

/// Writes the parameters of `GET /v1/workers`, with the question mark unless there are none.
pub(crate) fn write(query: &Query, wait: Option<Wait>) -> String {
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
    if let Some(rank) = query.rank {
        add("rank", &rank.to_string());
    }
    for (key, value) in query.labels.iter() {
        add(&format!("{LABEL_PREFIX}{key}"), value);
    }
    if let Some(Wait { count, time }) = wait {
        add("count", &count.to_string());
        add("wait_ms", &time.as_millis().to_string());
    }
    text
}

/// Reads the parameters of `GET /v1/workers`.
pub(crate) fn read(text: &str) -> Result<(Query, Option<Wait>), QueryFault> {
    let mut query = Query::all();
    let (mut count, mut wait_ms) = (None, None);
    for (name, value) in pairs(text)? {
        match name.as_str() {
            "role" => query = query.role(Role::named(&value)?),
            "rank" => query = query.rank(number(&name, &value)?),
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
    let wait = match (count, wait_ms) {
        (Some(count), Some(ms)) => Some(Wait { count, time: Duration::from_millis(ms) }),
        (None, None) => None,
        (Some(_), None) => return Err(QueryFault::Missing { name: "wait_ms" }),
        (None, Some(_)) => return Err(QueryFault::Missing { name: "count" }),
    };
    Ok((query, wait))
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

fn number<N: std::str::FromStr>(name: &str, value: &str) -> Result<N, QueryFault> {
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
        let labels = proptest::collection::btree_map("[A-Za-z0-9._/-]{1,64}", "\\PC{0,60}", 0..8);
        let wait = proptest::option::of((any::<u16>(), any::<u32>()));
        (role, any::<Option<u32>>(), labels, wait).prop_map(|(role, rank, labels, wait)| {
            let role = role.map(|role| Role::named(&role).unwrap());
            let query = Query { role, rank, labels: Labels::try_from(labels).unwrap() };
            let wait =
                wait.map(|(count, ms)| Wait { count: count.into(), time: Duration::from_millis(ms.into()) });
            (query, wait)
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again((query, wait) in any_query()) {
            let text = write(&query, wait);
            prop_assert!(text.is_ascii());
            prop_assert_eq!(read(text.strip_prefix('?').unwrap_or("")), Ok((query, wait)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,80}", cut in "([a-z_.]{0,9}=?[%0-9a-fA-F+&]{0,9}){0,4}") {
            for text in [text, cut] {
                let _ = read(&text);
                let _ = read_incarnation(&text);
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
            ("rank=1&rank=1", QueryFault::Twice { name: name("rank") }),
            ("count=1", QueryFault::Missing { name: "wait_ms" }),
            ("wait_ms=1", QueryFault::Missing { name: "count" }),
            ("rank=-1", QueryFault::Number { name: name("rank"), given: name("-1") }),
            ("rank=4294967296", QueryFault::Number { name: name("rank"), given: name("4294967296") }),
            ("role=", QueryFault::Value(Invalid::Role { given: name("") })),
            ("label.=x", QueryFault::Value(Invalid::LabelKey { given: name("") })),
        ] {
            assert_eq!(read(text), Err(fault), "{text}");
        }
        assert_eq!(read_incarnation(""), Err(QueryFault::Missing { name: "incarnation" }));
        assert_eq!(read_incarnation("incarnation=0f"), Ok(Incarnation::new(15)));
    }
}
