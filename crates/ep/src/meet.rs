//! How ranks in different processes meet: each over an engine of its own, whose handshake compares what they agree on and
//! carries their memory, and whose sessions say when one of them dies.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crossdock_engine::{Doorbell, Engine, OsError, duration_ns, now_ns};
use crossdock_proto::{Fingerprint, Notice, SessionEnd, SessionId, TargetId};
use crossdock_transport::Mapping;

use crate::error::GroupError;
use crate::group::{Group, GroupOptions, Mourner};
use crate::words::RankMemory;
use crate::{BLOCK_CHANNELS, GroupConfig};

/// Why the ranks of a group did not meet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeetError {
    /// The group itself is not possible.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// There is not one address for each rank.
    #[error("{addresses} addresses for {ranks} ranks")]
    Addresses {
        /// How many there are.
        addresses: usize,
        /// How many ranks.
        ranks: u32,
    },
    /// A port did not take this rank's memory.
    #[error("a port did not take the memory: {0}")]
    Register(#[from] crossdock_transport::Error),
    /// A rank does not want to meet this one, or cannot, and time does not help: its configuration may be another one.
    #[error("rank {rank} cannot be met: {cause}")]
    Refused {
        /// Which rank.
        rank: u32,
        /// Why: where the configurations differ, their differences.
        cause: SessionEnd,
    },
    /// Whoever answers at the address of a rank says that it is another one.
    #[error("at the address of rank {expected} there is rank {found}")]
    WrongRank {
        /// Whose address it is.
        expected: u32,
        /// Who answers.
        found: u32,
    },
    /// A rank can be reached only through a port that does not map its memory.
    #[error("rank {rank} is reached by {port}, which does not map its memory here")]
    NotMapped {
        /// Which rank.
        rank: u32,
        /// The transport.
        port: &'static str,
    },
    /// Some ranks were not met in time.
    #[error("ranks {missing:?} were not met within {time_ms} ms{}", last.as_ref().map_or_else(String::new, |end| format!("; the last reason: {end}")))]
    Late {
        /// Which ones.
        missing: Vec<u32>,
        /// How long this rank waited.
        time_ms: u64,
        /// Why the last attempt failed that did.
        last: Option<SessionEnd>,
    },
    /// The operating system refused.
    #[error(transparent)]
    Os(#[from] OsError),
    /// The thread that keeps in touch could not be started.
    #[error("no thread: {0}")]
    Thread(std::io::Error),
}

/// What keeps in touch with the other ranks. Dropping it says goodbye to them.
#[derive(Debug)]
pub(crate) struct Link {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Control {
    stop: AtomicBool,
    doorbell: Doorbell,
}

/// What each peer's session brought.
struct Met {
    memories: Vec<RankMemory>,
}

impl GroupConfig {
    /// What the handshake between two ranks compares: ranks whose configurations differ refuse each other, with the
    /// difference in words.
    pub fn fingerprint(&self, options: &GroupOptions) -> Fingerprint {
        let limits: Vec<String> = self.max_tokens.iter().map(u32::to_string).collect();
        let values = [
            ("ranks", self.max_tokens.len().to_string()),
            ("max_tokens", limits.join(",")),
            ("experts", self.experts.to_string()),
            ("top_k", self.top_k.to_string()),
            ("hidden", self.hidden.to_string()),
            ("payload", self.payload.to_string()),
            ("slots", self.slots.to_string()),
            ("placement_version", self.placement_version.to_string()),
            ("scale_channels", BLOCK_CHANNELS.to_string()),
            ("verify", options.verify.to_string()),
        ];
        Fingerprint::new(values.map(|(key, value)| (format!("experts.{key}"), value)))
    }
}

/// What a rank tells its peers in the handshake: the engine's `app`.
pub fn introduction(rank: u32) -> Vec<u8> {
    rank.to_le_bytes().to_vec()
}

impl Group {
    /// Meets the other ranks of a group, each over an engine of its own.
    ///
    /// The engine's protocol has the [`fingerprint`](GroupConfig::fingerprint) of the configuration and this rank's
    /// [`introduction`]; it keeps mappings; nothing is registered with it and nothing connected. `addresses` are what the
    /// engines of all ranks are dialed at, by rank. From then on a thread keeps in touch with the others: a rank whose
    /// session ends is dead to this one.
    pub fn meet(
        mut engine: Engine,
        config: &GroupConfig,
        rank: u32,
        addresses: &[String],
        options: &GroupOptions,
        time: Duration,
    ) -> Result<Group, MeetError> {
        let own = Group::allocate_region(config, rank)?;
        let ranks = config.ranks();
        if addresses.len() != ranks as usize {
            return Err(MeetError::Addresses { addresses: addresses.len(), ranks });
        }
        engine.register(&own)?;
        let control = Arc::new(Control { stop: AtomicBool::new(false), doorbell: Doorbell::new()? });
        // The higher rank dials, so that two never do at once.
        let now = now_ns();
        let dialed: BTreeMap<TargetId, u32> =
            (0..rank).map(|peer| (engine.proto().connect(now, &addresses[peer as usize]), peer)).collect();
        let (told, tells) = sync_channel(1);
        let keeper = Keeper {
            engine,
            control: control.clone(),
            rank,
            ranks,
            dialed,
            sessions: BTreeMap::new(),
            mappings: BTreeMap::new(),
            met: BTreeMap::new(),
            last: None,
            told: Some(told),
            mourner: None,
        };
        let (mourners, mourner) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("crossdock-ep".into())
            .spawn(move || keeper.run(&mourner))
            .map_err(MeetError::Thread)?;
        let link = Link { control, thread: Some(thread) };
        let late = |missing: Vec<u32>, last| MeetError::Late {
            missing,
            time_ms: duration_ns(time) / 1_000_000,
            last,
        };
        let met: Met = match tells.recv_timeout(time) {
            Ok(met) => met?,
            Err(RecvTimeoutError::Timeout) => {
                // The thread says what is missing.
                link.control.stop.store(true, Ordering::Release);
                link.control.doorbell.ring();
                match tells.recv() {
                    Ok(Err(MeetError::Late { missing, last, .. })) => return Err(late(missing, last)),
                    Ok(met) => met?,
                    Err(_) => return Err(late(Vec::new(), None)),
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Err(late(Vec::new(), None)),
        };
        let mut memories = met.memories;
        memories.insert(rank as usize, own.into());
        let mut group = Group::over_mapped(config, rank, memories, options)?;
        // Whoever dies from now on is told to this group.
        let _ = mourners.send(group.mourner());
        group.link = Some(link);
        group.link_doorbell();
        Ok(group)
    }

    fn link_doorbell(&self) {
        if let Some(link) = &self.link {
            link.control.doorbell.ring();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::Release);
        self.control.doorbell.ring();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// The thread that keeps in touch.
struct Keeper {
    engine: Engine,
    control: Arc<Control>,
    rank: u32,
    ranks: u32,
    dialed: BTreeMap<TargetId, u32>,
    sessions: BTreeMap<SessionId, u32>,
    mappings: BTreeMap<SessionId, Mapping>,
    met: BTreeMap<u32, RankMemory>,
    last: Option<SessionEnd>,
    /// Until all have met.
    told: Option<SyncSender<Result<Met, MeetError>>>,
    mourner: Option<Mourner>,
}

impl Keeper {
    fn run(mut self, mourners: &std::sync::mpsc::Receiver<Mourner>) {
        // Ranks that died between the meeting and the group's beginning.
        let mut died = Vec::new();
        self.tell_if_complete();
        while !self.control.stop.load(Ordering::Acquire) {
            let now = now_ns();
            let mut active = self.engine.turn(now);
            while let Some(mapped) = self.engine.next_mapping() {
                // A rank has one region; the same one on a second lane is the same memory.
                self.mappings.entry(mapped.session).or_insert(mapped.mapping);
            }
            while let Some(notice) = self.engine.next_notice() {
                active = true;
                died.extend(self.hear(now, notice));
            }
            if self.mourner.is_none() {
                self.mourner = mourners.try_recv().ok();
            }
            if let Some(mourner) = &self.mourner {
                died.drain(..).for_each(|rank| mourner.mark_dead(rank));
            }
            if active {
                continue;
            }
            let stop = || !self.control.stop.load(Ordering::Acquire);
            if let Err(error) = self.engine.park(now, &self.control.doorbell, LONGEST_SLEEP_NS, stop) {
                // Without a sleep, deaths are not heard of any more; deadlines still end every wait.
                self.tell(Err(error.into()));
                break;
            }
        }
        let missing =
            (0..self.ranks).filter(|rank| *rank != self.rank && !self.met.contains_key(rank)).collect();
        let last = self.last.take();
        self.tell(Err(MeetError::Late { missing, time_ms: 0, last }));
        self.engine.shut_down(now_ns());
    }

    /// What the engine says. Gives the rank that is dead now, if any.
    fn hear(&mut self, now: u64, notice: Notice) -> Option<u32> {
        match notice {
            Notice::SessionUp { session, target, port, app, .. } => {
                let rank =
                    <[u8; 4]>::try_from(&*app).map(u32::from_le_bytes).ok().filter(|&rank| rank < self.ranks);
                let expected = target.and_then(|target| self.dialed.get(&target).copied());
                match (rank, expected) {
                    (Some(found), Some(expected)) if found != expected => {
                        self.tell(Err(MeetError::WrongRank { expected, found }));
                    }
                    (Some(rank), _) if rank != self.rank => self.welcome(session, rank, port),
                    // Nobody of this group.
                    _ => {}
                }
                None
            }
            Notice::SessionDown { session, target, cause, .. } => {
                let rank = session.and_then(|session| self.sessions.remove(&session));
                self.mappings.retain(|known, _| Some(*known) != session);
                if let Some(rank) = rank {
                    target.into_iter().for_each(|target| self.engine.proto().disconnect(now, target));
                    return Some(rank);
                }
                if let Some(&rank) = target.and_then(|target| self.dialed.get(&target))
                    && !cause.is_retryable()
                {
                    self.tell(Err(MeetError::Refused { rank, cause }));
                    return None;
                }
                self.last = Some(cause);
                None
            }
            // There are no rooms.
            _ => None,
        }
    }

    fn welcome(&mut self, session: SessionId, rank: u32, port: &'static str) {
        if self.told.is_none() || self.met.contains_key(&rank) {
            // Another start of a rank that the group has met: it is not in the group.
            return;
        }
        let Some(mapping) = self.mappings.remove(&session) else {
            return self.tell(Err(MeetError::NotMapped { rank, port }));
        };
        match RankMemory::mapped(mapping) {
            Ok(memory) => {
                self.met.insert(rank, memory);
                self.sessions.insert(session, rank);
                self.tell_if_complete();
            }
            Err(error) => self.tell(Err(GroupError::Memory { rank, error }.into())),
        }
    }

    fn tell_if_complete(&mut self) {
        if self.met.len() + 1 == self.ranks as usize {
            let memories = self.met.values().cloned().collect();
            self.tell(Ok(Met { memories }));
        }
    }

    fn tell(&mut self, end: Result<Met, MeetError>) {
        if let Some(told) = self.told.take() {
            // Whoever does not wait any more has said so by `stop`.
            let _ = told.send(end);
        }
    }
}

/// The doorbell wakes the thread earlier.
const LONGEST_SLEEP_NS: u64 = 1_000_000_000;
