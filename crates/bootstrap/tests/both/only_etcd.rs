//! What can happen to an etcd, and not to crossdock's own server.

use std::fs::{self, DirEntry};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crossdock_bootstrap::{
    Client, ClientConfig, Counted, DpRank, Error, ErrorCode, GroupId, Query, Ranks, Registered, Registration,
    RoomPolicy, Status, Topology, WaitError, Worker,
};
use serde_json::{Value, json};

use crate::cases::{eventually, member, nodes, sees_it_away, soon_told, topology, worker};
use crate::etcd::Process;
use crate::front::{Front, Say};
use crate::{Home, SHORT_MS, SOON};

#[test]
fn workers_outlive_an_etcd_that_is_killed_and_comes_back() {
    let Some(process) = Process::start() else { return };
    let mut home = Home::Etcd(process);
    let client = home.client();
    let group = GroupId::new("g").unwrap();
    let registrations: Vec<Registration> = (0..3)
        .map(|rank| {
            let member = member("g", &topology(3), Ranks::tp(rank));
            let worker = Worker { ttl_ms: 6 * SHORT_MS, member, ..worker(&format!("w{rank}"), 7) };
            Registration::start(client.clone(), worker).unwrap()
        })
        .collect();
    client.wait_for_group(&group, Counted::Ready, SOON).unwrap();
    let mut watch = client.watch(Query::all());
    assert_eq!(watch.next(SOON).unwrap().len(), 3);
    for round in 0..3 {
        home.kill();
        eventually("every worker sees that it is away", || {
            registrations.iter().all(|one| sees_it_away(&one.status()))
        });
        let Home::Etcd(process) = &mut home else { unreachable!("it is one") };
        process.start_again();
        eventually("every worker has renewed", || {
            registrations.iter().all(|one| matches!(one.status(), Status::Registered { .. }))
        });
        // What it had on disk is there again, with all leases.
        let complete = client.group(&group, Counted::Ready).unwrap();
        assert!(complete.complete, "round {round}: {complete}");
        assert_eq!(
            soon_told(&mut watch, Duration::from_millis(300)),
            [],
            "round {round}: nobody came or left"
        );
    }
    for registration in registrations {
        registration.deregister().unwrap();
    }
    assert!(client.find(&Query::all()).unwrap().is_empty());
}

#[test]
fn what_somebody_else_wrote_harms_nobody() {
    let Some(process) = Process::start() else { return };
    let home = Home::Etcd(process);
    let client = home.client();
    let put = |key: &str, value: &[u8]| {
        post(&home, "/v3/kv/put", &json!({"key": STANDARD.encode(key), "value": STANDARD.encode(value)}));
    };
    let told = Topology { rooms: RoomPolicy::Told, ..topology(2) };
    let a = Worker { member: member("g", &told, Ranks::tp(0)), ..worker("a", 1) };
    client.register(&a).unwrap();
    let another = serde_json::to_vec(&worker("another", 1)).unwrap();
    for (key, value) in [
        ("crossdock/live/g/", &b"before all others"[..]),
        ("crossdock/live/g/b/kept", b"no JSON"),
        ("crossdock/live/g/c/kept", b"{}"),
        ("crossdock/live/g/d/kept", &another),
        ("crossdock/live//another/kept/deeper", &another),
        ("crossdock/live//another/other", &another),
        ("crossdock/live//", b""),
        ("crossdock/live/\u{0}\u{7f}", b"\x00\xff"),
        ("crossdock/past/e", b"[1, 2"),
        ("crossdock/groups/g", b"anything"),
        ("crossdock/rooms/g/5", b"many"),
    ] {
        put(key, value);
    }
    assert_eq!(nodes(&client.find(&Query::all()).unwrap()), ["a"]);
    client.renew(&a.node, a.incarnation).unwrap();
    let e = Worker { member: member("g", &told, Ranks::tp(1)), ..worker("e", 1) };
    assert_eq!(client.register(&e).unwrap(), Registered::Created);
    let group = GroupId::new("g").unwrap();
    assert!(client.group(&group, Counted::Ready).unwrap().complete);
    assert_eq!(client.dp_ranks(&group, &[5]).unwrap(), [DpRank::NotYet]);
    // A record of the right form that no rule would have let in.
    for (node, shape, rank) in [("y", topology(1), 0), ("z", topology(8), 7), ("zz", told.clone(), 0)] {
        let stranger = Worker { member: member("g", &shape, Ranks::tp(rank)), ..worker(node, 1) };
        put(&format!("crossdock/live/g/{node}/kept"), &serde_json::to_vec(&stranger).unwrap());
    }
    let summed = client.group(&group, Counted::Ready).unwrap();
    assert_eq!((summed.ready, summed.missing_count, summed.complete), (2, 0, true), "{summed}");
    for node in ["y", "z", "zz"] {
        put(&format!("crossdock/live/g/{node}/kept"), b"gone");
    }
    // Its own key was overwritten: the worker registers again, as after any loss.
    put("crossdock/live/g/a/kept", b"gone");
    assert_eq!(client.renew(&a.node, a.incarnation).unwrap_err().code(), Some(ErrorCode::UnknownWorker));
    assert_eq!(client.register(&a).unwrap(), Registered::Created);
    assert!(client.group(&group, Counted::Ready).unwrap().complete);
}

