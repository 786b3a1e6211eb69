//! How a fabric is made, and what can be done to it while it runs.

/// How a [`Fabric`](super::Fabric) is made.
#[derive(Clone, Debug)]
pub struct FabricOptions {
    /// The devices, which are called `fake0` and so on. All reach each other, and themselves.
    pub devices: Vec<DeviceOptions>,
    /// All chance comes from here.
    pub seed: u64,
    /// When things happen.
    pub pace: Pace,
    /// What devices allow.
    pub limits: Limits,
    /// What goes wrong by itself.
    pub faults: Faults,
    /// The library lacks the functions that came with rdma-core 28 and later.
    pub old_library: bool,
}

impl Default for FabricOptions {
    fn default() -> Self {
        Self {
            devices: vec![DeviceOptions::default(); 2],
            seed: 0,
            pace: Pace::Stepped { most: 8 },
            limits: Limits::default(),
            faults: Faults::default(),
            old_library: false,
        }
    }
}

/// One device, which has one port.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// RoCE; else InfiniBand.
    pub ethernet: bool,
    /// The largest packet in bytes: 256, 512, 1024, 2048 or 4096.
    pub mtu_bytes: u32,
    /// The port has a link when the fabric is made.
    pub link_up: bool,
    /// It is of iWARP, which connects by other means.
    pub iwarp: bool,
    /// It tells when a queue pair takes no more of the shared receives, as the specification wants; soft-RoCE does not.
    pub tells_last_receive: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { ethernet: true, mtu_bytes: 1024, link_up: true, iwarp: false, tells_last_receive: true }
    }
}

/// When packets move. Time is counted in steps: one packet sent or landed, or one request flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Within the calls that post and poll, all that can.
    AtOnce,
    /// At each poll of any completion queue, a random number of steps up to this. With 0 only
    /// [`Fabric::step`](super::Fabric::step) moves anything. The same seed and calls give the same run.
    Stepped {
        /// How many at most.
        most: u32,
    },
    /// In a thread of the fabric's, which ends with it.
    Thread,
    /// Within the calls, but no byte of a write or a read moves, and none of their keys is looked at: a device that
    /// costs next to nothing, to measure what posting costs.
    Weightless,
}

/// What devices allow.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Sends, or receives, of a queue pair.
    pub max_qp_wr: u32,
    /// Receives of a shared receive queue.
    pub max_srq_wr: u32,
    /// Entries of a completion queue.
    pub max_cqe: u32,
    /// Pieces of a request.
    pub max_sge: u32,
    /// Bytes that go inline.
    pub max_inline: u32,
    /// Bytes of a message.
    pub max_msg_sz: u32,
    /// Reads of a queue pair at once, asked for and answered.
    pub rd_atom: u8,
    /// Queue pairs of a device.
    pub max_qp: u32,
    /// Regions of a device.
    pub max_mr: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_qp_wr: 8192,
            max_srq_wr: 32_768,
            max_cqe: 1 << 20,
            max_sge: 16,
            max_inline: 220,
            max_msg_sz: 1 << 30,
            rd_atom: 16,
            max_qp: 4096,
            max_mr: 65_536,
        }
    }
}

/// What goes wrong by itself.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// One packet of so many is lost; 0: none.
    pub lost_one_in: u32,
}

/// A call that is to fail.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The call.
    pub function: Function,
    /// Of [`Function::ModifyQp`], only calls to this state, `IBV_QPS_*`.
    pub state: Option<u32>,
    /// Of [`Function::PostSend`] and the like: so many requests of the chain are taken before.
    pub accepted: usize,
    /// So many calls go well before.
    pub after: u32,
    /// Then so many fail.
    pub times: u32,
    /// With this code.
    pub errno: i32,
}

impl Failure {
    /// The next call fails.
    pub fn next(function: Function, errno: i32) -> Self {
        Self { function, state: None, accepted: 0, after: 0, times: 1, errno }
    }
}

/// The functions of libibverbs that can be counted, and made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Function {
    GetDeviceList,
    OpenDevice,
    CloseDevice,
    QueryDevice,
    QueryPort,
    QueryGid,
    QueryGidTable,
    QueryPkey,
    AllocPd,
    DeallocPd,
    RegMr,
    RegMrIova2,
    RegDmabufMr,
    DeregMr,
    CreateCompChannel,
    DestroyCompChannel,
    CreateCq,
    ResizeCq,
    DestroyCq,
    GetCqEvent,
    AckCqEvents,
    CreateSrq,
    DestroySrq,
    CreateQp,
    ModifyQp,
    DestroyQp,
    GetAsyncEvent,
    AckAsyncEvent,
    PollCq,
    ReqNotifyCq,
    PostSrqRecv,
    PostRecv,
    PostSend,
}

impl Function {
    /// The calls that end an object. They work on devices that have failed, and for processes that are dead.
    pub(super) fn ends_something(self) -> bool {
        use Function::*;
        matches!(
            self,
            CloseDevice
                | DeallocPd
                | DeregMr
                | DestroyCompChannel
                | DestroyCq
                | AckCqEvents
                | DestroySrq
                | DestroyQp
                | AckAsyncEvent
        )
    }
}
