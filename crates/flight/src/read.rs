//! Reads dumps: whole ones, and as much as there is of others.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::event::{Event, Header, Line, Peer, Ring, VERSION};

/// What could be read of one dump.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// Where it came from.
    pub path: PathBuf,
    /// Its first line.
    pub header: Header,
    /// Its events, each with the peer whose ring it was in.
    pub events: Vec<(Option<Arc<Peer>>, Event)>,
    /// Events that had been overwritten before.
    pub overwritten: u64,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// What is wrong with a dump of which the rest could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// There is no last line: its writer, its disk or a copy of it ended early.
    Truncated {
        /// So many lines there are.
        lines: u64,
    },
    /// A line cannot be read, and was left out.
    BadLine {
        /// Which, from 1.
        line: u64,
        /// Why.
        what: String,
    },
    /// There are more lines that cannot be read than are listed.
    MoreBadLines {
        /// How many more.
        lines: u64,
    },
    /// The file is longer than is read.
    TooLong {
        /// So much is.
        limit: u64,
    },
}

/// Why nothing was read of a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The system refused.
    #[error("{}: {error}", path.display())]
    Os {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The first line is not a dump's.
    #[error("{}: not a dump of the flight recorder: {what}", path.display())]
    NotADump {
        /// Which file.
        path: PathBuf,
        /// What is wrong with the line.
        what: String,
    },
    /// A later form of dumps.
    #[error("{}: version {version} of the form, where {VERSION} can be read: use the crossdock that wrote it", path.display())]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { lines } => write!(f, "ends early, after {lines} lines"),
            Self::BadLine { line, what } => write!(f, "line {line} cannot be read: {what}"),
            Self::MoreBadLines { lines } => write!(f, "{lines} more lines cannot be read"),
            Self::TooLong { limit } => write!(f, "only the first {} MiB were read", limit >> 20),
        }
    }
}

/// Reads files, and of folders the files that end in `.jsonl`. Those that cannot be read do not keep the others.
pub fn read_paths(paths: &[PathBuf]) -> (Vec<File>, Vec<ReadError>) {
    let (mut files, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        match listed(path) {
            Ok(found) => {
                for path in found {
                    match read_file(&path) {
                        Ok(file) => files.push(file),
                        Err(error) => errors.push(error),
                    }
                }
            }
            Err(error) => errors.push(ReadError::Os { path: path.clone(), error }),
        }
    }
    (files, errors)
}

fn listed(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !std::fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads one file.
pub fn read_file(path: &Path) -> Result<File, ReadError> {
    let os = |error| ReadError::Os { path: path.to_owned(), error };
    let from = std::fs::File::open(path).map_err(os)?;
    read(path, BufReader::new(from))
}

/// Reads one dump; `path` is named in what is said of it.
pub fn read(path: &Path, from: impl BufRead) -> Result<File, ReadError> {
    let os = |error| ReadError::Os { path: path.to_owned(), error };
    let not_a_dump = |what: String| ReadError::NotADump { path: path.to_owned(), what };
    let mut lines = Lines { from: from.take(LONGEST_FILE_BYTES + 1), number: 0, bytes: Vec::new() };
    let header = match lines.next().map_err(os)? {
        None => return Err(not_a_dump("it is empty".into())),
        Some(line) => match line.and_then(parse) {
            Ok(Line::Header(header)) => header,
            Ok(_) => return Err(not_a_dump("it does not begin with a header".into())),
            Err(what) => return Err(not_a_dump(what)),
        },
    };
    if header.version != VERSION {
        return Err(ReadError::Version { path: path.to_owned(), version: header.version });
    }
    let mut file =
        File { path: path.to_owned(), header, events: Vec::new(), overwritten: 0, problems: Vec::new() };
    let (mut peer, mut is_whole, mut bad) = (None, false, 0);
    while let Some(line) = lines.next().map_err(os)? {
        match line.and_then(parse) {
            Ok(Line::Event(event)) => file.events.push((peer.clone(), *event)),
            Ok(Line::Ring(Ring { peer: of, overwritten, .. })) => {
                peer = of.map(Arc::new);
                file.overwritten = file.overwritten.saturating_add(overwritten);
            }
            Ok(Line::End { .. }) => is_whole = true,
            Ok(Line::Header(_) | Line::Unknown) => {}
            Err(what) => {
                bad += 1;
                if bad <= BAD_LINES_NAMED {
                    file.problems.push(Problem::BadLine { line: lines.number, what });
                }
            }
        }
    }
    if bad > BAD_LINES_NAMED {
        file.problems.push(Problem::MoreBadLines { lines: bad - BAD_LINES_NAMED });
    }
    if lines.from.limit() == 0 {
        file.problems.push(Problem::TooLong { limit: LONGEST_FILE_BYTES });
    } else if !is_whole {
        file.problems.push(Problem::Truncated { lines: lines.number });
    }
    Ok(file)
}

struct Lines<R> {
    from: io::Take<R>,
    number: u64,
    bytes: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// The next line that is not empty; an error if it is longer than a line is.
    fn next(&mut self) -> io::Result<Option<Result<&[u8], String>>> {
        loop {
            self.bytes.clear();
            let length = (&mut self.from).take(LONGEST_LINE_BYTES).read_until(b'\n', &mut self.bytes)?;
            if length == 0 {
                return Ok(None);
            }
            self.number += 1;
            if length as u64 == LONGEST_LINE_BYTES && !self.bytes.ends_with(b"\n") {
                self.skip_line()?;
                return Ok(Some(Err(format!("longer than {LONGEST_LINE_BYTES} bytes"))));
            }
            if !self.bytes.trim_ascii().is_empty() {
                return Ok(Some(Ok(self.bytes.as_slice())));
            }
        }
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let ahead = self.from.fill_buf()?;
            let (used, is_over) = match ahead.iter().position(|&byte| byte == b'\n') {
                Some(at) => (at + 1, true),
                None => (ahead.len(), ahead.is_empty()),
            };
            self.from.consume(used);
            if is_over {
                return Ok(());
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Line, String> {
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

/// Longer than any folder's usual limit.
const LONGEST_FILE_BYTES: u64 = 256 << 20;
/// No line that is written is half as long.
const LONGEST_LINE_BYTES: u64 = 64 << 10;
const BAD_LINES_NAMED: u64 = 3;
