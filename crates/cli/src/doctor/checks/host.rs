//! Processor, memory, limits, and the system calls that everything rests on.

use super::{Check, bytes, count};
use crate::doctor::facts::{Facts, Limit};

pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![
        cpu(facts),
        memory(facts),
        huge_pages(facts),
        memfd(facts),
        pidfd(facts),
        unix_sockets(facts),
        tcp_sockets(facts),
        descriptors(facts.limits.files),
        threads(facts.limits.threads),
        locked_memory(facts),
        ptrace(facts),
        clock(facts),
    ];
    checks.extend(container(facts));
    checks
}

fn cpu(facts: &Facts) -> Check {
    let cpu = &facts.cpu;
    let model = cpu.model.as_deref().unwrap_or("a processor without a name");
    let (cores, nodes) = (count(cpu.online, "core", "cores"), facts.topology.nodes.len().max(1));
    let allowed = match cpu.allowed == cpu.online {
        true => String::new(),
        false => format!(", {} of them for this process", cpu.allowed),
    };
    let place = format!("{model}, {cores}{allowed}, {}", count(nodes, "NUMA node", "NUMA nodes"));
    let says = match cpu.vectors {
        Some(vectors) => format!("{place}; copies use {vectors}, with stores that go past the cache"),
        None => {
            format!("{place}; copies go through the cache, which costs a third of the memory's speed or more")
        }
    };
    match (cpu.vectors, cpu.allowed) {
        (_, ..=1) => {
            Check::note("cpu", format!("{says}; a node's progress loop shares the only core with the engine"))
                .advice("give the process two cores or more: taskset, docker --cpus, or the pod's limits")
        }
        (Some("AVX-512" | "AVX2" | "NEON"), _) => Check::good("cpu", says),
        _ => Check::note("cpu", says)
            .advice("in a virtual machine, pass the host's processor through (-cpu host)"),
    }
}

fn memory(facts: &Facts) -> Check {
    let memory = &facts.memory;
    let limit = memory.limit_bytes.map(|limit| format!(", of which this process may have {}", bytes(limit)));
    let (total, available) = (bytes(memory.total_bytes), bytes(memory.available_bytes));
    let says = format!("{total}{}, {available} available", limit.unwrap_or_default());
    match memory.available_bytes.min(memory.limit_bytes.unwrap_or(u64::MAX)) {
        LITTLE_MEMORY.. => Check::good("memory", says),
        _ => Check::degraded(
            "memory",
            format!("{says}: less than a small pool of pages needs"),
            "end what else runs here, or raise the container's limit of memory",
        ),
    }
}

fn huge_pages(facts: &Facts) -> Check {
    let memory = &facts.memory;
    let of_size = |size: u64| {
        let pages = memory.huge_pages.iter().filter(|pages| pages.page_bytes == size && pages.reserved > 0);
        pages
            .map(|pages| format!("{} of {} on node {}", pages.free, pages.reserved, pages.node))
            .collect::<Vec<_>>()
    };
    let free = memory.huge_pages.iter().any(|pages| pages.page_bytes == HUGE_PAGE_BYTES && pages.free > 0);
    let shared = memory.transparent_shared.as_deref();
    let by_itself = matches!(shared, Some("always" | "within_size" | "advise" | "force"));
    let transparent = format!("transparent ones for shared memory: {}", shared.unwrap_or("not there"));
    let giant = match of_size(1 << 30) {
        none if none.is_empty() => String::new(),
        giant => format!("; of 1 GiB {}", giant.join(", ")),
    };
    match (free, by_itself) {
        (true, _) => {
            let free = of_size(HUGE_PAGE_BYTES).join(", ");
            Check::good("huge-pages", format!("free of 2 MiB: {free}{giant}; {transparent}"))
        }
        (false, true) => Check::good("huge-pages", format!("none of 2 MiB is free; {transparent}{giant}")),
        (false, false) => Check::note(
            "huge-pages",
            format!(
                "none of 2 MiB is free, {transparent}{giant}: a pool is mapped in pages of 4 KiB, whose misses cost \
                 scattered copies time"
            ),
        )
        .advice(
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or reserve them: \
             echo N > /proc/sys/vm/nr_hugepages",
        ),
    }
}

