//! Moves KV-cache pages between inference workers: the facade
