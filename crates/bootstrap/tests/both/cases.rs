//! What holds for every registry.

use std::thread;
use std::time::{Duration, Instant};

use crossdock_bootstrap::{
    Change, Counted, DpRank, Error, ErrorCode, GroupId, Incarnation, Labels, Listed, Member, NodeId, Query,
    ROOMS_PER_CALL_MAX, Ranks, Refusal, Registered, Registration, Registry, Role, RoomPolicy, State, Status,
    Tag, Topology, WaitError, Watch, Worker,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::{Home, SHORT_MS, SOON, limits};

pub fn worker(node: &str, incarnation: u64) -> Worker {
    Worker {
        node: NodeId::new(node).unwrap(),
        incarnation: Incarnation::new(incarnation),
        role: Role::Decode,
        address: "10.0.0.1:7000".parse().unwrap(),
        ttl_ms: 20_000,
        warm_up_ms: 0,
        member: None,
        labels: Labels::none(),
    }
}

pub fn member(group: &str, topology: &Topology, ranks: Ranks) -> Option<Member> {
    Some(Member::new(GroupId::new(group).unwrap(), topology.clone(), ranks).unwrap())
}

pub fn topology(tp_size: u32) -> Topology {
    let single = Topology::single(Tag::new("deepseek-r1").unwrap(), Tag::new("fp8_e4m3").unwrap(), 64);
    Topology { tp_size, ..single }
}

fn group(name: &str) -> GroupId {
    GroupId::new(name).unwrap()
}

pub fn nodes(found: &[Listed]) -> Vec<&str> {
    found.iter().map(|listed| listed.worker.node.as_str()).collect()
}

/// Waits for something that another thread brings about.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < end, "not within {SOON:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What a watch tells within a short time, of a registry that may take longer than that to answer at all.
pub fn soon_told(watch: &mut Watch, time: Duration) -> Vec<Change> {
    let end = Instant::now() + SOON;
    loop {
        match watch.next(time) {
            Ok(changes) => return changes,
            Err(late) => assert!(late.retry_helps() && Instant::now() < end, "{late}"),
        }
    }
}

/// Its last attempt was in vain: at renewing or, where nobody let it run until its time to live was over, at joining again.
pub fn sees_it_away(status: &Status) -> bool {
    match status {
        Status::Retrying { last, .. } | Status::Joining { last: Some(last), .. } => last.retry_helps(),
        _ => false,
    }
}

pub fn two_clients_see_the_same_workers(home: &mut Home) {
    let (one, two) = (home.client(), home.client());
    let two_ranks = topology(2);
    let prefill =
        Worker { role: Role::Prefill, member: member("p", &two_ranks, Ranks::tp(1)), ..worker("p1", 7) };
    let labels = Labels::none().with("zone", "a & b / c").unwrap();
    let decode = Worker { labels, ..worker("d0", u64::MAX) };
    assert_eq!(one.register(&prefill).unwrap(), Registered::Created);
    assert_eq!(two.register(&decode).unwrap(), Registered::Created);
    assert_eq!(two.register(&decode).unwrap(), Registered::Renewed);
    let decode = Worker { ttl_ms: 30_000, ..decode };
    assert_eq!(two.register(&decode).unwrap(), Registered::Updated);
    for client in [&one, &two] {
        let query = |query: Query| client.find(&query).unwrap();
        assert_eq!(nodes(&query(Query::all())), ["d0", "p1"]);
        assert_eq!(nodes(&query(Query::all().role(Role::Prefill))), ["p1"]);
        assert_eq!(nodes(&query(Query::all().group(group("p")))), ["p1"]);
        assert!(query(Query::all().group(group("q"))).is_empty());
        assert_eq!(nodes(&query(Query::all().tp_rank(1).dp_rank(0))), ["p1"]);
        assert_eq!(nodes(&query(Query::all().state(State::Ready))), ["d0", "p1"]);
        let zone = Query::all().label("zone", "a & b / c").unwrap();
        assert_eq!(nodes(&query(zone.clone())), ["d0"]);
        assert!(query(zone.role(Role::Prefill)).is_empty());
        for worker in [&prefill, &decode] {
            let listed = client.worker(&worker.node).unwrap().unwrap();
            assert_eq!((&listed.worker, listed.state), (worker, State::Ready));
        }
        assert_eq!(client.worker(&NodeId::new("d1").unwrap()).unwrap(), None);
    }
    let health = one.health().unwrap();
    assert_eq!((health.status.as_str(), health.workers), ("ok", 2));

    two.renew(&decode.node, decode.incarnation).unwrap();
    one.deregister(&decode.node, decode.incarnation).unwrap();
    one.deregister(&decode.node, decode.incarnation).expect("what is not there needs no taking out");
    assert_eq!(nodes(&two.find(&Query::all()).unwrap()), ["p1"]);
    let gone = two.renew(&decode.node, decode.incarnation).unwrap_err();
    assert_eq!(gone.code(), Some(ErrorCode::UnknownWorker));
    assert_eq!(two.register(&decode).unwrap(), Registered::Created);
}

pub fn an_incarnation_that_was_replaced_stays_out(home: &mut Home) {
    let client = home.client();
    // The successor may belong to another group, or to none.
    for (name, before, after) in [
        ("a", None, None),
        ("b", member("b", &topology(1), Ranks::tp(0)), None),
        ("c", member("c", &topology(1), Ranks::tp(0)), member("d", &topology(2), Ranks::tp(1))),
    ] {
        let old = Worker { member: before, ..worker(name, 0xa) };
        let new = Worker { member: after, ..worker(name, 0xb) };
        client.register(&old).unwrap();
        assert_eq!(client.register(&new).unwrap(), Registered::Replaced, "{name}");
        let node = &old.node;
        for refused in [
            client.register(&old).map(drop),
            client.renew(node, old.incarnation),
            client.deregister(node, old.incarnation),
        ] {
            let refused = refused.unwrap_err();
            assert!(matches!(refused, Error::Refused { status: 409, .. }), "{refused}");
            assert_eq!(refused.code(), Some(ErrorCode::StaleIncarnation));
            assert!(refused.to_string().contains("by incarnation 000000000000000b"), "{refused}");
            assert!(!refused.retry_helps());
        }
        assert_eq!(client.worker(node).unwrap().unwrap().worker, new);
        assert_eq!(client.find(&Query::all()).unwrap().len(), 1, "nothing is left of the old one");
        client.renew(node, new.incarnation).unwrap();
        client.deregister(node, new.incarnation).unwrap();
        assert_eq!(client.register(&old).unwrap_err().code(), Some(ErrorCode::StaleIncarnation));
        assert!(client.find(&Query::all()).unwrap().is_empty());
    }
}

pub fn a_worker_that_does_not_renew_expires_and_one_that_does_stays(home: &mut Home) {
    let client = home.client();
    let registration =
        Registration::start(client.clone(), Worker { ttl_ms: 5_000, ..worker("kept", 1) }).unwrap();
    registration.wait(SOON).unwrap();
    let registered = Instant::now();
    client.register(&Worker { ttl_ms: SHORT_MS, ..worker("left", 1) }).unwrap();
    eventually("the worker that does not renew is gone", || {
        let found = client.find(&Query::all()).unwrap();
        assert!(found.iter().all(|listed| listed.remaining_ms != Some(0)));
        assert!(
            nodes(&found).contains(&"kept"),
            "{:?} after {:?}",
            registration.status(),
            registered.elapsed()
        );
        registered.elapsed() > Duration::from_millis(7_000) && nodes(&found) == ["kept"]
    });
    let late = client.renew(&NodeId::new("left").unwrap(), Incarnation::new(1)).unwrap_err();
    assert_eq!(late.code(), Some(ErrorCode::UnknownWorker));
    drop(registration);
    assert!(client.find(&Query::all()).unwrap().is_empty(), "dropping takes the worker out");
}

pub fn a_registration_ends_when_its_node_is_taken(home: &mut Home) {
    let client = home.client();
    let registration =
        Registration::start(client.clone(), Worker { ttl_ms: SHORT_MS, ..worker("n", 1) }).unwrap();
    registration.wait(SOON).unwrap();
    client.register(&worker("n", 2)).unwrap();
    eventually("the first one is told", || matches!(registration.status(), Status::Replaced { .. }));
    let told = registration.wait(SOON).unwrap_err();
    assert!(told.to_string().contains("was replaced by incarnation 0000000000000002"), "{told}");
    registration.deregister().expect("there is nothing of it left to take out");
    assert_eq!(client.worker(&NodeId::new("n").unwrap()).unwrap().unwrap().worker.incarnation.number(), 2);
}

pub fn a_registry_that_has_forgotten_everyone_is_refilled(home: &mut Home) {
    let client = home.client();
    let registrations: Vec<Registration> = (0..4)
        .map(|index| {
            let member = member("g", &topology(4), Ranks::tp(index));
            let worker = Worker { ttl_ms: SHORT_MS, member, ..worker(&format!("d{index}"), index.into()) };
            Registration::start(client.clone(), worker).unwrap()
        })
        .collect();
    client.wait_for_group(&group("g"), Counted::Ready, SOON).unwrap();
    let mut watch = client.watch(Query::all());
    assert_eq!(watch.next(SOON).unwrap().len(), 4);
    home.kill();
    eventually("every worker sees that the registry is away", || {
        registrations.iter().all(|one| sees_it_away(&one.status()))
    });
    let down = client.find(&Query::all()).unwrap_err();
    assert!(matches!(down, Error::Unreachable { .. }) && down.retry_helps(), "{down}");
    let waiting = thread::spawn({
        let client = client.clone();
        move || client.wait_for_group(&group("g"), Counted::Ready, SOON)
    });
    let away = watch.next(Duration::from_millis(500)).unwrap_err();
    assert!(away.retry_helps(), "{away}");
    home.start_anew();
    waiting.join().unwrap().expect("a wait goes on over the restart");
    // A watch tells nothing, or that who was away for longer than its time to live left and came again.
    let mut there = 4;
    while let changes @ [_, ..] = &soon_told(&mut watch, Duration::from_secs(1))[..] {
        for change in changes {
            match change {
                Change::Came(_) => there += 1,
                Change::Left(_) => there -= 1,
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(there, 4);
    for registration in registrations {
        registration.wait(SOON).unwrap();
        registration.deregister().unwrap();
    }
    assert_eq!(client.health().unwrap().workers, 0);
}

pub fn a_wait_ends_when_enough_are_there_and_by_its_deadline(home: &mut Home) {
    let client = home.client();
    client.register(&worker("d0", 1)).unwrap();
    let began = Instant::now();
    let too_few = client.wait_for(&Query::all(), 3, Duration::from_millis(300)).unwrap_err();
    assert!((300..20_000).contains(&(began.elapsed().as_millis() as u64)), "{:?}", began.elapsed());
    match &too_few {
        WaitError::TooFew { wanted: 3, found, waited_ms: 300, .. } => assert_eq!(nodes(found), ["d0"]),
        other => panic!("{other}"),
    }
    let waiting = thread::spawn({
        let client = client.clone();
        move || client.wait_for(&Query::all(), 3, SOON).map(|found| (found.len(), Instant::now()))
    });
    thread::sleep(Duration::from_millis(50));
    client.register(&worker("d1", 1)).unwrap();
    client.register(&worker("d2", 1)).unwrap();
    let there = Instant::now();
    let (found, told) = waiting.join().unwrap().unwrap();
    assert_eq!(found, 3);
    let delay = told.saturating_duration_since(there);
    assert!(
        delay < Duration::from_secs(10),
        "the registry tells at once, and not when a poll is over: {delay:?}"
    );
}

pub fn times_beyond_the_limits_are_refused(home: &mut Home) {
    let client = home.client();
    let code = |worker: Worker| client.register(&worker).unwrap_err().code().unwrap();
    assert_eq!(code(Worker { ttl_ms: 49, ..worker("n", 1) }), ErrorCode::TtlOutOfRange);
    assert_eq!(code(Worker { ttl_ms: 60_001, ..worker("n", 1) }), ErrorCode::TtlOutOfRange);
    assert_eq!(code(Worker { warm_up_ms: 60_001, ..worker("n", 1) }), ErrorCode::WarmUpOutOfRange);
    assert!(client.find(&Query::all()).unwrap().is_empty());
}

pub fn a_group_is_complete_when_every_rank_is_there(home: &mut Home) {
    let client = home.client();
    let name = group("prefill-0");
    let unknown = client.group(&name, Counted::Ready).unwrap_err();
    assert_eq!((unknown.code(), unknown.retry_helps()), (Some(ErrorCode::UnknownGroup), true));
    let nobody = client.wait_for_group(&name, Counted::Ready, Duration::from_millis(500)).unwrap_err();
    assert!(nobody.to_string().contains("no worker of group prefill-0 was registered"), "{nobody}");

    let shape = Topology { pp_size: 2, dp_size: 2, ..topology(1) };
    let all: Vec<Ranks> = shape.all_ranks().collect();
    let join = |index: usize| {
        let member = member("prefill-0", &shape, all[index]);
        client.register(&Worker { member, role: Role::Prefill, ..worker(&format!("p{index}"), 1) }).unwrap()
    };
    join(2);
    join(0);
    let half = client.group(&name, Counted::Ready).unwrap();
    assert_eq!((half.complete, half.ready, half.size, half.missing_count), (false, 2, 4, 2));
    assert_eq!(half.missing, [all[1], all[3]]);
    assert_eq!((&half.topology, &half.role), (&shape, &Role::Prefill));
    let late = client.wait_for_group(&name, Counted::Ready, Duration::from_millis(100)).unwrap_err();
    assert!(late.to_string().contains("2 of 4 ranks ready"), "{late}");
    assert!(late.to_string().contains("missing: dp 0 pp 1 cp 0 tp 0, dp 1 pp 1 cp 0 tp 0"), "{late}");
    assert!(matches!(late, WaitError::Incomplete { seen: Some(seen), last: None, .. } if *seen == half));

    let waiting = thread::spawn({
        let (client, name) = (client.clone(), name.clone());
        move || client.wait_for_group(&name, Counted::Ready, SOON).map(|group| (group, Instant::now()))
    });
    join(1);
    thread::sleep(Duration::from_millis(50));
    join(3);
    let there = Instant::now();
    let (complete, told) = waiting.join().unwrap().unwrap();
    assert!(complete.complete && complete.missing.is_empty() && complete.ready == 4);
    assert!(told.saturating_duration_since(there) < Duration::from_secs(10));

    client
        .register(&Worker { member: member("other", &topology(1), Ranks::tp(0)), ..worker("o", 1) })
        .unwrap();
    client.register(&worker("alone", 1)).unwrap();
    let all_groups = client.groups(Counted::Ready).unwrap();
    let shown: Vec<_> = all_groups.iter().map(|group| (group.group.as_str(), group.complete)).collect();
    assert_eq!(shown, [("other", true), ("prefill-0", true)]);
}

pub fn who_does_not_fit_into_a_group_is_told_why(home: &mut Home) {
    let client = home.client();
    let at = |node: &str, shape: &Topology, rank| {
        let member = member("g", shape, Ranks::tp(rank));
        client.register(&Worker { member, role: Role::Prefill, ..worker(node, 1) })
    };
    at("a", &topology(2), 0).unwrap();
    let smaller_pages = Topology { page_tokens: 16, ..topology(2) };
    let mismatch = at("b", &smaller_pages, 1).unwrap_err();
    assert_eq!((mismatch.code(), mismatch.retry_helps()), (Some(ErrorCode::TopologyMismatch), true));
    assert!(matches!(mismatch, Error::Refused { status: 409, .. }));
    let told = "group g has page_tokens 64 by node a, and node b says 16";
    assert!(mismatch.to_string().contains(told), "{mismatch}");
    let taken = at("b", &topology(2), 0).unwrap_err();
    assert_eq!((taken.code(), taken.retry_helps()), (Some(ErrorCode::RankTaken), true));
    let told = "the ranks dp 0 pp 0 cp 0 tp 0 of group g are held by node a, and node b claims them";
    assert!(taken.to_string().contains(told), "{taken}");
    let decode = Worker { member: member("g", &topology(2), Ranks::tp(1)), ..worker("b", 1) };
    assert!(client.register(&decode).unwrap_err().to_string().contains("role prefill"));
    assert_eq!(nodes(&client.find(&Query::all()).unwrap()), ["a"], "who is refused leaves nothing behind");

    // Alone in its group, a worker may change it; a group that has left may come back as another.
    at("a", &smaller_pages, 0).unwrap();
    at("b", &smaller_pages, 1).unwrap();
    at("a", &topology(2), 0).unwrap_err();
    for node in ["a", "b"] {
        client.deregister(&NodeId::new(node).unwrap(), Incarnation::new(1)).unwrap();
    }
    at("c", &topology(2), 0).unwrap();
    assert_eq!(client.group(&group("g"), Counted::Ready).unwrap().topology.page_tokens, 64);
}

pub fn a_worker_that_warms_up_is_not_judged_by_its_silence(home: &mut Home) {
    let client = home.client();
    let warming = Worker {
        ttl_ms: SHORT_MS,
        warm_up_ms: 60_000,
        member: member("g", &topology(1), Ranks::tp(0)),
        ..worker("w", 1)
    };
    client.register(&warming).unwrap();
    client.register(&Worker { ttl_ms: SHORT_MS, ..worker("silent", 1) }).unwrap();
    let listed = client.worker(&warming.node).unwrap().unwrap();
    assert_eq!((&listed.worker, listed.state), (&warming, State::Warming));
    assert_eq!(nodes(&client.find(&Query::all().state(State::Warming)).unwrap()), ["w"]);
    let count = |counted| client.group(&group("g"), counted).unwrap();
    let ready = count(Counted::Ready);
    assert_eq!((ready.complete, ready.ready, ready.warming, ready.missing_count), (false, 0, 1, 1));
    assert!(count(Counted::ReadyAndWarming).complete);

    // It does not renew, and outlives one that does not, either, and is held for more than its time to live.
    eventually("the other one expires", || nodes(&client.find(&Query::all()).unwrap()) == ["w"]);
    thread::sleep(Duration::from_millis(2 * SHORT_MS));
    assert_eq!(client.worker(&warming.node).unwrap().unwrap().state, State::Warming);
    client.renew(&warming.node, warming.incarnation).expect("it is still there");
    assert_eq!(client.worker(&warming.node).unwrap().unwrap().state, State::Warming);

    let waiting = thread::spawn({
        let client = client.clone();
        move || client.wait_for_group(&group("g"), Counted::Ready, SOON)
    });
    assert_eq!(client.register(&Worker { warm_up_ms: 0, ..warming.clone() }).unwrap(), Registered::Updated);
    assert!(waiting.join().unwrap().unwrap().complete);
    assert_eq!(client.worker(&warming.node).unwrap().unwrap().state, State::Ready);
    eventually("now it expires as any other", || client.find(&Query::all()).unwrap().is_empty());

    // A registration keeps it, and says when it is ready.
    let registration =
        Registration::start(client.clone(), Worker { incarnation: Incarnation::new(2), ..warming });
    let registration = registration.unwrap();
    registration.wait(SOON).unwrap();
    assert_eq!(client.find(&Query::all()).unwrap()[0].state, State::Warming);
    registration.ready();
    client.wait_for_group(&group("g"), Counted::Ready, SOON).unwrap();
    registration.deregister().unwrap();
}

pub fn a_warm_up_ends_by_its_time_and_is_not_prolonged(home: &mut Home) {
    let client = home.client();
    let warming = Worker { warm_up_ms: 2_000, ..worker("w", 1) };
    let began = Instant::now();
    client.register(&warming).unwrap();
    let state = || client.worker(&warming.node).unwrap().map(|listed| listed.state);
    eventually("it is taken for ready", || {
        // It asks for more, again and again.
        client.register(&Worker { warm_up_ms: 50_000, ..warming.clone() }).unwrap();
        state() == Some(State::Ready)
    });
    assert!(began.elapsed() >= Duration::from_millis(1_900), "{:?}", began.elapsed());
    client.register(&warming).unwrap();
    assert_eq!(state(), Some(State::Ready), "there is one warm-up for each start of a worker");
    let next = Worker { incarnation: Incarnation::new(2), ..warming.clone() };
    assert_eq!(client.register(&next).unwrap(), Registered::Replaced);
    assert_eq!(state(), Some(State::Warming));
    client.deregister(&next.node, next.incarnation).unwrap();
    assert_eq!(state(), None, "who leaves leaves at once");
}

pub fn rooms_follow_their_number_where_nobody_is_told(home: &mut Home) {
    let client = home.client();
    let shape = Topology { dp_size: 3, ..topology(1) };
    client.register(&Worker { member: member("g", &shape, Ranks::default()), ..worker("n", 1) }).unwrap();
    let rooms = [0, 1, 5, i64::MAX as u64, u64::MAX];
    let ranks = client.dp_ranks(&group("g"), &rooms).unwrap();
    let expected: Vec<DpRank> = rooms.iter().map(|room| DpRank::Known((room % 3) as u32)).collect();
    assert_eq!(ranks, expected);
    let refused = client.tell_rooms(&group("g"), &[(1, 1)], SOON).unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::RoomsFollow));
    let unknown = client.dp_ranks(&group("h"), &[1]).unwrap_err();
    assert_eq!((unknown.code(), unknown.retry_helps()), (Some(ErrorCode::UnknownGroup), true));
}

pub fn rooms_that_are_told_are_known_for_their_time(home: &mut Home) {
    let client = home.client();
    let shape = Topology { dp_size: 4, rooms: RoomPolicy::Told, ..topology(1) };
    let name = group("g");
    let keep = Duration::from_secs(30);
    assert_eq!(client.tell_rooms(&name, &[(1, 1)], keep).unwrap_err().code(), Some(ErrorCode::UnknownGroup));
    client.register(&Worker { member: member("g", &shape, Ranks::default()), ..worker("n", 1) }).unwrap();
    client.tell_rooms(&name, &[(1, 1), (u64::MAX, 3)], keep).unwrap();
    client.tell_rooms(&name, &[], keep).unwrap();
    let known = client.dp_ranks(&name, &[u64::MAX, 2, 1]).unwrap();
    assert_eq!(known, [DpRank::Known(3), DpRank::NotYet, DpRank::Known(1)]);
    client.tell_rooms(&name, &[(1, 0), (1, 2)], keep).unwrap();
    assert_eq!(client.dp_ranks(&name, &[1]).unwrap(), [DpRank::Known(2)], "what was said last holds");
    let wrong = client.tell_rooms(&name, &[(5, 0), (6, 4)], keep).unwrap_err();
    assert_eq!(wrong.code(), Some(ErrorCode::RankOutOfRange));
    assert_eq!(client.dp_ranks(&name, &[5]).unwrap(), [DpRank::NotYet], "all of them or none");
    let long = client.tell_rooms(&name, &[(5, 0)], Duration::from_secs(61)).unwrap_err();
    assert_eq!(long.code(), Some(ErrorCode::KeepOutOfRange));

    let waiting = thread::spawn({
        let (client, name) = (client.clone(), name.clone());
        move || client.wait_for_dp_ranks(&name, &[8, 1, 9], SOON)
    });
    client.tell_rooms(&name, &[(8, 0)], keep).unwrap();
    thread::sleep(Duration::from_millis(50));
    client.tell_rooms(&name, &[(9, 1)], keep).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), [0, 2, 1]);
    let late = client.wait_for_dp_ranks(&name, &[8, 100], Duration::from_millis(100)).unwrap_err();
    assert!(matches!(&late, WaitError::RoomsNotYet { not_yet, .. } if *not_yet == [100]), "{late}");

    // As many as one call takes, and not one more.
    let many: Vec<(u64, u32)> = (0..ROOMS_PER_CALL_MAX as u64).map(|room| (room, room as u32 % 4)).collect();
    client.tell_rooms(&name, &many, keep).unwrap();
    let rooms: Vec<u64> = many.iter().map(|(room, _)| *room).collect();
    let expected: Vec<DpRank> = many.iter().map(|(_, rank)| DpRank::Known(*rank)).collect();
    assert_eq!(client.dp_ranks(&name, &rooms).unwrap(), expected);
    let too_many = vec![7; ROOMS_PER_CALL_MAX + 1];
    assert_eq!(client.dp_ranks(&name, &too_many).unwrap_err().code(), Some(ErrorCode::InvalidBody));

    client.tell_rooms(&name, &[(77_777, 1)], Duration::from_millis(SHORT_MS)).unwrap();
    eventually("it is forgotten", || client.dp_ranks(&name, &[77_777]).unwrap() == [DpRank::NotYet]);
    assert_eq!(client.dp_ranks(&name, &[9]).unwrap(), [DpRank::Known(1)]);

    // The group is cut anew: a rank that it no longer has serves no room.
    client.tell_rooms(&name, &[(10, 3)], keep).unwrap();
    let cut = Topology { dp_size: 2, ..shape };
    client.register(&Worker { member: member("g", &cut, Ranks::default()), ..worker("n", 1) }).unwrap();
    assert_eq!(client.dp_ranks(&name, &[10, 9]).unwrap(), [DpRank::NotYet, DpRank::Known(1)]);
}

