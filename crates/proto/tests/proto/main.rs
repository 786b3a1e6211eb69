//! The protocol under every order of events, without I/O and without a clock.
#![forbid(unsafe_code)]

mod corpus;
mod ends;
mod frames;
mod handshake;
mod hostile;
mod lanes;
mod limits;
mod pages;
mod push;
mod random;
mod ranks;
mod targets;
mod time;
mod world;