fn memfd(facts: &Facts) -> Check {
    match &facts.tried.memfd {
        None => Check::good("memfd", "sealed shared memory can be made and mapped"),
        Some(why) => Check::unusable(
            "memfd",
            format!("no sealed shared memory, which every pool lies in: {why}"),
            "allow memfd_create and fcntl(F_ADD_SEALS) in the seccomp profile; gVisor and kernels before 3.17 lack them",
        ),
    }
}

fn pidfd(facts: &Facts) -> Check {
    match &facts.tried.pidfd {
        None => Check::good("pidfd", "the death of a peer on this host can be proven"),
        Some(why) => Check::degraded(
            "pidfd",
            format!("the death of a peer on this host cannot be proven, so shm connects to nobody: {why}"),
            "allow pidfd_open in the seccomp profile; kernels before 5.3 lack it",
        ),
    }
}

fn unix_sockets(facts: &Facts) -> Check {
    match &facts.tried.unix_sockets {
        None => Check::good("unix-sockets", "processes of this host can meet"),
        Some(why) => Check::unusable(
            "unix-sockets",
            format!("processes of this host cannot meet by abstract Unix sockets: {why}"),
            "allow sockets of the kind AF_UNIX in the seccomp or AppArmor profile",
        ),
    }
}

fn tcp_sockets(facts: &Facts) -> Check {
    match &facts.tried.tcp_sockets {
        None => Check::good("tcp-sockets", "TCP works over the loopback interface"),
        Some(why) => Check::unusable(
            "tcp-sockets",
            format!("no TCP over the loopback interface, and control streams are TCP: {why}"),
            "ip link set lo up; allow sockets of the kind AF_INET in the sandbox's profile",
        ),
    }
}

/// What peers cost: see `ShmOptions::max_lanes` and the figures of the benchmarks.
fn descriptors(files: Limit) -> Check {
    let Some(soft) = files.soft else {
        return Check::good("descriptors", "no limit of file descriptors");
    };
    let peers = soft.saturating_sub(DESCRIPTORS_OF_A_NODE) / DESCRIPTORS_OF_A_PEER;
    let says = format!(
        "{soft} file descriptors, enough for some {peers} peers over shm at {DESCRIPTORS_OF_A_PEER} each, and one more \
         for each further region that a peer shows"
    );
    let more = match files.hard {
        Some(hard) if hard <= soft => {
            "raise LimitNOFILE of the service, or docker --ulimit nofile=1048576".to_owned()
        }
        Some(hard) => format!("ulimit -n {hard}"),
        None => "ulimit -n 1048576".to_owned(),
    };
    match peers {
        MANY_PEERS.. => Check::good("descriptors", says),
        FEW_PEERS.. => Check::note("descriptors", says).advice(more),
        _ => Check::degraded("descriptors", says, more),
    }
}

fn threads(threads: Limit) -> Check {
    match threads.soft {
        Some(soft) if soft < FEW_THREADS => Check::degraded(
            "threads",
            format!(
                "the user may have {soft} threads, all processes together; a node has two, and its copy threads"
            ),
            "ulimit -u unlimited, or TasksMax of the service",
        ),
        Some(soft) => {
            Check::good("threads", format!("the user may have {soft}; a node has two, and its copy threads"))
        }
        None => Check::good("threads", "no limit; a node has two, and its copy threads"),
    }
}