pub fn who_looks_hears_that_a_worker_moved(home: &mut Home) {
    let client = home.client();
    let at = |incarnation, port: u16| Worker {
        address: format!("10.0.0.1:{port}").parse().unwrap(),
        member: member("g", &topology(2), Ranks::tp(0)),
        ttl_ms: 2 * SHORT_MS,
        ..worker("w", incarnation)
    };
    let old = Registration::start(client.clone(), at(1, 7001)).unwrap();
    old.wait(SOON).unwrap();
    let mut watch = client.watch(Query::all().group(group("g")));
    assert!(matches!(&watch.next(SOON).unwrap()[..], [Change::Came(listed)] if listed.worker == at(1, 7001)));
    assert_eq!(soon_told(&mut watch, Duration::from_millis(100)), []);

    // It starts elsewhere under its name and with its rank, while the old one is still there.
    let (moved, heard) = thread::scope(|scope| {
        let hearing = scope.spawn(|| (watch.next(SOON).unwrap(), Instant::now()));
        thread::sleep(Duration::from_millis(50));
        client.register(&at(2, 7002)).unwrap();
        let registered = Instant::now();
        let (moved, heard) = hearing.join().unwrap();
        (moved, heard.saturating_duration_since(registered))
    });
    match &moved[..] {
        [Change::Moved { from, to }] => assert_eq!((&from.worker, &to.worker), (&at(1, 7001), &at(2, 7002))),
        other => panic!("{other:?}"),
    }
    assert!(heard < Duration::from_secs(10), "{heard:?}");
    eventually("the old one is told", || matches!(old.status(), Status::Replaced { .. }));
    let stale = client.renew(&at(1, 7001).node, Incarnation::new(1)).unwrap_err();
    assert_eq!(stale.code(), Some(ErrorCode::StaleIncarnation));
    // In the same start, too: its host has another address now.
    assert_eq!(client.register(&at(2, 7003)).unwrap(), Registered::Updated);
    assert!(matches!(&watch.next(SOON).unwrap()[..], [Change::Moved { to, .. }] if to.worker == at(2, 7003)));
    // It is gone without a word.
    assert!(matches!(&watch.next(SOON).unwrap()[..], [Change::Left(listed)] if listed.worker == at(2, 7003)));
}

