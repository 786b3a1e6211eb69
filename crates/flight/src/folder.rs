//! Dumps are written by a thread that has nothing else to do, into a folder, within limits.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_queue::ArrayQueue;
use crossdock_proto::flight::Reason;

use crate::dump::Dump;
use crate::event::hex;

/// Where dumps go, and how much of the disk they may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderOptions {
    /// The folder; made if it is missing. Nodes may share one.
    pub path: PathBuf,
    /// Files of nodes with this node's name, those of its earlier lives included; the oldest go first. At least 1.
    pub max_files: usize,
    /// What they may hold together. A dump that is longer alone is not written.
    pub max_bytes: u64,
}

impl FolderOptions {
    /// A folder with the usual limits: 64 files and 64 MiB.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), max_files: 64, max_bytes: 64 << 20 }
    }
}

/// The writing end. To put a dump takes no lock and waits for nothing; dropped, it waits shortly for what is on its way.
pub struct Folder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    waiting: ArrayQueue<Dump>,
    is_closing: AtomicBool,
    /// Dumps for which there was no room in the queue, or not in time.
    left_out: AtomicU64,
}

impl Folder {
    /// Starts the thread. A folder that cannot be written is found, and logged, when there is something to write.
    pub fn open(options: FolderOptions) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            waiting: ArrayQueue::new(WAITING),
            is_closing: AtomicBool::new(false),
            left_out: AtomicU64::new(0),
        });
        let writer = Writer { options, shared: shared.clone(), has_complained: false, left_out: 0 };
        let thread = std::thread::Builder::new().name("flight".into()).spawn(move || writer.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Whether another dump can wait. Those that cannot are better made later than left out.
    pub fn has_room(&self) -> bool {
        !self.shared.waiting.is_full()
    }

    /// Lets a dump be written. If as many wait already as may, it is left out, and the log says so.
    pub fn put(&self, dump: Dump) {
        if self.shared.waiting.push(dump).is_err() {
            self.shared.left_out.fetch_add(1, Ordering::Relaxed);
        }
        self.wake();
    }

    /// So many dumps are not made, as what they were to tell is gone: the log says so.
    pub fn leave_out(&self, dumps: u64) {
        self.shared.left_out.fetch_add(dumps, Ordering::Relaxed);
        self.wake();
    }

    /// How many dumps were left out.
    pub fn left_out(&self) -> u64 {
        self.shared.left_out.load(Ordering::Relaxed)
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.shared.is_closing.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        thread.thread().unpark();
        let until = Instant::now() + LAST_WRITES;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        // A disk that hangs keeps the thread, and nobody else.
    }
}

struct Writer {
    options: FolderOptions,
    shared: Arc<Shared>,
    /// What is wrong with the folder is said once, until something could be written again.
    has_complained: bool,
    /// How many were left out when that was last said.
    left_out: u64,
}

/// Why a dump was not written.
#[derive(Debug, thiserror::Error)]
enum NotWritten {
    #[error("{call} {}: {error}", path.display())]
    Os { call: &'static str, path: PathBuf, error: io::Error },
    #[error("a dump of {bytes} bytes, where all dumps together may have {limit}")]
    TooLong { bytes: u64, limit: u64 },
}

impl Writer {
    fn run(mut self) {
        loop {
            // Looked at first: what was put before the end is written before it.
            let is_closing = self.shared.is_closing.load(Ordering::Acquire);
            while let Some(dump) = self.shared.waiting.pop() {
                self.write_and_tell(&dump);
            }
            let all_left_out = self.shared.left_out.load(Ordering::Relaxed);
            let left_out = all_left_out - std::mem::replace(&mut self.left_out, all_left_out);
            if left_out > 0 {
                tracing::warn!(
                    left_out,
                    "dumps of the flight recorder were left out: the disk does not keep up"
                );
            }
            if is_closing {
                return;
            }
            std::thread::park_timeout(LONGEST_SLEEP);
        }
    }

    fn write_and_tell(&mut self, dump: &Dump) {
        match self.write(dump) {
            Ok(path) => {
                self.has_complained = false;
                tracing::info!(path = %path.display(), "flight recorder dumped");
            }
            Err(error) => {
                if !std::mem::replace(&mut self.has_complained, true) {
                    tracing::error!("the flight recorder cannot write: {error}; said once");
                }
            }
        }
    }

