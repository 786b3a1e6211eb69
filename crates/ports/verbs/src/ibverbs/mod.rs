//! libibverbs as Rust sees it: its types, its functions as a table that is filled when the library is found, and objects that
//! destroy themselves. All the unsafe code of this crate is here.
//!
//! The library of the machine is loaded at run time: no header, no linking and no generated code is needed to build.
//! A test puts a table of functions of its own in its place.
#![allow(unsafe_code)]

// There are tables for these machines; what differs between them is the size of a mutex.
#[cfg(all(
    test,
    target_os = "linux",
    target_env = "gnu",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
mod abi;
pub(crate) mod chain;
pub(crate) mod context;
pub(crate) mod device_memory;
pub(crate) mod library;
pub(crate) mod objects;
pub(crate) mod status;
pub(crate) mod sys;
