//! What the medium carries on this machine, measured just before a scene: the yardstick of its share.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use super::PortName;

/// More would not make the figure better.
const MOST_BYTES: usize = 192 << 20;
const PIECE_BYTES: usize = 64 * 1152;
const REPEATS: usize = 3;

/// The best of a few tries with as many bytes as a pool has, in GB/s; 0 where nothing could be measured.
pub fn measure(port: PortName, pool_bytes: u64) -> f64 {
    let bytes = usize::try_from(pool_bytes).map_or(MOST_BYTES, |bytes| bytes.min(MOST_BYTES));
    let tries = (0..REPEATS).map(|_| match port {
        PortName::Shm => copy(bytes),
        PortName::Tcp => stream(bytes).unwrap_or(0.0),
    });
    tries.fold(0.0, f64::max)
}

/// One thread copies page-sized pieces from one half of memory to the other, scattered.
fn copy(bytes: usize) -> f64 {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    let pieces = bytes / PIECE_BYTES;
    let begin = Instant::now();
    for at in 0..pieces {
        let (source, destination) =
            ((at * 7919) % pieces * PIECE_BYTES, (at * 104_729) % pieces * PIECE_BYTES);
        to[destination..destination + PIECE_BYTES].copy_from_slice(&from[source..source + PIECE_BYTES]);
    }
    let seconds = begin.elapsed().as_secs_f64();
    std::hint::black_box(&to);
    (pieces * PIECE_BYTES) as f64 / seconds / 1e9
}

/// One plain stream over loopback, large writes and reads.
fn stream(bytes: usize) -> std::io::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let reader = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            match stream.read(&mut buffer)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => left = left.saturating_sub(read),
            }
        }
        stream.write_all(&[1])
    });
    let mut stream = TcpStream::connect(address)?;
    let buffer = vec![1; 1 << 20];
    let begin = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(buffer.len());
        stream.write_all(&buffer[..piece])?;
        left -= piece;
    }
    stream.read_exact(&mut [0])?;
    let seconds = begin.elapsed().as_secs_f64();
    reader.join().map_err(|_| std::io::Error::other("the reading thread panicked"))??;
    Ok(bytes as f64 / seconds / 1e9)
}
