//! A small inference engine whose prefill and decode are apart, on crossdock's public API alone.
//!
//! ```sh
//! cargo run --release -p crossdock-examples --example engine
//! ```
//!
//! Two prefill ranks (tensor parallelism: each keeps half of the KV heads, in pages of 16 tokens) compute the prompts;
//! one decode rank (all heads, pages of 8 tokens) continues them. Between them go the keys and values, layer by layer. Both
//! sides keep the prefixes of prompts, so that what is known is neither computed nor sent again. One user hangs up, and one
//! request is too late. In the end every answer is compared with that of the same model run in one place.
//!
//! The router is this file. Read on in `prefill.rs` and `decode.rs`, which open the rooms; `cache.rs` has what both need:
//! layout, memory, node. `model.rs` knows nothing of crossdock.

mod cache;
mod decode;
mod model;
mod prefill;

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crossdock::{End, Ended, Parallelism, Who};
use crossdock_bootstrap::{Client, ClientConfig, Role, Server, ServerConfig};

use cache::Side;
use decode::Decode;
use model::{Head, Hidden, KV_HEADS, KvCache, LAYERS, Model, Random, VOCABULARY};
use prefill::Prefill;

type Problem = Box<dyn std::error::Error + Send + Sync>;

/// Tokens that each answer has.
const NEW_TOKENS: u32 = 64;
/// How much longer than its deadline the end of a room may take to be told on a busy machine.
const GRACE: Duration = Duration::from_secs(20);

/// The layer that is the last to be computed for somebody who hangs up.
const HANGS_UP_AFTER: u32 = LAYERS / 2;

/// What the router tells both sides of a request.
#[derive(Clone)]
struct Job {
    room: u64,
    prompt: Vec<u32>,
    deadline: Instant,
    /// The user hangs up when this layer has been computed.
    hangs_up_after: Option<u32>,
}

/// What a side tells the router of a request.
struct Report {
    room: u64,
    /// Tokens of the prompt that were here already.
    cached: u32,
    /// `None`: it was not begun.
    ended: Option<Ended>,
    /// The answer, from the decode side.
    tokens: Vec<u32>,
}

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Served,
    /// The user goes away while the prompt is computed.
    HangsUp,
    /// The queue before prefill is longer than the request's time.
    TooLate,
}

fn main() -> Result<(), Problem> {
    let model = Model::new();
    let side = |role, tp, page_tokens, pages| Side {
        role,
        parallelism: Parallelism::tensor(tp, LAYERS, Some(KV_HEADS)),
        page_tokens,
        pages,
    };
    let (prefill, decode) = (side(Role::Prefill, 2, 16, 96), side(Role::Decode, 1, 8, 128));
    let server = Server::start(ServerConfig::on("127.0.0.1:0".parse()?))?;
    let registry = Client::new(ClientConfig::to(&server.address().to_string()))?;
    let mut key = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;

    let ((prefill_jobs, to_prefill), (decode_jobs, to_decode)) = (channel(), channel());
    let ((prefill_says, from_prefill), (decode_says, from_decode)) = (channel(), channel());
    std::thread::scope(|scope| {
        let (model, registry, key) = (&model, &registry, &key);
        let (prefill, decode) = (&prefill, &decode);
        let prefilling = scope.spawn(move || {
            Prefill::open(model, [prefill, decode], key, registry)?.run(&to_prefill, &prefill_says)
        });
        let decoding = scope.spawn(move || {
            Decode::open(model, [decode, prefill], key, registry)?.run(&to_decode, &decode_says)
        });
        let mut router = Router { prefill_jobs, decode_jobs, from_decode, lines: BTreeMap::new() };
        let routed = requests().into_iter().try_for_each(|wave| router.serve(wave));
        let lines = std::mem::take(&mut router.lines);
        // Hangs up: both sides end. Their own problems say more than that they fell silent.
        drop(router);
        let sent = prefilling.join().map_err(|_| "prefill panicked")??;
        let batches = decoding.join().map_err(|_| "decode panicked")??;
        routed?;
        let lines = close(lines, &from_prefill);
        check(model, &lines)?;
        check_sent(&lines, &sent);
        print(&lines, &sent, &batches);
        Ok(())
    })
}

