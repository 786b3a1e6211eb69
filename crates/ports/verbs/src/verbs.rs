//! The library that ports are opened over.

use std::fmt;
use std::sync::Arc;

use crossdock_transport::{Error, Result};

use crate::ibverbs::library::{self, Library};

/// libibverbs, found on this machine, or what a test has put in its place.
#[derive(Clone)]
pub struct Verbs(Arc<Library>);

impl Verbs {
    /// Loads `libibverbs.so.1`. [`Error::Unsupported`] where there is none.
    pub fn load() -> Result<Self> {
        match library::load() {
            Ok(library) => Ok(Self(Arc::new(library))),
            Err(_) => Err(Error::Unsupported {
                what: "RDMA",
                advice: "install rdma-core's libibverbs (Debian: libibverbs1 and ibverbs-providers), then see `crossdock doctor`",
            }),
        }
    }

    #[cfg(feature = "fake")]
    pub(crate) fn of(library: Arc<Library>) -> Self {
        Self(library)
    }

    pub(crate) fn library(&self) -> &Arc<Library> {
        &self.0
    }
}

impl PartialEq for Verbs {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Verbs {}

impl fmt::Debug for Verbs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verbs")
    }
}
