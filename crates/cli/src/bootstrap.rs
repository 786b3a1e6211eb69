//! `crossdock bootstrap`: the registry as a program.

use std::error::Error;
use std::io::Read;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;
use crossdock_bootstrap::{DEFAULT_PORT, Server, ServerConfig, Token};

#[derive(Args)]
pub struct Options {
    /// Where to listen; port 0 takes a free one
    #[arg(long, default_value_t = SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT)))]
    listen: SocketAddr,
    /// What callers must present as a bearer token; without it everyone who reaches the address is let in
    #[arg(long, env = "CROSSDOCK_BOOTSTRAP_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// End when standard input ends: for a parent that must not leave it behind
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    if options.until_stdin_ends {
        crate::demo::end_with_parent()?;
    }
    let mut config = ServerConfig::on(options.listen);
    config.token = options.token.as_deref().map(Token::new).transpose()?;
    let server = Server::start(config)?;
    println!("{}", server.address());
    if options.until_stdin_ends {
        let mut rest = Vec::new();
        std::io::stdin().read_to_end(&mut rest)?;
        server.shutdown();
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("registry at http://{}/v1/workers; end it with Ctrl-C", server.address());
    loop {
        std::thread::park();
    }
}
