//! What a group takes that does nothing. A program of its own: what other tests take is not counted.

use std::thread;
use std::time::Duration;

use crossdock::experts::{
    Bf16, Group, GroupConfig, LatencyOutputs, Meeting, MeetingConfig, Payload, Rows, ScaleOrder, Tokens,
};
use crossdock::{Authentication, PortConfig};

/// The ranks of a group meet, over tcp alone.
fn meet(config: &GroupConfig) -> Vec<Group> {
    let meetings: Vec<Meeting> = (0..config.ranks())
        .map(|rank| {
            let auth = Authentication::PreSharedKey(b"of these tests only".to_vec());
            let mut meeting = MeetingConfig::new(config.clone(), rank, auth);
            meeting.ports = vec![PortConfig::Tcp(None)];
            Meeting::open(meeting).unwrap()
        })
        .collect();
    let addresses: Vec<String> = meetings.iter().map(|meeting| meeting.address().to_owned()).collect();
    thread::scope(|scope| {
        let meet = |meeting: Meeting| {
            let addresses = &addresses;
            scope.spawn(move || meeting.meet(addresses, Duration::from_secs(60)).unwrap())
        };
        let threads: Vec<_> = meetings.into_iter().map(meet).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The thread that keeps in touch sleeps while nobody asks anything of it, also after a long wait.
#[test]
fn a_group_that_does_nothing_takes_no_time() {
    let config = GroupConfig {
        max_tokens: vec![4; 2],
        experts: 2,
        top_k: 1,
        hidden: 128,
        payload: Payload::Bf16,
        slots: 2,
        placement_version: 7,
    };
    let groups = meet(&config);
    let groups: Vec<Group> = thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .into_iter()
            .map(|mut group| {
                scope.spawn(move || {
                    // The other waits for long, and says that it does.
                    thread::sleep(Duration::from_millis(300) * group.rank());
                    let choices = [0, 1];
                    let rows = vec![Bf16::from_f32(1.0); 2 * 128];
                    let mut outputs = LatencyOutputs::new(&group, Payload::Bf16, ScaleOrder::ByRow);
                    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
                    let slot = group.slot(0);
                    let step = slot.dispatch(&tokens).unwrap().latency(&mut outputs).unwrap();
                    step.combine().receive(&[1.0, 1.0], &mut rows.clone()).unwrap();
                    group
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    // Of the threads that keep in touch.
    let ticks = || -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let of_task = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
            let (name, rest) = stat.rsplit_once(')')?;
            let mut fields = rest.split_whitespace().skip(11);
            let mut next = || fields.next()?.parse::<u64>().ok();
            name.ends_with("(crossdock-ep").then_some(next()? + next()?)
        };
        tasks.filter_map(of_task).sum()
    };
    // Whoever spins takes all of a hundred ticks a second; here there are two who would.
    let spent = (0..5).map(|_| {
        let before = ticks();
        thread::sleep(Duration::from_millis(400));
        ticks().saturating_sub(before)
    });
    let least = spent.min().unwrap();
    assert!(least < 20, "{least} ticks in 400 ms");
    drop(groups);
}
