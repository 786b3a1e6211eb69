//! Where the ranks run: each in a process of its own, or all as threads of this one.
//!
//! What a launcher does in a deployment is done here over standard input and output: each process is told its rank and the
//! key, tells where it can be dialed, and is told where the others are. A registry can do that too:
//! `Meeting::meet_at` in the place of `meet`.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crossdock::Authentication;
use crossdock::experts::{Group, Meeting, MeetingConfig};
use serde::{Deserialize, Serialize};

use crate::{Job, Problem, Told, group_config, group_options, run};

/// All ranks are threads, and map each other's memory without having to meet.
pub fn threads(job: &Job) -> Result<Vec<Vec<Told>>, Problem> {
    let groups = Group::in_process(&group_config(job), &group_options())?;
    std::thread::scope(|scope| {
        let rank = |group| {
            scope.spawn(move || {
                let mut told = Vec::new();
                let run = run(job, group, |layer| {
                    told.push(layer);
                    Ok(())
                });
                // Whoever dies in the middle leaves the group here.
                run.map(|_group| told)
            })
        };
        let ranks: Vec<_> = groups.into_iter().map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().map_err(|_| "a rank panicked")?).collect()
    })
}

/// Whether this process was started as a rank.
pub fn is_rank() -> bool {
    std::env::var_os(IS_RANK).is_some()
}

/// One rank, in a process of its own.
pub fn work() -> Result<(), Problem> {
    let mut lines = std::io::stdin().lock().lines();
    let mut hear = || -> Result<String, Problem> { Ok(lines.next().ok_or("the launcher is gone")??) };
    // The key comes over standard input: everybody can see a process's arguments.
    let Begin { job, rank, key } = serde_json::from_str(&hear()?)?;
    let key = Authentication::PreSharedKey(key.to_vec());
    let mut config = MeetingConfig::new(group_config(&job), rank, key);
    config.options = group_options();
    let meeting = Meeting::open(config)?;
    say(&Said::Address(meeting.address().to_owned()))?;
    let addresses: Vec<String> = serde_json::from_str(&hear()?)?;
    let group = meeting.meet(&addresses, PATIENCE)?;
    let group = run(&job, group, |layer| say(&Said::Layer(layer)))?;
    if job.kill == Some(rank) {
        // Here it is killed, with its end of the group as it is.
        hear()?;
    }
    drop(group);
    Ok(())
}

/// Starts this program once for each rank, and hears what they tell.
pub fn processes(job: &Job) -> Result<Vec<Vec<Told>>, Problem> {
    let mut key = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
    let (say, heard) = channel();
    let mut launched = Launched { ranks: Vec::new(), heard };
    for rank in 0..job.ranks {
        launched.ranks.push(start(rank, say.clone())?);
        launched.tell(rank, &Begin { job: job.clone(), rank, key })?;
    }
    let mut addresses = vec![String::new(); job.ranks as usize];
    for _ in 0..job.ranks {
        match launched.hear()? {
            (rank, Some(Said::Address(address))) => addresses[rank as usize] = address,
            (rank, _) => return Err(format!("rank {rank} has ended before the ranks met").into()),
        }
    }
    (0..job.ranks).try_for_each(|rank| launched.tell(rank, &addresses))?;
    let mut told: Vec<Vec<Told>> = (0..job.ranks).map(|_| Vec::new()).collect();
    let all = |rank: u32| (job.steps_of(rank) * job.layers) as usize;
    let mut running = job.ranks;
    while running > 0 {
        let (rank, said) = launched.hear()?;
        let of_rank = &mut told[rank as usize];
        match said {
            Some(Said::Layer(layer)) => {
                of_rank.push(layer);
                if job.kill == Some(rank) && of_rank.len() == all(rank) {
                    launched.ranks[rank as usize].kill()?;
                }
            }
            None if of_rank.len() == all(rank) => running -= 1,
            _ => return Err(format!("rank {rank} has ended early").into()),
        }
    }
    Ok(told)
}

/// A rank is told who it is, and then the addresses of all.
#[derive(Serialize, Deserialize)]
struct Begin {
    job: Job,
    rank: u32,
    key: [u8; 32],
}

#[derive(Serialize, Deserialize)]
enum Said {
    /// Where it can be dialed.
    Address(String),
    /// A layer is over.
    Layer(Told),
}

struct Launched {
    ranks: Vec<Child>,
    /// By rank; nothing when its output has ended.
    heard: Receiver<(u32, Option<Said>)>,
}

impl Launched {
    fn tell(&mut self, rank: u32, what: &impl Serialize) -> Result<(), Problem> {
        let input = self.ranks[rank as usize].stdin.as_mut().ok_or("a rank without an input")?;
        Ok(writeln!(input, "{}", serde_json::to_string(what)?)?)
    }

    fn hear(&self) -> Result<(u32, Option<Said>), Problem> {
        Ok(self.heard.recv_timeout(2 * PATIENCE)?)
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            // Both fail only where it has ended and was waited for.
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

/// Starts one, with a thread that reads what it says: a rank whose pipe is full would keep the others waiting.
fn start(rank: u32, say: Sender<(u32, Option<Said>)>) -> Result<Child, Problem> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(AS_RANK)
        .env(IS_RANK, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().ok_or("a rank without an output")?;
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            // A test harness says things of its own.
            if let Ok(said) = serde_json::from_str(&line) {
                let _ = say.send((rank, Some(said)));
            }
        }
        let _ = say.send((rank, None));
    });
    Ok(child)
}

fn say(what: &Said) -> Result<(), Problem> {
    Ok(writeln!(std::io::stdout(), "{}", serde_json::to_string(what)?)?)
}

const IS_RANK: &str = "CROSSDOCK_MOE_IS_RANK";
/// What this program has to be told to become a rank; the tests are another program.
const AS_RANK: &[&str] =
    if cfg!(test) { &["--exact", "tests::as_rank", "--nocapture", "--quiet"] } else { &[] };
/// How long the ranks may take to meet, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
