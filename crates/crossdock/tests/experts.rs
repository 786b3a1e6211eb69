//! Ranks in processes of their own meet, exchange tokens, and live on when one of them is killed or stopped.
//!
//! The test binary runs itself once for each rank.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use crossdock::experts::{
    Bf16, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs, MeetError, Meeting, MeetingConfig,
    Payload, Rows, ScaleOrder, Tokens,
};
use crossdock::{Authentication, PortConfig, ShmOptions};

const HIDDEN: usize = 256;
const TOKENS: usize = 16;
const TOP_K: usize = 2;

fn group(ranks: usize) -> GroupConfig {
    GroupConfig {
        max_tokens: vec![TOKENS as u32; ranks],
        experts: 2 * ranks as u32,
        top_k: TOP_K as u32,
        hidden: HIDDEN as u32,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

/// As if so many hosts had as many ranks each: only tcp reaches from one to the other.
fn config_on(ranks: usize, rank: u32, nodes: u32) -> MeetingConfig {
    let domain = format!("node {}", rank / (ranks as u32 / nodes));
    let shm = ShmOptions { domain, ..ShmOptions::default() };
    MeetingConfig { ports: vec![PortConfig::Shm(shm), PortConfig::Tcp(None)], ..config(ranks, rank) }
}

fn config(ranks: usize, rank: u32) -> MeetingConfig {
    let mut config =
        MeetingConfig::new(group(ranks), rank, Authentication::PreSharedKey(b"of these tests only".to_vec()));
    // Five seconds of silence: on a busy machine the living are heard of within that.
    (config.heartbeat_grace, config.heartbeats_missed) = (Duration::ZERO, 25);
    config.options = GroupOptions {
        deadline: Duration::from_secs(60),
        warm_up: Duration::from_secs(60),
        ..GroupOptions::default()
    };
    config
}

/// One step: every token chooses one expert of `(token) % ranks` and one of the next rank; experts double.
fn step(group: &mut Group, value: f32) -> Result<Vec<Bf16>, EpError> {
    let ranks = group.config().ranks() as i64;
    let choices: Vec<i64> =
        (0..TOKENS as i64).flat_map(|t| [2 * (t % ranks), 2 * ((t + 1) % ranks) + 1]).collect();
    let rows = vec![Bf16::from_f32(value); TOKENS * HIDDEN];
    let mut outputs = LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
    let mut step = group.slot(0).dispatch(&tokens)?.latency(&mut outputs)?;
    for expert in 0..outputs.counts().len() {
        for (row, result) in step.results_mut(expert).chunks_mut(HIDDEN).enumerate() {
            for (bytes, result) in outputs.row(expert, row).chunks(2).zip(result) {
                let value = Bf16::from_bits(u16::from_le_bytes(bytes.try_into().unwrap()));
                *result = Bf16::from_f32(2.0 * value.to_f32());
            }
        }
    }
    let mut out = rows.clone();
    step.combine().receive(&[0.5; TOKENS * TOP_K], &mut out)?;
    Ok(out)
}

/// What a step gives where some ranks are dead.
fn expected(ranks: usize, value: f32, dead: &[u32]) -> Vec<Bf16> {
    let token = |t: usize| {
        let answers =
            [t % ranks, (t + 1) % ranks].iter().filter(|rank| !dead.contains(&(**rank as u32))).count();
        vec![Bf16::from_f32(value * answers as f32); HIDDEN]
    };
    (0..TOKENS).flat_map(token).collect()
}

/// One rank, which answers to lines: what [`Ranks`] runs.
#[test]
fn child() {
    let Ok(args) = std::env::var("CROSSDOCK_EXPERTS_CHILD") else { return };
    let mut args = args.split('/');
    let mut next = || args.next().unwrap();
    let (rank, ranks, nodes) = (next().parse().unwrap(), next().parse().unwrap(), next().parse().unwrap());
    let bind = next().parse().unwrap();
    let meeting = Meeting::open(MeetingConfig { bind, ..config_on(ranks, rank, nodes) }).unwrap();
    let mut lines = std::io::stdin().lock().lines().map(Result::unwrap);
    let mut said = std::io::stderr().lock();
    writeln!(said, "address {}", meeting.address()).unwrap();
    let addresses: Vec<String> = lines.next().unwrap().split(' ').map(str::to_owned).collect();
    let mut group = meeting.meet(&addresses, Duration::from_secs(60)).unwrap();
    writeln!(said, "met").unwrap();
    for line in lines {
        let mut words = line.split(' ');
        let steps: u32 = words.next().unwrap().parse().unwrap();
        let dead: Vec<u32> = words.map(|word| word.parse().unwrap()).collect();
        for at in 0..steps {
            let value = (rank * 100 + at % 64) as f32;
            match step(&mut group, value) {
                Ok(out) => {
                    let now = group.masked();
                    // A step in which a rank dies may still have had its answers, or not.
                    let possible = [&dead[..], &now[..], &[]].map(|dead| expected(ranks, value, dead));
                    assert!(possible.contains(&out), "step {at} of rank {rank}, {now:?} masked");
                }
                Err(EpError::Masked { by }) => {
                    writeln!(said, "masked by {by}").unwrap();
                    return;
                }
                Err(error) => panic!("{error}"),
            }
        }
        writeln!(said, "done {:?}", group.masked()).unwrap();
    }
}

struct Ranks(Vec<Rank>);

struct Rank {
    child: Child,
    asks: ChildStdin,
    says: BufReader<std::process::ChildStderr>,
    _out: ChildStdout,
}

impl Ranks {
    fn start(ranks: usize) -> Ranks {
        Ranks::on(ranks, 1)
    }

    fn on(ranks: usize, nodes: usize) -> Ranks {
        let mut all = Ranks((0..ranks).map(|rank| Rank::start(rank, ranks, nodes)).collect());
        let addresses: Vec<String> = all.0.iter_mut().map(Rank::hear_address).collect();
        all.ask(&addresses.join(" "));
        all.0.iter_mut().for_each(|rank| drop(rank.hear("met")));
        all
    }

    fn ask(&mut self, line: &str) {
        self.0.iter_mut().for_each(|rank| rank.ask(line));
    }
}

impl Rank {
    fn start(rank: usize, ranks: usize, nodes: usize) -> Rank {
        Rank::start_at(rank, ranks, nodes, "127.0.0.1:0")
    }

    fn start_at(rank: usize, ranks: usize, nodes: usize, bind: &str) -> Rank {
        // Under emulation the emulator is started, with its options.
        let runner = std::env::var("CROSSDOCK_TEST_RUNNER").unwrap_or_default();
        let this = std::env::current_exe().unwrap();
        let mut words = runner.split_whitespace();
        let mut command = match words.next() {
            None => Command::new(this),
            Some(emulator) => {
                let mut command = Command::new(emulator);
                command.args(words).arg(this);
                command
            }
        };
        command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
        command.env("CROSSDOCK_EXPERTS_CHILD", format!("{rank}/{ranks}/{nodes}/{bind}"));
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (asks, says) = (child.stdin.take().unwrap(), BufReader::new(child.stderr.take().unwrap()));
        let out = child.stdout.take().unwrap();
        Rank { child, asks, says, _out: out }
    }

    fn ask(&mut self, line: &str) {
        // One that is dead does not hear.
        let _ = writeln!(self.asks, "{line}");
    }

    /// The next line that begins so; panics with all others if it ends.
    fn hear(&mut self, begin: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            if self.says.read_line(&mut line).unwrap() == 0 {
                panic!("a rank ended; it said: {all}");
            }
            if line.starts_with(begin) {
                return line.trim_end().to_owned();
            }
            all += &line;
        }
    }

    fn hear_address(&mut self) -> String {
        self.hear("address ").split_once(' ').unwrap().1.to_owned()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Those that are stopped die too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ranks_of_several_processes_exchange_tokens() {
    let mut ranks = Ranks::start(4);
    ranks.ask("50");
    for rank in &mut ranks.0 {
        assert_eq!(rank.hear("done"), "done []");
    }
}

#[test]
fn ranks_on_two_nodes_exchange_tokens() {
    let mut ranks = Ranks::on(4, 2);
    ranks.ask("50");
    for rank in &mut ranks.0 {
        assert_eq!(rank.hear("done"), "done []");
    }
}

#[test]
fn the_others_go_on_when_a_rank_is_killed() {
    for round in 0..4 {
        // On one node, then on two.
        let mut ranks = Ranks::on(4, 1 + round as usize % 2);
        ranks.ask(if round % 2 == 0 { "800 2" } else { "200 2" });
        std::thread::sleep(Duration::from_millis(5 + 15 * round));
        let begun = Instant::now();
        ranks.0[2].signal(rustix::process::Signal::KILL);
        for at in [0, 1, 3] {
            assert_eq!(ranks.0[at].hear("done"), "done [2]");
        }
        // Far from the deadline of a minute: the end of the process was noticed.
        assert!(begun.elapsed() < Duration::from_secs(55), "{:?}", begun.elapsed());
    }
}

#[test]
fn a_rank_that_is_stopped_is_masked_and_told_so_when_it_goes_on() {
    // On one node, then each on its own.
    for nodes in [1, 3] {
        let mut ranks = Ranks::on(3, nodes);
        ranks.ask("3");
        ranks.0.iter_mut().for_each(|rank| drop(rank.hear("done []")));
        ranks.ask(if nodes == 1 { "800 1" } else { "200 1" });
        std::thread::sleep(Duration::from_millis(15));
        ranks.0[1].signal(rustix::process::Signal::STOP);
        for at in [0, 2] {
            assert_eq!(ranks.0[at].hear("done"), "done [1]");
        }
        ranks.0[1].signal(rustix::process::Signal::CONT);
        // Over ports it hears that the sessions are over, which is all that it can know of the others.
        ranks.0[1].hear(if nodes == 1 { "masked by" } else { "done [0, 2]" });
    }
}

#[test]
fn ranks_that_do_not_agree_refuse_each_other_in_words() {
    let other = {
        let mut other = config(2, 0);
        other.group.hidden = 512;
        Meeting::open(other).unwrap()
    };
    let meeting = Meeting::open(config(2, 1)).unwrap();
    let addresses = [other.address().to_owned(), meeting.address().to_owned()];
    let theirs = addresses.clone();
    let waiting = std::thread::spawn(move || other.meet(&theirs, Duration::from_secs(8)));
    let refused = meeting.meet(&addresses, Duration::from_secs(30)).unwrap_err();
    assert!(matches!(refused, MeetError::Refused { rank: 0, .. }), "{refused:?}");
    assert!(refused.to_string().contains("experts.hidden 256 here, 512 there"), "{refused}");
    let late = waiting.join().unwrap().unwrap_err();
    assert!(late.to_string().starts_with("ranks [1] were not met within 8000 ms"), "{late}");
}

#[test]
fn a_rank_that_nobody_joins_says_who_is_missing() {
    let meeting = Meeting::open(config(3, 1)).unwrap();
    let own = meeting.address().to_owned();
    let addresses = ["127.0.0.1:9".to_owned(), own.clone(), own];
    let late = meeting.meet(&addresses, Duration::from_millis(300)).unwrap_err();
    assert!(late.to_string().contains("ranks [0, 2] were not met"), "{late}");
    let alone = Meeting::open(config(1, 0)).unwrap();
    let addresses = [alone.address().to_owned()];
    let mut group = alone.meet(&addresses, Duration::from_secs(10)).unwrap();
    assert_eq!(step(&mut group, 3.0).unwrap(), expected(1, 3.0, &[]));
}

/// It is killed at any time of a meeting that lacks a rank, and starts again at its address, until all are there.
#[test]
fn a_rank_that_is_killed_while_the_group_meets_may_start_again() {
    // On one node, then each on its own.
    for nodes in [1, 3] {
        let mut others = [Rank::start(0, 3, nodes), Rank::start(1, 3, nodes)];
        let last = Meeting::open(config_on(3, 2, nodes as u32)).unwrap();
        let [first, second] = others.each_mut().map(Rank::hear_address);
        let addresses = [first, second.clone(), last.address().to_owned()];
        others.iter_mut().for_each(|rank| rank.ask(&addresses.join(" ")));
        for time in [10, 150, 600] {
            std::thread::sleep(Duration::from_millis(time));
            others[1].signal(rustix::process::Signal::KILL);
            others[1].child.wait().unwrap();
            others[1] = Rank::start_at(1, 3, nodes, &second);
            assert_eq!(others[1].hear_address(), second);
            others[1].ask(&addresses.join(" "));
        }
        let mut group = last.meet(&addresses, Duration::from_secs(60)).unwrap();
        others.iter_mut().for_each(|rank| {
            rank.hear("met");
            rank.ask("20");
        });
        for at in 0..20 {
            assert_eq!(step(&mut group, at as f32).unwrap(), expected(3, at as f32, &[]));
        }
        others.iter_mut().for_each(|rank| drop(rank.hear("done []")));
    }
}

/// It gives up, having met some, and comes back.
#[test]
fn a_rank_that_gave_up_meeting_is_met_when_it_tries_again() {
    let open = |rank, bind: &str| {
        Meeting::open(MeetingConfig { bind: bind.parse().unwrap(), ..config(3, rank) }).unwrap()
    };
    let meetings = [0, 1, 2].map(|rank| open(rank, "127.0.0.1:0"));
    let addresses = [0, 1, 2].map(|rank: usize| meetings[rank].address().to_owned());
    let [first, mut again, last] = meetings;
    let minute = Duration::from_secs(60);
    let run = |meeting: Meeting| {
        let mut group = meeting.meet(&addresses, minute).unwrap();
        for at in 0..5 {
            assert_eq!(step(&mut group, at as f32).unwrap(), expected(3, at as f32, &[]));
        }
    };
    std::thread::scope(|scope| {
        let run = &run;
        scope.spawn(move || run(first));
        let mut time = Duration::from_millis(200);
        loop {
            let late = again.meet(&addresses, time).unwrap_err();
            again = open(1, &addresses[1]);
            let MeetError::Late { missing, .. } = late else { panic!("{late:?}") };
            // It has met the first, and the last does not want to meet anybody yet.
            if missing == [2] {
                break;
            }
            assert_eq!(missing, [0, 2]);
            assert!(time < minute, "the first was not met");
            time *= 2;
        }
        scope.spawn(move || run(again));
        scope.spawn(move || run(last));
    });
}

#[test]
fn a_rank_that_starts_again_in_a_complete_group_is_refused_and_the_group_goes_on() {
    let meetings = [0, 1].map(|rank| Meeting::open(config(2, rank)).unwrap());
    let addresses = [0, 1].map(|rank: usize| meetings[rank].address().to_owned());
    std::thread::scope(|scope| {
        let (met, all_met) = std::sync::mpsc::channel();
        let go_on = meetings.map(|meeting| {
            let (addresses, met) = (&addresses, met.clone());
            let (go_on, told) = std::sync::mpsc::channel();
            scope.spawn(move || {
                let mut group = meeting.meet(addresses, Duration::from_secs(60)).unwrap();
                met.send(()).unwrap();
                // While the other start tries, and after it.
                for at in 0..200 {
                    if at == 100 {
                        told.recv().unwrap();
                    }
                    let value = (at % 50) as f32;
                    assert_eq!(step(&mut group, value).unwrap(), expected(2, value, &[]));
                }
                assert!(group.masked().is_empty());
            });
            go_on
        });
        (0..2).for_each(|_| all_met.recv().unwrap());
        let again = Meeting::open(config(2, 1)).unwrap();
        let own = [addresses[0].clone(), again.address().to_owned()];
        let late = again.meet(&own, Duration::from_secs(3)).map(drop).unwrap_err();
        go_on.iter().for_each(|go_on| go_on.send(()).unwrap());
        assert!(matches!(&late, MeetError::Late { missing, .. } if missing == &[0]), "{late:?}");
    });
}

#[cfg(feature = "bootstrap")]
#[test]
fn ranks_meet_through_a_registry() {
    use crossdock::bootstrap::{Client, ClientConfig, Server, ServerConfig};
    let server = Server::start(ServerConfig::on("127.0.0.1:0".parse().unwrap())).unwrap();
    let client = Client::new(ClientConfig::to(&server.address().to_string())).unwrap();
    std::thread::scope(|scope| {
        let rank = |rank| {
            let client = client.clone();
            scope.spawn(move || {
                let meeting = Meeting::open(config(3, rank)).unwrap();
                let mut met = meeting.meet_at(&client, "moe", Duration::from_secs(30)).unwrap();
                for at in 0..5 {
                    assert_eq!(step(&mut met.group, at as f32).unwrap(), expected(3, at as f32, &[]));
                }
            })
        };
        let all: Vec<_> = (0..3).map(rank).collect();
        all.into_iter().for_each(|rank| rank.join().unwrap());
    });
}

/// What a crashed rank leaves in the registry holds until its time is over, and its next start takes its place at once.
#[cfg(feature = "bootstrap")]
#[test]
fn a_rank_that_starts_again_takes_the_place_that_it_had_in_the_registry() {
    use crossdock::bootstrap::{
        Address, Client, ClientConfig, Incarnation, Labels, NodeId, Query, Role, Server, ServerConfig, Worker,
    };
    let server = Server::start(ServerConfig::on("127.0.0.1:0".parse().unwrap())).unwrap();
    let client = Client::new(ClientConfig::to(&server.address().to_string())).unwrap();
    let nowhere = "127.0.0.1:9".parse().unwrap();
    // One that others dial, and one that dials all others.
    for (group, crashed) in [("first", 0), ("last", 2)] {
        let role = Role::named("experts").unwrap();
        let labels = Labels::none().with("experts-group", group).unwrap();
        let left = Worker {
            node: NodeId::new(&format!("{group}.experts.{crashed}")).unwrap(),
            incarnation: Incarnation::new(7),
            role: role.clone(),
            address: Address::new(nowhere).unwrap(),
            ttl_ms: 60_000,
            warm_up_ms: 0,
            member: None,
            labels: labels.with("experts-rank", &crashed.to_string()).unwrap(),
        };
        client.register(&left).unwrap();
        std::thread::scope(|scope| {
            let start = |rank| {
                let client = &client;
                scope.spawn(move || {
                    let meeting = Meeting::open(config(3, rank)).unwrap();
                    let mut met = meeting.meet_at(client, group, Duration::from_secs(60)).unwrap();
                    for at in 0..5 {
                        assert_eq!(step(&mut met.group, at as f32).unwrap(), expected(3, at as f32, &[]));
                    }
                });
            };
            let is_listed = |rank: u32| {
                let query = Query::all().role(role.clone()).label("experts-group", group).unwrap();
                let listed = client.find(&query).unwrap();
                listed.iter().any(|listed| {
                    listed.worker.labels.value("experts-rank") == Some(&rank.to_string())
                        && listed.worker.address.socket() != nowhere
                })
            };
            start(crashed);
            while !is_listed(crashed) {
                std::thread::sleep(Duration::from_millis(10));
            }
            (0..3).filter(|rank| *rank != crashed).for_each(start);
        });
    }
}
