//! The protocol under every order of events, without I/O and without a clock.
#![forbid(unsafe_code)]

mod handshake;
mod pages;
mod push;
mod targets;
mod world;
