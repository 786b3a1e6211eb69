//! What there is to know of a machine before anything is judged. All but [`Tried`] and [`Cuda`] is read below a root
//! folder, so that the tree of another machine can be looked at too.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crossdock_verbs::topology::{Topology, numbers_of_list};
use serde::Serialize;

use super::cuda::Cuda;
use super::peer::Peer;
use super::tried::Tried;

/// A machine, as this process sees it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Facts {
    /// `6.8.0-45-generic`.
    pub kernel: Option<String>,
    pub cpu: Cpu,
    pub memory: Memory,
    pub limits: Limits,
    pub capabilities: Capabilities,
    /// 0: processes of one user may reach into each other; 1: only where the target allows it; 2: only with a
    /// capability; 3: never. Nothing where the kernel has no such rule.
    pub ptrace_scope: Option<u32>,
    pub clock: Clock,
    pub container: Container,
    pub interfaces: Vec<Interface>,
    /// Those of the kernel's modules that matter here, and whether they are there.
    pub modules: BTreeMap<&'static str, bool>,
    /// Whether the files of the RDMA devices can be opened, by name.
    pub uverbs: BTreeMap<String, Access>,
    pub libibverbs: Option<Library>,
    pub nvidia: Option<Driver>,
    /// Numbers of the GPUs whose files are there.
    pub gpu_files: Vec<u32>,
    /// Channels that processes of several machines of one NVLink domain share memory by.
    pub imex_channels: Vec<String>,
    pub tried: Tried,
    /// What the CUDA driver and NVML say, where this machine is looked at.
    pub cuda: Option<Cuda>,
    /// What goes between this machine and another, where that was asked for.
    pub peer: Option<Peer>,
    #[serde(serialize_with = "super::json::topology")]
    pub topology: Topology,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Cpu {
    pub model: Option<String>,
    /// The best vectors that copies can use: `AVX-512`, `AVX2`, `SSE2`, `NEON`.
    pub vectors: Option<&'static str>,
    /// Whether stores can go past the cache.
    pub has_streaming_stores: bool,
    pub online: usize,
    /// How many of them this process may run on.
    pub allowed: usize,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
    /// What the control group allows.
    pub limit_bytes: Option<u64>,
    pub huge_pages: Vec<HugePages>,
    /// What the kernel does by itself for ordinary memory: `always`, `madvise`, `never`.
    pub transparent: Option<String>,
    /// The same for shared memory, as crossdock's is: `advise` and `never` among others.
    pub transparent_shared: Option<String>,
}

