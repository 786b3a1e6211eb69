//! What a device's codes are called, and what to look at.

use crossdock_transport::DeviceStatus;

use super::sys::*;

/// No acknowledgement came, however often the device has sent again.
pub(crate) const RETRY_EXCEEDED: u32 = IBV_WC_RETRY_EXC_ERR;

/// The meanings of all codes up to 23, and of whatever is newer.
macro_rules! table {
    ($of:ident) => {{
        let mut all = [$of(u32::MAX); 25];
        let mut code = 0;
        while code < 24 {
            all[code] = $of(code as u32);
            code += 1;
        }
        all
    }};
}

/// What the status of a completion means.
pub(crate) fn of_completion(status: u32) -> &'static DeviceStatus {
    static ALL: [DeviceStatus; 25] = table!(completion);
    &ALL[(status as usize).min(ALL.len() - 1)]
}

/// What an event means that is the end of a queue pair or of all.
pub(crate) fn of_event(event: u32) -> &'static DeviceStatus {
    static ALL: [DeviceStatus; 25] = table!(event_in_words);
    &ALL[(event as usize).min(ALL.len() - 1)]
}

const fn completion(status: u32) -> DeviceStatus {
    let advice = match status {
        IBV_WC_RETRY_EXC_ERR => {
            "the peer's device does not answer: its process or host is gone, the link is down, packets are lost \
             (on RoCE look at PFC and ECN), or the two ports' GIDs, MTUs or VLANs do not fit"
        }
        IBV_WC_RNR_RETRY_EXC_ERR => {
            "the peer had no receive left: report it, credits should have prevented that"
        }
        IBV_WC_WR_FLUSH_ERR => {
            "the queue pair was in error already: usually the device has refused an access of the peer, or the \
             peer has closed; look at the peer's log"
        }
        IBV_WC_REM_ACCESS_ERR => {
            "the peer's device refused the address or the key: its memory was deregistered meanwhile, or this \
             process wrote outside of what it was granted"
        }
        IBV_WC_REM_INV_REQ_ERR | IBV_WC_REM_INV_RD_REQ_ERR => {
            "the peer's device refused the request: run the same version of crossdock on both sides"
        }
        IBV_WC_REM_OP_ERR | IBV_WC_REM_ABORT_ERR => "the peer's device failed: look at its kernel log",
        IBV_WC_LOC_QP_OP_ERR => {
            "this device could not execute the request: with soft-RoCE its link is down or the peer's address has no \
             route; else look for local memory that was deregistered while it was in use"
        }
        IBV_WC_LOC_PROT_ERR | IBV_WC_LOC_LEN_ERR | IBV_WC_LOC_ACCESS_ERR => {
            "this device refused local memory: it was deregistered or unmapped while it was in use"
        }
        IBV_WC_FATAL_ERR | IBV_WC_GENERAL_ERR => "this device failed: look at the kernel log, and reset it",
        _ => "look up the status in the device's documentation, and look at the kernel log",
    };
    let name = match wc_status_name(status) {
        Some(name) => name,
        None => "an unknown status",
    };
    DeviceStatus { name, advice }
}

const fn event_in_words(event: u32) -> DeviceStatus {
    let advice = match event {
        IBV_EVENT_QP_ACCESS_ERR | IBV_EVENT_QP_REQ_ERR => {
            "the peer wrote or read where it may not; if it is crossdock, report it"
        }
        IBV_EVENT_CQ_ERR => "completions were lost: lower requests_per_lane or max_lanes, and report it",
        _ => "this device failed: look at the kernel log, and reset it",
    };
    let name = match event_name(event) {
        Some(name) => name,
        None => "an unknown event",
    };
    DeviceStatus { name, advice }
}
