//! A rank's steps through the library.

use std::net::SocketAddr;
use std::time::Duration;

use crossdock::experts::{Meeting, MeetingConfig};
use crossdock::{Authentication, Memory, PortConfig, ShmOptions};
use crossdock_benches::{Aligned, rail_ports};
use crossdock_ep::{
    Bf16, Group, GroupConfig, GroupOptions, LatencyOutputs, LatencyStep, Patience, Payload, Report, Rows,
    ScaleRule, Scales, ThroughputOutputs, ThroughputStep, Tokens,
};

use crate::control::{Control, Op, now_ns};
use crate::error::Error;
use crate::options::{Mode, PortName, name};
use crate::setup::Setup;

/// A rank's tokens in the form in which the library takes them.
#[derive(Default)]
pub struct Inputs {
    /// `[tokens, hidden]`.
    pub rows: Aligned<Bf16>,
    /// The same as bytes: what a throughput step of fp8, and the floor where nothing is quantised, begin with.
    pub values: Aligned<u8>,
    pub scales: Aligned<u8>,
}

/// One rank of the group.
pub struct Ours {
    group: Group,
    outputs: Outputs,
    /// `[tokens, hidden]`: what came back.
    pub combined: Aligned<Bf16>,
}

enum Outputs {
    Latency(LatencyOutputs),
    Throughput(ThroughputOutputs),
}

