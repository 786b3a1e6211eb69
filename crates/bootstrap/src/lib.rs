//! Where the peers are: a registry server and its client
