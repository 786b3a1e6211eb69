//! The client and the server together, as workers use them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crossdock_bootstrap::{
    Client, ClientConfig, Counted, Error, ErrorCode, ForeignAnswer, GroupId, Incarnation, Labels, Limits,
    Member, NodeId, Query, Ranks, Registered, Registration, Role, Server, ServerConfig, Stage, StartError,
    Status, Token, Topology, WaitError, Worker,
};

const SOON: Duration = Duration::from_secs(10);

fn anywhere() -> ServerConfig {
    let mut config = ServerConfig::on("127.0.0.1:0".parse().unwrap());
    config.limits.ttl_ms = 50..=60_000;
    config
}

fn client(address: SocketAddr) -> Client {
    Client::new(ClientConfig::to(&address.to_string())).unwrap()
}

fn worker(node: &str, incarnation: u64) -> Worker {
    Worker {
        node: NodeId::new(node).unwrap(),
        incarnation: Incarnation::new(incarnation),
        role: Role::Decode,
        address: "10.0.0.1:7000".parse().unwrap(),
        ttl_ms: 10_000,
        warm_up_ms: 0,
        member: None,
        labels: Labels::none(),
    }
}

/// Waits for something that another thread brings about.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < end, "not within {SOON:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_worker_may_start_before_its_server() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let registration = Registration::start(client(address), worker("early", 1)).unwrap();
    eventually("an attempt has failed", || {
        matches!(registration.status(), Status::Joining { attempts: 1.., .. })
    });
    let late = registration.wait(Duration::from_millis(20)).unwrap_err();
    assert!(late.to_string().contains("connecting"), "{late}");
    let _server = Server::start(ServerConfig { listen: address, ..anywhere() }).unwrap();
    registration.wait(SOON).unwrap();
}

#[test]
fn a_refusal_is_told_at_once_and_cured_by_the_server() {
    let mut config = anywhere();
    config.limits.workers = 1;
    let server = Server::start(config).unwrap();
    let client = client(server.address());
    client.register(&worker("first", 1)).unwrap();
    let refused = client.register(&worker("second", 1)).unwrap_err();
    assert_eq!((refused.code(), refused.retry_helps()), (Some(ErrorCode::RegistryFull), true));
    let short = client.register(&Worker { ttl_ms: 1, ..worker("short", 1) }).unwrap_err();
    assert_eq!(short.code(), Some(ErrorCode::TtlOutOfRange));
    let registration =
        Registration::start(client.clone(), Worker { ttl_ms: 120_000, ..worker("long", 1) }).unwrap();
    let refused = registration.wait(SOON).unwrap_err();
    assert!(refused.to_string().contains("not within 50 to 60000"), "{refused}");

    let second = Registration::start(client.clone(), worker("second", 1)).unwrap();
    eventually("the registry is full", || matches!(second.status(), Status::Joining { attempts: 1.., .. }));
    client.deregister(&NodeId::new("first").unwrap(), Incarnation::new(1)).unwrap();
    second.wait(SOON).unwrap();
}

#[test]
fn only_the_token_opens_the_registry() {
    let token = |secret| Some(Token::new(secret).unwrap());
    let server = Server::start(ServerConfig { token: token("s3cret"), ..anywhere() }).unwrap();
    let with = |token| {
        Client::new(ClientConfig { token, ..ClientConfig::to(&server.address().to_string()) }).unwrap()
    };
    for wrong in [None, token("s3cre"), token("s3cret+")] {
        let client = with(wrong);
        let refused = client.register(&worker("d0", 1)).unwrap_err();
        assert!(matches!(refused, Error::Refused { status: 401, .. }), "{refused}");
        assert_eq!(refused.code(), Some(ErrorCode::WrongToken));
        assert!(!refused.to_string().contains("s3cret"));
        let waited = client.wait_for(&Query::all(), 1, SOON).unwrap_err();
        assert!(matches!(waited, WaitError::Failed(Error::Refused { status: 401, .. })), "{waited}");
        assert_eq!(client.health().unwrap().workers, 0, "health is open");
    }
    assert_eq!(with(token("s3cret")).register(&worker("d0", 1)).unwrap(), Registered::Created);
}

#[test]
fn many_clients_at_once() {
    const CLIENTS: u64 = 64;
    let server = Server::start(ServerConfig { connections: 24, waits: 8, ..anywhere() }).unwrap();
    let address = server.address();
    // More clients than places, so some are answered at once and ask again, and all of them come through.
    let all_have_seen_all = &Barrier::new(CLIENTS as usize);
    thread::scope(|scope| {
        for index in 0..CLIENTS {
            scope.spawn(move || {
                let client = client(address);
                let registration =
                    Registration::start(client.clone(), worker(&format!("w{index:02}"), index)).unwrap();
                let found = client.wait_for(&Query::all(), CLIENTS as usize, SOON).unwrap();
                assert_eq!(found.len(), CLIENTS as usize);
                all_have_seen_all.wait();
                drop(registration);
            });
        }
    });
}

