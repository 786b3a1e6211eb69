//! The router's part of a scene: gives rooms to both workers, hears how each side ended them, and says what is missing.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use crossdock::now_ns;
use crossdock_replay::Arrival;

use super::process::{Child, Heard};
use super::registry::Registry;
use super::report::{Print, Progress, Scene};
use super::talk::{Ended, Said, Tell};
use super::worker::GRACE;
use super::{Options, PortName, limit};

/// One scene: all requests over one port.
pub struct Router {
    port: PortName,
    workers: [Worker; 2],
    heard: Receiver<(usize, Heard)>,
    /// The rooms that one of the workers has not ended.
    open: BTreeMap<u64, Room>,
    /// How many rooms may be open: those that are told of and not over.
    most_open: usize,
    is_closed_loop: bool,
    /// How long both workers together may be silent about a room.
    patience: Duration,
    /// When no more rooms are begun.
    until: Instant,
    /// The time for all scenes, as the user gave it.
    within_s: u64,
    each_room: bool,
    print: Print,
    limit_gb_per_s: f64,
}

struct Worker {
    child: Child,
    standing: Standing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Started here; nothing has been heard of it.
    Launched,
    /// Looks for its peer.
    Starting,
    Serving,
    /// It has not said for too long how a room ended.
    Mute,
    Gone,
}

impl Worker {
    /// Whether it does not serve yet.
    fn is_early(&self) -> bool {
        matches!(self.standing, Standing::Launched | Standing::Starting)
    }
}

struct Room {
    begin: Instant,
    /// Which workers have not ended it.
    open_at: [bool; 2],
}

const PREFILL: usize = 0;
const DECODE: usize = 1;
/// How long the workers may take to find each other.
const MEETING: Duration = Duration::from_secs(30);
/// How long they may still take once the registry has ended.
const AFTER_REGISTRY: Duration = Duration::from_secs(2);

impl Router {
    /// Starts the workers of a scene.
    pub fn start(
        options: &Options,
        port: PortName,
        pages: u32,
        registry: &str,
        until: Instant,
    ) -> std::io::Result<Self> {
        let rails = [PREFILL, DECODE].map(|side| options.rails(side));
        let limit_gb_per_s = limit::measure(port, rails, options.pool_mib << 20);
        let (events, heard) = mpsc::channel();
        let mut key = [0; 32];
        rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        let start = |at: usize, role: &str| -> std::io::Result<Worker> {
            let (pages, deadline_s) = (pages.to_string(), options.deadline_s.to_string());
            let in_flight = options.in_flight.to_string();
            let mut arguments = vec![
                "demo-worker",
                "--role",
                role,
                "--port",
                port.name(),
                "--registry",
                registry,
                "--pages",
                &pages,
                "--deadline-s",
                &deadline_s,
                "--in-flight",
                &in_flight,
                "--op",
                options.op.name(),
            ];
            if let (PortName::Verbs, Some(devices)) = (port, rails[at]) {
                arguments.extend(["--devices", devices]);
            }
            if let Some(folder) = &options.flight_dir {
                arguments.extend(["--flight-dir", folder]);
            }
            let mut child = Child::start(role, &arguments)?;
            child.tell(&Tell::Key { key });
            child.listen(at, events.clone())?;
            Ok(Worker { child, standing: Standing::Launched })
        };
        let workers = [start(PREFILL, "prefill")?, start(DECODE, "decode")?];
        Ok(Self {
            port,
            workers,
            heard,
            open: BTreeMap::new(),
            most_open: match options.is_closed_loop() {
                true => options.in_flight as usize,
                false => options.queue as usize,
            },
            is_closed_loop: options.is_closed_loop(),
            // Each worker ends every room by its deadline, and says so by the end of the grace.
            patience: Duration::from_secs(options.deadline_s) + GRACE + Duration::from_secs(3),
            until,
            within_s: options.within_s,
            each_room: options.each_room,
            print: options.print(),
            limit_gb_per_s,
        })
    }

    /// Hands all requests over, or as many as the time allows, and lets the workers leave.
    pub fn play(mut self, arrivals: &[Arrival], registry: &mut Registry) -> Scene {
        let mut scene = Scene::new(self.port.name(), arrivals.len(), self.limit_gb_per_s);
        self.meet(&mut scene, registry);
        if scene.troubles().is_empty() {
            self.hand_over(&mut scene, arrivals);
        }
        self.part(&mut scene);
        scene
    }

