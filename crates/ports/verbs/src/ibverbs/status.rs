//! What a device's codes are called, and what to look at.

use super::sys::*;

/// A code, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub name: &'static str,
    pub advice: &'static str,
}

/// No acknowledgement came, however often the device has sent again.
pub(crate) const RETRY_EXCEEDED: u32 = IBV_WC_RETRY_EXC_ERR;

/// Of a completion.
pub(crate) fn of_completion(status: u32) -> Status {
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
    Status { name: wc_status_name(status).unwrap_or("an unknown status"), advice }
}

/// Of an event that is the end of a queue pair or of all.
pub(crate) fn of_event(event: u32) -> Status {
    let advice = match event {
        IBV_EVENT_QP_ACCESS_ERR | IBV_EVENT_QP_REQ_ERR => {
            "the peer wrote or read where it may not; if it is crossdock, report it"
        }
        IBV_EVENT_CQ_ERR => "completions were lost: lower requests_per_lane or max_lanes, and report it",
        _ => "this device failed: look at the kernel log, and reset it",
    };
    Status { name: event_name(event).unwrap_or("an unknown event"), advice }
}
