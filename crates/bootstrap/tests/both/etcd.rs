//! An etcd of a test's own: Debian's `etcd-server`, or any other on the `PATH`.

use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A cluster of one member. Dropping it kills it and removes its data.
pub struct Process {
    child: Child,
    clients: SocketAddr,
    peers: SocketAddr,
    folder: PathBuf,
    arguments: Vec<String>,
}

impl Process {
    /// Starts one. Where there is none to start, this says so and gives nothing; `REQUIRE=etcd` makes that a failure.
    pub fn start() -> Option<Process> {
        Process::start_with(&[])
    }

    /// The same, with further arguments.
    pub fn start_with(arguments: &[&str]) -> Option<Process> {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let found =
            Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if let Err(error) = found {
            let wanted = std::env::var("REQUIRE").unwrap_or_default();
            assert!(
                !wanted.split(',').any(|what| what == "etcd"),
                "REQUIRE={wanted}, and etcd does not start: {error}"
            );
            // Past the test's capture, so that it is seen.
            let name = thread::current().name().unwrap_or("a test").to_owned();
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED {name}: etcd does not start ({error}); install Debian's etcd-server, or let .ci/run fetch it"
            );
            return None;
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("crossdock-etcd-{}-{number}", std::process::id()));
        let end = Instant::now() + SOON;
        loop {
            fs::create_dir_all(&folder).expect("a folder for its data");
            // Another program may take a port before etcd does.
            let [clients, peers] = free_ports();
            let child = spawn(clients, peers, &folder, &arguments);
            let mut process =
                Process { child, clients, peers, folder: folder.clone(), arguments: arguments.clone() };
            if process.serves(end) {
                return Some(process);
            }
            assert!(Instant::now() < end, "etcd does not come up: {}", process.log());
            drop(process);
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn address(&self) -> String {
        self.clients.to_string()
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }

    /// Starts it again at the same address, with what it has on disk.
    pub fn start_again(&mut self) {
        let end = Instant::now() + SOON;
        loop {
            self.child = spawn(self.clients, self.peers, &self.folder, &self.arguments);
            if self.serves(end) {
                return;
            }
            assert!(Instant::now() < end, "etcd does not come back: {}", self.log());
            let _ = self.child.wait();
        }
    }

    /// Removes what it has on disk; for one that was killed.
    pub fn forget(&mut self) {
        fs::remove_dir_all(self.folder.join("data")).expect("its data is there");
    }

    /// Whether it comes to answer before it ends.
    fn serves(&mut self, end: Instant) -> bool {
        let config = crossdock_bootstrap::ClientConfig::to(&format!("etcd://{}", self.clients));
        let client = crossdock_bootstrap::Client::new(config).expect("an address");
        while Instant::now() < end {
            if self.child.try_wait().expect("it is our child").is_some() {
                return false;
            }
            if TcpStream::connect(self.clients).is_ok() && client.health().is_ok() {
                return true;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        log.lines().rev().take(5).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // All of this fails only where it is done already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// With short elections, since etcd grants no lease that is shorter than one and a half of them.
fn spawn(clients: SocketAddr, peers: SocketAddr, folder: &std::path::Path, arguments: &[String]) -> Child {
    let (clients, peers) = (format!("http://{clients}"), format!("http://{peers}"));
    let log = File::options().create(true).append(true).open(folder.join("log")).expect("a log");
    Command::new(PROGRAM)
        .args(["--name", "one", "--heartbeat-interval", "20", "--election-timeout", "200"])
        .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", &format!("one={peers}")])
        .arg("--data-dir")
        .arg(folder.join("data"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log"))
        .stderr(log)
        .spawn()
        .expect("it was there a moment ago")
}

fn free_ports() -> [SocketAddr; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("it is bound"))
}

const PROGRAM: &str = "etcd";
const SOON: Duration = Duration::from_secs(60);