/// A request, and what both sides said of it.
struct Line {
    job: Job,
    fate: Fate,
    decode: Option<Report>,
    /// One for each rank that began it.
    prefill: Vec<Report>,
}

struct Router {
    prefill_jobs: Sender<Job>,
    decode_jobs: Sender<Job>,
    from_decode: Receiver<Report>,
    lines: BTreeMap<u64, Line>,
}

impl Router {
    /// Gives requests to both sides at once, and waits for their answers.
    fn serve(&mut self, wave: Vec<(Vec<u32>, Fate)>) -> Result<(), Problem> {
        let count = wave.len();
        for (prompt, fate) in wave {
            let time =
                if fate == Fate::TooLate { Duration::from_millis(50) } else { Duration::from_secs(30) };
            let room = self.lines.len() as u64 + 1;
            let hangs_up_after = (fate == Fate::HangsUp).then_some(HANGS_UP_AFTER);
            let job = Job { room, prompt, deadline: Instant::now() + time, hangs_up_after };
            self.decode_jobs.send(job.clone())?;
            if fate == Fate::TooLate {
                std::thread::sleep(job.time_left());
            }
            self.prefill_jobs.send(job.clone())?;
            self.lines.insert(room, Line { job, fate, decode: None, prefill: Vec::new() });
        }
        for _ in 0..count {
            let report = self.from_decode.recv_timeout(Duration::from_secs(30) + GRACE)?;
            let line = self.lines.get_mut(&report.room).ok_or("a report of no request")?;
            line.decode = Some(report);
        }
        Ok(())
    }
}

