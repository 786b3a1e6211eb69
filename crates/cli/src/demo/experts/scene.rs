//! The parent's part of an experts' scene: starts the ranks, lets them step for a while, kills one, and hears what became
//! of the others.

use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use crossdock::now_ns;

use super::super::process::{Child, Heard};
use super::super::registry::Registry;
use super::super::report::Print;
use super::report::{Death, Scene};
use super::talk::{Done, Said, Tell};
use super::{MEASURED, Mode, Options, RANKS};

/// The ranks of a scene.
pub struct Stage {
    mode: Mode,
    ranks: Vec<Rank>,
    heard: Receiver<(usize, Heard<Said>)>,
    /// How long the ranks may be silent about their steps.
    patience: Duration,
    print: Print,
}

struct Rank {
    child: Child,
    standing: Standing,
    /// Of the steps that it was told last.
    done: Option<Done>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Launched,
    /// Looks for the others.
    Starting,
    Serving,
    Gone,
}

/// How long the ranks may take to find each other.
const MEETING: Duration = Duration::from_secs(40);
/// How long they may still take once the registry has ended.
const AFTER_REGISTRY: Duration = Duration::from_secs(2);
/// First steps touch memory, and are not told.
const WARM_UP: u32 = 4;
/// How long the ranks step before they are told again.
const BATCH: Duration = Duration::from_millis(200);
/// What a rank may take beyond its deadline to tell how its steps ended, on a machine that has too much to do.
const GRACE: Duration = Duration::from_secs(10);

impl Stage {
    /// Starts the ranks.
    pub fn start(options: &Options, mode: Mode, registry: &str) -> std::io::Result<Self> {
        let (events, heard) = mpsc::channel();
        let mut key = [0; 32];
        rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        // The registry may be others' too.
        let group = format!("demo-{}-{}", std::process::id(), mode.name());
        let deadline_s = options.deadline_s.to_string();
        let start = |at: u32| -> std::io::Result<Rank> {
            let name = format!("{} rank {at}", mode.name());
            let number = at.to_string();
            let arguments = [
                "demo-rank",
                "--mode",
                mode.name(),
                "--rank",
                &number,
                "--group",
                &group,
                "--registry",
                registry,
                "--deadline-s",
                &deadline_s,
            ];
            let mut child = Child::start(&name, &arguments)?;
            child.tell(&Tell::Key { key });
            child.listen(at as usize, events.clone())?;
            Ok(Rank { child, standing: Standing::Launched, done: None })
        };
        Ok(Self {
            mode,
            ranks: (0..RANKS).map(start).collect::<std::io::Result<_>>()?,
            heard,
            patience: Duration::from_secs(options.deadline_s) + GRACE,
            print: options.print(),
        })
    }

    /// Plays the scene to its end.
    pub fn play(mut self, registry: &mut Registry) -> Scene {
        let mut scene = Scene::new(self.mode);
        self.meet(&mut scene, registry);
        if scene.troubles.is_empty()
            && let Some(batch) = self.measure(&mut scene)
        {
            self.kill_one(&mut scene, batch);
        }
        self.part(&mut scene);
        scene
    }

    /// Waits until all ranks have met. They cannot without the registry, so its end is told before theirs.
    fn meet(&mut self, scene: &mut Scene, registry: &mut Registry) {
        let mut until = Instant::now() + MEETING;
        let is_early = |rank: &Rank| matches!(rank.standing, Standing::Launched | Standing::Starting);
        while scene.troubles.is_empty() && self.ranks.iter().any(is_early) && Instant::now() < until {
            if registry.ended(Duration::ZERO).is_some() {
                // Ranks that have found each other already can do without it.
                until = until.min(Instant::now() + AFTER_REGISTRY);
            }
            self.hear(scene, until.min(Instant::now() + Duration::from_millis(100)));
        }
        let early: Vec<&Rank> = self.ranks.iter().filter(|rank| is_early(rank)).collect();
        if early.is_empty() {
            return;
        }
        match registry.ended(Duration::from_millis(500)) {
            Some(how) => scene.first_trouble(how),
            None if scene.troubles.is_empty() => {
                let names: Vec<String> = early.iter().map(|rank| rank.name()).collect();
                scene.trouble(&format!("not ready after {} s: {}", MEETING.as_secs(), names.join(", ")));
            }
            None => {}
        }
    }