    /// Waits until both workers serve. They cannot meet without the registry, so its end is told before theirs.
    fn meet(&mut self, scene: &mut Scene, registry: &mut Registry) {
        let begin = Instant::now();
        let mut until = self.until.min(begin + MEETING);
        while scene.troubles().is_empty() && self.workers.iter().any(Worker::is_early) {
            if registry.ended(Duration::ZERO).is_some() {
                // Workers that have found each other already can do without it.
                until = until.min(Instant::now() + AFTER_REGISTRY);
            }
            let step = until.min(Instant::now() + Duration::from_millis(100));
            if !self.hear(scene, step) && Instant::now() >= until && registry.ended(Duration::ZERO).is_none()
            {
                self.blame_early(scene, begin.elapsed());
            }
            if Instant::now() >= until {
                break;
            }
        }
        let is_early = self.workers.iter().any(Worker::is_early);
        // A worker may see that the registry is gone before this process does.
        if is_early && let Some(how) = registry.ended(Duration::from_millis(500)) {
            scene.first_trouble(how);
        }
    }

    /// Not all workers serve, and the time is over: the user's, or that of a meeting.
    fn blame_early(&self, scene: &mut Scene, waited: Duration) {
        let early = self.workers.iter().filter(|worker| worker.is_early());
        if Instant::now() < self.until {
            for Worker { child, .. } in early {
                let (role, id, seconds) = (child.name(), child.id(), waited.as_secs());
                scene.trouble(format!("the {role} process ({id}) was not ready after {seconds} s"));
            }
            return;
        }
        let missing: Vec<String> = early
            .map(|Worker { child, standing }| {
                let what = match (standing, child.name()) {
                    (Standing::Launched, _) => "to start",
                    (_, "prefill") => "to allocate its pool and register",
                    _ => "to allocate its pool, register and find its peer",
                };
                format!("the {} process ({}) {what}", child.name(), child.id())
            })
            .collect();
        scene.trouble(format!(
            "the time of --within-s {} (all scenes together) is over; still waiting for {}",
            self.within_s,
            missing.join(", and for ")
        ));
    }

    /// Says which processes they are, once both can no longer be left behind.
    fn introduce(&self) {
        if !self.is_any(Standing::Launched) {
            let [prefill, decode] = self.workers.each_ref().map(|worker| worker.child.id());
            self.print.line(&format!(
                "\nscene {}: prefill is process {prefill}, decode is process {decode}",
                self.port.name()
            ));
        }
    }

    fn hand_over(&mut self, scene: &mut Scene, arrivals: &[Arrival]) {
        let mut progress = Progress::new(self.port.name(), arrivals.len());
        let start_ns = now_ns();
        loop {
            if scene.begun < arrivals.len() && scene.troubles().is_empty() && Instant::now() >= self.until {
                scene.cut_short = true;
            }
            while scene.may_begin() && self.is_next_here(&arrivals[scene.begun], start_ns) {
                self.begin(scene, &arrivals[scene.begun], start_ns);
            }
            if self.open.is_empty() && !scene.may_begin() {
                break;
            }
            self.hear(scene, Instant::now() + self.nap(scene, arrivals, start_ns));
            self.find_mute(scene);
            progress.show(scene.ended(), scene.bytes);
        }
        progress.end();
    }

    /// Whether the next request has come: by its time, or because another one is over.
    fn is_next_here(&self, next: &Arrival, start_ns: u64) -> bool {
        match self.is_closed_loop {
            true => self.open.len() < self.most_open,
            false => now_ns() >= start_ns + next.at_ns,
        }
    }

    /// How long to listen at most.
    fn nap(&self, scene: &Scene, arrivals: &[Arrival], start_ns: u64) -> Duration {
        let most = Duration::from_millis(100);
        match arrivals.get(scene.begun).filter(|_| scene.may_begin() && !self.is_closed_loop) {
            Some(next) => most.min(Duration::from_nanos((start_ns + next.at_ns).saturating_sub(now_ns()))),
            None => most,
        }
    }

