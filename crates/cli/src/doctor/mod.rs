//! `crossdock doctor`: what this machine can do, what it lacks, and what to do about it.
//!
//! [`facts`] reads, [`checks`] judges, [`report`] tells. Whatever is asked of devices or of peers later is a fact of its
//! own and brings its own checks.

mod checks;
mod cuda;
mod facts;
mod json;
mod peer;
mod report;
mod tried;

use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use crate::output::{complain, say};
use checks::State;
use facts::Facts;
use report::Report;

pub use cuda::{Options as DriverOptions, answer as ask_driver};

#[derive(Args)]
pub struct Options {
    /// As JSON: one object, which docs/doctor.md explains
    #[arg(long)]
    json: bool,
    /// Also tries every rail with those of another machine, where `crossdock doctor --listen` waits
    #[arg(long, value_name = "ADDR", conflicts_with = "listen")]
    peer: Option<String>,
    /// Waits there for the doctor of another machine, and answers it: for the time of the test, and without authentication
    #[arg(long, value_name = "ADDR", conflicts_with = "json")]
    listen: Option<SocketAddr>,
    /// The folder that the /proc, /sys, /dev and /etc of another machine lie in; what has to be tried is tried here
    #[arg(long, hide = true, default_value = "/")]
    root: PathBuf,
}

pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    if let Some(address) = options.listen {
        peer::answer(address)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut facts = match Facts::read(&options.root) {
        Ok(facts) => facts,
        Err(error) => {
            complain(format_args!("crossdock: nothing can be known of this machine: {error}"));
            return Ok(ExitCode::from(UNUSABLE));
        }
    };
    // Libraries of another machine's tree cannot be asked.
    facts.cuda = (options.root == Path::new("/")).then(|| cuda::ask(&facts.topology));
    facts.peer = options.peer.as_deref().map(peer::ask);
    let report = Report::of(&facts);
    match options.json {
        true => say!("{}", serde_json::to_string(&report)?),
        false => say!("{report}"),
    }
    Ok(ExitCode::from(code(report.state)))
}

const fn code(state: State) -> u8 {
    match state {
        State::Good | State::Note => 0,
        State::Degraded => 1,
        State::Unusable => UNUSABLE,
    }
}

const UNUSABLE: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_says_how_bad_it_is() {
        let states = [State::Good, State::Note, State::Degraded, State::Unusable];
        assert_eq!(states.map(code), [0, 0, 1, 2]);
    }
}
