//! How a port is opened.

use std::time::Duration;

use crossdock_host::HostOptions;

/// How a port is opened.
#[derive(Clone, Debug)]
pub struct ShmOptions {
    /// The port's name in logs and errors.
    pub name: String,
    /// How many threads share a large copy, the caller of `post` among them; at least one. Each costs a core while it
    /// copies.
    pub copy_threads: usize,
    /// How many lanes may be open at a time. Each takes four file descriptors, and one more for each region that its
    /// peer has registered.
    pub max_lanes: usize,
    /// How many regions may be registered at a time; at most 4096.
    pub max_regions: usize,
    /// How many file descriptors of peers' shared regions may be kept at a time, over all lanes; no more than half of
    /// what the process may have when the port is opened (`RLIMIT_NOFILE`). A lane whose peer passes one more ends with
    /// [`DownCause::LimitReached`](crossdock_transport::DownCause::LimitReached).
    pub max_peer_descriptors: usize,
    /// How many immediates may be on their way on a lane, and how many ends of ops may wait to be polled there. Rounded
    /// up to a power of two, up to 65,536.
    pub immediates_per_lane: u32,
    /// How many bytes each copy thread moves in one call of `post` before it comes back short, so that the thread that
    /// owns the port serves its other lanes in time. One piece of a paged op is moved in any case.
    pub bytes_per_turn: u64,
    /// How long a lane may take to connect.
    pub connect_timeout: Duration,
    /// What [`PortInfo::bytes_per_second`](crossdock_transport::PortInfo::bytes_per_second) says; rails are loaded in this proportion.
    pub bytes_per_second: u64,
    /// Lets every process of this user reach into this one, where `/proc/sys/kernel/yama/ptrace_scope` is 1 and
    /// would forbid it (`PR_SET_PTRACER_ANY`). Only private memory needs it.
    pub allow_ptrace: bool,
    /// Processes with different domains do not connect, as if they were on different hosts; at most 255 bytes. For
    /// containers of one host that share its namespaces and are to be told apart all the same.
    pub domain: String,
}

impl Default for ShmOptions {
    fn default() -> Self {
        Self {
            name: "shm".into(),
            copy_threads: 1,
            max_lanes: 1024,
            max_regions: 1024,
            max_peer_descriptors: 65_536,
            immediates_per_lane: 1024,
            bytes_per_turn: 8 << 20,
            connect_timeout: Duration::from_secs(10),
            bytes_per_second: 10_000_000_000,
            allow_ptrace: false,
            domain: String::new(),
        }
    }
}

impl ShmOptions {
    /// What is not about the way of bytes.
    pub(crate) fn of_host(&self) -> HostOptions {
        HostOptions {
            name: self.name.clone(),
            max_lanes: self.max_lanes,
            max_regions: self.max_regions,
            max_peer_descriptors: self.max_peer_descriptors,
            immediates_per_lane: self.immediates_per_lane,
            connect_timeout: self.connect_timeout,
            bytes_per_second: self.bytes_per_second,
            numa_node: None,
            domain: self.domain.clone(),
        }
    }
}