#[test]
fn thousands_of_workers_fill_the_registry_and_not_one_more() {
    const WORKERS: u64 = 4096;
    let server = Server::start(anywhere()).unwrap();
    let client = &client(server.address());
    let worker = |index: u64| {
        let topology =
            Topology { tp_size: 8, ..Topology::single("m".parse().unwrap(), "bf16".parse().unwrap(), 64) };
        let group = GroupId::new(&format!("g{}", index / 8)).unwrap();
        let member = Member::new(group, topology, Ranks::tp(index as u32 % 8)).unwrap();
        Worker { ttl_ms: 60_000, member: Some(member), ..worker(&format!("w{index}"), index) }
    };
    thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(move || {
                for index in (part..WORKERS).step_by(4) {
                    assert_eq!(client.register(&worker(index)).unwrap(), Registered::Created);
                }
            });
        }
    });
    let refused = client.register(&worker(WORKERS)).unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::RegistryFull), "{refused}");
    assert_eq!(client.register(&worker(7)).unwrap(), Registered::Renewed, "who is there is not turned away");
    assert_eq!(client.find(&Query::all()).unwrap().len() as u64, WORKERS);
    let groups = client.groups(Counted::Ready).unwrap();
    assert!(groups.len() as u64 == WORKERS / 8 && groups.iter().all(|group| group.complete));
}

#[test]
fn a_server_that_hangs_costs_a_call_its_deadline_and_no_more() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = ClientConfig {
        call_time: Duration::from_millis(100),
        ..ClientConfig::to(&silent.local_addr().unwrap().to_string())
    };
    let client = Client::new(config).unwrap();
    let began = Instant::now();
    let late = client.health().unwrap_err();
    assert!(matches!(late, Error::Deadline { time_ms: 100, .. }) && late.retry_helps(), "{late:?}");
    let registration = Registration::start(client, worker("n", 1)).unwrap();
    drop(registration);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn a_server_may_be_given_by_name() {
    let server = Server::start(anywhere()).unwrap();
    // This name has an IPv6 address too on most hosts, where the server does not listen.
    let named = format!("http://localhost:{}", server.address().port());
    let named = Client::new(ClientConfig::to(&named)).unwrap();
    assert_eq!(named.health().unwrap().status, "ok");
    let nobody = Client::new(ClientConfig::to("nobody.invalid")).unwrap().health().unwrap_err();
    let stage = match &nobody {
        Error::Unreachable { stage, .. } | Error::Deadline { stage, .. } => *stage,
        other => panic!("{other}"),
    };
    assert!(stage == Stage::Lookup && nobody.retry_helps(), "{nobody}");
    assert!(nobody.to_string().contains("nobody.invalid:8997"), "{nobody}");
}

#[test]
fn another_service_at_the_address_is_recognised() {
    for (says, retry_helps) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>", false),
        ("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", true),
    ] {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = client(other.local_addr().unwrap());
        let answering = thread::spawn(move || {
            let (mut stream, _) = other.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            stream.write_all(says.as_bytes()).unwrap();
        });
        let foreign = client.find(&Query::all()).unwrap_err();
        assert!(matches!(foreign, Error::Foreign { .. }), "{foreign:?}");
        assert_eq!(foreign.retry_helps(), retry_helps, "{foreign:?}");
        answering.join().unwrap();
    }
}

#[test]
fn another_service_in_place_of_etcd_is_recognised() {
    for (says, retry_helps) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", false),
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 19\r\n\r\n404 page not found\n", false),
        ("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", true),
    ] {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = format!("etcd://{}", other.local_addr().unwrap());
        let client = Client::new(ClientConfig::to(&name)).unwrap();
        let answering = thread::spawn(move || {
            let (mut stream, _) = other.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            stream.write_all(says.as_bytes()).unwrap();
        });
        let foreign = client.find(&Query::all()).unwrap_err();
        assert!(matches!(foreign, Error::Foreign { .. }), "{foreign:?}");
        assert_eq!(foreign.retry_helps(), retry_helps, "{foreign:?}");
        answering.join().unwrap();
    }
    for wrong in ["etcd://", "etcd://a,", "etcd://a:0", "etcd:/a"] {
        let refused = Client::new(ClientConfig::to(wrong)).unwrap_err();
        assert!(refused.to_string().contains("etcd://HOST:PORT"), "{refused}");
    }
}

