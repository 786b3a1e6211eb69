//! A node of which nothing exists but its recorder and its clocks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crossdock_flight::{Clocks, Dump, File, read};
use crossdock_proto::flight::{FlightLimits, Incident, Reason, Recorder, RingId, RingPeer, Snapshot, What};
use crossdock_proto::{End, Identity, RoleKind, RoomName, SessionEnd, SessionId, Stage, TargetId, Who};
use crossdock_transport::GrantId;

pub struct Node {
    pub recorder: Recorder,
    identity: Identity,
    name: String,
    /// The latest session of each ring.
    sessions: BTreeMap<RingId, SessionId>,
    met: u32,
    /// What its monotonic clock says when the true time is 0.
    began_ns: i64,
    /// By how much its wall clock is wrong.
    ahead_ns: i64,
}

/// When the true time is 0.
pub const EPOCH_NS: i64 = 1_750_000_000_000_000_000;

impl Node {
    pub fn new(node: u64, name: &str, began_ns: i64, ahead_ns: i64) -> Self {
        let recorder = Recorder::new(FlightLimits { peers: 4, records: 256 });
        let identity = Identity { node, incarnation: node + 1000 };
        let (name, sessions) = (name.to_owned(), BTreeMap::new());
        Self { recorder, identity, name, sessions, met: 0, began_ns, ahead_ns }
    }

    /// The same node, started again.
    pub fn again(&self) -> Self {
        let mut node = Self::new(self.identity.node, &self.name, self.began_ns, self.ahead_ns);
        node.identity.incarnation = self.identity.incarnation + 1;
        node
    }

    /// A session of which it is not recorded when it began.
    pub fn meet(&mut self, other: &Node) -> RingId {
        let name = other.name.as_str().into();
        let ring = self.recorder.begin(RingPeer { identity: other.identity, name, port: "tcp" });
        self.met += 1;
        self.sessions.insert(ring, SessionId(self.met));
        ring
    }

    /// A session that begins at this true time.
    pub fn begin(&mut self, true_ns: i64, other: &Node) -> RingId {
        let ring = self.meet(other);
        let incarnation = other.identity.incarnation;
        self.note(true_ns, ring, None, What::SessionBegan { incarnation, is_dialer: true });
        ring
    }

    /// Records something at this true time.
    pub fn note(&mut self, true_ns: i64, ring: RingId, room: Option<u64>, what: What) {
        let room = room.map(|room| RoomName { room, use_count: 0, share: 0 });
        let at_ns = (self.began_ns + true_ns) as u64;
        self.recorder.record(ring, at_ns, self.sessions.get(&ring).copied(), room, what);
    }

    /// What it would write at this true time.
    pub fn dump(&self, true_ns: i64, reason: Reason) -> Dump {
        let monotonic_ns = (self.began_ns + true_ns) as u64;
        let unix_ns = (EPOCH_NS + true_ns + self.ahead_ns) as u64;
        let rings = (0..self.recorder.rings() as u32).filter_map(|ring| self.recorder.copy(RingId(ring)));
        let snapshot = Snapshot {
            identity: self.identity,
            name: self.name.as_str().into(),
            reason,
            at_ns: monotonic_ns,
            rings: rings.collect(),
            targets: vec![(TargetId(1), "10.0.0.7:7000".into())],
        };
        Dump { snapshot, clocks: Clocks { monotonic_ns, unix_ns } }
    }

    pub fn file(&self, true_ns: i64) -> File {
        let dump = self.dump(true_ns, Reason::Asked);
        read(Path::new(&self.name), dump.text().as_slice()).expect("what was written can be read")
    }
}

pub fn grant(index: u32) -> GrantId {
    GrantId::new(index, 0)
}

pub fn sent(index: u32) -> What {
    What::GrantSent { grant: grant(index), attempt: 0, pages: 4 }
}

pub fn came(index: u32) -> What {
    What::GrantCame { grant: grant(index), attempt: 0, pages: 4 }
}

pub fn bound(role: RoleKind) -> What {
    What::Bound { role, pages: 4, waited_ms: 0, left_ms: 30_000 }
}

pub fn ended(end: Option<End>, counted: u32, expected: Option<u32>) -> What {
    What::Ended {
        end: end.map(Box::new),
        stage: Stage::Transfer,
        counted,
        expected,
        age_ms: 30_000,
        met_ms: Some(29_900),
        quiet_ms: 1_500,
        silent_ms: 2_100,
    }
}

pub fn silent() -> SessionEnd {
    SessionEnd::Silent { for_ns: 2_100_000_000 }
}

pub fn expired(by: Who) -> End {
    End::Expired { by, stage: Stage::Transfer }
}

pub fn failed(number: u64, ring: RingId) -> Reason {
    Reason::Failed(Incident { number, ring, room: Some(RoomName { room: 4711, use_count: 0, share: 0 }) })
}

/// A folder of this test's own; removed when dropped.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("crossdock-flight-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder for the test");
        Self(path)
    }

    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the folder is there");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