    fn write(&self, dump: &Dump) -> Result<PathBuf, NotWritten> {
        let folder = &self.options.path;
        let os = |call, path: &Path| {
            let path = path.to_owned();
            move |error| NotWritten::Os { call, path, error }
        };
        let text = dump.text();
        let (bytes, limit) = (text.len() as u64, self.options.max_bytes);
        if bytes > limit {
            return Err(NotWritten::TooLong { bytes, limit });
        }
        std::fs::create_dir_all(folder).map_err(os("making", folder))?;
        let prefix = prefix(&dump.snapshot.name);
        let file = folder.join(format!("{prefix}{}", suffix(dump)));
        self.make_room(&prefix, &file, bytes)?;
        // Whoever reads the folder meanwhile finds the earlier text or this one.
        let unfinished = file.with_extension(UNFINISHED);
        let written = std::fs::write(&unfinished, &text).map_err(os("writing", &unfinished));
        let renamed = written.and_then(|()| std::fs::rename(&unfinished, &file).map_err(os("naming", &file)));
        if renamed.is_err() {
            // What is there of it takes the room that there is little of.
            let _ = std::fs::remove_file(&unfinished);
        }
        renamed.map(|()| file)
    }

    /// Removes this node's oldest dumps until one more fits, and what a process that has ended meanwhile has begun.
    fn make_room(&self, prefix: &str, but: &Path, bytes: u64) -> Result<(), NotWritten> {
        let folder = &self.options.path;
        let os = |error| NotWritten::Os { call: "listing", path: folder.clone(), error };
        let mut found: Vec<(SystemTime, PathBuf, u64)> = Vec::new();
        let mut held = 0;
        for entry in std::fs::read_dir(folder).map_err(os)? {
            let entry = entry.map_err(os)?;
            let path = entry.path();
            let kind = entry.file_name().to_str().and_then(|name| kind_of(prefix, name));
            // One that another process has removed meanwhile takes no room.
            let (Some(kind), Ok(about)) = (kind, entry.metadata()) else { continue };
            if path == but || path == but.with_extension(UNFINISHED) {
                continue;
            }
            let modified = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            match kind {
                FileKind::Dump => found.push((modified, path, about.len())),
                FileKind::Unfinished if modified.elapsed().is_ok_and(|age| age > LONGEST_WRITE) => {
                    remove(path)?;
                }
                FileKind::Unfinished => held += about.len(),
            }
        }
        found.sort();
        held += found.iter().map(|(.., bytes)| bytes).sum::<u64>();
        let mut left = found.len();
        for (_, path, length) in found {
            if left < self.options.max_files.max(1) && held + bytes <= self.options.max_bytes {
                break;
            }
            remove(path)?;
            held -= length;
            left -= 1;
        }
        Ok(())
    }
}

/// Another process may have been first.
fn remove(path: PathBuf) -> Result<(), NotWritten> {
    std::fs::remove_file(&path)
        .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
        .map_err(|error| NotWritten::Os { call: "removing", path, error })
}

/// How the names of a node's dumps begin. Two nodes whose names differ only in what a file's name has no room for share
/// no limits.
fn prefix(name: &str) -> String {
    let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
    let short: String = name.chars().take(LONGEST_NAME).map(plain).collect();
    match short == name {
        true => format!("crossdock-{short}-"),
        false => format!("crossdock-{short}-{:08x}-", hash(name)),
    }
}

/// The same in every process and version, which the standard library's are not: FNV-1a.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// And how they go on: which life, and what of it.
fn suffix(dump: &Dump) -> String {
    let life = hex(dump.snapshot.identity.incarnation);
    match dump.snapshot.reason {
        Reason::Failed(incident) => format!("{life}-{:06}.jsonl", incident.number),
        Reason::Panicked => format!("{life}-panic.jsonl"),
        Reason::Asked => format!("{life}-asked.jsonl"),
    }
}

enum FileKind {
    Dump,
    Unfinished,
}

/// Only what was written here is ever removed.
fn kind_of(prefix: &str, name: &str) -> Option<FileKind> {
    let (stem, extension) = name.strip_prefix(prefix)?.rsplit_once('.')?;
    let (life, what) = stem.split_once('-')?;
    let is_ours = life.len() == 16 && life.bytes().all(|b| b.is_ascii_hexdigit()) && !what.is_empty();
    match extension {
        "jsonl" if is_ours => Some(FileKind::Dump),
        UNFINISHED if is_ours => Some(FileKind::Unfinished),
        _ => None,
    }
}

/// How the name of a dump ends while it is written.
const UNFINISHED: &str = "part";

/// Nobody writes any more what has not grown for so long.
const LONGEST_WRITE: Duration = Duration::from_secs(60);

/// Dumps that may wait. Each is of a second at least, so that a disk may be slow for so long.
const WAITING: usize = 16;

const LONGEST_NAME: usize = 64;

/// How long the end of a node waits for its last dumps.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// Everything that is put wakes the thread.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