    fn begin(&mut self, scene: &mut Scene, arrival: &Arrival, start_ns: u64) {
        let at_ns = if self.is_closed_loop { now_ns() } else { start_ns + arrival.at_ns };
        scene.begin(at_ns);
        let room = scene.begun as u64;
        if self.open.len() >= self.most_open {
            return scene.refused(self.most_open);
        }
        if self.each_room {
            let (port, tokens) = (self.port.name(), arrival.tokens);
            self.print.line(&format!("{port}: room {room} begins, {tokens} tokens"));
        }
        let go = Tell::Go { room, arrival: Arrival { at_ns, ..arrival.clone() } };
        // A worker that cannot be told has ended; its end is heard later.
        self.workers.iter_mut().for_each(|worker| worker.child.tell(&go));
        self.open.insert(room, Room { begin: Instant::now(), open_at: [true; 2] });
    }

    /// The survivors say what they still hold, and leave.
    fn part(&mut self, scene: &mut Scene) {
        self.workers.iter_mut().for_each(|worker| worker.child.tell(&Tell::End));
        let until = Instant::now() + self.patience;
        while self.is_any(Standing::Serving) {
            if !self.hear(scene, until) && Instant::now() >= until {
                for Worker { child, standing } in &mut self.workers {
                    if *standing == Standing::Serving {
                        *standing = Standing::Mute;
                        let (role, id) = (child.name(), child.id());
                        scene.trouble(format!("the {role} process ({id}) did not end and was killed"));
                    }
                }
            }
        }
    }

    /// Hears one thing from a worker; false if there was nothing to be heard by then.
    fn hear(&mut self, scene: &mut Scene, until: Instant) -> bool {
        let Ok((at, heard)) = self.heard.recv_timeout(until.saturating_duration_since(Instant::now())) else {
            return false;
        };
        match heard {
            Heard::Said(Said::Started) => {
                self.workers[at].standing = Standing::Starting;
                self.introduce();
            }
            Heard::Said(Said::Ready) => self.workers[at].standing = Standing::Serving,
            Heard::Said(Said::Ended(ended)) => self.ended(scene, at, ended),
            Heard::Said(Said::Bye(bye)) => scene.bye(self.workers[at].child.name(), &bye),
            Heard::Gone { how } => {
                let worker = &mut self.workers[at];
                if how != "exit status: 0" || !self.open.is_empty() || worker.is_early() {
                    let (role, id) = (worker.child.name(), worker.child.id());
                    scene.trouble(format!("the {role} process ({id}) ended early: {how}"));
                }
                worker.standing = Standing::Gone;
                self.forget(scene, at);
            }
        }
        true
    }

    fn ended(&mut self, scene: &mut Scene, at: usize, ended: Ended) {
        let Worker { child, standing } = &self.workers[at];
        let room = ended.room;
        if self.each_room {
            let (port, name) = (self.port.name(), child.name());
            self.print.line(&format!("{port}: room {room}, {name}, {} ms: {}", ended.after_ms, ended.how));
        }
        match self.open.get_mut(&room) {
            Some(Room { open_at, .. }) if open_at[at] => {
                open_at[at] = false;
                self.open.retain(|_, room| room.open_at.contains(&true));
            }
            // A process that was stopped and continues tells of rooms that have been given up.
            _ if *standing == Standing::Mute => {}
            _ => {
                scene.trouble(format!("the {} process ended room {room} more than once", child.name()));
            }
        }
        match at {
            PREFILL => scene.prefill_ended(ended),
            _ => scene.decode_ended(ended),
        }
    }

    /// Gives up workers that have not said for too long how a room ended: rooms end by their deadlines, so they are
    /// stopped, or hang.
    fn find_mute(&mut self, scene: &mut Scene) {
        let Some((&room, Room { begin, open_at })) = self.open.first_key_value() else { return };
        if begin.elapsed() <= self.patience {
            return;
        }
        let late = *open_at;
        for (at, _) in late.iter().enumerate().filter(|(_, late)| **late) {
            let Worker { child, standing } = &mut self.workers[at];
            *standing = Standing::Mute;
            let (role, id, waited) = (child.name(), child.id(), self.patience.as_secs());
            scene.trouble(format!(
                "the {role} process ({id}) does not answer (stopped?): not a word about room {room} in {waited} s"
            ));
            self.forget(scene, at);
        }
    }

    /// Waits for this worker's rooms no longer.
    fn forget(&mut self, scene: &mut Scene, at: usize) {
        if self.open.values().any(|room| room.open_at[at]) {
            scene.over();
        }
        self.open.retain(|_, room| {
            room.open_at[at] = false;
            room.open_at.contains(&true)
        });
    }

    fn is_any(&self, standing: Standing) -> bool {
        self.workers.iter().any(|worker| worker.standing == standing)
    }
}
