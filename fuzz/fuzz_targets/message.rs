//! The decoder of control messages: any bytes are refused, or are the one form of a message.
#![no_main]

use crossdock_proto::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|frame: &[u8]| {
    if let Ok((from, message)) = Message::decode(frame) {
        let mut again = Vec::new();
        message.encode(from, &mut again);
        assert_eq!(again, frame, "{message:?} has two forms");
        assert_eq!(Message::decode(&again), Ok((from, message)));
    }
});
