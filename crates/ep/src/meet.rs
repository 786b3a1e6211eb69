//! How ranks in different processes meet: each over an engine of its own, whose handshake compares what they agree on and
//! carries their memory, and whose sessions say when one of them dies.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crossdock_engine::{Doorbell, Engine, OsError, duration_ns};
use crossdock_proto::{Fingerprint, SessionEnd};

use crate::error::GroupError;
use crate::group::{Group, GroupOptions, Reach};
use crate::keeper::{Control, Keeper, Met};
use crate::outgoing::Outgoing;
use crate::pace::Machine;
use crate::region::LAYOUT_VERSION;
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
    /// A port did not take this rank's memory, or not that another may write there.
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
    outgoing: Arc<Outgoing>,
    thread: Option<JoinHandle<()>>,
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
            ("layout", LAYOUT_VERSION.to_string()),
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
    /// [`introduction`]; it keeps mappings and side arrivals; nothing is registered with it and nothing connected.
    /// `addresses` are what the engines of all ranks are dialed at, by rank. Ranks whose memory a port maps here are reached
    /// by stores and loads, the others through their ports. From then on a thread keeps in touch with the others: a rank
    /// whose session ends is dead to this one.
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
        let control = Arc::new(Control::default());
        let outgoing = Arc::new(Outgoing::new(ranks, config.slots, Doorbell::new()?));
        let (told, tells) = sync_channel(1);
        let shared = (control.clone(), outgoing.clone());
        let parting_ns = duration_ns(options.deadline);
        let keeper = Keeper::new(engine, config, rank, own.clone(), addresses, shared, (told, parting_ns));
        let (mourners, mourner) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("crossdock-ep".into())
            .spawn(move || keeper.run(&mourner))
            .map_err(MeetError::Thread)?;
        let link = Link { control, outgoing, thread: Some(thread) };
        let others = || (0..ranks).filter(|&other| other != rank).collect();
        let mut met: Met = match tells.recv_timeout(time) {
            Ok(met) => met?,
            Err(RecvTimeoutError::Timeout) => {
                // The thread says what is missing; or it has all of them in this very moment, and goes on.
                link.control.give_up.store(true, Ordering::Release);
                link.outgoing.ring();
                let time_ms = duration_ns(time) / 1_000_000;
                match tells.recv() {
                    Ok(Err(MeetError::Late { missing, last, .. })) => {
                        return Err(MeetError::Late { missing, time_ms, last });
                    }
                    Ok(met) => met?,
                    Err(_) => return Err(MeetError::Late { missing: others(), time_ms, last: None }),
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(MeetError::Late { missing: others(), time_ms: 0, last: None });
            }
        };
        met[rank as usize] = Some(Reach::Mapped(own.into()));
        let reaches: Vec<Reach> = met.into_iter().flatten().collect();
        let has_ports = reaches.iter().any(|reach| matches!(reach, Reach::Port));
        let outgoing = has_ports.then(|| link.outgoing.clone());
        let mut group = Group::assemble(config, rank, reaches, outgoing, options, Arc::new(Machine::new()))?;
        // Whoever dies from now on is told to this group.
        let _ = mourners.send(group.mourner());
        link.outgoing.ring();
        group.link = Some(link);
        Ok(group)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::Release);
        self.outgoing.ring();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}