/// Reserved pages of one size on one NUMA node.
#[derive(Clone, Debug, Serialize)]
pub struct HugePages {
    pub node: u32,
    pub page_bytes: u64,
    pub reserved: u64,
    pub free: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Limits {
    pub locked_bytes: Limit,
    pub files: Limit,
    pub threads: Limit,
}

/// A limit of this process; nothing is no limit.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Limit {
    pub soft: Option<u64>,
    pub hard: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Capabilities {
    /// May lock memory beyond the limit.
    pub ipc_lock: bool,
    /// May reach into processes of others.
    pub ptrace: bool,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Clock {
    pub current: Option<String>,
    pub available: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Container {
    /// What tells that this is one: a file, or the cluster's variable.
    pub sign: Option<String>,
    /// How large `/dev/shm` is, where it says so.
    pub shm_bytes: Option<u64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Interface {
    pub name: String,
    pub is_up: bool,
    /// Whether a device is behind it, and not only the kernel.
    pub is_physical: bool,
    pub is_loopback: bool,
    pub mbit_per_s: Option<u64>,
    pub mtu_bytes: Option<u32>,
    pub addresses: Vec<String>,
}

/// Whether a device's file can be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    Open,
    Missing,
    Refused(String),
}

#[derive(Clone, Debug, Serialize)]
pub struct Library {
    pub path: String,
    /// The second number of its version, where its name tells: from 12 on it registers dma-bufs.
    pub minor: Option<u32>,
}

/// NVIDIA's kernel driver.
#[derive(Clone, Debug, Serialize)]
pub struct Driver {
    pub version: Option<String>,
    /// The open kernel modules, which alone export dma-bufs.
    pub is_open: bool,
}

impl Facts {
    /// Fails where neither `/proc` nor `/sys` can be looked into: then nothing would be known, and all would seem well.
    pub fn read(root: &Path) -> io::Result<Self> {
        for folder in ["proc", "sys"].map(|name| root.join(name)) {
            let told =
                |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
            fs::read_dir(&folder).map_err(told)?;
        }
        let root = Root(root);
        let topology = Topology::read(root.0);
        let tried = Tried::here();
        Ok(Self {
            kernel: root.text("/proc/sys/kernel/osrelease"),
            cpu: cpu(&root),
            memory: memory(&root, &topology),
            limits: limits(&root),
            capabilities: capabilities(&root),
            ptrace_scope: root.number("/proc/sys/kernel/yama/ptrace_scope"),
            clock: clock(&root),
            container: container(&root),
            interfaces: interfaces(&root, &tried),
            modules: MODULES.iter().map(|&name| (name, root.has(&format!("/sys/module/{name}")))).collect(),
            uverbs: uverbs(&root, &topology),
            libibverbs: libibverbs(&root),
            nvidia: nvidia(&root),
            gpu_files: gpu_files(&root),
            imex_channels: root.names("/dev/nvidia-caps-imex-channels"),
            tried,
            cuda: None,
            peer: None,
            topology,
        })
    }

    /// Whether the kernel is at least of this version; not where it does not tell.
    pub fn kernel_is_at_least(&self, major: u32, minor: u32) -> bool {
        let text = self.kernel.as_deref().unwrap_or_default();
        let mut numbers =
            text.split(|letter: char| !letter.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        version >= (major, minor)
    }

    pub fn has_module(&self, name: &str) -> bool {
        self.modules.get(name).copied().unwrap_or(false)
    }
}

/// The folder that stands for `/`.
pub struct Root<'a>(pub &'a Path);

impl Root<'_> {
    fn at(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    fn text(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.at(path)).ok()?;
        let text = String::from_utf8_lossy(&bytes).trim().to_owned();
        (!text.is_empty()).then_some(text)
    }

    fn number<T: std::str::FromStr>(&self, path: &str) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    fn has(&self, path: &str) -> bool {
        self.at(path).exists()
    }

    fn names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.at(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

fn cpu(root: &Root<'_>) -> Cpu {
    let text = root.text("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let of_name = |line: &str| {
            Some(line.split_once(':').filter(|(key, _)| key.trim() == name)?.1.trim().to_owned())
        };
        text.lines().find_map(of_name)
    };
    let flags = field("flags").or_else(|| field("Features")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|known| known == flag);
    let vectors = [("avx512f", "AVX-512"), ("avx2", "AVX2"), ("sse2", "SSE2"), ("asimd", "NEON")];
    let vectors = vectors.into_iter().find(|(flag, _)| has(flag)).map(|(_, name)| name);
    let online = numbers_of_list(&root.text("/sys/devices/system/cpu/online").unwrap_or_default()).len();
    let allowed = status(root, "Cpus_allowed_list").map_or(online, |list| numbers_of_list(&list).len());
    Cpu {
        model: field("model name").or_else(|| arm_model(&field("CPU part")?)),
        vectors,
        has_streaming_stores: vectors.is_some(),
        online,
        allowed: allowed.min(online),
    }
}

/// Arm tells a number for its cores.
fn arm_model(part: &str) -> Option<String> {
    let names = [
        ("0xd0c", "Neoverse N1"),
        ("0xd40", "Neoverse V1"),
        ("0xd49", "Neoverse N2"),
        ("0xd4f", "Neoverse V2"),
    ];
    let name = names.iter().find(|(number, _)| *number == part).map(|(_, name)| *name);
    Some(name.map_or_else(|| format!("Arm part {part}"), |name| format!("Arm {name}")))
}

/// A line of `/proc/self/status`.
fn status(root: &Root<'_>, name: &str) -> Option<String> {
    let text = root.text("/proc/self/status")?;
    let of_name =
        |line: &str| Some(line.split_once(':').filter(|(key, _)| *key == name)?.1.trim().to_owned());
    text.lines().find_map(of_name)
}

fn memory(root: &Root<'_>, topology: &Topology) -> Memory {
    let text = root.text("/proc/meminfo").unwrap_or_default();
    let bytes = |name: &str| {
        let of_name = |line: &str| {
            let kib = line.split_once(':').filter(|(key, _)| *key == name)?.1;
            kib.split_whitespace().next()?.parse::<u64>().ok()
        };
        text.lines().find_map(of_name).unwrap_or(0).saturating_mul(1024)
    };
    let chosen = |path: &str| {
        let text = root.text(path)?;
        let chosen = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))?;
        Some(chosen.to_owned())
    };
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let total_bytes = bytes("MemTotal");
    Memory {
        total_bytes,
        available_bytes: bytes("MemAvailable"),
        // The first kind writes `max` for no limit, the second a number that no machine has.
        limit_bytes: limit
            .iter()
            .find_map(|path| root.number(path))
            .filter(|&limit: &u64| limit < total_bytes),
        huge_pages: topology.nodes.iter().flat_map(|node| huge_pages(root, node.number)).collect(),
        transparent: chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        transparent_shared: chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    }
}

fn huge_pages(root: &Root<'_>, node: u32) -> Vec<HugePages> {
    let folder = format!("/sys/devices/system/node/node{node}/hugepages");
    let sizes = root.names(&folder).into_iter().filter_map(|name| {
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let count = |what: &str| root.number(&format!("{folder}/{name}/{what}"));
        Some(HugePages {
            node,
            page_bytes: kib.saturating_mul(1024),
            reserved: count("nr_hugepages")?,
            free: count("free_hugepages")?,
        })
    });
    sizes.collect()
}

fn limits(root: &Root<'_>) -> Limits {
    let text = root.text("/proc/self/limits").unwrap_or_default();
    let limit = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let mut numbers = rest.split_whitespace().map(|word| word.parse().ok());
        Limit { soft: numbers.next().flatten(), hard: numbers.next().flatten() }
    };
    Limits {
        locked_bytes: limit("Max locked memory"),
        files: limit("Max open files"),
        threads: limit("Max processes"),
    }
}

