//! What can happen to an etcd, and not to crossdock's own server.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crossdock_bootstrap::{
    Client, ClientConfig, Counted, DpRank, Error, ErrorCode, GroupId, Query, Ranks, Registered, Registration,
    RoomPolicy, Status, Topology, Worker,
};

use crate::cases::{eventually, member, nodes, topology, worker};
use crate::etcd::Process;
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
            let worker = Worker { ttl_ms: 3 * SHORT_MS, member, ..worker(&format!("w{rank}"), 7) };
            Registration::start(client.clone(), worker).unwrap()
        })
        .collect();
    client.wait_for_group(&group, Counted::Ready, SOON).unwrap();
    let mut watch = client.watch(Query::all());
    assert_eq!(watch.next(SOON).unwrap().len(), 3);
    for round in 0..3 {
        home.kill();
        eventually("every worker sees that it is away", || {
            registrations.iter().all(|one| matches!(one.status(), Status::Retrying { .. }))
        });
        let Home::Etcd(process) = &mut home else { unreachable!("it is one") };
        process.start_again();
        eventually("every worker has renewed", || {
            registrations.iter().all(|one| matches!(one.status(), Status::Registered { .. }))
        });
        // What it had on disk is there again, with all leases.
        let complete = client.group(&group, Counted::Ready).unwrap();
        assert!(complete.complete, "round {round}: {complete}");
        assert_eq!(watch.next(Duration::from_millis(300)).unwrap(), [], "round {round}: nobody came or left");
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
    let put = |key: &str, value: &[u8]| post(&home, "/v3/kv/put", key, value);
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
fn an_etcd_that_hangs_costs_a_call_its_deadline_and_no_more() {
    let Some(process) = Process::start() else { return };
    let name = format!("etcd://{}", process.address());
    let client =
        Client::new(ClientConfig { call_time: Duration::from_millis(300), ..ClientConfig::to(&name) })
            .unwrap();
    let registration =
        Registration::start(client.clone(), Worker { ttl_ms: SHORT_MS, ..worker("n", 1) }).unwrap();
    registration.wait(SOON).unwrap();
    process.signal("STOP");
    let began = Instant::now();
    for late in [client.find(&Query::all()).map(drop), client.register(&worker("m", 1)).map(drop)] {
        let late = late.unwrap_err();
        assert!(matches!(late, Error::Deadline { .. }) && late.retry_helps(), "{late}");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    eventually("it is noticed", || matches!(registration.status(), Status::Retrying { .. }));
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

fn post(home: &Home, path: &str, key: &str, value: &[u8]) {
    let address = home.name();
    let mut stream = TcpStream::connect(address.strip_prefix("etcd://").unwrap()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let body = format!(r#"{{"key":"{}","value":"{}"}}"#, STANDARD.encode(key), STANDARD.encode(value));
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

impl Process {
    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.id().to_string()]).status();
        assert!(sent.unwrap().success(), "SIG{name}");
    }
}
