//! etcd's version 3 interface as its own HTTP/JSON gateway gives it: keys and values in base64, whole numbers in
//! strings. It needs no gRPC, and no more than the HTTP client that is here already.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::error::{Error, ForeignAnswer, InvalidServer, Stage};
use crate::exchange::{Answer, Deadline, exchange_until, request_head};
use crate::lookup::Lookup;
use crate::token::Token;

/// The members of one etcd cluster. A call goes to the member that answered last, and to the next one where that fails.
#[derive(Debug)]
pub(crate) struct Gateway {
    name: String,
    members: Vec<Lookup>,
    current: AtomicUsize,
    token: Option<Token>,
    answer_bytes: usize,
}

/// `etcd://HOST:PORT,…/PREFIX`, taken apart: the members, and what all keys begin with.
pub(crate) fn parse(server: &str) -> Result<(Vec<Lookup>, String), InvalidServer> {
    let invalid = || InvalidServer { given: server.to_owned() };
    let text = server.strip_prefix("etcd://").ok_or_else(invalid)?;
    let (members, prefix) = text.split_once('/').unwrap_or((text, ""));
    let members: Option<Vec<Lookup>> =
        members.split(',').map(|member| Lookup::with_port(member, DEFAULT_PORT)).collect();
    let prefix = match prefix.trim_end_matches('/') {
        "" => "crossdock/".to_owned(),
        prefix if prefix.bytes().all(|byte| byte.is_ascii_graphic()) => format!("{prefix}/"),
        _ => return Err(invalid()),
    };
    Ok((members.filter(|members| members.len() <= MEMBERS_MAX).ok_or_else(invalid)?, prefix))
}

/// One key with its value.
#[derive(Debug, Deserialize)]
pub(crate) struct Pair {
    #[serde(deserialize_with = "bytes")]
    pub(crate) key: Vec<u8>,
    #[serde(default, deserialize_with = "bytes")]
    pub(crate) value: Vec<u8>,
    #[serde(default, deserialize_with = "whole")]
    pub(crate) mod_revision: i64,
    #[serde(default, deserialize_with = "whole")]
    pub(crate) lease: i64,
}

/// What the whole cluster was like when it answered.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Header {
    #[serde(default, deserialize_with = "natural")]
    pub(crate) cluster_id: u64,
    #[serde(default, deserialize_with = "whole")]
    pub(crate) revision: i64,
}

/// What one operation of a transaction found.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Range {
    #[serde(default)]
    pub(crate) kvs: Vec<Pair>,
}

/// How a transaction ended.
#[derive(Debug, Deserialize)]
pub(crate) struct Done {
    pub(crate) header: Header,
    #[serde(default)]
    pub(crate) succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Debug, Deserialize)]
struct Response {
    #[serde(default, alias = "responseRange")]
    response_range: Option<Range>,
}

impl Done {
    /// What the ranges found, in their order; an empty one for each that the answer left out.
    pub(crate) fn ranges(self) -> impl Iterator<Item = Range> {
        let found = self.responses.into_iter().filter_map(|response| response.response_range);
        found.chain(std::iter::repeat_with(Range::default))
    }
}

