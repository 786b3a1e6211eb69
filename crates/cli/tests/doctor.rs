//! `crossdock doctor`: here, and on machines of paper.

#[path = "../../ports/verbs/tests/machine/mod.rs"]
mod machine;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};

use machine::{Carrier, Machine, NO_GID};
use serde_json::Value;

fn doctor(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_crossdock")).arg("doctor").args(arguments).output().expect("it starts")
}

/// What is told of a machine, and the exit code.
struct Told {
    json: Value,
    code: Option<i32>,
}

fn told(machine: &Machine) -> Told {
    let root = machine.root().to_str().expect("a plain path");
    let output = doctor(&["--json", "--root", root]);
    let json = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    Told { json, code: output.status.code() }
}

fn page(machine: &Machine) -> String {
    let output = doctor(&["--root", machine.root().to_str().expect("a plain path")]);
    String::from_utf8(output.stdout).expect("text")
}

impl Told {
    /// The only check of that name that is about that device, if there is one.
    fn find(&self, name: &str, of: &str) -> Option<&Value> {
        let checks = self.json["checks"].as_array().expect("a list");
        let about = |check: &&Value| check["name"] == name && check["of"].as_str().unwrap_or("") == of;
        let mut found = checks.iter().filter(about);
        let first = found.next();
        assert!(found.next().is_none(), "{name} of {of} twice: {}", self.json);
        first
    }

    fn state(&self, name: &str, of: &str) -> &str {
        let check = self.find(name, of).unwrap_or_else(|| panic!("no {name} of {of}: {}", self.json));
        check["state"].as_str().expect("a word")
    }

    /// It is in that state, says so, and advises so.
    fn expect(&self, name: &str, of: &str, state: &str, says: &str, advice: &str) {
        assert_eq!(self.state(name, of), state, "{name} of {of}: {}", self.json["checks"]);
        let check = self.find(name, of).expect("it is there");
        let text = |key: &str| check[key].as_str().unwrap_or("").to_owned();
        assert!(text("says").contains(says), "{name}: {check}");
        assert!(text("advice").contains(advice), "{name}: {check}");
    }

    /// Names of those in a state.
    fn of_state(&self, state: &str) -> Vec<String> {
        let checks = self.json["checks"].as_array().expect("a list");
        let wanted = checks.iter().filter(|check| check["state"] == state);
        wanted.map(|check| format!("{} {}", check["name"], check["of"]).replace('"', "")).collect()
    }

    /// The code is that of the state. What is tried is tried on the machine that the tests run on, where it has to work.
    fn ends(&self, code: i32, state: &str) {
        assert_eq!((self.code, &self.json["state"]), (Some(code), &state.into()), "{}", self.json["checks"]);
    }
}

