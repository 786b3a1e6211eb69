//! The server's HTTP interface, spoken by hand: what each request is answered, and what a request may not do.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossdock_bootstrap::{Server, ServerConfig, Token, serve};
use proptest::prelude::*;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(10);

fn anywhere() -> ServerConfig {
    ServerConfig::on("127.0.0.1:0".parse().unwrap())
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    stream
}

/// One answer of the server.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Value,
}

impl Answer {
    fn error(&self) -> (u16, &str) {
        (self.status, self.body["error"].as_str().unwrap_or_default())
    }
}

/// Reads one answer and leaves the connection at its end.
fn answer(stream: &mut TcpStream) -> Answer {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("the answer's head");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head.split("content-length: ").nth(1).map_or("0", |rest| rest.split("\r\n").next().unwrap());
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).expect("the answer's body");
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    Answer { status, head, body }
}

fn ask(address: SocketAddr, request: &str) -> Answer {
    let mut stream = connect(address);
    stream.write_all(request.as_bytes()).unwrap();
    answer(&mut stream)
}

fn send(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn registration() -> Value {
    json!({
        "node": "d0", "incarnation": "0000000000c0ffee", "role": "decode",
        "address": "10.0.0.1:7000", "ttl_ms": 10_000, "warm_up_ms": 0, "labels": {"model": "deepseek-r1"},
        "member": {
            "group": "decode", "tp_rank": 0, "pp_rank": 0, "cp_rank": 0, "dp_rank": 0,
            "tp_size": 8, "pp_size": 1, "cp_size": 1, "dp_size": 1,
            "page_tokens": 64, "dtype": "fp8_e4m3", "model": "deepseek-r1", "rooms": "follow",
        },
    })
}

/// How the other side ended a connection: all that it still said, once it has closed.
fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => said,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => said,
        Err(error) => panic!("the connection was not closed: {error}"),
    }
}