pub fn a_group_starts_all_at_once(home: &mut Home) {
    const RANKS: u32 = 24;
    let client = &home.client();
    let began = Instant::now();
    thread::scope(|scope| {
        let shape = topology(RANKS);
        for rank in 0..RANKS {
            let member = member("g", &shape, Ranks::tp(rank));
            scope.spawn(move || {
                let worker = Worker { member, ..worker(&format!("w{rank}"), rank.into()) };
                let registration = Registration::start(client.clone(), worker).unwrap();
                registration.wait(SOON).unwrap();
                let complete = client.wait_for_group(&group("g"), Counted::Ready, SOON).unwrap();
                assert_eq!(complete.ready, RANKS);
                // Nobody leaves before everybody has seen the others.
                client.register(&crate::cases::worker(&format!("seen{rank}"), 1)).unwrap();
                let all = 2 * RANKS as usize;
                client.wait_for(&Query::all(), all, SOON).unwrap();
                std::mem::forget(registration);
            });
        }
    });
    println!("a group of {RANKS} was complete, and all of it seen, after {:?}", began.elapsed());
}

pub fn of_two_that_want_the_same_ranks_one_gets_them(home: &mut Home) {
    let client = &home.client();
    for round in 0..8 {
        let name = format!("g{round}");
        let outcomes: Vec<Result<Registered, Error>> = thread::scope(|scope| {
            let racing = (0..4u32).map(|index| {
                // Two for each of two ranks, and two topologies.
                let shape = Topology { page_tokens: 16 + index / 2, ..topology(2) };
                let member = member(&name, &shape, Ranks::tp(index % 2));
                let worker = Worker { member, ..worker(&format!("{name}-{index}"), 1) };
                scope.spawn(move || client.register(&worker))
            });
            racing.collect::<Vec<_>>().into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let won: Vec<usize> = (0..4).filter(|index| outcomes[*index].is_ok()).collect();
        assert!(won == [0, 1] || won == [2, 3], "round {round}: {outcomes:?}");
        assert!(
            outcomes.iter().flat_map(|outcome| outcome.as_ref().err()).all(|error| error.code().is_some())
        );
        assert!(client.group(&group(&name), Counted::Ready).unwrap().complete);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Register(Box<Worker>),
    Renew(NodeId, Incarnation),
    Deregister(NodeId, Incarnation),
}

/// The registry's rules, without a network and without the passing of time, are what every registry answers by.
pub fn any_sequence_of_calls_is_answered_as_the_rules_say(home: &mut Home) {
    let config = Config { failure_persistence: None, ..Config::with_cases(12) };
    let result = TestRunner::new(config).run(&proptest::collection::vec(any_step(), 1..40), |steps| {
        let elsewhere = home.elsewhere();
        let client = &elsewhere.client;
        let mut rules = Registry::new(limits());
        for step in steps {
            let now = Duration::ZERO;
            let (answer, expected) = match &step {
                Step::Register(worker) => {
                    let expected = rules.register(now, (**worker).clone());
                    (client.register(worker).map(Some), expected.map(Some))
                }
                Step::Renew(node, incarnation) => {
                    let expected = rules.renew(now, node, *incarnation).map(|()| None);
                    (client.renew(node, *incarnation).map(|()| None), expected)
                }
                Step::Deregister(node, incarnation) => {
                    let expected = match rules.deregister(now, node, *incarnation) {
                        Err(Refusal::Unknown { .. }) => Ok(None),
                        done => done.map(|()| None),
                    };
                    (client.deregister(node, *incarnation).map(|()| None), expected)
                }
            };
            let told = |error: Error| match error {
                Error::Refused { problem, .. } => problem.message,
                other => panic!("{other}"),
            };
            prop_assert_eq!(
                answer.map_err(told),
                expected.map_err(|refusal| refusal.to_string()),
                "{:?}",
                step
            );
            prop_assert_eq!(
                plain(client.find(&Query::all()).unwrap()),
                plain(rules.find(now, &Query::all()))
            );
            let groups = client.groups(Counted::Ready).unwrap();
            prop_assert_eq!(groups, rules.groups(now, Counted::Ready));
        }
        Ok(())
    });
    result.unwrap();
}

fn plain(listed: Vec<Listed>) -> Vec<(Worker, State)> {
    listed.into_iter().map(|listed| (listed.worker, listed.state)).collect()
}

fn any_step() -> impl Strategy<Value = Step> {
    let node = || (0..4u32).prop_map(|index| NodeId::new(&format!("n{index}")).unwrap());
    let incarnation = || (0..4u64).prop_map(Incarnation::new);
    let place = ("[gh]", prop_oneof![4 => Just(3u32), 1 => Just(2)], 0..3u32);
    let place = place.prop_map(|(group, tp_size, rank)| {
        member(&group, &topology(tp_size), Ranks::tp(rank.min(tp_size - 1)))
    });
    let member = prop_oneof![1 => Just(None), 3 => place];
    let worker = (node(), incarnation(), member, prop_oneof![3 => Just(0), 1 => Just(60_000u64)], 0..2u16)
        .prop_map(|(node, incarnation, member, warm_up_ms, port)| {
            let address = format!("10.0.0.1:{}", 7000 + port).parse().unwrap();
            Worker { node, incarnation, member, warm_up_ms, address, ..worker("n", 0) }
        });
    prop_oneof![
        4 => worker.prop_map(|worker| Step::Register(Box::new(worker))),
        1 => (node(), incarnation()).prop_map(|(node, incarnation)| Step::Renew(node, incarnation)),
        1 => (node(), incarnation()).prop_map(|(node, incarnation)| Step::Deregister(node, incarnation)),
    ]
}
