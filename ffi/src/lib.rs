//! The C ABI of crossdock: what `include/crossdock.h` declares.
//!
//! Each function checks what it is given, calls the facade, and turns the answer into a status. Objects are named by
//! handles (`handles.rs`), numbers that are looked up: one that is stale, of another kind or made up gets an error. Structures
//! that may grow say their size (`sized.rs`). A Rust panic never crosses the boundary. `docs/abi.md` states what may change and
//! what never does.

// The types are named as the header names them.
#![allow(non_camel_case_types)]

mod arguments;
mod bell;
mod endpoint;
mod events;
mod group;
mod handles;
mod layout;
mod memory;
mod node;
mod outputs;
mod peer;
mod pool;
mod registry;
mod room;
mod sized;
mod status;
mod step;

pub use endpoint::*;
pub use events::*;
pub use group::*;
pub use layout::*;
pub use memory::*;
pub use node::*;
pub use outputs::*;
pub use peer::*;
pub use pool::*;
pub use registry::*;
pub use room::*;
pub use status::*;
pub use step::*;

/// Raised when something is added: `minor` of what the header was made for may be smaller than the library's.
pub const CROSSDOCK_ABI_MAJOR: u32 = 1;
/// What the library can do beyond the first release of this major version.
pub const CROSSDOCK_ABI_MINOR: u32 = 1;

/// The ABI of the library that is loaded: major version times 65,536 plus minor version.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_abi_version() -> u32 {
    CROSSDOCK_ABI_MAJOR << 16 | CROSSDOCK_ABI_MINOR
}

/// The release of the library that is loaded, as `"0.1.0"`. Never NULL, valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_version() -> *const std::ffi::c_char {
    const VERSION: &std::ffi::CStr =
        match std::ffi::CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("a version has no NUL"),
        };
    VERSION.as_ptr()
}