impl Job {
    fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// Two waves, so that the second finds prefixes of the first.
fn requests() -> [Vec<(Vec<u32>, Fate)>; 2] {
    let mut random = Random(7);
    let mut words = |count: u32| -> Vec<u32> {
        let word = |_| ((random.number() + 1.0) / 2.0 * VOCABULARY as f32) as u32 % VOCABULARY;
        (0..count).map(word).collect()
    };
    let system = words(50);
    let mut asks = |count| [system.clone(), words(count)].concat();
    let first = asks(33);
    let follow_up = [first.clone(), asks(20)].concat();
    let served = |prompt| (prompt, Fate::Served);
    [
        vec![served(first), served(asks(6)), served(asks(90)), (asks(41), Fate::HangsUp)],
        vec![
            served(follow_up),
            (asks(25), Fate::TooLate),
            served(asks(14)),
            served(asks(70)),
            served(asks(1)),
            served(asks(120)),
        ],
    ]
}

/// Adds what the prefill side has said.
fn close(mut lines: BTreeMap<u64, Line>, from_prefill: &Receiver<Report>) -> Vec<Line> {
    for report in from_prefill.try_iter() {
        if let Some(line) = lines.get_mut(&report.room) {
            line.prefill.push(report);
        }
    }
    lines.into_values().collect()
}

/// Every answer is that of the model in one place, and every request has ended as it had to, on both sides.
fn check(model: &Model, lines: &[Line]) -> Result<(), Problem> {
    for Line { job, fate, decode, prefill } in lines {
        let decode = decode.as_ref().ok_or("an answer is missing")?;
        let end_there = decode.ended.as_ref().map(|ended| &ended.end);
        let ends_here: Vec<_> = prefill.iter().map(|report| report.ended.as_ref().map(|e| &e.end)).collect();
        let room = job.room;
        match fate {
            Fate::Served => {
                assert_eq!(end_there, Some(&End::Delivered), "room {room}");
                assert_eq!(ends_here, [Some(&End::Delivered); 2], "room {room}");
                assert_eq!(decode.tokens, in_one_place(model, &job.prompt), "room {room}");
            }
            Fate::HangsUp => {
                assert_eq!(end_there, Some(&End::Cancelled { by: Who::Peer }), "room {room}");
                let by = [Who::Here, Who::Peer].map(|by| End::Cancelled { by });
                assert_eq!(ends_here, by.each_ref().map(Some), "room {room}");
            }
            Fate::TooLate => {
                // Both sides count; whichever finds first that the time is over tells the other.
                assert!(matches!(end_there, Some(End::Expired { .. })), "room {room}: {end_there:?}");
                assert_eq!(ends_here, [None], "room {room}");
            }
        }
    }
    let cached = |report: &Report| report.cached > 0;
    assert!(
        lines.iter().any(|line| line.decode.iter().any(cached)),
        "no prefix was shared on the decode side"
    );
    assert!(lines.iter().any(|line| line.prefill.iter().any(cached)), "none on the prefill side");
    Ok(())
}

/// Each rank has sent its half of the heads of what the decode side lacked, once.
fn check_sent(lines: &[Line], sent: &[u64]) {
    let token_bytes = u64::from(KV_HEADS) / 2 * 2 * size_of::<Head>() as u64;
    let of_fate = |wanted: Fate, layers: u32| -> u64 {
        let lacked =
            |line: &Line| line.job.prompt.len() as u32 - line.decode.as_ref().map_or(0, |r| r.cached);
        let tokens: u32 = lines.iter().filter(|line| line.fate == wanted).map(lacked).sum();
        u64::from(tokens * layers) * token_bytes
    };
    let needed = of_fate(Fate::Served, LAYERS);
    // What was sent before the user hung up is lost.
    let most = needed + of_fate(Fate::HangsUp, HANGS_UP_AFTER);
    assert!(sent.iter().all(|sent| (needed..=most).contains(sent)), "{sent:?}, and {needed} were needed");
}

/// The same model without pages, ranks, nodes or prefixes.
fn in_one_place(model: &Model, prompt: &[u32]) -> Vec<u32> {
    #[derive(Default)]
    struct Plain(BTreeMap<(u32, u32, u32), [Head; 2]>);
    impl KvCache for Plain {
        fn heads(&self) -> Range<u32> {
            0..KV_HEADS
        }
        fn write(&mut self, layer: u32, token: u32, head: u32, key: &Head, value: &Head) {
            self.0.insert((layer, token, head), [*key, *value]);
        }
        fn key(&self, layer: u32, token: u32, head: u32) -> Head {
            self.0[&(layer, token, head)][0]
        }
        fn value(&self, layer: u32, token: u32, head: u32) -> Head {
            self.0[&(layer, token, head)][1]
        }
    }
    let mut cache = [Plain::default()];
    let mut answer: Vec<u32> = Vec::new();
    let mut input = prompt.to_vec();
    let mut first = 0;
    while answer.len() < NEW_TOKENS as usize {
        let mut hidden: Vec<Hidden> = (first..).zip(&input).map(|(at, &id)| model.embed(id, at)).collect();
        (0..LAYERS).for_each(|layer| model.layer(layer, first, &mut hidden, &mut cache));
        first += input.len() as u32;
        input = vec![model.next(&hidden[hidden.len() - 1])];
        answer.extend(&input);
    }
    answer
}

fn print(lines: &[Line], sent: &[u64], batches: &[usize]) {
    println!("                cached by");
    println!("room  prompt  prefill  decode  answer                  decode side's end");
    for Line { job, decode, prefill, .. } in lines {
        let Some(Report { cached, ended: Some(ended), tokens, .. }) = decode else { continue };
        let computed_not = prefill.first().map_or(0, |report| report.cached);
        let begin: Vec<String> = tokens.iter().take(5).map(u32::to_string).collect();
        let answer = if begin.is_empty() { String::new() } else { format!("{} …", begin.join(" ")) };
        let (room, prompt, end) = (job.room, job.prompt.len(), &ended.end);
        println!("{room:>4}  {prompt:>6}  {computed_not:>7}  {cached:>6}  {answer:<22}  {end}");
    }
    let (steps, tokens) = (batches.len(), batches.iter().sum::<usize>());
    let largest = batches.iter().max().unwrap_or(&0);
    println!("sent by the prefill ranks: {sent:?} bytes");
    println!("decoded {tokens} tokens in {steps} steps, of up to {largest} requests each");
    println!("every answer is that of the same model in one place");
}

#[cfg(test)]
mod tests {
    #[test]
    fn answers_as_in_one_place() -> Result<(), super::Problem> {
        super::main()
    }
}