fn capabilities(root: &Root<'_>) -> Capabilities {
    let effective = status(root, "CapEff").and_then(|set| u64::from_str_radix(&set, 16).ok()).unwrap_or(0);
    Capabilities { ipc_lock: effective >> 14 & 1 == 1, ptrace: effective >> 19 & 1 == 1 }
}

fn clock(root: &Root<'_>) -> Clock {
    let folder = "/sys/devices/system/clocksource/clocksource0";
    let available = root.text(&format!("{folder}/available_clocksource")).unwrap_or_default();
    Clock {
        current: root.text(&format!("{folder}/current_clocksource")),
        available: available.split_whitespace().map(str::to_owned).collect(),
    }
}

fn container(root: &Root<'_>) -> Container {
    let signs = ["/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io"];
    let mounts = root.text("/proc/self/mounts").unwrap_or_default();
    // The last one mounted lies on top.
    let shm = mounts.lines().rev().find(|line| line.split_whitespace().nth(1) == Some("/dev/shm"));
    let size = shm.and_then(|line| {
        line.split_whitespace().nth(3)?.split(',').find_map(|one| one.strip_prefix("size="))
    });
    Container {
        sign: signs.iter().find(|path| root.has(path)).map(|path| (*path).to_owned()),
        shm_bytes: size.and_then(bytes_of_mount),
    }
}

