//! A demo as a user starts it, watched from outside.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The program under test.
pub const CROSSDOCK: &str = env!("CARGO_BIN_EXE_crossdock");

/// A demo that runs. Dropping it kills it.
pub struct Demo {
    /// Its own process.
    pub parent: Child,
    lines: Receiver<String>,
    errors: Option<JoinHandle<String>>,
    /// What it has printed so far.
    pub text: String,
}

/// A demo that has ended.
pub struct Ended {
    pub status: ExitStatus,
    pub text: String,
    pub errors: String,
}

impl Demo {
    /// One of the hand-over alone.
    pub fn of_kv(arguments: &[&str]) -> Self {
        Self::start(&[&["--scenes", "kv"], arguments].concat())
    }

    pub fn start(arguments: &[&str]) -> Self {
        let mut parent = Command::new(CROSSDOCK)
            .arg("demo")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let output = parent.stdout.take().expect("stdout is piped");
        let mut problems = parent.stderr.take().expect("stderr is piped");
        let (said, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is what there is to show.
            let _ = problems.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Self { parent, lines, errors: Some(errors), text: String::new() }
    }

    /// Reads until a line has the words; false if the output ended or the time was over before.
    pub fn reads(&mut self, words: &str, within: Duration) -> bool {
        let until = Instant::now() + within;
        while let Ok(line) = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.text.push_str(&line);
            self.text.push('\n');
            if line.contains(words) {
                return true;
            }
        }
        false
    }

    /// Reads to the end; panics if that does not come in time.
    pub fn end(mut self, within: Duration) -> Ended {
        let until = Instant::now() + within;
        let status = loop {
            // Reading on keeps the pipe from filling up.
            self.reads("\u{0}", Duration::from_millis(20));
            match self.parent.try_wait().expect("the demo is our child") {
                Some(status) => break status,
                None if Instant::now() >= until => {
                    panic!("the demo did not end within {within:?}; so far:\n{}", self.text)
                }
                None => {}
            }
        };
        self.reads("\u{0}", Duration::from_secs(5));
        let errors = self.errors.take().expect("taken once").join().expect("the reader does not panic");
        Ended { status, text: std::mem::take(&mut self.text), errors }
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Both fail only where it has ended and was waited for.
        let _ = self.parent.kill();
        let _ = self.parent.wait();
    }
}

/// A trace that is there as long as it is held.
pub struct TraceFile(String);

impl TraceFile {
    pub fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("crossdock-{}-{name}.jsonl", std::process::id()));
        std::fs::File::create(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .expect("the folder for temporary files takes files");
        Self(path.to_str().expect("the folder's name is text").to_owned())
    }

    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for TraceFile {
    fn drop(&mut self) {
        // Left behind, it does no harm.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A folder that is there as long as it is held; made by whoever writes into it.
pub struct Scratch(String);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("crossdock-{}-{name}", std::process::id()));
        Self(path.to_str().expect("the folder's name is text").to_owned())
    }

    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left behind, it does no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