#[test]
fn a_member_that_is_away_is_passed_over() {
    let Some(process) = Process::start() else { return };
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let members = format!("etcd://{closed},{},{}/team-a", silent.local_addr().unwrap(), process.address());
    let client =
        Client::new(ClientConfig { call_time: Duration::from_secs(6), ..ClientConfig::to(&members) })
            .unwrap();
    assert_eq!(client.register(&worker("n", 1)).unwrap(), Registered::Created);
    let began = Instant::now();
    assert_eq!(nodes(&client.find(&Query::all()).unwrap()), ["n"]);
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "the one that answered is asked first: {:?}",
        began.elapsed()
    );
    // Another prefix is another registry.
    let other = Client::new(ClientConfig::to(&format!("etcd://{}/team-b", process.address()))).unwrap();
    assert!(other.find(&Query::all()).unwrap().is_empty());
}

#[test]
fn a_member_that_answers_that_it_cannot_is_left() {
    let Some(process) = Process::start() else { return };
    let learner = r#"{"error":"etcdserver: rpc not supported for learner","message":"etcdserver: rpc not supported for learner","code":14}"#;
    for (status, body) in [(503, learner), (502, "<html>"), (504, "")] {
        let front = Front::start("", move |_, _| Say::Answer(status, body));
        let config = |members: &str| ClientConfig {
            limits: crate::limits(),
            ..ClientConfig::to(&format!("etcd://{members}"))
        };
        let client = Client::new(config(&format!("{},{}", front.address(), process.address()))).unwrap();
        client.register(&worker("n", 1)).unwrap();
        client.renew(&worker("n", 1).node, worker("n", 1).incarnation).unwrap();
        assert_eq!(nodes(&client.find(&Query::all()).unwrap()), ["n"]);
        assert_eq!(front.asked_at_all(), 1, "it is not asked again while another one answers");
        // Where nobody answers better, that is what is told.
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for members in [format!("{closed},{}", front.address()), format!("{},{closed}", front.address())] {
            let told = Client::new(config(&members)).unwrap().find(&Query::all()).unwrap_err();
            assert!(told.to_string().contains("registry") || told.to_string().contains("learner"), "{told}");
            assert!(!matches!(told, Error::Unreachable { .. }) && told.retry_helps(), "{told}");
        }
    }
}

#[test]
fn a_quiet_wait_is_quiet_while_a_member_is_away() {
    let Some(process) = Process::start() else { return };
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let members = format!("etcd://{closed},{},{closed}", process.address());
    let client = Client::new(ClientConfig::to(&members)).unwrap();
    let two = Worker { member: member("g", &topology(2), Ranks::tp(0)), ..worker("n", 1) };
    client.register(&two).unwrap();
    let time = Duration::from_millis(1_500);
    let mut watch = client.watch(Query::all());
    assert_eq!(watch.next(SOON).unwrap().len(), 1);
    let began = Instant::now();
    assert_eq!(watch.next(time).unwrap(), [], "a quiet registry is no failure");
    assert!(began.elapsed() >= time * 2 / 3, "{:?}", began.elapsed());
    let incomplete = client.wait_for_group(&GroupId::new("g").unwrap(), Counted::Ready, time).unwrap_err();
    assert!(
        matches!(&incomplete, WaitError::Incomplete { seen: Some(seen), last: None, .. } if seen.ready == 1),
        "{incomplete}"
    );
    let too_few = client.wait_for(&Query::all(), 2, time).unwrap_err();
    assert!(
        matches!(&too_few, WaitError::TooFew { found, last: None, .. } if nodes(found) == ["n"]),
        "{too_few}"
    );
    // A change is heard of at once all the same.
    thread::scope(|scope| {
        let began = Instant::now();
        let heard = scope.spawn(|| watch.next(SOON).unwrap());
        thread::sleep(Duration::from_millis(100));
        client.register(&worker("m", 1)).unwrap();
        assert_eq!(heard.join().unwrap().len(), 1);
        assert!(began.elapsed() < SOON / 4, "{:?}", began.elapsed());
    });
}

