//! Machines of paper: the `/sys`, `/proc`, `/dev` and `/etc` of machines that are not here, in a folder of their own. The
//! layout is that of real ones; tests break it where they need to.
#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A machine of paper; its folder goes with it.
pub struct Machine {
    root: PathBuf,
}

/// A device on the PCI bus: where it hangs, whose it is, what it is, its node, its driver.
pub struct Card<'a> {
    /// Below `/sys/devices`, with the bridges.
    pub path: &'a str,
    pub vendor: &'a str,
    pub class: &'a str,
    pub node: i32,
    pub driver: &'a str,
}

/// What carries an RDMA port.
#[derive(Clone, Copy)]
pub enum Carrier {
    InfiniBand,
    /// The interface, and the last number of its address.
    Roce(&'static str, u8),
}

impl Machine {
    /// Two sockets of x86-64 without any device: nothing is wrong with it.
    pub fn bare() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("crossdock-machine-{}-{number}", std::process::id()));
        let machine = Self { root };
        machine.file("/proc/sys/kernel/osrelease", "6.8.0-60-generic\n");
        let flags = "flags\t\t: fpu sse2 avx2 avx512f\n";
        machine.file("/proc/cpuinfo", &format!("model name\t: Intel(R) Xeon(R) Platinum 8480C\n{flags}"));
        machine.file("/sys/devices/system/cpu/online", "0-111\n");
        machine.status("0-111", 0);
        machine.file("/proc/meminfo", "MemTotal:       2113000000 kB\nMemAvailable:   2000000000 kB\n");
        machine.locked_memory("unlimited");
        machine.node(0, "0-55", "10 21");
        machine.node(1, "56-111", "21 10");
        machine.file("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
        let shared = "always within_size [advise] never deny force\n";
        machine.file("/sys/kernel/mm/transparent_hugepage/shmem_enabled", shared);
        machine.file("/proc/sys/kernel/yama/ptrace_scope", "0\n");
        machine.clock("tsc", "tsc hpet acpi_pm");
        machine.interface("lo", "unknown", 0, 65_536);
        machine.file("/sys/class/net/lo/type", "772\n");
        machine.interface("eth0", "up", 100_000, 9000);
        machine
    }

    /// Eight GPUs and eight adapters of InfiniBand, each pair below a switch of its own.
    pub fn with_eight_gpus() -> Self {
        let machine = Self::bare();
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n";
        machine.file("/proc/driver/nvidia/version", open);
        machine.file("/sys/module/nvidia/version", "570.86.15\n");
        for module in ["ib_core", "ib_uverbs", "mlx5_core", "mlx5_ib", "nvidia_peermem"] {
            machine.folder(&format!("/sys/module/{module}"));
        }
        machine.libibverbs("1.14.50.0");
        for pair in 0..8 {
            let (gpu, adapter) = (Self::gpu_path(pair), Self::adapter_path(pair));
            machine.gpu(&gpu, i32::from(pair >= 4), "NVIDIA H200", pair);
            machine.adapter(&adapter, i32::from(pair >= 4));
            machine.rdma(&format!("mlx5_{pair}"), &adapter, pair, Carrier::InfiniBand);
        }
        machine
    }

    /// A tray of a rack whose trays share an NVLink domain: two Arm processors, four GPUs with a bus of their own each, four
    /// adapters of RoCE.
    pub fn tray() -> Self {
        let machine = Self::bare();
        machine.file(
            "/proc/cpuinfo",
            "Features\t: fp asimd crc32\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n",
        );
        machine.file("/sys/devices/system/cpu/online", "0-143\n");
        machine.status("0-143", 0);
        machine.clock("arch_sys_counter", "arch_sys_counter");
        machine.node(0, "0-71", "10 40");
        machine.node(1, "72-143", "40 10");
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.65.06  Release Build\n";
        machine.file("/proc/driver/nvidia/version", open);
        machine.libibverbs("1.14.50.0");
        machine.file("/dev/nvidia-caps-imex-channels/channel0", "");
        let domains = [("0008", "0000"), ("0009", "0002"), ("0018", "0010"), ("0019", "0012")];
        let interfaces = ["rail0", "rail1", "rail2", "rail3"];
        for (at, ((gpu, adapter), interface)) in domains.into_iter().zip(interfaces).enumerate() {
            let node = i32::from(at >= 2);
            let gpu = format!("pci{gpu}:00/{gpu}:00:00.0/{gpu}:01:00.0");
            let adapter = format!("pci{adapter}:00/{adapter}:00:00.0/{adapter}:01:00.0");
            machine.gpu(&gpu, node, "NVIDIA GB200", at as u32);
            machine.adapter(&adapter, node);
            machine.interface(interface, "up", 400_000, 9000);
            machine.rdma(&format!("mlx5_{at}"), &adapter, at as u32, Carrier::Roce(interface, 10 + at as u8));
        }
        machine
    }

