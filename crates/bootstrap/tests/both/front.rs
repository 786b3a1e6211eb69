//! What stands in front of an etcd, or in its place: it passes requests on, or answers them as an etcd might.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// Serves until the test's process ends.
pub struct Front {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

/// What is done with a request.
pub enum Say {
    /// The etcd behind is asked.
    Pass,
    /// An answer with this status and body.
    Answer(u16, &'static str),
    /// The beginning of an answer that has no end.
    Begin(&'static str),
}

impl Front {
    /// Asks `say` what to do with each request, by its path and body.
    pub fn start(behind: &str, say: impl Fn(&str, &str) -> Say + Clone + Send + 'static) -> Front {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let front = Front { address, asked: Arc::clone(&asked) };
        let behind = behind.to_owned();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (behind, say, asked) = (behind.clone(), say.clone(), Arc::clone(&asked));
                // Clients go away when they have heard enough.
                thread::spawn(move || serve(stream?, &behind, say, &asked));
            }
        });
        front
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How often this path was asked for.
    pub fn asked(&self, path: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| *asked == path).count()
    }

    pub fn asked_at_all(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn serve(
    mut stream: TcpStream,
    behind: &str,
    say: impl Fn(&str, &str) -> Say,
    asked: &Mutex<Vec<String>>,
) -> io::Result<()> {
    let mut source = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if source.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let length = head.split("Content-Length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    source.read_exact(&mut body)?;
    let body = String::from_utf8(body).unwrap();
    asked.lock().unwrap().push(path.clone());
    match say(&path, &body) {
        Say::Pass => {
            let mut behind = TcpStream::connect(behind)?;
            behind.write_all((head + &body).as_bytes())?;
            io::copy(&mut behind, &mut stream)?;
        }
        Say::Answer(status, body) => {
            let length = body.len();
            write!(stream, "HTTP/1.1 {status} Said\r\nContent-Length: {length}\r\n\r\n{body}")?;
        }
        Say::Begin(line) => {
            let length = line.len();
            write!(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{line}\r\n")?;
            // Until the client has gone.
            io::copy(&mut source, &mut io::sink())?;
        }
    }
    Ok(())
}
