use std::sync::Arc;

use super::*;

/// Both ends of a ring in ordinary memory, and a view of the words that a hostile peer would write.
struct Rig {
    writer: Writer<Arc<Backing>>,
    reader: Reader<Arc<Backing>>,
    backing: Arc<Backing>,
}

struct Backing {
    header: Header,
    slots: Box<[AtomicU32]>,
}

fn rig(capacity: u32) -> Rig {
    let slots = (0..capacity).map(|_| AtomicU32::new(0)).collect();
    let backing = Arc::new(Backing { header: Header::default(), slots });
    let place = || {
        let (header, slots) = (NonNull::from(&backing.header), NonNull::from(&backing.slots[0]));
        // SAFETY: the Arc keeps header and slots in place; one writer and one reader are made below.
        unsafe { Place::new(header, slots, capacity, backing.clone()) }
    };
    Rig { writer: Writer::new(place()), reader: Reader::new(place()), backing: backing.clone() }
}

#[test]
fn numbers_come_in_order_and_the_ring_fills_at_its_capacity() {
    let Rig { mut writer, mut reader, .. } = rig(4);
    for round in 0..10u32 {
        for at in 0..4 {
            assert_eq!(writer.has_room(0), Ok(true));
            writer.push(round * 4 + at);
        }
        assert_eq!(writer.has_room(0), Ok(false));
        for at in 0..4 {
            assert_eq!(reader.pop(), Ok(Some(round * 4 + at)));
        }
        assert_eq!(reader.pop(), Ok(None));
        assert_eq!(writer.has_room(0), Ok(false), "the room comes with the release");
        reader.release();
        assert_eq!(writer.has_room(0), Ok(true));
    }
}

#[test]
fn promised_numbers_have_their_room() {
    let Rig { mut writer, mut reader, .. } = rig(4);
    writer.push(0);
    assert_eq!((writer.has_room(2), writer.has_room(3)), (Ok(true), Ok(false)));
    assert_eq!(writer.wait_for_room(3), Ok(false));
    assert_eq!(reader.pop(), Ok(Some(0)));
    assert!(reader.release(), "the writer sleeps for room");
    assert_eq!((writer.wait_for_room(3), writer.has_room(4)), (Ok(true), Ok(false)));
    (1..5).for_each(|number| writer.push(number));
    assert_eq!(writer.has_room(0), Ok(false));
}

#[test]
fn positions_wrap() {
    let mut rig = rig(2);
    let start = u32::MAX - 1;
    (rig.writer.tail, rig.writer.head_seen) = (start, start);
    (rig.reader.head, rig.reader.head_told, rig.reader.tail_seen) = (start, start, start);
    rig.backing.header.tail.0.store(start, Ordering::Relaxed);
    rig.backing.header.head.0.store(start, Ordering::Relaxed);
    for number in 0..7 {
        assert_eq!(rig.writer.has_room(0), Ok(true));
        rig.writer.push(number);
        assert_eq!(rig.reader.pop(), Ok(Some(number)));
        rig.reader.release();
    }
}

#[test]
fn only_a_sleeper_is_woken_and_only_once() {
    let Rig { mut writer, mut reader, .. } = rig(2);
    writer.push(1);
    assert!(!writer.should_wake(), "nobody sleeps");
    assert_eq!(reader.wait_for_next(), Ok(true), "no sleep is due: a number is there");
    reader.stop_waiting();
    assert_eq!(reader.pop(), Ok(Some(1)));
    assert!(!reader.release());
    assert_eq!(reader.wait_for_next(), Ok(false));
    writer.push(2);
    assert!(writer.should_wake());
    assert!(!writer.should_wake(), "told once");
    assert_eq!(writer.has_room(0), Ok(true));
    writer.push(3);
    assert_eq!(writer.wait_for_room(0), Ok(false));
    assert_eq!(reader.pop(), Ok(Some(2)));
    assert!(reader.release(), "the writer sleeps for room");
    assert!(!reader.release());
}

#[test]
fn impossible_positions_are_found_at_both_ends() {
    for wrong in [3, 1000, u32::MAX, 1 << 31] {
        let Rig { mut reader, backing, .. } = rig(2);
        backing.header.tail.0.store(wrong, Ordering::Relaxed);
        assert_eq!(reader.pop(), Err(Corrupt), "tail {wrong}");
        assert_eq!(reader.wait_for_next(), Err(Corrupt), "tail {wrong}");
    }
    for wrong in [3, 1000, u32::MAX, 1 << 31] {
        let Rig { mut writer, backing, .. } = rig(2);
        writer.push(0);
        assert_eq!(writer.has_room(0), Ok(true));
        writer.push(0);
        backing.header.head.0.store(wrong, Ordering::Relaxed);
        assert_eq!(writer.has_room(0), Err(Corrupt), "head {wrong}");
    }
}

#[test]
fn two_threads_pass_many_numbers() {
    const NUMBERS: u32 = 200_000;
    let Rig { mut writer, mut reader, .. } = rig(64);
    let sender = std::thread::spawn(move || {
        for number in 0..NUMBERS {
            while writer.has_room(0) == Ok(false) {
                std::thread::yield_now();
            }
            writer.push(number.wrapping_mul(0x9e37_79b9));
        }
    });
    for number in 0..NUMBERS {
        let found = loop {
            match reader.pop() {
                Ok(Some(found)) => break found,
                Ok(None) => {
                    reader.release();
                    std::thread::yield_now();
                }
                Err(Corrupt) => panic!("the ring is corrupt at {number}"),
            }
        };
        assert_eq!(found, number.wrapping_mul(0x9e37_79b9));
    }
    sender.join().expect("the sender has sent all");
}