    /// The ranks step for a while. Gives how many steps a batch has; `None` if something went wrong.
    fn measure(&mut self, scene: &mut Scene) -> Option<u32> {
        let mut took = self.steps(scene, WARM_UP)?;
        let mut count = WARM_UP;
        self.ranks.iter_mut().for_each(|rank| drop(rank.done.take()));
        let begin = Instant::now();
        while begin.elapsed() < MEASURED {
            let fits = BATCH.as_secs_f64() / took.as_secs_f64().max(1e-6) * f64::from(count);
            count = (fits as u32).clamp(1, MOST_STEPS);
            took = self.steps(scene, count)?;
            for done in self.ranks.iter_mut().filter_map(|rank| rank.done.take()) {
                scene.add(&done);
            }
            scene.steps += count;
            if scene.wrong > 0 {
                scene.trouble(&format!("{} rows are wrong", scene.wrong));
                return None;
            }
        }
        Some(count)
    }

    /// The last rank dies in the middle of a batch; the others end that one, and make one more.
    fn kill_one(&mut self, scene: &mut Scene, batch: u32) {
        let victim = self.ranks.len() - 1;
        let survivors = victim as u32;
        self.tell_steps(2 * batch);
        std::thread::sleep(BATCH / 2);
        let killed_ns = now_ns();
        if let Err(error) = self.ranks[victim].child.kill() {
            return scene.trouble(&format!("{} cannot be killed: {error}", self.ranks[victim].name()));
        }
        self.ranks[victim].standing = Standing::Gone;
        // Where the machine had other things to do, the first batch may have been over before the kill.
        let mut without = self.hear_of_death(scene, 2 * batch);
        if scene.troubles.is_empty() {
            self.tell_steps(batch);
            without.extend(self.hear_of_death(scene, batch));
        }
        if !scene.troubles.is_empty() {
            return;
        }
        let masked_ns: Vec<u64> = without.iter().filter_map(|done| done.masked_ns).collect();
        // Told with the first batch or the second.
        let is_as_it_should = |done: &Done| done.masked.is_empty() || done.masked == [victim as u32];
        if masked_ns.len() as u32 != survivors || !without.iter().all(is_as_it_should) {
            let masked: Vec<&Vec<u32>> = without.iter().map(|done| &done.masked).collect();
            return scene
                .trouble(&format!("rank {victim} was killed, and the others have masked {masked:?}"));
        }
        let steps: u32 = without.iter().map(|done| done.steps_without).sum();
        let lost: f64 = without.iter().map(|done| done.lost_share * f64::from(done.steps_without)).sum();
        let last_ns = masked_ns.into_iter().max().unwrap_or(killed_ns);
        scene.death = Some(Death {
            rank: victim as u32,
            masked_ms: last_ns.saturating_sub(killed_ns) as f64 / 1e6,
            steps: steps / survivors,
            lost_share: lost / f64::from(steps.max(1)),
        });
    }

    /// What the ranks that are left tell of a batch.
    fn hear_of_death(&mut self, scene: &mut Scene, count: u32) -> Vec<Done> {
        if self.wait_done(scene, count).is_none() {
            return Vec::new();
        }
        let told: Vec<Done> = self.ranks.iter_mut().filter_map(|rank| rank.done.take()).collect();
        told.iter().for_each(|done| scene.add_rows(done));
        if scene.wrong > 0 {
            scene.trouble(&format!("{} rows are wrong after a rank was killed", scene.wrong));
        }
        told
    }

