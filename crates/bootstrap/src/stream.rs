//! A connection that does not wait for ever for its peer to read.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use tokio::time::Sleep;

/// Bounds the time that one answer takes to leave. hyper bounds what it waits for on the reading side only, so
/// a peer that asks and then reads nothing would hold its connection for good.
pub(crate) struct TimedWrite<S> {
    stream: S,
    limit: Duration,
    /// Runs from the first write that found the socket full until all is flushed: a peer that reads a byte now
    /// and then does not start it again.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> TimedWrite<S> {
    pub(crate) fn new(stream: S, limit: Duration) -> TimedWrite<S> {
        TimedWrite { stream, limit, deadline: None }
    }

    /// Passes on what a write said, or fails it when it must wait and the time is over.
    fn bound<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            return written;
        }
        let limit = self.limit;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: Read + Unpin> Read for TimedWrite<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: Write + Unpin> Write for TimedWrite<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.bound(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        // hyper flushes the stream only when it has written all that it holds.
        if flushed.is_ready() {
            self.deadline = None;
        }
        self.bound(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.bound(cx, shut)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.bound(cx, written)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// A socket that takes as many bytes as it has room for.
    struct Socket {
        room: usize,
    }

    impl Write for Socket {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.room);
            self.room -= taken;
            if taken == 0 { Poll::Pending } else { Poll::Ready(Ok(taken)) }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn the_time_runs_from_the_first_full_socket_to_the_flush() {
        let limit = Duration::from_millis(20);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut stream = TimedWrite::new(Socket { room: 0 }, limit);
            let once = async |stream: &mut TimedWrite<Socket>, room| {
                stream.stream.room = room;
                poll_fn(|cx| Poll::Ready(Pin::new(&mut *stream).poll_write(cx, b"bytes"))).await
            };
            // Two answers, each within its time.
            for _ in 0..2 {
                assert!(once(&mut stream, 0).await.is_pending());
                assert!(matches!(once(&mut stream, 5).await, Poll::Ready(Ok(5))));
                poll_fn(|cx| Pin::new(&mut stream).poll_flush(cx)).await.unwrap();
                tokio::time::sleep(limit * 2).await;
            }
            // One answer that moves on now and then, and is not over in its time.
            assert!(once(&mut stream, 0).await.is_pending());
            assert!(matches!(once(&mut stream, 1).await, Poll::Ready(Ok(1))));
            tokio::time::sleep(limit * 2).await;
            let Poll::Ready(Err(late)) = once(&mut stream, 0).await else { panic!("it still waits") };
            assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        });
    }
}
