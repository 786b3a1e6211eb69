//! Moves scattered KV pages between two processes through the whole library, and compares with the best means known.
#![forbid(unsafe_code)]

mod bare_trips;
mod driver;
mod error;
mod initiator;
mod lanes;
mod latency;
mod model;
mod moving;
mod options;
mod passes;
mod process;
mod replay;
mod report;
mod setup;
mod talk;
mod target;
mod trips;
mod ways;

use std::process::ExitCode;

use clap::Parser;

use error::Error;
use options::Options;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CROSSDOCK_LOG").unwrap_or_else(|_| "error".into()),
        )
        .init();
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvbench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Error> {
    if let Some(parent) = options.parent {
        process::end_with(parent)?;
    }
    if options.burn {
        process::burn();
    }
    if let Some(address) = options.listen {
        return target::listen(address, options.parent.is_some());
    }
    let report = initiator::run(options)?;
    match options.json {
        true => println!("{}", report.json()),
        false => print!("{}", report.table()),
    }
    // The figures are there all the same: that some were not delivered is a part of them.
    report.verdict()
}
