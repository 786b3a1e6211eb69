//! Every interleaving of the two ends, as the memory model allows it:
//! `RUSTFLAGS="--cfg loom" cargo test -p crossdock-host --release --lib loom`.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::*;

struct Backing {
    header: Header,
    slots: Vec<AtomicU32>,
    /// The bytes that an immediate speaks of; loom reports any access that is not ordered.
    bytes: UnsafeCell<u32>,
    /// Stands for the doorbell: set by the waker, looked at by the sleeper.
    reader_woken: AtomicU32,
    writer_woken: AtomicU32,
}

// SAFETY: the cell is ordered by the protocol under test, and loom checks that it is.
unsafe impl Sync for Backing {}

fn ends(capacity: u32) -> (Writer<Arc<Backing>>, Reader<Arc<Backing>>, Arc<Backing>) {
    let backing = Arc::new(Backing {
        header: Header::default(),
        slots: (0..capacity).map(|_| AtomicU32::new(0)).collect(),
        bytes: UnsafeCell::new(0),
        reader_woken: AtomicU32::new(0),
        writer_woken: AtomicU32::new(0),
    });
    let place = || {
        let (header, slots) = (NonNull::from(&backing.header), NonNull::from(&backing.slots[0]));
        // SAFETY: the Arc keeps header and slots in place; one writer and one reader are made below.
        unsafe { Place::new(header, slots, capacity, backing.clone()) }
    };
    (Writer::new(place()), Reader::new(place()), backing)
}

#[test]
fn bytes_are_readable_when_the_immediate_is_seen() {
    loom::model(|| {
        let (mut writer, mut reader, backing) = ends(2);
        let bytes = backing.clone();
        let sender = thread::spawn(move || {
            // SAFETY: loom checks that the reader's access is ordered after this one.
            bytes.bytes.with_mut(|bytes| unsafe { *bytes = 7 });
            assert_eq!(writer.has_room(0), Ok(true));
            writer.push(1);
        });
        if let Some(number) = reader.pop().expect("nobody tampers") {
            assert_eq!(number, 1);
            // SAFETY: loom checks that the writer's access is ordered before this one.
            assert_eq!(backing.bytes.with(|bytes| unsafe { *bytes }), 7);
        }
        sender.join().expect("the sender has sent");
    });
}

#[test]
fn what_was_read_may_be_written_again_once_it_is_released() {
    loom::model(|| {
        let (mut writer, mut reader, backing) = ends(1);
        assert_eq!(writer.has_room(0), Ok(true));
        writer.push(1);
        let bytes = backing.clone();
        let sender = thread::spawn(move || {
            if writer.has_room(0) == Ok(true) {
                // SAFETY: loom checks that the reader's access is ordered before this one.
                bytes.bytes.with_mut(|bytes| unsafe { *bytes = 7 });
                writer.push(2);
            }
        });
        assert_eq!(reader.pop(), Ok(Some(1)));
        // SAFETY: loom checks that the writer's access is ordered after this one.
        assert_eq!(backing.bytes.with(|bytes| unsafe { *bytes }), 0);
        reader.release();
        assert!(matches!(reader.pop(), Ok(None | Some(2))));
        sender.join().expect("the sender has sent");
    });
}

#[test]
fn a_sleeping_reader_is_never_left_with_a_number() {
    loom::model(|| {
        let (mut writer, mut reader, backing) = ends(2);
        let bell = backing.clone();
        let sender = thread::spawn(move || {
            assert_eq!(writer.has_room(0), Ok(true));
            writer.push(1);
            if writer.should_wake() {
                bell.reader_woken.store(1, Ordering::SeqCst);
            }
        });
        let sleeps = !reader.wait_for_next().expect("nobody tampers");
        sender.join().expect("the sender has sent");
        if sleeps {
            assert_eq!(backing.reader_woken.load(Ordering::SeqCst), 1, "asleep, with a number in the ring");
        }
    });
}

#[test]
fn a_writer_that_sleeps_for_room_is_never_left_with_it() {
    loom::model(|| {
        let (mut writer, mut reader, backing) = ends(1);
        assert_eq!(writer.has_room(0), Ok(true));
        writer.push(1);
        let bell = backing.clone();
        let receiver = thread::spawn(move || {
            assert_eq!(reader.pop(), Ok(Some(1)));
            if reader.release() {
                bell.writer_woken.store(1, Ordering::SeqCst);
            }
        });
        let sleeps = !writer.wait_for_room(0).expect("nobody tampers");
        receiver.join().expect("the receiver has taken it");
        if sleeps {
            assert_eq!(backing.writer_woken.load(Ordering::SeqCst), 1, "asleep, with room in the ring");
        }
    });
}

#[test]
fn both_ends_can_sleep_on_one_ring() {
    loom::model(|| {
        let (mut writer, mut reader, backing) = ends(1);
        assert_eq!(writer.has_room(0), Ok(true));
        writer.push(1);
        let bell = backing.clone();
        let sender = thread::spawn(move || {
            if writer.wait_for_room(0) == Ok(true) {
                writer.stop_waiting();
                writer.push(2);
                if writer.should_wake() {
                    bell.reader_woken.store(1, Ordering::SeqCst);
                }
                return true;
            }
            false
        });
        assert_eq!(reader.pop(), Ok(Some(1)));
        if reader.release() {
            backing.writer_woken.store(1, Ordering::SeqCst);
        }
        let sleeps = reader.wait_for_next() == Ok(false);
        let sent = sender.join().expect("the sender ends");
        if sent && sleeps {
            assert_eq!(backing.reader_woken.load(Ordering::SeqCst), 1, "asleep, with a number in the ring");
        }
        if !sent {
            assert_eq!(backing.writer_woken.load(Ordering::SeqCst), 1, "asleep, with room in the ring");
        }
    });
}
