//! A [`Port`](crossdock_transport::Port) over RDMA verbs: reliable connections of InfiniBand and RoCE devices.
//!
//! Nothing is linked: `libibverbs.so.1` is looked for when a port is opened, so that a program with this port
//! starts on machines without it.
#![deny(unsafe_code)]

#[allow(dead_code)]
mod ibverbs;
pub mod topology;
