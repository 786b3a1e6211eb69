//! The crossdock program.
#![forbid(unsafe_code)]

mod bootstrap;
mod demo;
mod doctor;
mod output;
mod table;
mod timeline;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::complain;

#[derive(Parser)]
#[command(
    name = "crossdock",
    version,
    about = "Moves KV-cache pages from prefill to decode workers, and tokens to their experts"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Hands requests from a prefill process to a decode process and tokens to their experts, checks every byte, and shows
    /// tables
    Demo(demo::Options),
    /// Says what this machine can do and what it lacks, with advice; ends with 0 (good), 1 (degraded) or 2 (unusable)
    Doctor(doctor::Options),
    /// Runs the registry that tells where the workers are
    Bootstrap(bootstrap::Options),
    /// Merges dumps of the flight recorder and says of each request what happened, on which side, and why
    Timeline(timeline::Options),
    /// Asks the GPUs' driver, which may hang or crash; started by `doctor`
    #[command(hide = true)]
    DoctorDriver(doctor::DriverOptions),
    /// One of the demo's processes; started by `demo`
    #[command(hide = true)]
    DemoWorker(demo::WorkerOptions),
    /// One of the ranks of the demo's experts; started by `demo`
    #[command(hide = true)]
    DemoRank(demo::RankOptions),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // A line that cannot be written would be complained of by a panic, on the progress loop's thread.
        .log_internal_errors(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CROSSDOCK_LOG").unwrap_or_else(|_| "error".into()),
        )
        .init();
    let done = match Cli::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Bootstrap(options) => bootstrap::run(&options),
        Command::Timeline(options) => timeline::run(&options),
        Command::DoctorDriver(options) => Ok(doctor::ask_driver(&options)),
        Command::DemoWorker(options) => demo::work(&options),
        Command::DemoRank(options) => demo::work_as_rank(&options),
    };
    let code = match done {
        Ok(code) => code,
        Err(error) => {
            complain(format_args!("crossdock: {error}"));
            let mut cause = error.source();
            while let Some(error) = cause {
                complain(format_args!("  because: {error}"));
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    };
    match output::failure() {
        None => code,
        Some(error) => {
            complain(format_args!("crossdock: not everything could be printed: {error}"));
            ExitCode::FAILURE
        }
    }
}