/// What has arrived, and where results go.
pub enum Arrived<'a, 'slot> {
    Latency(&'a mut LatencyStep<'slot>, &'a LatencyOutputs),
    Throughput(&'a mut ThroughputStep<'slot>, &'a ThroughputOutputs),
}

impl Ours {
    pub fn new(setup: &Setup, regions: &[Memory], rank: u32) -> Result<Self, Error> {
        // The library would count the processors of this thread, which has only one.
        let patience = if setup.crowded { Patience::SHARED_PROCESSOR } else { Patience::OWN_PROCESSOR };
        Self::over(setup, regions, rank, patience)
    }

    /// A rank that reaches the others through a port, as from host to host.
    pub fn meet<C: FnMut() -> Result<(), Error>>(
        setup: &Setup,
        control: &mut Control<'_, C>,
    ) -> Result<Self, Error> {
        let options = &setup.options;
        let (port, rank) = (name(options.port), control.rank);
        // A key would have to be told over memory that anybody of this user can read.
        let mut meeting = MeetingConfig::new(setup.config.clone(), rank, Authentication::Off);
        meeting.ports = match options.port {
            PortName::Shm => vec![PortConfig::Shm(ShmOptions::default())],
            PortName::Tcp => vec![PortConfig::Tcp(None)],
            PortName::Verbs => rail_ports(&options.devices, rank as usize),
        };
        let patience = if setup.crowded { Patience::SHARED_PROCESSOR } else { Patience::OWN_PROCESSOR };
        meeting.options = GroupOptions { deadline: DEADLINE, ..patient(patience) };
        let meeting = Meeting::open(meeting).map_err(|error| Error::NoMeeting { port, error })?;
        let address: SocketAddr = meeting.address().parse().expect("an engine is dialed at ip:port");
        let ports = control.exchange_ports(address.port())?;
        let addresses: Vec<String> =
            ports.into_iter().map(|port| SocketAddr::new(address.ip(), port).to_string()).collect();
        Ok(Self::of(setup, meeting.meet(&addresses, DEADLINE)?))
    }

    /// One that sleeps as soon as it has to wait.
    pub fn parked(setup: &Setup, regions: &[Memory], rank: u32) -> Result<Self, Error> {
        Self::over(setup, regions, rank, Patience { spins: 0, yields: 0 })
    }

    fn over(setup: &Setup, regions: &[Memory], rank: u32, patience: Patience) -> Result<Self, Error> {
        // SAFETY: the regions were allocated for this group and are mapped in all of its processes, each of which makes its
        // own rank of it, once.
        #[expect(unsafe_code, reason = "the regions are inherited, and not met")]
        let group = unsafe { Group::over(&setup.config, rank, regions.to_vec(), &patient(patience))? };
        Ok(Self::of(setup, group))
    }

    /// A group of its own for this rank, which has all experts: the same work with nobody to wait for.
    pub fn alone(setup: &Setup) -> Result<Self, Error> {
        let config = GroupConfig { max_tokens: vec![setup.options.tokens], ..setup.config.clone() };
        let mut groups = Group::in_process(&config, &patient(Patience::OWN_PROCESSOR))?;
        Ok(Self::of(setup, groups.remove(0)))
    }

    fn of(setup: &Setup, group: Group) -> Self {
        let outputs = match setup.options.mode {
            Mode::Latency => Outputs::Latency(LatencyOutputs::new(&group, setup.payload, setup.order())),
            Mode::Throughput => Outputs::Throughput(ThroughputOutputs::new(&group, setup.payload)),
        };
        let combined = Aligned::new(setup.problem.tokens * setup.problem.hidden);
        Self { group, outputs, combined }
    }

    /// A dispatch and a combine of the latency mode in one go, without anybody to meet. Between them `compute` sees what
    /// has arrived.
    pub fn whole(
        &mut self,
        setup: &Setup,
        rank: u32,
        inputs: &Inputs,
        compute: impl FnOnce(Arrived<'_, '_>),
    ) -> Result<(), Error> {
        let Self { group, outputs: Outputs::Latency(outputs), combined } = self else {
            return Err(Error::NoRoundTrips);
        };
        let dispatch =
            group.slot(0).dispatch(&tokens(setup, rank, inputs)).map_err(Error::ep("the dispatch"))?;
        let mut step = dispatch.latency(outputs).map_err(Error::ep("the dispatch's receive half"))?;
        compute(Arrived::Latency(&mut step, outputs));
        let combine = step.combine();
        let report =
            combine.receive(setup.problem.weights(rank), combined).map_err(Error::ep("the combine"))?;
        waited_ns(&report).map(drop)
    }

    /// A dispatch and a combine, each when all ranks have met. Between them `compute` sees what has arrived.
    pub fn step<C: FnMut() -> Result<(), Error>>(
        &mut self,
        setup: &Setup,
        control: &mut Control<'_, C>,
        inputs: &Inputs,
        slot: u32,
        compute: impl FnOnce(Arrived<'_, '_>, &Control<'_, C>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Self { group, outputs, combined } = self;
        let weights = setup.problem.weights(control.rank);
        let tokens = tokens(setup, control.rank, inputs);
        let slot = group.slot(slot as usize);
        let mut bytes = (0, 0);
        let mut tell = |report: &Report| {
            bytes = (bytes.0 + report.wire_bytes, bytes.1 + report.logical_bytes);
            waited_ns(report)
        };
        match outputs {
            Outputs::Latency(outputs) => {
                let mut arrived = None;
                control.time(Op::Dispatch, || {
                    let dispatch = slot.dispatch(&tokens).map_err(Error::ep("the dispatch"))?;
                    let sent = now_ns();
                    let step = dispatch.latency(outputs).map_err(Error::ep("the dispatch's receive half"))?;
                    let waited = tell(step.report())?;
                    arrived = Some(step);
                    Ok((sent, waited))
                })?;
                let mut step = arrived.expect("the dispatch has run");
                compute(Arrived::Latency(&mut step, outputs), control)?;
                control.time(Op::Combine, || {
                    let combine = step.combine();
                    let sent = now_ns();
                    let all = combine.receive(weights, combined).map_err(Error::ep("the combine"))?;
                    Ok((sent, tell(&all)?))
                })?;
            }
            Outputs::Throughput(outputs) => {
                let mut arrived = None;
                control.time(Op::Dispatch, || {
                    let dispatch = slot.dispatch(&tokens).map_err(Error::ep("the dispatch"))?;
                    let sent = now_ns();
                    let step =
                        dispatch.throughput(outputs).map_err(Error::ep("the dispatch's receive half"))?;
                    let waited = tell(step.report())?;
                    arrived = Some(step);
                    Ok((sent, waited))
                })?;
                let mut step = arrived.expect("the dispatch has run");
                compute(Arrived::Throughput(&mut step, outputs), control)?;
                control.time(Op::Combine, || {
                    let combine = step.combine(None).map_err(Error::ep("the combine"))?;
                    let sent = now_ns();
                    let all = combine.receive(&[], None, combined).map_err(Error::ep("the combine"))?;
                    Ok((sent, tell(&all)?))
                })?;
            }
        }
        control.tell_bytes(bytes.0, bytes.1);
        Ok(())
    }
}

impl Arrived<'_, '_> {
    /// Where the results of one of this rank's groups go, in a group of so many ranks, and of whose tokens they are: source rank and token, row by
    /// row.
    pub fn results_mut(&mut self, ranks: u32, group: usize) -> (&mut [Bf16], Vec<(u32, usize)>) {
        let ranks = 0..ranks;
        match self {
            Self::Latency(step, outputs) => {
                let outputs = &**outputs;
                let tokens = &outputs.sources()[group * outputs.rows()..][..outputs.rows()];
                let of_source = |source: u32| {
                    outputs.range(group, source).map(move |row| (source, tokens[row as usize] as usize))
                };
                let tokens = ranks.flat_map(of_source).collect();
                (step.results_mut(group), tokens)
            }
            Self::Throughput(step, outputs) => {
                let outputs = &**outputs;
                let of_source = |source: u32| {
                    outputs.range(source).map(move |row| (source, outputs.tokens()[row] as usize))
                };
                let tokens = ranks.flat_map(of_source).collect();
                (step.results_mut(), tokens)
            }
        }
    }
}

fn tokens<'a>(setup: &'a Setup, rank: u32, inputs: &'a Inputs) -> Tokens<'a> {
    let problem = &setup.problem;
    let rows = match (setup.options.mode, setup.payload) {
        (_, Payload::Bf16) => Rows::Bf16(&inputs.rows),
        (Mode::Latency, _) => Rows::Fp8(&inputs.rows, ScaleRule::Plain),
        (Mode::Throughput, payload) => {
            let scales = Scales::by_token(&inputs.scales, setup.scale_bytes());
            Rows::Made { payload, values: &inputs.values, scales }
        }
    };
    // The latency mode takes weights back in the combine.
    let weights = (setup.options.mode == Mode::Throughput).then_some(problem.weights(rank));
    Tokens { rows, choices: problem.choices(rank), weights }
}

fn patient(patience: Patience) -> GroupOptions {
    GroupOptions { patience: Some(patience), ..GroupOptions::default() }
}

/// For meeting the others, and for a rank that is late.
const DEADLINE: Duration = Duration::from_secs(60);

fn waited_ns(report: &Report) -> Result<u64, Error> {
    if !report.masked.is_empty() {
        return Err(Error::Masked { ranks: report.masked.clone() });
    }
    Ok(report.waits.iter().map(|wait| wait.as_nanos() as u64).sum())
}