#[test]
fn a_wait_does_not_storm_a_server_that_cannot_answer() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = client(other.local_addr().unwrap());
    let waiting = thread::spawn(move || client.wait_for(&Query::all(), 1, Duration::from_millis(400)));
    other.set_nonblocking(true).unwrap();
    let mut calls = 0;
    while !waiting.is_finished() {
        if let Ok((mut stream, _)) = other.accept() {
            calls += 1;
            stream.set_nonblocking(false).unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n");
        }
        thread::sleep(Duration::from_millis(1));
    }
    let too_few = waiting.join().unwrap().unwrap_err();
    assert!(too_few.to_string().contains("the last call failed"), "{too_few}");
    // Pauses of at least 10, 20, 40, 80 and 160 ms.
    assert!((1..=7).contains(&calls), "{calls} calls in 400 ms");
}

#[test]
fn a_watch_does_not_storm_a_registry_that_is_away_while_a_departure_is_due() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut watch = client(other.local_addr().unwrap()).watch(Query::all());
    let listed = r#"{"node":"n","incarnation":"1","role":"decode","address":"10.0.0.1:7000","ttl_ms":1000,
        "state":"ready","age_ms":1,"remaining_ms":150}"#;
    // A registry that forgets its only worker in a restart, and is away from then on.
    let first = format!(r#"{{"workers":[{listed}],"mark":"1.1"}}"#);
    let lists = [first.as_str(), r#"{"workers":[],"mark":"2.1"}"#];
    let watching = thread::spawn(move || {
        let came = watch.next(SOON).unwrap();
        (came.len(), watch.next(Duration::from_secs(2)))
    });
    other.set_nonblocking(true).unwrap();
    let mut calls = 0;
    while !watching.is_finished() {
        if let Ok((mut stream, _)) = other.accept() {
            stream.set_nonblocking(false).unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let answer = lists.get(calls).map_or_else(
                || "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n".to_owned(),
                |list| format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{list}", list.len()),
            );
            let _ = stream.write_all(answer.as_bytes());
            calls += 1;
        }
        thread::sleep(Duration::from_millis(1));
    }
    let (came, away) = watching.join().unwrap();
    assert_eq!(came, 1);
    assert!(away.unwrap_err().retry_helps());
    // Two lists, then pauses of at least 10, 20, 40, 80, 160, 320 and twice 500 ms before the calls that fail.
    assert!((3..=10).contains(&calls), "{calls} calls in 2 s");
}

#[test]
fn times_beyond_all_bounds_are_taken_for_very_long() {
    let mut config = ServerConfig { longest_wait: Duration::MAX, ..anywhere() };
    (config.limits.ttl_ms, config.limits.warm_up_ms) = (1..=u64::MAX, u64::MAX);
    let server = Server::start(config).unwrap();
    let name = server.address().to_string();
    let client = Client::new(ClientConfig { call_time: Duration::MAX, ..ClientConfig::to(&name) }).unwrap();
    let patient = Worker { ttl_ms: u64::MAX, warm_up_ms: u64::MAX, ..worker("n", 1) };
    let registration = Registration::start(client.clone(), patient).unwrap();
    registration.wait(Duration::MAX).unwrap();
    let waiting = thread::spawn({
        let client = client.clone();
        move || client.wait_for(&Query::all(), 2, Duration::MAX)
    });
    thread::sleep(Duration::from_millis(100));
    client.register(&worker("m", 1)).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap().len(), 2);
    assert_eq!(client.watch(Query::all()).next(Duration::MAX).unwrap().len(), 2);
    registration.deregister().unwrap();
}

#[test]
fn an_answer_larger_than_the_client_takes_is_refused() {
    let server = Server::start(anywhere()).unwrap();
    let address = server.address().to_string();
    let client = Client::new(ClientConfig { answer_bytes: 100, ..ClientConfig::to(&address) }).unwrap();
    client.register(&worker("d0", 1)).unwrap();
    let refused = client.find(&Query::all()).unwrap_err();
    assert!(
        matches!(refused, Error::Foreign { source: ForeignAnswer::Body { limit: 100 }, .. }),
        "{refused:?}"
    );
}

#[test]
fn a_server_says_why_it_does_not_start() {
    let server = Server::start(anywhere()).unwrap();
    let taken = Server::start(ServerConfig { listen: server.address(), ..anywhere() }).unwrap_err();
    assert!(matches!(taken, StartError::Listen { address, .. } if address == server.address()), "{taken}");
    let mut nobody = anywhere();
    nobody.limits.workers = 0;
    #[expect(clippy::reversed_empty_ranges, reason = "this is the mistake that is refused")]
    let no_ttl = Limits { ttl_ms: 5..=4, ..anywhere().limits };
    for wrong in [
        ServerConfig { connections: 8, waits: 8, ..anywhere() },
        nobody,
        ServerConfig { limits: no_ttl, ..anywhere() },
    ] {
        assert!(matches!(Server::start(wrong), Err(StartError::Config(_))));
    }
}