    /// Where GPU number so much of [`with_eight_gpus`](Self::with_eight_gpus) hangs.
    pub fn gpu_path(pair: u32) -> String {
        let bus = 0x10 + 0x18 * pair;
        let above = Self::switch(bus);
        format!("{above}/0000:{:02x}:00.0/0000:{:02x}:00.0", bus + 2, bus + 3)
    }

    /// The same of its adapter.
    pub fn adapter_path(pair: u32) -> String {
        let bus = 0x10 + 0x18 * pair;
        let above = Self::switch(bus);
        format!("{above}/0000:{:02x}:01.0/0000:{:02x}:00.0", bus + 2, bus + 4)
    }

    fn switch(bus: u32) -> String {
        format!("pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{:02x}:00.0", bus + 1)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn file(&self, path: &str, text: &str) {
        let file = self.at(path);
        fs::create_dir_all(file.parent().expect("a folder")).expect("folders can be made here");
        fs::write(file, text).expect("files can be written here");
    }

    pub fn folder(&self, path: &str) {
        fs::create_dir_all(self.at(path)).expect("folders can be made here");
    }

    pub fn remove(&self, path: &str) {
        let path = self.at(path);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// A link to a place below the root, relative as the kernel's are.
    pub fn link(&self, path: &str, to: &str) {
        let link = self.at(path);
        fs::create_dir_all(link.parent().expect("a folder")).expect("folders can be made here");
        let up = "../".repeat(path.trim_start_matches('/').split('/').count() - 1);
        symlink(format!("{up}{}", to.trim_start_matches('/')), link).expect("links can be made here");
    }

    pub fn node(&self, number: u32, cpus: &str, distances: &str) {
        let node = format!("/sys/devices/system/node/node{number}");
        self.file(&format!("{node}/cpulist"), &format!("{cpus}\n"));
        self.file(&format!("{node}/distance"), &format!("{distances}\n"));
        for (size, reserved) in [("2048kB", 512), ("1048576kB", 0)] {
            self.file(&format!("{node}/hugepages/hugepages-{size}/nr_hugepages"), &format!("{reserved}\n"));
            self.file(&format!("{node}/hugepages/hugepages-{size}/free_hugepages"), &format!("{reserved}\n"));
        }
    }

    /// Where the process may run, and its capabilities.
    pub fn status(&self, cpus: &str, capabilities: u64) {
        self.file(
            "/proc/self/status",
            &format!("Name:\tcrossdock\nCapEff:\t{capabilities:016x}\nCpus_allowed_list:\t{cpus}\n"),
        );
    }

    pub fn locked_memory(&self, limit: &str) {
        let limits = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max processes             1000000              1000000              processes \n\
             Max open files            1048576              1048576              files     \n\
             Max locked memory         {limit:<20} {limit:<20} bytes     \n"
        );
        self.file("/proc/self/limits", &limits);
    }

    pub fn clock(&self, current: &str, available: &str) {
        let folder = "/sys/devices/system/clocksource/clocksource0";
        self.file(&format!("{folder}/current_clocksource"), &format!("{current}\n"));
        self.file(&format!("{folder}/available_clocksource"), &format!("{available} \n"));
    }

    pub fn interface(&self, name: &str, state: &str, mbit_per_s: u32, mtu: u32) {
        let folder = format!("/sys/class/net/{name}");
        self.file(&format!("{folder}/operstate"), &format!("{state}\n"));
        self.file(&format!("{folder}/mtu"), &format!("{mtu}\n"));
        self.file(&format!("{folder}/type"), "1\n");
        // What tells a speed has a device behind it.
        if mbit_per_s > 0 {
            self.folder(&format!("{folder}/device"));
            self.file(&format!("{folder}/speed"), &format!("{mbit_per_s}\n"));
        }
    }

    pub fn libibverbs(&self, version: &str) {
        let name = format!("/usr/lib/x86_64-linux-gnu/libibverbs.so.{version}");
        self.file(&name, "");
        self.link("/usr/lib/x86_64-linux-gnu/libibverbs.so.1", &name);
    }

    pub fn card(&self, card: &Card<'_>) {
        let folder = format!("/sys/devices/{}", card.path);
        self.file(&format!("{folder}/vendor"), &format!("{}\n", card.vendor));
        self.file(&format!("{folder}/class"), &format!("{}\n", card.class));
        self.file(&format!("{folder}/numa_node"), &format!("{}\n", card.node));
        self.lanes(card.path, "current", "32.0 GT/s PCIe", 16);
        self.lanes(card.path, "max", "32.0 GT/s PCIe", 16);
        self.lanes(card.path.rsplit_once('/').expect("a bridge above").0, "max", "32.0 GT/s PCIe", 16);
        self.link(&format!("{folder}/driver"), &format!("/sys/bus/pci/drivers/{}", card.driver));
        self.link(&format!("/sys/bus/pci/devices/{}", address(card.path)), &folder);
    }

    /// The lanes of a card or of the port above, `current` or `max`.
    pub fn lanes(&self, path: &str, which: &str, speed: &str, width: u32) {
        self.file(&format!("/sys/devices/{path}/{which}_link_speed"), &format!("{speed}\n"));
        self.file(&format!("/sys/devices/{path}/{which}_link_width"), &format!("{width}\n"));
    }

    pub fn gpu(&self, path: &str, node: i32, model: &str, minor: u32) {
        self.card(&Card { path, vendor: "0x10de", class: "0x030200", node, driver: "nvidia" });
        let information = format!("Model: \t\t {model}\nIRQ:   \t\t 100\nDevice Minor: \t {minor}\n");
        self.file(&format!("/proc/driver/nvidia/gpus/{}/information", address(path)), &information);
        self.file(&format!("/dev/nvidia{minor}"), "");
    }

    pub fn adapter(&self, path: &str, node: i32) {
        self.card(&Card { path, vendor: "0x15b3", class: "0x020700", node, driver: "mlx5_core" });
    }

    /// An RDMA device of one port, on a card that is there.
    pub fn rdma(&self, name: &str, path: &str, number: u32, carrier: Carrier) {
        let folder = format!("/sys/devices/{path}/infiniband/{name}");
        self.file(&format!("{folder}/fw_ver"), "28.43.2026\n");
        self.file(&format!("{folder}/node_type"), "1: CA\n");
        self.file(&format!("{folder}/hca_type"), "MT4129\n");
        self.link(&format!("{folder}/device"), &format!("/sys/devices/{path}"));
        self.link(&format!("/sys/class/infiniband/{name}"), &folder);
        self.file(&format!("/sys/class/infiniband_verbs/uverbs{number}/ibdev"), &format!("{name}\n"));
        self.file(&format!("/dev/infiniband/uverbs{number}"), "");
        self.port(&folder, carrier);
    }

    /// A device of software, as rxe makes it; its GID table has 1,024 places.
    pub fn software_rdma(&self, name: &str, number: u32, interface: &'static str) {
        let folder = format!("/sys/devices/virtual/infiniband/{name}");
        self.file(&format!("{folder}/node_type"), "1: CA\n");
        self.link(&format!("/sys/class/infiniband/{name}"), &folder);
        self.file(&format!("/sys/class/infiniband_verbs/uverbs{number}/ibdev"), &format!("{name}\n"));
        self.file(&format!("/dev/infiniband/uverbs{number}"), "");
        for empty in 3..1024 {
            self.file(&format!("{folder}/ports/1/gids/{empty}"), NO_GID);
        }
        self.port(&folder, Carrier::Roce(interface, 1));
    }

    fn port(&self, device: &str, carrier: Carrier) {
        let port = format!("{device}/ports/1");
        self.file(&format!("{port}/state"), "4: ACTIVE\n");
        self.file(&format!("{port}/phys_state"), "5: LinkUp\n");
        self.file(&format!("{port}/rate"), "400 Gb/sec (4X NDR)\n");
        for counter in ["counters/symbol_error", "counters/link_downed", "hw_counters/out_of_sequence"] {
            self.file(&format!("{port}/{counter}"), "0\n");
        }
        match carrier {
            Carrier::InfiniBand => {
                self.file(&format!("{port}/link_layer"), "InfiniBand\n");
                self.file(&format!("{port}/lid"), "0x1b\n");
                self.file(&format!("{port}/gids/0"), "fe80:0000:0000:0000:a088:c203:005b:4c86\n");
                self.file(&format!("{port}/gids/1"), NO_GID);
                self.file(&format!("{port}/gid_attrs/types/0"), "IB/RoCE v1\n");
                self.file(&format!("{port}/pkeys/0"), "0xffff\n");
                self.file(&format!("{port}/pkeys/1"), "0x0000\n");
            }
            Carrier::Roce(interface, last) => {
                self.file(&format!("{port}/link_layer"), "Ethernet\n");
                self.file(&format!("{port}/pkeys/0"), "0xffff\n");
                let link = "fe80:0000:0000:0000:a288:c2ff:fe5b:4c86\n".to_owned();
                let v4 = format!("0000:0000:0000:0000:0000:ffff:0a00:00{last:02x}\n");
                for (index, kind, address) in
                    [(0, "IB/RoCE v1", &link), (1, "RoCE v2", &link), (2, "RoCE v2", &v4)]
                {
                    self.file(&format!("{port}/gids/{index}"), address);
                    self.file(&format!("{port}/gid_attrs/types/{index}"), &format!("{kind}\n"));
                    self.file(&format!("{port}/gid_attrs/ndevs/{index}"), &format!("{interface}\n"));
                }
            }
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Where this fails, something is left in the folder for temporary files.
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// The last of a path is the device itself.
pub fn address(path: &str) -> &str {
    path.rsplit('/').next().expect("a path has a last part")
}

pub const NO_GID: &str = "0000:0000:0000:0000:0000:0000:0000:0000\n";
