//! One progress loop: control streams, lanes, tickets, heartbeats