fn locked_memory(facts: &Facts) -> Check {
    let name = "locked-memory";
    let Some(soft) = facts.limits.locked_bytes.soft else {
        return Check::good(name, "no limit: any pool can be registered with an RDMA device");
    };
    if facts.capabilities.ipc_lock {
        let says =
            format!("a limit of {}, which CAP_IPC_LOCK lifts: any pool can be registered", bytes(soft));
        return Check::good(name, says);
    }
    if soft >= facts.memory.total_bytes && facts.memory.total_bytes > 0 {
        return Check::good(name, format!("a limit of {}, more than there is memory", bytes(soft)));
    }
    let says =
        format!("registering with an RDMA device locks memory, and only {} may be locked", bytes(soft));
    let advice = "ulimit -l unlimited (LimitMEMLOCK=infinity of the service, docker --ulimit memlock=-1, or \
                  /etc/security/limits.d)";
    match facts.topology.devices.is_empty() {
        false => Check::degraded(name, format!("{says}: larger pools are refused"), advice),
        true => Check::note(name, format!("{says}; there is no such device here")),
    }
}

fn ptrace(facts: &Facts) -> Check {
    let private = "shm reaches memory that crossdock did not allocate";
    let own = "Memory that crossdock allocates needs nothing of this";
    match facts.ptrace_scope.unwrap_or(0) {
        _ if facts.capabilities.ptrace => Check::good("ptrace", format!("{private}: CAP_SYS_PTRACE allows it")),
        0 => Check::good("ptrace", format!("{private}, between processes of one user")),
        1 => Check::note("ptrace", format!("ptrace_scope is 1: {private} only where its owner allows it. {own}"))
            .advice("open the port with ShmOptions::allow_ptrace, or sysctl kernel.yama.ptrace_scope=0"),
        2 => Check::note("ptrace", format!("ptrace_scope is 2: {private} only with CAP_SYS_PTRACE. {own}"))
            .advice("give the processes CAP_SYS_PTRACE, or sysctl kernel.yama.ptrace_scope=0"),
        scope => Check::note(
            "ptrace",
            format!("ptrace_scope is {scope}: no process reaches into another, so private memory goes by tcp. {own}"),
        )
        .advice("it can be lowered only by a new start of the machine"),
    }
}

fn clock(facts: &Facts) -> Check {
    let clock = &facts.clock;
    let Some(current) = clock.current.as_deref() else {
        return Check::note("clock", "the kernel does not tell its clock source");
    };
    if !SLOW_CLOCKS.contains(&current) {
        return Check::good("clock", format!("{current}, which is read without a system call"));
    }
    let says = format!(
        "{current}: every look at the clock is a system call or a slow device, and each turn takes one"
    );
    let advice = match clock.available.iter().find(|other| !SLOW_CLOCKS.contains(&other.as_str())) {
        Some(other) => format!("echo {other} > /sys/devices/system/clocksource/clocksource0/current_clocksource"),
        None => "see dmesg for why the processor's own clock was given up; tsc=reliable on the kernel's command line \
                 keeps it"
            .into(),
    };
    Check::degraded("clock", says, advice)
}

fn container(facts: &Facts) -> Option<Check> {
    let container = &facts.container;
    let sign = container.sign.as_deref()?;
    let says = format!("this is a container ({sign})");
    Some(match container.shm_bytes {
        Some(size) if size < LITTLE_SHM => Check::note(
            "container",
            format!(
                "{says} with a /dev/shm of {}: crossdock uses none of it, NCCL and PyTorch's workers do",
                bytes(size)
            ),
        )
        .advice("docker --shm-size=16g, or a memory-backed volume at /dev/shm"),
        _ => Check::good("container", says),
    })
}

const HUGE_PAGE_BYTES: u64 = 2 << 20;
const LITTLE_MEMORY: u64 = 256 << 20;
const LITTLE_SHM: u64 = 1 << 30;
/// Sockets, epoll, eventfds and the pool of a node, and those of the engine around it.
const DESCRIPTORS_OF_A_NODE: u64 = 64;
const DESCRIPTORS_OF_A_PEER: u64 = 6;
const MANY_PEERS: u64 = 512;
const FEW_PEERS: u64 = 32;
const FEW_THREADS: u64 = 64;
/// Those that the kernel reads from a device, or without a fast way for programs.
const SLOW_CLOCKS: &[&str] = &["hpet", "acpi_pm", "jiffies", "refined-jiffies", "pit", "xen"];