#[test]
fn the_interface_is_as_documented() {
    let server = Server::start(anywhere()).unwrap();
    // All on one connection, which stays open.
    let mut stream = connect(server.address());
    let mut ask = |request: String| {
        stream.write_all(request.as_bytes()).unwrap();
        answer(&mut stream)
    };
    let put = send("PUT", "/v1/workers/d0", &registration().to_string());
    let created = ask(put.clone());
    assert_eq!((created.status, created.body), (201, json!({"outcome": "created"})));
    assert!(created.head.contains("content-type: application/json"));
    let renewed = ask(put);
    assert_eq!((renewed.status, renewed.body), (200, json!({"outcome": "renewed"})));
    let renewed = ask(send("POST", "/v1/workers/d0/renew", r#"{"incarnation": "c0ffee"}"#));
    assert_eq!((renewed.status, renewed.body), (200, json!({"outcome": "renewed"})));

    let mut listed = ask(send("GET", "/v1/workers/%640", "")).body;
    let (age, remaining) = (listed["age_ms"].take(), listed["remaining_ms"].take());
    assert!(age.as_u64().unwrap() < 10_000 && remaining.as_u64().unwrap() <= 10_000);
    let mut expected = registration();
    (expected["age_ms"], expected["remaining_ms"]) = (Value::Null, Value::Null);
    expected["state"] = "ready".into();
    assert_eq!(listed, expected);

    for (query, found) in [
        ("", 1),
        ("?", 1),
        ("?role=decode&group=decode&tp_rank=0&state=ready&label.model=deepseek%2Dr1", 1),
        ("?role=prefill", 0),
        ("?group=other", 0),
        ("?tp_rank=1", 0),
        ("?pp_rank=1", 0),
        ("?cp_rank=1", 0),
        ("?dp_rank=1", 0),
        ("?state=warming", 0),
        ("?label.model=", 0),
        ("?count=1&wait_ms=60000", 1),
        ("?count=2&wait_ms=1", 1),
    ] {
        let list = ask(send("GET", &format!("/v1/workers{query}"), ""));
        assert_eq!((list.status, list.body["workers"].as_array().unwrap().len()), (200, found), "{query}");
    }

    let health = ask(send("GET", "/health", ""));
    assert_eq!(
        (health.status, &health.body["status"], &health.body["workers"]),
        (200, &json!("ok"), &json!(1))
    );
    assert!(health.body["uptime_ms"].is_u64() && health.body["version"].is_string());

    let gone = ask(send("DELETE", "/v1/workers/d0?incarnation=c0ffee", ""));
    assert_eq!((gone.status, gone.body), (200, json!({"outcome": "deregistered"})));
    assert_eq!(ask(send("GET", "/v1/workers/d0", "")).error(), (404, "unknown_worker"));
}

#[test]
fn groups_and_rooms_are_as_documented() {
    let server = Server::start(anywhere()).unwrap();
    let ask = |method, path: &str, body: Value| ask(server.address(), &send(method, path, &body.to_string()));
    let put = |rank: u32, warm_up_ms: u32| {
        let mut body = registration();
        body["node"] = format!("d{rank}").into();
        body["warm_up_ms"] = warm_up_ms.into();
        body["member"] = json!({
            "group": "decode", "dp_rank": rank, "dp_size": 2, "page_tokens": 64, "dtype": "bf16", "model": "m",
            "rooms": "told",
        });
        ask("PUT", &format!("/v1/workers/d{rank}"), body)
    };
    assert_eq!(put(0, 0).status, 201);
    let missing = json!([{"dp_rank": 1, "pp_rank": 0, "cp_rank": 0, "tp_rank": 0}]);
    let mut group = json!({
        "group": "decode", "role": "decode", "complete": false, "size": 2, "ready": 1, "warming": 0,
        "missing_count": 1, "missing": missing,
        "topology": {
            "tp_size": 1, "pp_size": 1, "cp_size": 1, "dp_size": 2, "page_tokens": 64, "dtype": "bf16", "model": "m",
            "rooms": "told",
        },
    });
    let shown = ask("GET", "/v1/groups/decode", json!(null));
    assert_eq!((shown.status, shown.body), (200, group.clone()));
    assert_eq!(put(1, 60_000).status, 201);
    group["warming"] = 1.into();
    assert_eq!(ask("GET", "/v1/groups/decode?count=ready&wait_ms=1", json!(null)).body, group);
    assert_eq!(ask("GET", "/v1/groups", json!(null)).body, json!({"groups": [group.clone()]}));
    (group["complete"], group["missing_count"], group["missing"]) = (true.into(), 0.into(), json!([]));
    assert_eq!(ask("GET", "/v1/groups/decode?count=all&wait_ms=60000", json!(null)).body, group);
    let warming = ask("GET", "/v1/workers?state=warming", json!(null)).body;
    assert_eq!(warming["workers"][0]["node"], "d1");

    let told = ask(
        "POST",
        "/v1/groups/decode/rooms",
        json!({"rooms": {"7": 1, "18446744073709551615": 0}, "keep_ms": 60_000}),
    );
    assert_eq!((told.status, told.body), (200, json!({"outcome": "told"})));
    let asked = json!({"rooms": ["18446744073709551615", "8", "7"], "wait_ms": 1});
    let known = ask("POST", "/v1/groups/decode/rooms/query", asked);
    let expected = json!({"dp_ranks": {"7": 1, "18446744073709551615": 0}, "not_yet": ["8"]});
    assert_eq!((known.status, known.body), (200, expected));
    let wrong = ask("POST", "/v1/groups/decode/rooms", json!({"rooms": {"7": 2}, "keep_ms": 1}));
    assert_eq!(wrong.error(), (400, "rank_out_of_range"));
}

#[test]
fn a_list_is_kept_back_until_it_is_another_than_was_seen() {
    let server = Server::start(anywhere()).unwrap();
    let address = server.address();
    let list = |query: &str| ask(address, &send("GET", &format!("/v1/workers{query}"), ""));
    let put = |ttl_ms: u32| {
        let mut body = registration();
        body["ttl_ms"] = ttl_ms.into();
        let answer = ask(address, &send("PUT", "/v1/workers/d0", &body.to_string()));
        assert!(answer.status < 300, "{answer:?}");
    };
    let after = |mark: &Value| format!("?seen={}&wait_ms=20000", mark.as_str().unwrap());
    let mark = list("").body["mark"].clone();
    let waiting = thread::spawn({
        let query = after(&mark);
        move || ask(address, &send("GET", &format!("/v1/workers{query}"), ""))
    });
    thread::sleep(Duration::from_millis(50));
    put(600);
    let seen = waiting.join().unwrap().body;
    assert_eq!(seen["workers"].as_array().unwrap().len(), 1);
    // A mark of the past is answered at once, and so is one of another start of the server.
    assert_eq!(list(&after(&mark)).body["mark"], seen["mark"]);
    assert_eq!(list("?seen=0000000000000001.1&wait_ms=20000").body["mark"], seen["mark"]);
    // A renewal is no change; the end of a worker is, and nobody need call for it to be heard of.
    let began = Instant::now();
    put(600);
    assert_eq!(list(&after(&seen["mark"])).body["workers"], json!([]));
    assert!(began.elapsed() >= Duration::from_millis(300), "{:?}", began.elapsed());
}

#[test]
fn who_asks_for_rooms_before_their_group_is_there_hears_when_it_comes() {
    let server = Server::start(anywhere()).unwrap();
    let address = server.address();
    let waiting = thread::spawn(move || {
        let body = json!({"rooms": ["11"], "wait_ms": 20_000}).to_string();
        ask(address, &send("POST", "/v1/groups/decode/rooms/query", &body))
    });
    thread::sleep(Duration::from_millis(100));
    let began = Instant::now();
    let mut body = registration();
    body["member"]["dp_size"] = 4.into();
    assert_eq!(ask(address, &send("PUT", "/v1/workers/d0", &body.to_string())).status, 201);
    let known = waiting.join().unwrap();
    assert_eq!((known.status, known.body), (200, json!({"dp_ranks": {"11": 3}, "not_yet": []})));
    assert!(began.elapsed() < SOON / 2, "{:?}", began.elapsed());
}

#[test]
fn those_that_wait_hear_of_many_changes_at_once() {
    const WORKERS: usize = 40;
    let server = Server::start(anywhere()).unwrap();
    let address = server.address();
    let mut all_at_once = false;
    for round in 0..20 {
        let mark = ask(address, &send("GET", "/v1/workers", "")).body["mark"].clone();
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                let path = format!("/v1/workers?seen={}&wait_ms=20000", mark.as_str().unwrap());
                thread::spawn(move || ask(address, &send("GET", &path, "")))
            })
            .collect();
        thread::sleep(Duration::from_millis(50));
        let puts = (0..WORKERS).map(|index| {
            let mut body = registration();
            (body["node"], body["member"]) = (format!("d{index}").into(), Value::Null);
            body["incarnation"] = format!("{:x}", round + 1).into();
            send("PUT", &format!("/v1/workers/d{index}"), &body.to_string())
        });
        let mut stream = connect(address);
        stream.write_all(puts.collect::<String>().as_bytes()).unwrap();
        for _ in 0..WORKERS {
            assert!(answer(&mut stream).status < 300);
        }
        let incarnation = json!(format!("{:016x}", round + 1));
        let heard = waiting.into_iter().map(|waiting| {
            let list = waiting.join().unwrap().body;
            list["workers"].as_array().unwrap().iter().filter(|w| w["incarnation"] == incarnation).count()
        });
        // A busy machine may need longer for the changes than those who wait are kept for more.
        all_at_once |= heard.collect::<Vec<_>>() == [WORKERS; 4];
        if all_at_once {
            break;
        }
    }
    assert!(all_at_once);
}

