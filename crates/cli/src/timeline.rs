//! `crossdock timeline`: the flight recorders of several nodes as one story.

use std::error::Error;
use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use crossdock_flight::{Dumps, Filter, Outcome, Room, Timeline, listed};
use serde::Serialize;

use crate::output::complain;

#[derive(Args)]
pub struct Options {
    /// Dumps, or folders of them: those of all nodes that took part
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Only the request with this number
    #[arg(long)]
    room: Option<u64>,
    /// Only what this node did, or was done with it: its name, or its number in 16 hexadecimal digits
    #[arg(long)]
    peer: Option<String>,
    /// Only the end of it: 10s, 500ms, 2m
    #[arg(long, value_parser = duration)]
    last: Option<Duration>,
    /// Every room, and not only those that failed
    #[arg(long)]
    all: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let mut dumps = Dumps::default();
    for path in listed(&options.paths) {
        match path.and_then(|path| Ok((dumps.read(&path)?, path))) {
            Ok((problems, path)) => {
                for problem in problems {
                    complain(format_args!(
                        "crossdock: {}: {problem}; the rest of it is used",
                        path.display()
                    ));
                }
            }
            Err(error) => complain(format_args!("crossdock: {error}")),
        }
    }
    if dumps.is_empty() {
        return Err("there is no dump to read".into());
    }
    let filter = Filter {
        room: options.room,
        peer: options.peer.clone(),
        last_ns: options.last.map(|last| u64::try_from(last.as_nanos()).unwrap_or(u64::MAX)),
    };
    let timeline = Timeline::of(dumps, &filter);
    let is_wanted =
        |room: &&Room| options.all || options.room.is_some() || room.verdict.outcome == Outcome::Failed;
    let wanted: Vec<&Room> = timeline.rooms.iter().filter(is_wanted).collect();
    if options.json {
        return print_json(&timeline.json(&wanted));
    }
    let shown = &wanted[..wanted.len().min(if options.all { usize::MAX } else { ROOMS_SHOWN })];
    print(format_args!("{}", timeline.table(shown)))?;
    if shown.len() < wanted.len() {
        let left = wanted.len() - shown.len();
        print(format_args!("\n{left} more rooms failed: --all shows every room, --room N one of them\n"))?;
    }
    match options.room {
        Some(room) if wanted.is_empty() => Err(format!("no dump names room {room}").into()),
        // What there is to know is then between the nodes, and not of a request.
        None if wanted.is_empty() => {
            print(format_args!("\nno room failed; the last events:\n{}", timeline.tail(EVENTS_SHOWN)))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Whoever has read enough may close the pipe.
fn print(text: fmt::Arguments<'_>) -> Result<ExitCode, Box<dyn Error>> {
    unless_broken(io::stdout().lock().write_fmt(text))
}

fn print_json(json: &impl Serialize) -> Result<ExitCode, Box<dyn Error>> {
    let mut out = BufWriter::new(io::stdout().lock());
    let written = serde_json::to_writer_pretty(&mut out, json).map_err(io::Error::from);
    unless_broken(written.and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()))
}

fn unless_broken(written: io::Result<()>) -> Result<ExitCode, Box<dyn Error>> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let wrong = || format!("'{text}' is no length of time: 10s, 500ms or 2m are");
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    match &text[digits..] {
        "ms" => Ok(Duration::from_millis(number)),
        "" | "s" => Ok(Duration::from_secs(number)),
        "m" | "min" => Ok(Duration::from_secs(number.saturating_mul(60))),
        _ => Err(wrong()),
    }
}

/// As many as a person reads.
const ROOMS_SHOWN: usize = 20;
const EVENTS_SHOWN: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_have_units() {
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "s", "-1s", "1h", "1.5s", "10 s", "99999999999999999999s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