#[test]
fn this_machine_is_looked_at() {
    let told = doctor(&["--json"]);
    let json: Value = serde_json::from_slice(&told.stdout).expect("one object");
    let code = match json["state"].as_str().expect("a state") {
        "good" => 0,
        "degraded" => 1,
        other => panic!("{other}: the tests run here, so crossdock can: {}", json["checks"]),
    };
    assert_eq!(told.status.code(), Some(code), "{}", json["checks"]);
    for check in json["checks"].as_array().expect("a list") {
        let is_bad = matches!(check["state"].as_str(), Some("degraded" | "unusable"));
        assert!(!is_bad || check["advice"].is_string(), "no advice: {check}");
        assert!(check["says"].as_str().is_some_and(|says| !says.is_empty()), "{check}");
    }
    let names: Vec<&str> = json["checks"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|check| check["name"].as_str())
        .collect();
    for name in
        ["cpu", "memory", "memfd", "pidfd", "unix-sockets", "tcp-sockets", "descriptors", "locked-memory"]
    {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    assert!(json["facts"]["memory"]["total_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    assert!(json["facts"]["cuda"]["driver"].is_object(), "{}", json["facts"]["cuda"]);
    let page = doctor(&[]);
    assert_eq!(page.status.code(), Some(code));
    let page = String::from_utf8(page.stdout).expect("text");
    assert!(page.contains("Peers on this host: shm") && page.contains("All in all: "), "{page}");
}

/// What the process answers that asks the GPUs' driver: both libraries, whether they are there or not.
#[test]
fn the_driver_is_asked_in_a_process_of_its_own() {
    let output = Command::new(env!("CARGO_BIN_EXE_crossdock"))
        .args(["doctor-driver", "0000:01:00.0"])
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{text}"))).collect();
    for library in ["nvml", "driver"] {
        let answers: Vec<&Value> = lines.iter().filter_map(|line| line.get(library)).collect();
        let [answer] = answers[..] else { panic!("{text}") };
        let is_told = answer["told"].is_object();
        let is_refused = answer["refused"]["says"].is_string() && answer["refused"]["advice"].is_string();
        assert!(is_told != is_refused, "{text}");
    }
}

/// `docs/doctor.md` has every check, and none that is not there any more.
#[test]
fn every_check_is_explained() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/doctor/checks");
    let mut known = Vec::new();
    for file in std::fs::read_dir(folder).expect("the sources are there") {
        let text = std::fs::read_to_string(file.expect("a file").path()).expect("text");
        // Names stand behind a constructor, or in a `let name`.
        let calls = ["Check::good(", "Check::note(", "Check::degraded(", "Check::unusable(", "let name ="];
        for call in calls {
            let names = text
                .split(call)
                .skip(1)
                .filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next());
            known.extend(names.map(str::to_owned));
        }
    }
    known.sort();
    known.dedup();
    assert!(known.len() > 25, "{known:?}");
    let page = include_str!("../../../docs/doctor.md");
    let explained = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let mut explained: Vec<&str> = explained.collect();
    explained.sort();
    assert_eq!(explained, known);
}

#[test]
fn eight_gpus_with_their_adapters_are_good() {
    let machine = Machine::with_eight_gpus();
    let told = told(&machine);
    told.ends(0, "good");
    assert_eq!(told.of_state("note"), ["gpu-fabric null"], "{}", told.json["checks"]);
    assert!(told.json["facts"]["cuda"].is_null(), "the driver of a machine of paper cannot be asked");
    for at in 0..8 {
        told.expect("rdma-port", &format!("mlx5_{at}/1"), "good", "active, InfiniBand at 400 Gbit/s", "");
        told.expect("rdma-pcie", &format!("mlx5_{at}"), "good", "504 Gbit/s for 400", "");
        let gpu = machine::address(&Machine::gpu_path(at)).to_owned();
        told.expect("gpu-distance", &gpu, "good", &format!("mlx5_{at} (PIX)"), "");
    }
    told.expect("gpu", "", "good", "8 GPUs, NVIDIA H200; driver 570.86.15, open kernel modules", "");
    told.expect("gpu-memory", "", "good", "nvidia_peermem", "");
    told.expect("cpu", "", "good", "Xeon(R) Platinum 8480C, 112 cores, 2 NUMA nodes; copies use AVX-512", "");
    let topology = &told.json["facts"]["topology"];
    assert_eq!(topology["gpus"][5]["distances"]["mlx5_4"], "NODE");
    assert_eq!(topology["gpus"][5]["distances"]["mlx5_0"], "SYS");
    let page = page(&machine);
    assert!(page.contains("Ready for RDMA: mlx5_0/1, mlx5_1/1"), "{page}");
    assert!(page.contains("together 3200 Gbit/s"), "{page}");
    // What is good of eight devices is one line, and a row of a table each.
    assert_eq!(page.lines().filter(|line| line.contains("rdma-port")).count(), 1, "{page}");
    assert_eq!(page.lines().filter(|line| line.starts_with("mlx5_")).count(), 8, "{page}");
}

#[test]
fn a_tray_of_a_rack_is_good_until_its_channels_go() {
    let machine = Machine::tray();
    let whole = told(&machine);
    whole.ends(0, "good");
    whole.expect("cpu", "", "good", "Arm Neoverse V2, 144 cores, 2 NUMA nodes; copies use NEON", "");
    whole.expect("gpu-imex", "", "good", "1 IMEX channel", "");
    whole.expect("gpu-memory", "", "good", "dma-bufs", "");
    whole.expect("rdma-gid", "mlx5_3/1", "good", "GID 2 is 10.0.0.13, RoCE v2", "");
    whole.expect("rdma-mtu", "mlx5_3/1", "good", "4096 bytes", "");
    whole.expect("clock", "", "good", "arch_sys_counter", "");
    whole.expect("network", "", "good", "5 interfaces are up, the fastest rail", "");
    whole.expect("libibverbs", "", "good", "at /usr/lib/x86_64-linux-gnu/libibverbs.so.1", "");
    machine.remove("/dev/nvidia-caps-imex-channels");
    let broken = told(&machine);
    broken.ends(1, "degraded");
    broken.expect("gpu-imex", "", "degraded", "no IMEX channel", "nvidia-imex");
    assert_eq!(broken.of_state("degraded"), ["gpu-imex null"]);
}

/// Each trouble alone is found, named and advised on, and nothing else is.
#[test]
fn what_is_broken_is_found() {
    type Break = fn(&Machine);
    /// How it is broken; then the check, its device, its words and its advice.
    type Case = (Break, [&'static str; 4]);
    const PORT: &str = "/sys/class/infiniband/mlx5_2/ports/1";
    let cases: &[Case] = &[
        (
            |machine| {
                machine.file(&format!("{PORT}/state"), "1: DOWN\n");
                machine.file(&format!("{PORT}/phys_state"), "2: Polling\n");
            },
            ["rdma-port", "mlx5_2/1", "DOWN, the link Polling", "cable"],
        ),
        (
            |machine| machine.file(&format!("{PORT}/state"), "2: INIT\n"),
            ["rdma-port", "mlx5_2/1", "no subnet manager", "opensm"],
        ),
        (
            |machine| machine.file(&format!("{PORT}/gids/0"), NO_GID),
            ["rdma-gid", "mlx5_2/1", "the table of GIDs is empty", "subnet manager"],
        ),
        (
            |machine| machine.file(&format!("{PORT}/pkeys/0"), "0x7fff\n"),
            ["rdma-partition", "mlx5_2/1", "limited member", "partitions.conf"],
        ),
        (
            |machine| machine.locked_memory("65536"),
            ["locked-memory", "", "only 64 KiB may be locked", "ulimit -l"],
        ),
        (
            |machine| machine.lanes(&Machine::adapter_path(2), "current", "32.0 GT/s PCIe", 8),
            ["rdma-pcie", "mlx5_2", "runs at 32 GT/s x8; the device can do 32 GT/s x16", "lspci"],
        ),
        (
            |machine| machine.lanes(&Machine::adapter_path(2), "current", "16.0 GT/s PCIe", 16),
            ["rdma-pcie", "mlx5_2", "runs at 16 GT/s x16", "lspci"],
        ),
        (
            |machine| machine.remove("/dev/infiniband/uverbs2"),
            ["rdma-access", "mlx5_2", "/dev/infiniband/uverbs2 is not there", "--device /dev/infiniband"],
        ),
        (
            |machine| machine.remove("/sys/class/infiniband_verbs/uverbs2"),
            ["rdma-access", "mlx5_2", "no file for this device", "modprobe ib_uverbs"],
        ),
        (
            |machine| machine.remove("/usr/lib/x86_64-linux-gnu/libibverbs.so.1"),
            ["libibverbs", "", "in none of the loader's folders", "libibverbs1"],
        ),
        (
            |machine| machine.remove("/sys/class/infiniband/mlx5_2"),
            ["rdma-adapter", "0000:44:00.0", "is no RDMA device here", "modprobe mlx5_ib"],
        ),
        (
            |machine| {
                machine.remove("/sys/module/nvidia_peermem");
                machine.file("/proc/sys/kernel/osrelease", "5.4.0-200-generic\n");
            },
            ["gpu-memory", "", "dma-bufs lack a kernel of 5.12", "modprobe nvidia_peermem"],
        ),
        (
            |machine| {
                machine.remove("/sys/module/nvidia_peermem");
                let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Release\n";
                machine.file("/proc/driver/nvidia/version", text);
            },
            ["gpu-memory", "", "NVIDIA's open kernel modules", "modprobe nvidia_peermem"],
        ),
        (
            |machine| machine.remove("/dev/nvidia3"),
            ["gpu-file", "0000:5b:00.0", "/dev/nvidia3 is not there", "--gpus all"],
        ),
        (
            |machine| machine.clock("hpet", "tsc hpet"),
            ["clock", "", "hpet: every look at the clock", "echo tsc > /sys"],
        ),
        (
            |machine| {
                let limits =
                    "Max open files  200  4096  files\nMax locked memory  unlimited  unlimited  bytes\n";
                machine.file("/proc/self/limits", limits);
            },
            ["descriptors", "", "200 file descriptors, enough for some 22 peers", "ulimit -n 4096"],
        ),
        (
            |machine| machine.file("/proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 100000 kB\n"),
            ["memory", "", "less than a small pool", "limit of memory"],
        ),
    ];
    for (breaks, [name, of, says, advice]) in cases {
        let machine = Machine::with_eight_gpus();
        breaks(&machine);
        let told = told(&machine);
        told.ends(1, "degraded");
        told.expect(name, of, "degraded", says, advice);
        let subject = if of.is_empty() { "null" } else { of };
        assert_eq!(told.of_state("degraded"), [format!("{name} {subject}")], "{}", told.json["checks"]);
        let page = page(&machine);
        assert!(page.contains("\ndegraded  "), "{page}");
        assert!(page.contains("-> "), "{page}");
    }
}

/// What is worth knowing, and nothing bad: the machine stays good.
#[test]
fn what_is_worth_knowing_is_a_note() {
    type Change = fn(&Machine);
    type Case = (Change, [&'static str; 4]);
    let cases: &[Case] = &[
        (
            |machine| machine.file("/proc/sys/kernel/yama/ptrace_scope", "1\n"),
            ["ptrace", "", "ptrace_scope is 1", "allow_ptrace"],
        ),
        (
            |machine| machine.file("/proc/sys/kernel/yama/ptrace_scope", "3\n"),
            ["ptrace", "", "no process reaches into another", "new start"],
        ),
        (|machine| machine.status("7", 0), ["cpu", "", "112 cores, 1 of them for this process", "taskset"]),
        (
            |machine| {
                machine.file("/.dockerenv", "");
                machine.file("/proc/self/mounts", "shm /dev/shm tmpfs rw,nosuid,size=65536k 0 0\n");
            },
            ["container", "", "a /dev/shm of 64 MiB", "--shm-size"],
        ),
        (
            |machine| machine.interface("eth0", "up", 100_000, 1500),
            ["network", "", "small packets", "ip link set eth0 mtu 9000"],
        ),
        (
            |machine| machine.file("/sys/class/infiniband/mlx5_2/ports/1/counters/symbol_error", "12\n"),
            ["rdma-counters", "mlx5_2/1", "symbol_error 12", "cable"],
        ),
        (
            |machine| {
                let path = Machine::adapter_path(2);
                machine.lanes(&path, "current", "16.0 GT/s PCIe", 16);
                machine.lanes(path.rsplit_once('/').expect("a bridge").0, "max", "16.0 GT/s PCIe", 16);
            },
            ["rdma-pcie", "mlx5_2", "carries 252 Gbit/s, less than the 400 Gbit/s", "a slot"],
        ),
        (
            |machine| machine.remove("/proc/driver/nvidia/gpus/0000:13:00.0"),
            ["gpu", "", "7 of 8 GPUs given to this process", "--gpus all"],
        ),
    ];
    for (changes, [name, of, says, advice]) in cases {
        let machine = Machine::with_eight_gpus();
        changes(&machine);
        let told = told(&machine);
        told.ends(0, "good");
        told.expect(name, of, "note", says, advice);
    }
}

#[test]
fn roce_is_judged_by_its_interface() {
    let machine = Machine::tray();
    machine.interface("rail1", "up", 400_000, 1500);
    machine.file("/sys/class/infiniband/mlx5_1/ports/1/hw_counters/out_of_sequence", "9\n");
    machine.file("/sys/class/infiniband/mlx5_0/ports/1/gids/2", NO_GID);
    for gid in 1..3 {
        machine.file(&format!("/sys/class/infiniband/mlx5_2/ports/1/gids/{gid}"), NO_GID);
    }
    machine.file("/sys/class/infiniband/mlx5_3/ports/1/state", "1: DOWN\n");
    machine.file("/sys/class/infiniband/mlx5_3/ports/1/phys_state", "3: Disabled\n");
    let told = told(&machine);
    told.ends(1, "degraded");
    told.expect(
        "rdma-mtu",
        "mlx5_1/1",
        "note",
        "RDMA sends 1024 bytes each instead of 4096",
        "rail1 mtu 9000",
    );
    told.expect("rdma-counters", "mlx5_1/1", "note", "packets were lost: out_of_sequence 9", "PFC");
    told.expect("rdma-gid", "mlx5_0/1", "note", "of the link alone", "dev rail0");
    told.expect("rdma-gid", "mlx5_2/1", "degraded", "RoCE v1 does not leave the switch", "IPv4 address");
    told.expect("rdma-port", "mlx5_3/1", "degraded", "its interface is not up", "ip link set rail3 up");
    let ready = told.json["follows"].as_array().and_then(|lines| lines.last()).and_then(Value::as_str);
    assert_eq!(
        ready,
        Some(
            "Ready for RDMA: mlx5_0/1, mlx5_1/1, together 800 Gbit/s; used where a node names a verbs port (docs/rdma.md)."
        )
    );
}

#[test]
fn hardware_that_is_not_there_is_nothing_bad() {
    let machine = Machine::bare();
    machine.locked_memory("65536");
    let told = told(&machine);
    told.ends(0, "good");
    told.expect("rdma", "", "note", "no RDMA device", "");
    told.expect("gpu", "", "note", "no NVIDIA GPU", "");
    told.expect("locked-memory", "", "note", "there is no such device here", "");
    assert!(told.find("libibverbs", "").is_none());
}

#[test]
fn hardware_without_its_driver_is_bad() {
    let machine = Machine::bare();
    let path = "pci0000:10/0000:10:01.0/0000:11:00.0";
    let gpu = |driver| machine::Card { path, vendor: "0x10de", class: "0x030200", node: 0, driver };
    machine.card(&gpu("vfio-pci"));
    told(&machine).expect("gpu", "", "note", "given to another driver", "");
    machine.remove(&format!("/sys/devices/{path}/driver"));
    let bare = told(&machine);
    bare.ends(1, "degraded");
    bare.expect("gpu", "", "degraded", "driver is not loaded", "modprobe nvidia");
}

#[test]
fn a_device_of_software_needs_no_slot() {
    let machine = Machine::bare();
    machine.software_rdma("rxe0", 0, "eth0");
    machine.libibverbs("1.14.50.0");
    let told = told(&machine);
    told.ends(0, "good");
    told.expect("rdma-gid", "rxe0/1", "good", "GID 2 is 10.0.0.1, RoCE v2", "");
    assert!(told.find("rdma-pcie", "rxe0").is_none());
}

#[test]
fn an_adapter_without_infiniband_keys_is_told_apart() {
    let machine = Machine::bare();
    machine.libibverbs("1.14.50.0");
    let path = "pci0000:10/0000:10:01.0/0000:11:00.0";
    machine.adapter(path, 0);
    machine.rdma("mlx5_0", path, 0, Carrier::InfiniBand);
    machine.file("/sys/class/infiniband/mlx5_0/ports/1/pkeys/0", "0x0000\n");
    told(&machine).expect("rdma-partition", "mlx5_0/1", "degraded", "no partition key", "full member");
}

#[test]
fn a_folder_that_is_no_machine_is_refused() {
    let output = doctor(&["--root", "/nowhere/at/all"]);
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("nothing can be known of this machine: /nowhere/at/all/proc"), "{errors}");
}

/// Two doctors, over TCP where there is no RDMA: every rail of one with every one of the other, bytes compared. A peer
/// that is not there is a degraded check and no hang.
#[test]
fn two_machines_try_their_rails() {
    let mut listening = Command::new(env!("CARGO_BIN_EXE_crossdock"))
        .args(["doctor", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(listening.stdout.take().expect("it is a pipe")).lines();
    let line = lines.next().expect("a line").expect("text");
    let address = line.split_whitespace().nth(2).expect("waiting at ADDR for").to_owned();
    let output = doctor(&["--json", "--peer", &address]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert!(listening.wait().expect("it has ended").success());
    let peer = &json["facts"]["peer"];
    assert!(peer["error"].is_null(), "{peer}");
    let pairs = peer["pairs"].as_array().expect("a list");
    assert!(pairs.iter().any(|pair| pair["kind"] == "tcp"), "{peer}");
    // In the VM each of two devices writes to each, one of them the peer's.
    let rdma = pairs.iter().filter(|pair| pair["kind"] == "verbs").count();
    if let Ok(devices) = std::env::var("CROSSDOCK_VERBS_DEVICES") {
        let count = devices.split(',').count();
        assert_eq!(rdma, count * count, "{peer}");
    }
    for pair in pairs {
        assert!(pair["error"].is_null(), "{pair}");
        assert_eq!(pair["measured"]["verified_bytes"], 4 << 20, "{pair}");
        assert!(pair["measured"]["gb_per_s"].as_f64().expect("a number") > 0.0);
        assert!(pair["measured"]["latency_us_p50"].as_f64().expect("a number") > 0.0);
    }
    let checks = json["checks"].as_array().expect("a list");
    let told = checks.iter().filter(|check| check["name"] == "peer" && check["state"] == "good").count();
    assert_eq!(told, pairs.len());

    let output = doctor(&["--json", "--peer", &address]);
    assert_eq!(output.status.code(), Some(1), "nobody listens there any more");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert!(json["facts"]["peer"]["error"].is_string());
}

/// Whoever speaks another language is told so, and the doctor that listened ends with an error.
#[test]
fn a_peer_that_is_no_doctor_is_an_error() {
    let stranger = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = stranger.local_addr().expect("bound").to_string();
    let answers = std::thread::spawn(move || {
        let (mut stream, _) = stranger.accept().expect("the doctor comes");
        let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n");
    });
    let output = doctor(&["--json", "--peer", &address]);
    answers.join().expect("it has ended");
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert!(json["facts"]["peer"]["error"].is_string(), "{json}");
}

/// The side that listens hears numbers that mean nothing, and then what is no question: an answer that says so, an error,
/// and no panic.
#[test]
fn odd_questions_are_answered_or_refused() {
    let mut listening = Command::new(env!("CARGO_BIN_EXE_crossdock"))
        .args(["doctor", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(listening.stdout.take().expect("it is a pipe")).lines();
    let line = lines.next().expect("a line").expect("text");
    let address = line.split_whitespace().nth(2).expect("waiting at ADDR for").to_owned();
    let mut stream = TcpStream::connect(address).expect("it listens");
    let mut answers = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
    // An address is told before the peer's is looked at.
    let odd: [(&str, &[&str]); 5] = [
        (r#"{"open":{"rail":99,"address":"00"}}"#, &["failed"]),
        (r#"{"open":{"rail":0,"address":"zz"}}"#, &["opened", "failed"]),
        (r#"{"open":{"rail":0,"address":"78645441"}}"#, &["opened", "failed"]),
        (r#"{"verify":{"seed":1}}"#, &["done"]),
        (r#""close""#, &["done"]),
    ];
    for (number, (says, expected)) in odd.iter().enumerate() {
        writeln!(stream, r#"{{"number":{number},"says":{says}}}"#).expect("it reads");
        for expected in *expected {
            let line = answers.next().expect("a line").expect("text");
            let answer: Value = serde_json::from_str(&line).expect("JSON");
            assert_eq!(answer["number"], number, "{says}: {answer}");
            assert!(answer["says"][expected].is_object(), "{says}: {answer}");
        }
    }
    writeln!(stream, "HELO example.org").expect("it reads");
    let output = listening.wait_with_output().expect("it has ended");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
}