#[test]
fn every_wrong_request_is_told_what_is_wrong() {
    let server = Server::start(anywhere()).unwrap();
    let with = |field: &str, value: Value| {
        let mut body = registration();
        body[field] = value;
        body.to_string()
    };
    let valid = registration().to_string();
    let deep = "[".repeat(10_000);
    let many = json!({"rooms": (0..1025).map(|room: u32| room.to_string()).collect::<Vec<_>>()}).to_string();
    for (method, path, body, status, error) in [
        ("GET", "/", "", 404, "no_such_path"),
        ("GET", "/v1/worker", "", 404, "no_such_path"),
        ("GET", "/v1/workersx", "", 404, "no_such_path"),
        ("GET", "/v1/workers/d0/restart", "", 404, "no_such_path"),
        ("GET", "/v1/workers/", "", 400, "invalid_url"),
        ("GET", "/v1/workers/..", "", 400, "invalid_url"),
        ("GET", "/v1/workers/%zz", "", 400, "invalid_url"),
        ("GET", "/v1/workers/%ff", "", 400, "invalid_url"),
        ("GET", "/v1/workers/a%2Fb", "", 400, "invalid_url"),
        ("GET", "/v1/workers?color=red", "", 400, "invalid_url"),
        ("GET", "/v1/workers?tp_rank=first", "", 400, "invalid_url"),
        ("GET", "/v1/workers?tp_rank=1&tp_rank=2", "", 400, "invalid_url"),
        ("GET", "/v1/workers?state=up", "", 400, "invalid_url"),
        ("GET", "/v1/workers?seen=here&wait_ms=1", "", 400, "invalid_url"),
        ("GET", "/v1/workers?count=2", "", 400, "invalid_url"),
        ("GET", "/v1/workers/d0", "", 404, "unknown_worker"),
        ("DELETE", "/v1/workers/d0", "", 400, "invalid_url"),
        ("DELETE", "/v1/workers/d0?incarnation=xyz", "", 400, "invalid_url"),
        ("DELETE", "/v1/workers/d0?incarnation=1", "", 404, "unknown_worker"),
        ("POST", "/v1/workers/d0/renew", r#"{"incarnation":"1"}"#, 404, "unknown_worker"),
        ("POST", "/v1/workers/d0/renew", r#"{"incarnation":1}"#, 400, "invalid_body"),
        ("POST", "/v1/workers/d0/renew", "", 400, "invalid_body"),
        ("POST", "/v1/workers", &valid, 405, "method_not_allowed"),
        ("PATCH", "/v1/workers/d0", &valid, 405, "method_not_allowed"),
        ("PUT", "/health", "", 405, "method_not_allowed"),
        ("PUT", "/v1/workers/d1", &valid, 400, "invalid_url"),
        ("PUT", "/v1/workers/d0", "", 400, "invalid_body"),
        ("PUT", "/v1/workers/d0", "\u{0}", 400, "invalid_body"),
        ("PUT", "/v1/workers/d0", &valid[1..], 400, "invalid_body"),
        ("PUT", "/v1/workers/d0", &valid[..valid.len() - 1], 400, "invalid_body"),
        ("PUT", "/v1/workers/d0", &deep, 400, "invalid_body"),
        ("PUT", "/v1/workers/d0", &with("member", json!({"group": "g"})), 400, "invalid_body"),
        ("PUT", "/v1/workers/d0", &with("warm_up_ms", 3_600_001.into()), 400, "warm_up_out_of_range"),
        ("GET", "/v1/groups/g", "", 404, "unknown_group"),
        ("GET", "/v1/groups/", "", 400, "invalid_url"),
        ("GET", "/v1/groups/g?count=some", "", 400, "invalid_url"),
        ("GET", "/v1/groups/g?wait_ms=soon", "", 400, "invalid_url"),
        ("GET", "/v1/groups?wait_ms=1", "", 400, "invalid_url"),
        ("GET", "/v1/groups/g/rooms/1", "", 404, "no_such_path"),
        ("GET", "/v1/groups/g/rooms", "", 405, "method_not_allowed"),
        ("POST", "/v1/groups/g/rooms", r#"{"rooms":{"1":0},"keep_ms":1000}"#, 404, "unknown_group"),
        ("POST", "/v1/groups/g/rooms", r#"{"rooms":{"1":0},"keep_ms":0}"#, 400, "keep_out_of_range"),
        ("POST", "/v1/groups/g/rooms", r#"{"rooms":{"x":0},"keep_ms":1000}"#, 400, "invalid_body"),
        ("POST", "/v1/groups/g/rooms", r#"{"rooms":{"1":-1},"keep_ms":1000}"#, 400, "invalid_body"),
        ("POST", "/v1/groups/g/rooms/query", r#"{"rooms":["1"]}"#, 404, "unknown_group"),
        ("POST", "/v1/groups/g/rooms/query", r#"{"rooms":[1]}"#, 400, "invalid_body"),
        ("POST", "/v1/groups/g/rooms/query", &many, 400, "invalid_body"),
        ("POST", "/metrics", "", 405, "method_not_allowed"),
        ("PUT", "/v1/workers/d0", &with("address", "0.0.0.0:1".into()), 400, "invalid_body"),
        ("PUT", "/v1/workers/d0", &with("ttl_ms", 1.into()), 400, "ttl_out_of_range"),
        ("PUT", "/v1/workers/d0", &with("ttl_ms", u64::MAX.into()), 400, "ttl_out_of_range"),
        ("PUT", "/v1/workers/d0", &with("padding", "x".repeat(64 * 1024).into()), 413, "body_too_large"),
    ] {
        let answer = ask(server.address(), &send(method, path, body));
        assert_eq!(answer.error(), (status, error), "{method} {path}: {answer:?}");
        for text in ["message", "advice"] {
            assert!(answer.body[text].as_str().is_some_and(|text| !text.is_empty()), "{answer:?}");
        }
    }
    let refused = ask(server.address(), &send("PATCH", "/v1/workers/d0", ""));
    assert!(refused.head.contains("allow: get, head, put, delete"), "{refused:?}");
    assert_eq!(ask(server.address(), &send("GET", "/health", "")).body["workers"], 0);
}

#[test]
fn without_the_token_nothing_but_health_is_told() {
    let token = Some(Token::new("s3cret").unwrap());
    let server = Server::start(ServerConfig { token, ..anywhere() }).unwrap();
    for path in ["/v1/workers", "/v1/workers/d0", "/v1/groups", "/metrics", "/anything"] {
        let refused = ask(server.address(), &send("GET", path, ""));
        assert_eq!(refused.error(), (401, "wrong_token"));
        assert!(refused.head.contains("www-authenticate: bearer"));
    }
    let with = |value: &str| format!("GET /v1/workers HTTP/1.1\r\nHost: t\r\nAuthorization: {value}\r\n\r\n");
    assert_eq!(ask(server.address(), &with("Bearer s3cres")).status, 401);
    assert_eq!(ask(server.address(), &with("Bearer s3cret")).status, 200);
    assert_eq!(ask(server.address(), &send("GET", "/health", "")).status, 200);
}

#[test]
fn oversized_requests_are_cut() {
    let server = Server::start(anywhere()).unwrap();
    let address = server.address();
    // The body arrives although the client does not look at the answer before it has sent everything.
    let large = ask(address, &send("PUT", "/v1/workers/d0", &"x".repeat(200_000)));
    assert_eq!(large.error(), (413, "body_too_large"));
    // A client that asks first need not send it.
    let head =
        "PUT /v1/workers/d0 HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n";
    assert_eq!(ask(address, head).error(), (413, "body_too_large"));
    // A body without an announced length.
    let chunk = format!("18000\r\n{}\r\n", "x".repeat(0x18000));
    let head = "PUT /v1/workers/d0 HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(ask(address, &format!("{head}{chunk}0\r\n\r\n")).error(), (413, "body_too_large"));
    // One without an end is cut off, not swallowed.
    let mut endless = connect(address);
    endless.write_all(head.as_bytes()).unwrap();
    let cut = (0..10_000).find(|_| endless.write_all(chunk.as_bytes()).is_err());
    assert!(cut.is_some(), "a GB was taken");
    // Heads.
    let long = format!("GET /health HTTP/1.1\r\nHost: t\r\nx: {}\r\n\r\n", "y".repeat(20_000));
    assert_eq!(ask(address, &long).status, 431);
    let many = format!("GET /health HTTP/1.1\r\nHost: t\r\n{}\r\n", "a: b\r\n".repeat(64));
    assert_eq!(ask(address, &many).status, 431);
    let url = format!("GET /{} HTTP/1.1\r\nHost: t\r\n\r\n", "u".repeat(70_000));
    assert!(matches!(ask(address, &url).status, 414 | 431));
    assert_eq!(ask(address, &send("GET", "/health", "")).status, 200);
    let small = Server::start(ServerConfig { head_bytes: 1_000, head_lines: 2, ..anywhere() }).unwrap();
    let two_lines = |bytes| format!("GET /health HTTP/1.1\r\nHost: t\r\nx: {}\r\n\r\n", "y".repeat(bytes));
    assert_eq!(ask(small.address(), &two_lines(900)).status, 200);
    assert_eq!(ask(small.address(), &two_lines(1_000)).status, 431);
}

#[test]
fn connections_beyond_the_limit_wait_for_a_place() {
    let server = Server::start(ServerConfig { connections: 2, waits: 1, ..anywhere() }).unwrap();
    let mut open: Vec<TcpStream> = (0..2).map(|_| connect(server.address())).collect();
    for stream in &mut open {
        stream.write_all(send("GET", "/health", "").as_bytes()).unwrap();
        assert_eq!(answer(stream).status, 200);
    }
    let mut third = connect(server.address());
    third.write_all(send("GET", "/health", "").as_bytes()).unwrap();
    third.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(third.peek(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    open.pop();
    third.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(answer(&mut third).status, 200);
}

#[test]
fn a_client_that_dawdles_is_cut_off_and_holds_nobody_up() {
    let time = Duration::from_millis(200);
    // With two connections, one that is held for good would be felt.
    let config = ServerConfig {
        connections: 2,
        waits: 1,
        head_time: time,
        body_time: time,
        answer_time: time,
        ..anywhere()
    };
    let server = Server::start(config).unwrap();
    let address = server.address();

    let silent = |mut stream: TcpStream| assert_eq!(until_closed(&mut stream), b"");
    let began = Instant::now();
    silent(connect(address));
    let mut half = connect(address);
    half.write_all(b"GET /health HT").unwrap();
    silent(half);
    let mut idle = connect(address);
    idle.write_all(send("GET", "/health", "").as_bytes()).unwrap();
    assert_eq!(answer(&mut idle).status, 200);
    silent(idle);
    assert!(began.elapsed() >= time * 3 && began.elapsed() < SOON, "{:?}", began.elapsed());

    // A byte now and then does not help.
    let mut dribble = connect(address);
    let began = Instant::now();
    dribble.write_all(b"GET /health HTTP/1.1\r\nx: ").unwrap();
    while dribble.write_all(b"y").is_ok() {
        assert!(began.elapsed() < SOON);
        thread::sleep(Duration::from_millis(10));
    }
    let mut slow_body = connect(address);
    let began = Instant::now();
    slow_body.write_all(b"PUT /v1/workers/d0 HTTP/1.1\r\nHost: t\r\nContent-Length: 1000\r\n\r\n{").unwrap();
    slow_body.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    while slow_body.peek(&mut [0]).is_err() {
        assert!(began.elapsed() < SOON);
        slow_body.write_all(b" ").unwrap();
    }
    slow_body.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(answer(&mut slow_body).error(), (408, "body_timeout"));
    drop(slow_body);

    // More idle connections than there are places: each is closed in its turn, and a request comes through.
    let idle: Vec<TcpStream> = (0..6).map(|_| connect(address)).collect();
    assert_eq!(ask(address, &send("GET", "/health", "")).status, 200);
    drop(idle);
}

#[test]
fn a_client_that_does_not_read_is_cut_off() {
    let time = Duration::from_millis(200);
    let config = ServerConfig { connections: 2, waits: 1, answer_time: time, ..anywhere() };
    let server = Server::start(config).unwrap();
    let address = server.address();
    let labels: serde_json::Map<String, Value> =
        (0..16).map(|index| (format!("label-{index}"), "v".repeat(256).into())).collect();
    let mut filling = connect(address);
    for index in 0..100 {
        let mut body = registration();
        body["node"] = format!("d{index}").into();
        body["member"] = Value::Null;
        body["labels"] = labels.clone().into();
        let put = send("PUT", &format!("/v1/workers/d{index}"), &body.to_string());
        filling.write_all(put.as_bytes()).unwrap();
        assert_eq!(answer(&mut filling).status, 201);
    }
    drop(filling);
    // 200 lists of about 450 kB are more than any socket's buffers hold.
    let mut deaf: Vec<TcpStream> = (0..2).map(|_| connect(address)).collect();
    for stream in &mut deaf {
        stream.write_all(send("GET", "/v1/workers", "").repeat(200).as_bytes()).unwrap();
    }
    let health = ask(address, &send("GET", "/health", ""));
    assert_eq!(health.body["workers"], 100, "both connections were taken, and one has come free");
    // The other one's time began a little later.
    thread::sleep(time * 2);
    for mut stream in deaf {
        let said = until_closed(&mut stream);
        let answers = said.windows(b"HTTP/1.1 200".len()).filter(|window| window == b"HTTP/1.1 200").count();
        assert!((1..200).contains(&answers), "{answers} answers in {} bytes", said.len());
    }
}

#[test]
fn a_wait_is_cut_to_the_longest_that_the_server_allows() {
    let server =
        Server::start(ServerConfig { longest_wait: Duration::from_millis(50), ..anywhere() }).unwrap();
    let began = Instant::now();
    let found = ask(server.address(), &send("GET", "/v1/workers?count=1&wait_ms=60000", ""));
    assert_eq!((found.status, &found.body["workers"]), (200, &json!([])));
    assert!(began.elapsed() >= Duration::from_millis(50) && began.elapsed() < SOON);
}

#[test]
fn a_waiting_client_that_goes_away_leaves_its_place() {
    let server = Server::start(ServerConfig { waits: 1, ..anywhere() }).unwrap();
    let wait = |ms: u64| send("GET", &format!("/v1/workers?count=1&wait_ms={ms}"), "");
    let mut first = connect(server.address());
    first.write_all(wait(60_000).as_bytes()).unwrap();
    let waited = || {
        let began = Instant::now();
        assert_eq!(ask(server.address(), &wait(100)).body["workers"], json!([]));
        began.elapsed() >= Duration::from_millis(100)
    };
    let began = Instant::now();
    while waited() {
        assert!(began.elapsed() < SOON, "the only place is never taken");
    }
    drop(first);
    while !waited() {
        assert!(began.elapsed() < SOON, "the only place never comes free");
    }
}

#[test]
fn a_stopping_server_answers_what_waits_and_leaves_the_rest() {
    let config = ServerConfig {
        drain_time: Duration::from_millis(300),
        body_time: Duration::from_secs(60),
        ..anywhere()
    };
    let server = Server::start(config).unwrap();
    let address = server.address();
    let mut waiting = connect(address);
    waiting.write_all(send("GET", "/v1/workers?count=1&wait_ms=20000", "").as_bytes()).unwrap();
    let mut stuck = connect(address);
    stuck.write_all(b"PUT /v1/workers/d0 HTTP/1.1\r\nHost: t\r\nContent-Length: 1000\r\n\r\n{").unwrap();
    let mut idle = connect(address);
    // Both requests have reached the server once it answers a later one.
    thread::sleep(Duration::from_millis(50));
    assert_eq!(ask(address, &send("GET", "/health", "")).status, 200);
    let began = Instant::now();
    server.shutdown();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let answered = answer(&mut waiting);
    assert_eq!((answered.status, &answered.body["workers"]), (200, &json!([])));
    assert_eq!(until_closed(&mut idle), b"");
    until_closed(&mut stuck);
    assert!(TcpStream::connect(address).is_err(), "nobody listens");
    let again = Server::start(ServerConfig { listen: address, ..anywhere() }).unwrap();
    assert_eq!(ask(again.address(), &send("GET", "/health", "")).status, 200);
}

#[test]
fn idle_connections_do_not_hold_up_a_stopping_server() {
    let server = Server::start(ServerConfig { drain_time: Duration::from_secs(60), ..anywhere() }).unwrap();
    let fresh = connect(server.address());
    let mut used = connect(server.address());
    used.write_all(send("GET", "/health", "").as_bytes()).unwrap();
    assert_eq!(answer(&mut used).status, 200);
    let began = Instant::now();
    server.shutdown();
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    for mut stream in [fresh, used] {
        assert_eq!(until_closed(&mut stream), b"");
    }
}

#[test]
fn it_serves_inside_a_runtime_of_its_user() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, has_asked) = tokio::sync::oneshot::channel();
        thread::spawn(move || asked.send(ask(address, &send("GET", "/health", "")).status));
        let mut status = None;
        let stop = async { status = has_asked.await.ok() };
        serve(listener, anywhere(), stop).await.unwrap();
        assert_eq!(status, Some(200));
    });
}

/// Counts the panics of server threads: tokio would swallow one in a connection's task.
fn server_panics() -> usize {
    static HOOK: Once = Once::new();
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if thread::current().name() == Some("crossdock-bootstrap") {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            usual(panic);
        }));
    });
    PANICS.load(Ordering::Relaxed)
}

/// A valid request, cut, with bytes changed, taken out and put in.
fn any_mutation() -> impl Strategy<Value = Vec<u8>> {
    let requests = [
        send("PUT", "/v1/workers/d0", &registration().to_string()),
        send("POST", "/v1/workers/d0/renew", r#"{"incarnation":"c0ffee"}"#),
        send("DELETE", "/v1/workers/d0?incarnation=c0ffee", ""),
        send("GET", "/v1/workers?role=decode&group=g&tp_rank=0&label.a=b%20c&count=1&wait_ms=1", ""),
        send("GET", "/v1/workers?seen=0000000000000001.1&wait_ms=1", ""),
        send("GET", "/v1/groups/decode?count=all&wait_ms=1", ""),
        send("POST", "/v1/groups/decode/rooms", r#"{"rooms":{"17":1},"keep_ms":1000}"#),
        send("POST", "/v1/groups/decode/rooms/query", r#"{"rooms":["17"],"wait_ms":1}"#),
        send("GET", "/metrics", ""),
        "PUT /v1/workers/d0 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{\"a\r\n0\r\n\r\n".to_owned(),
    ];
    let change = (any::<prop::sample::Index>(), any::<Option<u8>>(), any::<bool>());
    (
        prop::sample::select(requests.to_vec()),
        proptest::collection::vec(change, 0..6),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(request, changes, end)| {
            let mut bytes = request.into_bytes();
            for (at, byte, replace) in changes {
                let at = at.index(bytes.len());
                match byte {
                    Some(byte) if replace => bytes[at] = byte,
                    Some(byte) => bytes.insert(at, byte),
                    None => drop(bytes.remove(at)),
                }
            }
            // Most are left whole.
            let length = bytes.len();
            bytes.truncate(length.min(end.index(length * 3) + 1));
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]
    /// Each case is one server and some dozens of connections.
    #[test]
    fn no_bytes_bring_the_server_down(
        requests in proptest::collection::vec(
            prop_oneof![
                3 => any_mutation(),
                1 => proptest::collection::vec(any::<u8>(), 0..300),
            ],
            64,
        ),
    ) {
        let before = server_panics();
        let server = Server::start(anywhere()).unwrap();
        for request in &requests {
            let mut stream = connect(server.address());
            // The server may have had enough before everything is sent.
            let _ = stream.write_all(request);
            let _ = stream.shutdown(Shutdown::Write);
            let said = until_closed(&mut stream);
            let status = said.strip_prefix(b"HTTP/1.1 ").or(said.strip_prefix(b"HTTP/1.0 "));
            let class = status.and_then(|status| status.first());
            prop_assert!(
                said.is_empty() || matches!(class, Some(b'2' | b'4')),
                "{:?} was answered {:?}",
                String::from_utf8_lossy(request),
                String::from_utf8_lossy(&said),
            );
        }
        prop_assert_eq!(ask(server.address(), &send("GET", "/health", "")).status, 200);
        server.shutdown();
        prop_assert_eq!(server_panics(), before);
    }
}
