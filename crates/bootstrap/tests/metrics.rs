//! What `/metrics` tells, read as Prometheus reads it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crossdock_bootstrap::{
    Client, ClientConfig, Counted, GroupId, Incarnation, Labels, Member, NodeId, Query, Ranks, Role,
    RoomPolicy, Server, ServerConfig, Tag, Topology, Worker,
};

#[test]
fn what_happens_is_counted_and_what_is_there_is_shown() {
    let mut config = ServerConfig::on("127.0.0.1:0".parse().unwrap());
    config.limits.ttl_ms = 50..=60_000;
    config.limits.rooms = 2;
    let server = Server::start(config).unwrap();
    let client = Client::new(ClientConfig::to(&server.address().to_string())).unwrap();
    let fresh = scrape(server.address());
    assert!(
        fresh.iter().filter(|(name, _)| name.contains("_total")).all(|(_, value)| *value == 0.0),
        "{fresh:?}"
    );

    let group = GroupId::new("g").unwrap();
    let p0 = worker("p0", 1, 0);
    client.register(&p0).unwrap();
    client.register(&p0).unwrap();
    client.renew(&p0.node, p0.incarnation).unwrap();
    client.register(&Worker { warm_up_ms: 60_000, ..worker("p1", 1, 1) }).unwrap();
    let moved = Worker { address: "10.0.0.2:7000".parse().unwrap(), ..worker("p0", 2, 0) };
    client.register(&moved).unwrap();
    client.renew(&p0.node, p0.incarnation).unwrap_err();
    client.register(&worker("p2", 1, 0)).unwrap_err();
    client.register(&worker("p2", 1, 2)).unwrap();
    client
        .register(&Worker { role: Role::named("encoder").unwrap(), member: None, ..worker("e", 1, 0) })
        .unwrap();
    client.deregister(&NodeId::new("e").unwrap(), Incarnation::new(1)).unwrap();
    client.register(&Worker { ttl_ms: 50, member: None, ..worker("short", 1, 0) }).unwrap();
    client
        .register(&Worker { role: Role::named("encoder").unwrap(), member: None, ..worker("e", 1, 0) })
        .unwrap();
    client.find(&Query::all()).unwrap();
    client.worker(&p0.node).unwrap();
    client.group(&group, Counted::Ready).unwrap();
    client.groups(Counted::Ready).unwrap();
    client.tell_rooms(&group, &[(1, 0), (2, 2)], Duration::from_secs(60)).unwrap();
    client.tell_rooms(&group, &[(3, 0)], Duration::from_secs(60)).unwrap_err();
    client.dp_ranks(&group, &[1, 2, 3]).unwrap();
    client.wait_for(&Query::all(), 1, Duration::from_secs(20)).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while client.worker(&NodeId::new("short").unwrap()).unwrap().is_some() {
        assert!(Instant::now() < end, "it does not expire");
    }

    let shown = scrape(server.address());
    for (sample, value) in [
        (r#"workers{role="prefill",state="ready"}"#, 2.0),
        (r#"workers{role="prefill",state="warming"}"#, 1.0),
        (r#"workers{role="decode",state="ready"}"#, 0.0),
        (r#"workers{role="other",state="ready"}"#, 1.0),
        (r#"groups{complete="false"}"#, 1.0),
        (r#"groups{complete="true"}"#, 0.0),
        ("rooms", 2.0),
        ("waiting", 0.0),
        (r#"registrations_total{outcome="created"}"#, 6.0),
        (r#"registrations_total{outcome="renewed"}"#, 2.0),
        (r#"registrations_total{outcome="replaced"}"#, 1.0),
        (r#"registrations_total{outcome="updated"}"#, 0.0),
        ("deregistrations_total", 1.0),
        ("expiries_total", 1.0),
        ("replacements_total", 1.0),
        ("moves_total", 1.0),
        ("rooms_told_total", 2.0),
        (r#"refusals_total{cause="stale_incarnation"}"#, 1.0),
        (r#"refusals_total{cause="rank_taken"}"#, 1.0),
        (r#"refusals_total{cause="rooms_full"}"#, 1.0),
        (r#"refusals_total{cause="unknown_worker"}"#, 1.0),
        (r#"refusals_total{cause="registry_full"}"#, 0.0),
        (r#"request_seconds_count{request="register"}"#, 9.0),
        (r#"request_seconds_count{request="workers"}"#, 1.0),
        (r#"request_seconds_count{request="group"}"#, 1.0),
        (r#"request_seconds_count{request="groups"}"#, 1.0),
        (r#"request_seconds_count{request="tell_rooms"}"#, 2.0),
        (r#"request_seconds_count{request="ask_rooms"}"#, 1.0),
        (r#"request_seconds_count{request="wait"}"#, 1.0),
        (r#"request_seconds_count{request="metrics"}"#, 1.0),
    ] {
        assert_eq!(shown.get(sample), Some(&value), "{sample} in {shown:#?}");
    }
    assert!(shown[r#"request_seconds_sum{request="register"}"#] > 0.0 && shown["uptime_seconds"] > 0.0);
    for (sample, before) in fresh.iter().filter(|(name, _)| name.contains("_total")) {
        assert!(shown[sample] >= *before, "{sample} falls");
    }
}

fn worker(node: &str, incarnation: u64, tp_rank: u32) -> Worker {
    let single = Topology::single(Tag::new("m").unwrap(), Tag::new("bf16").unwrap(), 64);
    let topology = Topology { tp_size: 3, dp_size: 3, rooms: RoomPolicy::Told, ..single };
    Worker {
        node: NodeId::new(node).unwrap(),
        incarnation: Incarnation::new(incarnation),
        role: Role::Prefill,
        address: "10.0.0.1:7000".parse().unwrap(),
        ttl_ms: 60_000,
        warm_up_ms: 0,
        member: Some(Member::new(GroupId::new("g").unwrap(), topology, Ranks::tp(tp_rank)).unwrap()),
        labels: Labels::none(),
    }
}

fn scrape(address: SocketAddr) -> BTreeMap<String, f64> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.to_ascii_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    parse(body)
}

/// Reads a page strictly: every sample belongs to a family that has a help and a type before it, no sample comes twice,
/// and histograms are cumulative, have an end at +Inf and agree with their counts.
fn parse(page: &str) -> BTreeMap<String, f64> {
    let (mut samples, mut family, mut help) = (BTreeMap::new(), None, None);
    let mut bucket: Option<(String, f64, f64)> = None;
    assert!(page.ends_with('\n'));
    for line in page.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = text.split_once(' ').map(|(name, _)| name.to_owned());
            continue;
        }
        if let Some(text) = line.strip_prefix("# TYPE ") {
            let (name, kind) = text.split_once(' ').expect("a type");
            assert_eq!(help.as_deref(), Some(name), "a type without a help");
            assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
            assert!(kind != "counter" || name.ends_with("_total"), "{line}");
            family = Some((name.to_owned(), kind.to_owned()));
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a sample and its value");
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        let (name, labels) = sample
            .split_once('{')
            .map_or((sample, ""), |(name, labels)| (name, labels.strip_suffix('}').expect("the labels end")));
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        for label in labels.split(',').filter(|label| !label.is_empty()) {
            let (key, is) = label.split_once('=').expect("a label and its value");
            assert!(key.bytes().all(|byte| byte.is_ascii_lowercase()), "{line}");
            let is = is.strip_prefix('"').and_then(|is| is.strip_suffix('"')).expect("quotes");
            assert!(!is.contains(['"', '\\']), "{line}");
        }
        let (of, kind) = family.as_ref().expect("a family");
        match (kind.as_str(), name.strip_prefix(of.as_str())) {
            ("counter" | "gauge", Some("")) => {}
            ("histogram", Some("_bucket")) => {
                let (rest, bound) = labels.rsplit_once("le=\"").expect("a bound");
                let bound = bound.trim_end_matches('"');
                let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() };
                if let Some((labels, before, count)) = &bucket
                    && labels == rest
                {
                    assert!(*before < bound && *count <= value, "{line}");
                }
                bucket = Some((rest.to_owned(), bound, value));
            }
            ("histogram", Some("_sum")) => {}
            ("histogram", Some("_count")) => {
                let (_, bound, count) = bucket.as_ref().expect("buckets before their count");
                assert!(bound.is_infinite() && *count == value, "{line}");
            }
            _ => panic!("{line} in family {of}"),
        }
        let short = sample.strip_prefix("crossdock_bootstrap_").expect("the prefix").to_owned();
        assert!(samples.insert(short, value).is_none(), "twice: {line}");
    }
    samples
}
