//! A server out of file descriptors: who comes waits, nothing spins meanwhile, and once connections have ended everybody is
//! served again without anybody's help.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crossdock_bootstrap::{
    Client, ClientConfig, Incarnation, Labels, NodeId, Registration, Role, Server, ServerConfig, Status,
    Worker,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Set in the process that is the server.
const SERVER: &str = "CROSSDOCK_TEST_SERVER";
/// Descriptors that the server's process may have.
const MOST: u64 = 32;
const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_server_out_of_descriptors_serves_again() {
    if std::env::var_os(SERVER).is_some() {
        return serve();
    }
    let server = Served::start();
    let early = Registration::start(client(&server.address), worker("early", 1)).unwrap();
    early.wait(SOON).unwrap();
    drop(early);

    // The system takes these, and the server as many as it may.
    let idle: Vec<_> = (0..2 * MOST).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    let late = Registration::start(client(&server.address), worker("late", 2)).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let (busy, began) = (server.busy(), Instant::now());
    assert!(late.wait(Duration::from_secs(1)).is_err(), "there are descriptors left");
    let busy = server.busy() - busy;
    assert!(busy < began.elapsed() / 4, "the server has spun for {busy:?}");

    drop(idle);
    late.wait(SOON).unwrap();
    assert!(matches!(late.status(), Status::Registered { .. }), "{:?}", late.status());
}

/// What the server's process does: the limit is that of a whole process.
fn serve() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(MOST), ..limit }).unwrap();
    let server = Server::start(ServerConfig::on("127.0.0.1:0".parse().unwrap())).unwrap();
    // Not where the harness writes its own words.
    eprintln!("{}", server.address());
    // Until the test ends, whichever way.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// The server's process; ended when dropped.
struct Served {
    process: Child,
    address: String,
}

impl Served {
    fn start() -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["a_server_out_of_descriptors_serves_again", "--exact", "--nocapture"])
            .env(SERVER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(process.stderr.take().unwrap()).read_line(&mut address).unwrap();
        Self { process, address: address.trim().to_owned() }
    }

    /// The time of a processor that it has used.
    fn busy(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        // After the name, which may have spaces, in hundredths of a second.
        let after = stat.rsplit(')').next().unwrap();
        let ticks = after.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap());
        Duration::from_millis(10 * ticks.sum::<u64>())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn client(address: &str) -> Client {
    Client::new(ClientConfig::to(address)).unwrap()
}

fn worker(node: &str, incarnation: u64) -> Worker {
    Worker {
        node: NodeId::new(node).unwrap(),
        incarnation: Incarnation::new(incarnation),
        role: Role::Decode,
        address: "10.0.0.1:7000".parse().unwrap(),
        ttl_ms: 10_000,
        warm_up_ms: 0,
        member: None,
        labels: Labels::none(),
    }
}