#[test]
fn a_watch_that_fails_is_neither_a_storm_nor_the_loss_of_what_was_read() {
    let Some(process) = Process::start() else { return };
    let group = GroupId::new("g").unwrap();
    let time = Duration::from_millis(800);
    const CREATED: &str = "{\"result\":{\"created\":true}}\n";
    let watched = |say: fn() -> Say| {
        let front = Front::start(&process.address(), move |path, _| match path {
            "/v3/watch" => say(),
            _ => Say::Pass,
        });
        let client = Client::new(ClientConfig::to(&format!("etcd://{}", front.address()))).unwrap();
        let two = Worker { member: member("g", &topology(2), Ranks::tp(0)), ..worker("n", 1) };
        client.register(&two).unwrap();
        let unmet = client.wait_for_group(&group, Counted::Ready, time).unwrap_err();
        let watches = front.asked("/v3/watch");
        assert!((1..=8).contains(&watches), "{watches} watches in {time:?}: {unmet}");
        unmet
    };
    for say in [
        || Say::Begin(CREATED),
        || Say::Answer(200, CREATED),
        || Say::Answer(200, ""),
        || Say::Answer(503, r#"{"error":{"grpc_code":14,"http_code":503,"message":"no leader"}}"#),
    ] {
        let unmet = watched(say);
        assert!(
            matches!(&unmet, WaitError::Incomplete { seen: Some(seen), last: None, .. } if seen.ready == 1),
            "{unmet}"
        );
    }
    for say in [
        || Say::Answer(403, r#"{"error":"etcdserver: permission denied","code":7}"#),
        || Say::Answer(400, r#"{"error":{"grpc_code":3,"http_code":400,"message":"wrong"}}"#),
    ] {
        let unmet = watched(say);
        assert!(matches!(unmet, WaitError::Failed(Error::Etcd { .. })), "{unmet}");
    }
}

#[test]
fn a_registration_in_vain_leaves_no_lease_behind() {
    let Some(process) = Process::start() else { return };
    let home = Home::Etcd(process);
    let address = home.name().replace("etcd://", "");
    let warming = Worker { warm_up_ms: 5_000, ..worker("n", 1) };
    let puts = |path: &str, body: &str| path == "/v3/kv/txn" && body.contains("request_put");
    for (status, body) in [
        // Somebody else is always faster; it may not; there is no space.
        (200, r#"{"header":{"cluster_id":"1","revision":"1"}}"#),
        (
            403,
            r#"{"error":"etcdserver: permission denied","message":"etcdserver: permission denied","code":7}"#,
        ),
        (429, r#"{"message":"etcdserver: mvcc: database space exceeded","code":8}"#),
    ] {
        let front =
            Front::start(
                &address,
                move |path, asked| {
                    if puts(path, asked) { Say::Answer(status, body) } else { Say::Pass }
                },
            );
        let config = ClientConfig::to(&format!("etcd://{}", front.address()));
        let client = Client::new(ClientConfig { call_time: Duration::from_secs(2), ..config }).unwrap();
        let in_vain = client.register(&warming).unwrap_err();
        assert!(matches!(in_vain, Error::Deadline { .. } | Error::Etcd { .. }), "{in_vain}");
        assert_eq!(leases(&home), 0, "{in_vain}");
    }
    // A node goes on with the lease of what is remembered of it, and with that alone.
    let client = home.client();
    for incarnation in 1..=5 {
        client.register(&worker("n", incarnation)).unwrap();
    }
    let refused = client.register(&worker("n", 1)).unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::StaleIncarnation));
    assert!(leases(&home) <= 5 + 1, "{} leases", leases(&home));
}

#[test]
fn a_lease_that_ends_while_it_is_tried_is_taken_anew() {
    let Some(process) = Process::start() else { return };
    let home = Home::Etcd(process);
    let address = home.name().replace("etcd://", "");
    let ended = Arc::new(AtomicBool::new(false));
    let front = Front::start(&address, {
        let (ended, name) = (Arc::clone(&ended), home.name());
        move |path, body| {
            if path == "/v3/kv/txn" && body.contains("request_put") && !ended.swap(true, Ordering::Relaxed) {
                let body: Value = serde_json::from_str(body).unwrap();
                let lease = &body["success"][0]["request_put"]["lease"];
                assert!(ask(&name, "/v3/lease/revoke", &json!({"ID": lease})).0);
            }
            Say::Pass
        }
    });
    let client = Client::new(ClientConfig::to(&format!("etcd://{}", front.address()))).unwrap();
    assert_eq!(client.register(&worker("n", 1)).unwrap(), Registered::Created);
    assert!(ended.load(Ordering::Relaxed));
    assert_eq!(leases(&home), 2, "nothing is left of the first attempt");
}

#[test]
fn an_etcd_without_space_says_so_and_is_asked_again() {
    let Some(process) = Process::start_with(&["--quota-backend-bytes", "2000000"]) else { return };
    let home = Home::Etcd(process);
    let large = json!({"key": STANDARD.encode("large"), "value": STANDARD.encode(vec![b'x'; 500_000])});
    eventually("it is full", || !ask(&home.name(), "/v3/kv/put", &large).0);
    let client = home.client();
    let full = client.register(&worker("n", 1)).unwrap_err();
    assert!(matches!(&full, Error::Etcd { status: 429, message, .. } if message.contains("space")), "{full}");
    assert!(full.retry_helps());
    assert!(client.find(&Query::all()).unwrap().is_empty(), "what is there can be read");
}

#[test]
fn an_etcd_that_hangs_costs_a_call_its_deadline_and_no_more() {
    let Some(process) = Process::start() else { return };
    let name = format!("etcd://{}", process.address());
    let client =
        Client::new(ClientConfig { call_time: Duration::from_millis(300), ..ClientConfig::to(&name) })
            .unwrap();
    let registration =
        Registration::start(client.clone(), Worker { ttl_ms: SHORT_MS, ..worker("n", 1) }).unwrap();
    registration.wait(SOON).unwrap();
    process.stop();
    let began = Instant::now();
    for late in [client.find(&Query::all()).map(drop), client.register(&worker("m", 1)).map(drop)] {
        let late = late.unwrap_err();
        assert!(matches!(late, Error::Deadline { .. }) && late.retry_helps(), "{late}");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    eventually("it is noticed", || sees_it_away(&registration.status()));
    process.signal("CONT");
    registration.wait(SOON).unwrap();
    registration.deregister().unwrap();
}

#[test]
fn hundreds_of_workers_find_each_other() {
    const WORKERS: usize = 320;
    let Some(process) = Process::start() else { return };
    let home = Home::Etcd(process);
    let client = &home.client();
    let began = Instant::now();
    thread::scope(|scope| {
        for part in 0..8 {
            scope.spawn(move || {
                for index in (part..WORKERS).step_by(8) {
                    let group = format!("g{}", index / 8);
                    let member = member(&group, &topology(8), Ranks::tp(index as u32 % 8));
                    client
                        .register(&Worker { member, ttl_ms: 60_000, ..worker(&format!("w{index}"), 1) })
                        .unwrap();
                }
            });
        }
    });
    let registered = began.elapsed();
    assert_eq!(client.find(&Query::all()).unwrap().len(), WORKERS);
    let groups = client.groups(Counted::Ready).unwrap();
    assert!(groups.len() == WORKERS / 8 && groups.iter().all(|group| group.complete));
    println!("{WORKERS} workers registered in {registered:?}, and were all seen after {:?}", began.elapsed());
}

/// Asks the etcd itself for something that it does.
fn post(home: &Home, path: &str, body: &Value) -> Value {
    let (done, answer) = ask(&home.name(), path, body);
    assert!(done, "{answer}");
    answer
}

/// Whether it is done, and the answer's body. In HTTP/1.0, which has no chunks.
fn ask(address: &str, path: &str, body: &Value) -> (bool, Value) {
    let mut stream = TcpStream::connect(address.strip_prefix("etcd://").unwrap()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let body = body.to_string();
    let length = body.len();
    let head = format!("POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.contains(" 200 OK\r\n"), serde_json::from_str(body).unwrap())
}

fn leases(home: &Home) -> usize {
    post(home, "/v3/lease/leases", &json!({}))["leases"].as_array().map_or(0, Vec::len)
}

impl Process {
    /// A signal that was sent is only on its way: this waits until every thread stands still.
    fn stop(&self) {
        self.signal("STOP");
        let still = |task: std::io::Result<DirEntry>| {
            fs::read_to_string(task.unwrap().path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
        };
        let tasks = format!("/proc/{}/task", self.id());
        eventually("it stands still", || fs::read_dir(&tasks).unwrap().all(still));
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.id().to_string()]).status();
        assert!(sent.unwrap().success(), "SIG{name}");
    }
}
