//! `crossdock bootstrap`: the registry as a program.

use std::error::Error;
use std::io::Read;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;
use crossdock_bootstrap::{DEFAULT_PORT, Server, ServerConfig, Token};

use crate::output::{complain, say};

#[derive(Args)]
#[command(after_long_help = AFTER_HELP)]
pub struct Options {
    /// Where to listen; port 0 takes a free one
    #[arg(long, default_value_t = SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT)))]
    listen: SocketAddr,
    /// What callers must present as a bearer token; without it everyone who reaches the address is let in
    #[arg(long, env = "CROSSDOCK_BOOTSTRAP_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// How many workers may be registered at once
    #[arg(long, value_name = "N", default_value_t = limits().workers)]
    workers: usize,
    /// The longest time that a worker may ask for to warm up, in seconds
    #[arg(long, value_name = "S", default_value_t = limits().warm_up_ms / 1000)]
    warm_up_s: u64,
    /// How many rooms may be known at once whose data-parallel rank was told
    #[arg(long, value_name = "N", default_value_t = limits().rooms)]
    rooms: usize,
    /// The longest time for which such a room may be kept, in seconds
    #[arg(long, value_name = "S", default_value_t = limits().room_ms / 1000)]
    room_s: u64,
    /// How many connections may be open at once; half as many requests may wait for workers
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=65536))]
    connections: u32,
    /// End when standard input ends: for a parent that must not leave it behind
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

const AFTER_HELP: &str = "\
What it answers, in JSON (docs/bootstrap.md has all of it):
  GET  /health                        whether it is well; needs no token
  GET  /metrics                       counters and times, for Prometheus
  GET  /v1/workers?role=prefill       who is there; &group=, &tp_rank=, &state=, &label.KEY= select,
                                      &count=N&wait_ms=T waits until there are N
  GET  /v1/groups                     each group's topology, and which ranks are missing
  GET  /v1/groups/G?wait_ms=T         the same of one, when it is complete
  POST /v1/groups/G/rooms/query       which data-parallel rank serves a room

Workers register by themselves. In a cluster that has etcd they need no such server: give them
etcd://HOST:PORT instead of its address.";

fn limits() -> crossdock_bootstrap::Limits {
    crossdock_bootstrap::Limits::default()
}

pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    if options.until_stdin_ends {
        crate::demo::end_with_parent()?;
    }
    let server = Server::start(config(options)?)?;
    say!("{}", server.address());
    if options.until_stdin_ends {
        let mut rest = Vec::new();
        std::io::stdin().read_to_end(&mut rest)?;
        server.shutdown();
        return Ok(ExitCode::SUCCESS);
    }
    let address = server.address();
    complain(format_args!(
        "registry at http://{address}/v1/workers, metrics at http://{address}/metrics; end it with Ctrl-C"
    ));
    loop {
        std::thread::park();
    }
}

fn config(options: &Options) -> Result<ServerConfig, Box<dyn Error>> {
    let mut config = ServerConfig::on(options.listen);
    config.token = options.token.as_deref().map(Token::new).transpose()?;
    config.limits.workers = options.workers;
    config.limits.warm_up_ms = options.warm_up_s.saturating_mul(1000);
    config.limits.rooms = options.rooms;
    config.limits.room_ms = options.room_s.saturating_mul(1000);
    config.connections = options.connections as usize;
    config.waits = config.connections / 2;
    Ok(config)
}