/// One step of a transaction.
pub(crate) enum Op<'a> {
    Get(&'a str),
    /// All keys that begin so.
    GetAll(&'a str),
    /// The first key that begins so.
    GetFirst(&'a str),
    Put {
        key: &'a str,
        value: &'a [u8],
        lease: i64,
    },
    Delete(&'a str),
}

impl Op<'_> {
    fn json(&self) -> Value {
        match self {
            Op::Get(key) => json!({"request_range": {"key": encode(key)}}),
            Op::GetAll(prefix) => {
                json!({"request_range": {"key": encode(prefix), "range_end": STANDARD.encode(after(prefix))}})
            }
            Op::GetFirst(prefix) => json!({"request_range": {
                "key": encode(prefix), "range_end": STANDARD.encode(after(prefix)), "limit": "1",
            }}),
            Op::Put { key, value, lease } => json!({"request_put": {
                "key": encode(key), "value": STANDARD.encode(value), "lease": lease.to_string(),
            }}),
            Op::Delete(key) => json!({"request_delete_range": {"key": encode(key)}}),
        }
    }
}

/// A condition of a transaction: the key was changed last in this revision; 0 says that it is not there.
pub(crate) struct Unchanged<'a>(pub(crate) &'a str, pub(crate) i64);

impl Gateway {
    pub(crate) fn new(members: Vec<Lookup>, token: Option<Token>, answer_bytes: usize) -> Gateway {
        let names: Vec<&str> = members.iter().map(Lookup::name).collect();
        let name = format!("etcd://{}", names.join(","));
        Gateway { name, members, current: AtomicUsize::new(0), token, answer_bytes }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Does all of these operations or, where a condition does not hold, none.
    pub(crate) fn transact(&self, only_if: &[Unchanged], ops: &[Op], by: Deadline) -> Result<Done, Error> {
        let compare = |Unchanged(key, revision): &Unchanged| {
            json!({
                "result": "EQUAL", "target": "MOD", "key": encode(key), "mod_revision": revision.to_string(),
            })
        };
        let compare: Vec<Value> = only_if.iter().map(compare).collect();
        let success: Vec<Value> = ops.iter().map(Op::json).collect();
        self.call("/v3/kv/txn", &json!({"compare": compare, "success": success}), by)
    }

    /// A lease of at least this time: whole seconds, and no fewer than etcd allows.
    pub(crate) fn grant(&self, time: Duration, by: Deadline) -> Result<i64, Error> {
        let seconds = time.as_millis().div_ceil(1000).max(1);
        let granted: Lease = self.call("/v3/lease/grant", &json!({"TTL": seconds.to_string()}), by)?;
        Ok(granted.id)
    }

    /// Starts a lease's time again. It fails to where the lease is over.
    pub(crate) fn keep_alive(&self, lease: i64, by: Deadline) -> Result<bool, Error> {
        let kept: Stream<Lease> = self.call("/v3/lease/keepalive", &json!({"ID": lease.to_string()}), by)?;
        Ok(kept.result.ttl > 0)
    }

    /// Ends a lease, and with it all keys that hang on it.
    pub(crate) fn revoke(&self, lease: i64, by: Deadline) -> Result<(), Error> {
        let revoked: Result<Value, Error> =
            self.call("/v3/lease/revoke", &json!({"ID": lease.to_string()}), by);
        match revoked {
            // It is over already.
            Err(Error::Etcd { status: 404, .. }) => Ok(()),
            revoked => revoked.map(drop),
        }
    }

    /// Waits until a key that begins so is changed after this revision, or may have been. A quiet watch is over by its
    /// deadline and is no failure.
    pub(crate) fn changed(&self, prefix: &str, after_revision: i64, by: Deadline) -> Result<(), Error> {
        let create = json!({"create_request": {
            "key": encode(prefix),
            "range_end": STANDARD.encode(after(prefix)),
            "start_revision": (after_revision + 1).to_string(),
        }});
        // The answer goes on for as long as the watch does. Everything that it says after its first line is a reason to
        // look: a change, or the end of the watch.
        let lines = |body: &[u8]| body.iter().filter(|byte| **byte == b'\n').count();
        // A watch is there to last, so a member has all the time and no share of it, and another one is asked only where
        // it fails before that.
        let told = self.first_answer(|member, _| {
            match self.ask(member, "/v3/watch", &create, by, |body| lines(body) > 1) {
                Err(Error::Deadline { stage: Stage::Receive, .. }) => {
                    Ok(Answer { status: 204, body: vec![] })
                }
                told => told,
            }
        })?;
        if !(200..300).contains(&told.status) {
            return Err(self.fault(&told));
        }
        if lines(&told.body) <= 1 {
            // It ended without a word, and would again if it were asked at once.
            std::thread::sleep(by.remaining().unwrap_or_default().min(WATCH_PAUSE));
        }
        Ok(())
    }

    pub(crate) fn version(&self, by: Deadline) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Version {
            etcdserver: String,
        }
        let version: Version = self.parse(self.exchange("/version", &Value::Null, by, |_| false)?)?;
        Ok(version.etcdserver)
    }

    fn call<T: DeserializeOwned>(&self, path: &str, body: &Value, by: Deadline) -> Result<T, Error> {
        self.parse(self.exchange(path, body, by, |_| false)?)
    }

    fn parse<T: DeserializeOwned>(&self, answer: Answer) -> Result<T, Error> {
        if !(200..300).contains(&answer.status) {
            return Err(self.fault(&answer));
        }
        let foreign =
            |error| Error::Foreign { server: self.name.clone(), source: ForeignAnswer::Json(error) };
        serde_json::from_slice(&answer.body).map_err(foreign)
    }

    /// What an answer says that is no success.
    fn fault(&self, Answer { status, body }: &Answer) -> Error {
        let (server, status) = (self.name.clone(), *status);
        let fault: Value = serde_json::from_slice(body).unwrap_or_default();
        // Where the answer would have been a stream, the fault lies one level deeper.
        let fault = fault.get("error").filter(|error| error.is_object()).unwrap_or(&fault);
        let text = |name| fault.get(name).and_then(Value::as_str);
        let Some(message) = text("message").or_else(|| text("error")) else {
            return Error::Foreign { server, source: ForeignAnswer::Status { status } };
        };
        let code = fault.get("code").or_else(|| fault.get("grpc_code")).and_then(Value::as_u64);
        // The code is etcd's; the status is what a gateway makes of it.
        let status = if code == Some(RESOURCE_EXHAUSTED) { 429 } else { status };
        Error::Etcd { server, status, message: message.to_owned() }
    }

    /// Asks the member that answered last, and then each of the others with its share of the time that is left.
    fn exchange(
        &self,
        path: &str,
        body: &Value,
        by: Deadline,
        enough: impl Fn(&[u8]) -> bool,
    ) -> Result<Answer, Error> {
        self.first_answer(|member, left| {
            let time = by.remaining().unwrap_or(Duration::from_micros(1)) / left;
            self.ask(member, path, body, by.within(time), &enough)
        })
    }

    /// Goes on from the member that answered last until one answers; `ask` is told how many are left. One that says
    /// that it cannot, as it has no leader, only learns or is a proxy without a member behind it, has not answered: what it
    /// says counts where nobody does better.
    fn first_answer(&self, ask: impl Fn(&Lookup, u32) -> Result<Answer, Error>) -> Result<Answer, Error> {
        let first = self.current.load(Ordering::Relaxed);
        let mut failed = None;
        for turn in 0..self.members.len() {
            let index = (first + turn) % self.members.len();
            match ask(&self.members[index], (self.members.len() - turn) as u32) {
                Ok(answer) if answer.status >= 500 => failed = Some(Ok(answer)),
                Err(error @ (Error::Unreachable { .. } | Error::Deadline { .. })) => {
                    if !matches!(failed, Some(Ok(_))) {
                        failed = Some(Err(error));
                    }
                }
                answered => {
                    self.current.store(index, Ordering::Relaxed);
                    return answered;
                }
            }
        }
        failed.expect("there is at least one member")
    }

    fn ask(
        &self,
        member: &Lookup,
        path: &str,
        body: &Value,
        by: Deadline,
        enough: impl Fn(&[u8]) -> bool,
    ) -> Result<Answer, Error> {
        let method = if body.is_null() { "GET" } else { "POST" };
        let mut request = request_head(method, path, member);
        if let Some(token) = &self.token {
            let _ = write!(request, "Authorization: {}\r\n", token.secret());
        }
        if body.is_null() {
            request.push_str("\r\n");
        } else {
            let body = body.to_string();
            let length = body.len();
            let _ =
                write!(request, "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}");
        }
        exchange_until(member, request.as_bytes(), self.answer_bytes, by, enough)
    }
}

#[derive(Deserialize)]
struct Lease {
    #[serde(rename = "ID", deserialize_with = "whole")]
    id: i64,
    #[serde(rename = "TTL", default, deserialize_with = "whole")]
    ttl: i64,
}

/// The first message of an answer that is a stream of them.
#[derive(Deserialize)]
struct Stream<T> {
    result: T,
}

fn encode(key: &str) -> String {
    STANDARD.encode(key)
}

/// The first key after all that begin with this prefix, which ends in a slash.
fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

fn bytes<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<u8>, D::Error> {
    STANDARD.decode(String::deserialize(source)?).map_err(D::Error::custom)
}

/// A whole number, in a string as the gateway writes it.
fn whole<'de, D: Deserializer<'de>>(source: D) -> Result<i64, D::Error> {
    String::deserialize(source)?.parse().map_err(D::Error::custom)
}

fn natural<'de, D: Deserializer<'de>>(source: D) -> Result<u64, D::Error> {
    String::deserialize(source)?.parse().map_err(D::Error::custom)
}

/// gRPC's code for a quota that is used up: of space, or of requests.
const RESOURCE_EXHAUSTED: u64 = 8;
const WATCH_PAUSE: Duration = Duration::from_millis(200);
const DEFAULT_PORT: u16 = 2379;
const MEMBERS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn members_and_prefix_are_read_from_the_address() {
        for (given, name, prefix) in [
            ("etcd://10.0.0.1", "etcd://10.0.0.1:2379", "crossdock/"),
            ("etcd://a:1,[::1]:2,c/", "etcd://a:1,[::1]:2,c:2379", "crossdock/"),
            ("etcd://a/team/b/", "etcd://a:2379", "team/b/"),
        ] {
            let (members, found) = parse(given).unwrap();
            assert_eq!((Gateway::new(members, None, 1).name(), found.as_str()), (name, prefix));
        }
        let many = format!("etcd://{}", vec!["a"; 17].join(","));
        for wrong in ["etcd://", "etcd://a,,b", "etcd://a:0", "etcd://a b", "etcd://a/b c", "http://a", &many]
        {
            assert_eq!(parse(wrong).unwrap_err(), InvalidServer { given: wrong.to_owned() });
        }
    }

    #[test]
    fn operations_are_written_as_the_gateway_reads_them() {
        let put = Op::Put { key: "k", value: b"\x00\xff", lease: i64::MAX };
        let text = r#"{"request_put":{"key":"aw==","lease":"9223372036854775807","value":"AP8="}}"#;
        assert_eq!(put.json(), serde_json::from_str::<Value>(text).unwrap());
        let all = r#"{"request_range":{"key":"YS8=","range_end":"YTA="}}"#;
        assert_eq!(Op::GetAll("a/").json(), serde_json::from_str::<Value>(all).unwrap());
        assert_eq!(after("a/"), b"a0");
    }

    #[test]
    fn an_answer_may_leave_out_what_is_nothing() {
        let text = r#"{"header":{"cluster_id":"18446744073709551615","revision":"7"},"succeeded":true,"responses":[
            {"response_put":{"header":{"revision":"7"}}},
            {"response_range":{"header":{"revision":"7"}}},
            {"responseRange":{"kvs":[{"key":"YQ==","mod_revision":"5"},{"key":"Yg==","value":"eA==","lease":"9"}]}}]}"#;
        let done: Done = serde_json::from_str(text).unwrap();
        assert!(done.succeeded);
        assert_eq!((done.header.cluster_id, done.header.revision), (u64::MAX, 7));
        let ranges: Vec<Range> = done.ranges().take(3).collect();
        assert_eq!(ranges.iter().map(|range| range.kvs.len()).collect::<Vec<_>>(), [0, 2, 0]);
        let [a, b] = &ranges[1].kvs[..] else { panic!("two pairs") };
        assert_eq!((&a.key[..], &a.value[..], a.mod_revision, a.lease), (&b"a"[..], &b""[..], 5, 0));
        assert_eq!((&b.key[..], &b.value[..], b.mod_revision, b.lease), (&b"b"[..], &b"x"[..], 0, 9));
        assert!(!serde_json::from_str::<Done>(r#"{"header":{}}"#).unwrap().succeeded);
        for wrong in [
            "{}",
            "[]",
            r#"{"header":{"revision":7}}"#,
            r#"{"header":{"revision":"seven"}}"#,
            r#"{"responses":[{"response_range":{"kvs":[{"key":"not base64"}]}}]}"#,
            r#"{"responses":[{"response_range":{"kvs":[{"value":"eA=="}]}}]}"#,
        ] {
            assert!(serde_json::from_str::<Done>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_etcd_says_when_it_cannot_is_told() {
        let gateway = Gateway::new(parse("etcd://a").unwrap().0, None, 1);
        let parse = |status, body: &str| {
            gateway.parse::<Done>(Answer { status, body: body.as_bytes().to_vec() }).unwrap_err()
        };
        let both = r#"{"error":"etcdserver: no leader","message":"etcdserver: no leader","code":14}"#;
        let no_leader = parse(503, both);
        assert!(matches!(no_leader, Error::Etcd { status: 503, .. }) && no_leader.retry_helps());
        assert_eq!(no_leader.to_string(), "etcd at etcd://a:2379 answered 503: etcdserver: no leader");
        let token = parse(401, r#"{"error":"etcdserver: invalid auth token"}"#);
        assert!(matches!(token, Error::Etcd { status: 401, .. }) && !token.retry_helps());
        for status in [403, 429, 503] {
            let full = parse(status, r#"{"message":"etcdserver: mvcc: database space exceeded","code":8}"#);
            assert!(matches!(full, Error::Etcd { status: 429, .. }) && full.retry_helps(), "{full}");
        }
        let stream = parse(503, r#"{"error":{"grpc_code":14,"http_code":503,"message":"no leader"}}"#);
        assert!(matches!(&stream, Error::Etcd { status: 503, message, .. } if message == "no leader"));
        for (status, body) in [(200, "<html>"), (200, "[]"), (502, "<html>"), (404, "{}")] {
            assert!(matches!(parse(status, body), Error::Foreign { .. }), "{body}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(
            body in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                r#"\{("(header|responses|kvs|key|result|ID|TTL)":("[0-9A-Za-z=]{0,6}"|[0-9]{1,3}|\[|\{|\}|\]),?){0,6}\}?"#
                    .prop_map(String::into_bytes),
            ],
            status in prop_oneof![Just(200u16), 0..600u16],
        ) {
            let gateway = Gateway::new(parse("etcd://a").unwrap().0, None, 1);
            let answer = || Answer { status, body: body.clone() };
            let _ = gateway.parse::<Done>(answer());
            let _ = gateway.parse::<Lease>(answer());
            let _ = gateway.parse::<Stream<Lease>>(answer());
        }
    }
}