    /// All ranks make so many steps. Gives how long that took.
    fn steps(&mut self, scene: &mut Scene, count: u32) -> Option<Duration> {
        let begin = Instant::now();
        self.tell_steps(count);
        self.wait_done(scene, count)?;
        Some(begin.elapsed())
    }

    fn tell_steps(&mut self, count: u32) {
        for rank in self.serving() {
            rank.child.tell(&Tell::Steps { count });
        }
    }

    /// Waits until all ranks that are left have told how their steps ended.
    fn wait_done(&mut self, scene: &mut Scene, count: u32) -> Option<()> {
        let until = Instant::now() + self.patience;
        while self.serving().any(|rank| rank.done.is_none()) {
            if !self.hear(scene, until) && Instant::now() >= until {
                let waited = self.patience.as_secs();
                for rank in self.serving().filter(|rank| rank.done.is_none()) {
                    scene.trouble(&format!(
                        "{} does not answer (stopped?): not a word about {count} steps in {waited} s",
                        rank.name()
                    ));
                    // It would not leave either, and is killed with the scene.
                    rank.standing = Standing::Gone;
                }
            }
            if !scene.troubles.is_empty() {
                return None;
            }
        }
        Some(())
    }

    /// The ranks say what they still hold, and leave.
    fn part(&mut self, scene: &mut Scene) {
        self.serving().for_each(|rank| rank.child.tell(&Tell::End));
        let until = Instant::now() + self.patience;
        while self.serving().next().is_some() {
            if !self.hear(scene, until) && Instant::now() >= until {
                let names: Vec<String> = self.serving().map(|rank| rank.name()).collect();
                scene.trouble(&format!("did not end, and is killed: {}", names.join(", ")));
                return;
            }
        }
    }

    fn serving(&mut self) -> impl Iterator<Item = &mut Rank> {
        self.ranks.iter_mut().filter(|rank| rank.standing == Standing::Serving)
    }

    /// Hears one thing from a rank; false if there was nothing to be heard by then.
    fn hear(&mut self, scene: &mut Scene, until: Instant) -> bool {
        let Ok((at, heard)) = self.heard.recv_timeout(until.saturating_duration_since(Instant::now())) else {
            return false;
        };
        let rank = &mut self.ranks[at];
        match heard {
            Heard::Said(Said::Started) => {
                rank.standing = Standing::Starting;
                self.introduce();
            }
            Heard::Said(Said::Ready) => rank.standing = Standing::Serving,
            Heard::Said(Said::Done(done)) => rank.done = Some(done),
            Heard::Said(Said::Bye { regions }) => {
                scene.leaks += regions;
                if regions > 0 {
                    scene.trouble(&format!("{} still maps {regions} regions", rank.name()));
                }
            }
            // One that was killed here is gone already.
            Heard::Gone { how } if rank.standing != Standing::Gone => {
                let early = how != "exit status: 0" || rank.standing != Standing::Serving;
                rank.standing = Standing::Gone;
                if early {
                    scene.trouble(&format!("{} ended early: {how}", rank.name()));
                }
            }
            Heard::Gone { .. } => {}
        }
        true
    }

    /// Says which processes they are, once none of them can be left behind.
    fn introduce(&self) {
        if self.ranks.iter().all(|rank| rank.standing != Standing::Launched) {
            let ids: Vec<String> = self.ranks.iter().map(|rank| rank.child.id().to_string()).collect();
            self.print.line(&format!(
                "\nscene experts, {}: the ranks are processes {}",
                self.mode.name(),
                ids.join(", ")
            ));
        }
    }
}

impl Rank {
    fn name(&self) -> String {
        format!("the {} process ({})", self.child.name(), self.child.id())
    }
}

/// Of a batch: what the ranks tell of it is one line each.
const MOST_STEPS: u32 = 10_000;
