//! What an operator reads: sessions and rooms are logged with peer, port and cause, and errors have advice.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossdock::experts::{
    Bf16, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs, Payload, Rows, ScaleOrder, Tokens,
};
use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, Error, LayoutOptions, Node, NotTaken, Placement,
    PortConfig, Progress, ReceiveRequest, SendError, SendRequest,
};

const WAIT: Duration = Duration::from_secs(20);

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// A line that holds all of these.
    fn has(&self, words: &[&str]) -> bool {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().any(|line| words.iter().all(|word| line.contains(word)))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn config(name: &str) -> (Config, crossdock::PagePool) {
    let layout = CacheLayout::new(LayoutOptions {
        model: "tiny".into(),
        model_layers: 1,
        layers: 0..1,
        kind: CacheKind::Mla { latent_bytes: 512, rope_bytes: 64 },
        dtype: Dtype::Bf16,
        page_tokens: 16,
        pages: 16,
        placement: Placement::LayerMajor { region: 0 },
    })
    .unwrap();
    let (memory, pool) = crossdock::allocate(&layout).unwrap();
    let mut config = Config::new(name, layout, memory, Authentication::Off);
    config.ports = vec![PortConfig::Tcp(None)];
    config.progress = Progress::Caller;
    (config, pool)
}

#[test]
fn sessions_and_rooms_are_logged_with_peer_port_and_cause() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let ((config_p, pool_p), (config_d, pool_d)) = (config("prefill-3"), config("decode-5"));
        let mut prefill = Node::open(config_p).unwrap();
        let mut decode = Node::open(config_d).unwrap();
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (_, _up) = decode.handle().connect(nobody.as_str()).unwrap();
        let (peer, _up) = decode.handle().connect(prefill.address()).unwrap();
        let address = prefill.address().to_owned();
        let deadline = WAIT;
        let pages = pool_p.take(1).unwrap().share();
        let request = SendRequest { room: 71, use_count: 0, tokens: 10, pages, deadline };
        let mut sending = prefill.handle().open(request).unwrap();
        sending.send_layers(0..1).unwrap();
        sending.finish(Vec::new()).unwrap();
        let pages = pool_d.take(1).unwrap();
        let request =
            ReceiveRequest { peer, room: 71, use_count: 0, tokens: 10, skip_tokens: 0, pages, deadline };
        let mut receiving = decode.handle().receive(request).unwrap();
        let begin = Instant::now();
        let (mut received, mut sent) = (None, None);
        while received.is_none() || sent.is_none() || !log.has(&["session down", &nobody]) {
            prefill.progress();
            decode.progress();
            received = received.or(receiving.end.poll().ok().flatten());
            sent = sent.or(sending.end.poll().ok().flatten());
            assert!(begin.elapsed() < WAIT, "{}", log.text());
        }
        drop(prefill);
        while !log.has(&["session down", "prefill-3"]) {
            decode.progress();
            assert!(begin.elapsed() < WAIT, "{}", log.text());
        }
        let lines: [&[&str]; 6] = [
            &["session up", "peer=\"prefill-3\"", "port=\"tcp\""],
            &["session down: unreachable: connect: Connection refused", &nobody],
            &["session down: closed by the peer", "peer=\"prefill-3\"", "port=\"tcp\"", &address],
            &["role=\"receive\"", "room=71", "peer=\"prefill-3\"", "port=\"tcp\"", "delivered"],
            &["role=\"send\"", "room=71", "peer=\"decode-5\"", "port=\"tcp\"", "start"],
            &["role=\"send\"", "room=71", "peer=\"decode-5\"", "port=\"tcp\"", "delivered"],
        ];
        for line in lines {
            assert!(log.has(line), "no line with {line:?} in\n{}", log.text());
        }
    });
}

/// A step of a rank that the others may not take: its tokens go to every rank.
fn step(group: &mut Group) -> Result<Vec<u32>, EpError> {
    let (ranks, hidden) = (group.config().ranks(), group.config().hidden as usize);
    let (rows, choices): (Vec<Bf16>, Vec<i64>) =
        (vec![Bf16::from_f32(1.0); hidden], (0..ranks.into()).collect());
    let mut outputs = LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
    drop(group.slot(0).dispatch(&tokens)?.latency(&mut outputs)?);
    Ok(group.masked())
}

#[test]
fn why_a_rank_is_masked_is_logged() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let config = GroupConfig {
            max_tokens: vec![1; 3],
            experts: 3,
            top_k: 3,
            hidden: 128,
            payload: Payload::Bf16,
            slots: 1,
            placement_version: 0,
        };
        let short = Duration::from_millis(300);
        let options = GroupOptions { deadline: short, warm_up: short, ..GroupOptions::default() };
        let mut groups = Group::in_process(&config, &options).unwrap();
        // The last one has left, the middle one neither calls nor waits.
        drop(groups.pop());
        assert_eq!(step(&mut groups[0]).unwrap(), [1, 2]);
        let lines: [&[&str]; 2] = [
            &["WARN", "rank=1", "by=0", "it neither made its call nor waited itself for 300ms"],
            &["INFO", "rank=2", "by=0", "it has left the group"],
        ];
        for line in lines {
            assert!(log.has(line), "no line with {line:?} in\n{}", log.text());
        }
        // It comes too late, and hears from the first one that it is out; that one it does not mask.
        let out = step(&mut groups[1]);
        assert!(matches!(out, Err(EpError::Masked { by: 0 })), "{out:?}");
        assert!(!log.has(&["masked:", "rank=0"]), "{}", log.text());
    });
}

#[test]
fn errors_say_whether_to_try_again_and_what_to_do() {
    let (first, _pool) = config("one");
    let node = Node::open(first).unwrap();
    let (mut second, _pool) = config("two");
    second.bind = node.address().parse().unwrap();
    let error = Node::open(second).unwrap_err();
    assert!(error.is_retryable() && error.advice().contains("port"), "{error}: {}", error.advice());
    let (mut third, _pool) = config("three");
    third.ports.clear();
    let error = Node::open(third).unwrap_err();
    assert!(matches!(error, Error::NoPort) && !error.is_retryable(), "{error}");
    assert!(NotTaken::Busy.is_retryable() && !NotTaken::Stopped.is_retryable());
    assert!(SendError::from(NotTaken::Busy).is_retryable() && !SendError::Finished.is_retryable());
    assert!(SendError::Finished.advice().contains("another room"));
}
