//! The Port trait, its ops and events, and the conformance suite
