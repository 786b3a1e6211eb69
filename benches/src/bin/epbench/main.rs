//! Sends tokens to experts of several processes and back through the library, and compares with the same work where
//! nobody waits.
#![deny(unsafe_code)]

mod control;
mod error;
mod floor;
mod measure;
mod options;
mod ours;
mod problem;
mod process;
mod reference;
mod report;
mod setup;
mod sizes;
mod trips;
mod turns;

use std::process::ExitCode;

use clap::Parser;

use error::Error;
use options::Options;
use process::Ranks;
use setup::{Setup, Shared};

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "epbench: {}{error}",
                options.child.map_or(String::new(), |rank| format!("rank {rank}: "))
            );
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Error> {
    if let Some(parent) = options.parent {
        process::end_with(parent)?;
    }
    if options.sizes {
        return sizes::print(options);
    }
    let setup = Setup::new(options)?;
    if let (Some(parent), Some(rank)) = (options.parent, options.child) {
        let shared = Shared::open(&setup, parent, &options.descriptors)?;
        return measure::run(&setup, &shared, rank, || Ok(())).map(drop);
    }
    let shared = Shared::allocate(&setup)?;
    let mut ranks = Ranks::start(&setup, &shared)?;
    let measured = measure::run(&setup, &shared, 0, || ranks.check());
    // A rank that has ended says why; what rank 0 then sees is only that it is gone.
    let measured = measured.map_err(|error| ranks.check().err().unwrap_or(error))?;
    ranks.wait()?;
    let report = report::Report::new(&setup, measured);
    match options.json || options.turns {
        true => println!("{}", report.json()),
        false => print!("{}", report.table()),
    }
    report.verdict()
}