/// `65536k`, as the options of a mount are written.
fn bytes_of_mount(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

fn interfaces(root: &Root<'_>, tried: &Tried) -> Vec<Interface> {
    let read = |name: String| {
        let file = |what: &str| format!("/sys/class/net/{name}/{what}");
        let kind: Option<u32> = root.number(&file("type"));
        // Interfaces that do not tell, such as the loopback, are up when they are there.
        let is_up = matches!(root.text(&file("operstate")).as_deref(), Some("up" | "unknown"));
        Interface {
            is_up,
            is_physical: root.has(&file("device")),
            is_loopback: kind == Some(LOOPBACK),
            mbit_per_s: root.number(&file("speed")).filter(|&speed| speed > 0 && speed < u64::from(u32::MAX)),
            mtu_bytes: root.number(&file("mtu")),
            addresses: tried
                .addresses
                .iter()
                .filter(|(of, _)| *of == name)
                .map(|(_, ip)| ip.to_string())
                .collect(),
            name,
        }
    };
    root.names("/sys/class/net")
        .into_iter()
        .filter(|name| root.has(&format!("/sys/class/net/{name}/mtu")))
        .map(read)
        .collect()
}

fn uverbs(root: &Root<'_>, topology: &Topology) -> BTreeMap<String, Access> {
    let files = topology.devices.iter().filter_map(|device| device.uverbs.clone());
    let tried = files.map(|name| {
        let file = File::options().read(true).write(true).open(root.at(&format!("/dev/infiniband/{name}")));
        let access = match file {
            Ok(_) => Access::Open,
            Err(error) if error.kind() == ErrorKind::NotFound => Access::Missing,
            Err(error) => Access::Refused(error.to_string()),
        };
        (name, access)
    });
    tried.collect()
}

/// Where the loader would find it: its usual folders, those of its configuration, and those of the environment.
fn libibverbs(root: &Root<'_>) -> Option<Library> {
    let mut folders: Vec<String> = LIBRARY_FOLDERS.iter().map(|folder| (*folder).to_owned()).collect();
    for file in root.names("/etc/ld.so.conf.d").into_iter().filter(|name| name.ends_with(".conf")) {
        let text = root.text(&format!("/etc/ld.so.conf.d/{file}")).unwrap_or_default();
        folders.extend(text.lines().map(str::trim).filter(|line| line.starts_with('/')).map(str::to_owned));
    }
    if root.0 == Path::new("/") {
        let paths = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        folders.splice(..0, paths.split(':').filter(|path| !path.is_empty()).map(str::to_owned));
    }
    let files = folders.into_iter().map(|folder| format!("{folder}/libibverbs.so.1"));
    let path = files.into_iter().find(|path| root.has(path))?;
    // `libibverbs.so.1.14.41.0` of rdma-core 41.
    let file = root.at(&path).canonicalize().ok();
    let name = file.and_then(|file| Some(file.file_name()?.to_str()?.to_owned()));
    let minor = name.and_then(|name| name.strip_prefix("libibverbs.so.1.")?.split('.').next()?.parse().ok());
    Some(Library { path, minor })
}

fn nvidia(root: &Root<'_>) -> Option<Driver> {
    let told = root.text("/proc/driver/nvidia/version");
    let version = root.text("/sys/module/nvidia/version");
    if told.is_none() && version.is_none() {
        return None;
    }
    let told = told.unwrap_or_default();
    let is_version =
        |word: &&str| word.contains('.') && word.starts_with(|letter: char| letter.is_ascii_digit());
    let line = told.lines().next().unwrap_or_default();
    Some(Driver {
        version: version.or_else(|| line.split_whitespace().find(is_version).map(str::to_owned)),
        is_open: line.contains("Open Kernel Module"),
    })
}

fn gpu_files(root: &Root<'_>) -> Vec<u32> {
    root.names("/dev").iter().filter_map(|name| name.strip_prefix("nvidia")?.parse().ok()).collect()
}

/// What registers memory, runs adapters, and lets adapters reach the memory of GPUs.
const MODULES: &[&str] = &[
    "ib_core",
    "ib_uverbs",
    "mlx5_core",
    "mlx5_ib",
    "bnxt_re",
    "irdma",
    "efa",
    "rdma_rxe",
    "siw",
    "nvidia",
    "nvidia_peermem",
    "nv_peer_mem",
    "gdrdrv",
];

const LIBRARY_FOLDERS: &[&str] = &[
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/usr/local/lib",
    "/usr/local/lib64",
];

/// The kernel's number for loopback interfaces.
const LOOPBACK: u32 = 772;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_numbers() {
        let is_new = |kernel: &str| {
            let facts = Facts { kernel: Some(kernel.into()), ..Facts::default() };
            facts.kernel_is_at_least(5, 12)
        };
        for kernel in ["5.12.0", "5.12", "5.100-rc1", "6.1.0-18-amd64", "10.0"] {
            assert!(is_new(kernel), "{kernel}");
        }
        for kernel in ["5.4.0-200-generic", "4.18.0-553.el8", "5", "", "x"] {
            assert!(!is_new(kernel), "{kernel}");
        }
        assert!(!Facts::default().kernel_is_at_least(0, 1));
    }

    #[test]
    fn sizes_of_mounts_have_units() {
        assert_eq!(bytes_of_mount("65536k"), Some(64 << 20));
        assert_eq!(bytes_of_mount("2g"), Some(2 << 30));
        assert_eq!(bytes_of_mount("512"), Some(512));
        for wrong in ["", "k", "50%", "1t", "99999999999999999999k"] {
            assert_eq!(bytes_of_mount(wrong), None, "{wrong}");
        }
    }
}
