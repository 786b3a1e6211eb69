//! The registry as its users see it: the same tests whether crossdock's own server or etcd keeps it.

mod cases;
mod etcd;
mod front;
mod only_etcd;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crossdock_bootstrap::{Client, ClientConfig, Limits, Server, ServerConfig};

/// Where a registry lives.
enum Home {
    Server { server: Option<Server>, address: SocketAddr },
    Etcd(etcd::Process),
}

impl Home {
    fn server() -> Home {
        let server = Server::start(config("127.0.0.1:0".parse().unwrap())).unwrap();
        Home::Server { address: server.address(), server: Some(server) }
    }

    fn client(&self) -> Client {
        Client::new(ClientConfig { limits: limits(), ..ClientConfig::to(&self.name()) }).unwrap()
    }

    fn name(&self) -> String {
        match self {
            Home::Server { address, .. } => address.to_string(),
            Home::Etcd(process) => format!("etcd://{}", process.address()),
        }
    }

    /// An empty registry of the same kind.
    fn elsewhere(&self) -> Elsewhere {
        match self {
            Home::Server { .. } => {
                let home = Home::server();
                Elsewhere { client: home.client(), _home: Some(home) }
            }
            Home::Etcd(_) => {
                static COUNT: AtomicU32 = AtomicU32::new(0);
                let name = format!("{}/elsewhere-{}", self.name(), COUNT.fetch_add(1, Ordering::Relaxed));
                let config = ClientConfig { limits: limits(), ..ClientConfig::to(&name) };
                Elsewhere { client: Client::new(config).unwrap(), _home: None }
            }
        }
    }

    /// Ends it as a crash would.
    fn kill(&mut self) {
        match self {
            Home::Server { server, .. } => drop(server.take()),
            Home::Etcd(process) => process.kill(),
        }
    }

    /// Starts it again at the same address, with nothing left of what it knew.
    fn start_anew(&mut self) {
        match self {
            Home::Server { server, address } => *server = Some(Server::start(config(*address)).unwrap()),
            Home::Etcd(process) => {
                process.forget();
                process.start_again();
            }
        }
    }
}

struct Elsewhere {
    client: Client,
    _home: Option<Home>,
}

fn config(listen: SocketAddr) -> ServerConfig {
    ServerConfig { limits: limits(), ..ServerConfig::on(listen) }
}

fn limits() -> Limits {
    Limits { ttl_ms: 50..=60_000, warm_up_ms: 60_000, room_ms: 60_000, ..Limits::default() }
}

/// The shortest time to live that both can keep: etcd counts in seconds.
const SHORT_MS: u64 = 1_000;
/// For everything that should come soon, on a machine that has too much to do.
const SOON: Duration = Duration::from_secs(40);

macro_rules! on_both {
    ($($case:ident)*) => {
        mod server {
            $(#[test]
            fn $case() {
                crate::cases::$case(&mut crate::Home::server());
            })*
        }
        mod at_etcd {
            $(#[test]
            fn $case() {
                if let Some(process) = crate::etcd::Process::start() {
                    crate::cases::$case(&mut crate::Home::Etcd(process));
                }
            })*
        }
    };
}

on_both! {
    two_clients_see_the_same_workers
    an_incarnation_that_was_replaced_stays_out
    a_worker_that_does_not_renew_expires_and_one_that_does_stays
    a_registration_ends_when_its_node_is_taken
    a_registry_that_has_forgotten_everyone_is_refilled
    a_wait_ends_when_enough_are_there_and_by_its_deadline
    times_beyond_the_limits_are_refused
    a_group_is_complete_when_every_rank_is_there
    who_does_not_fit_into_a_group_is_told_why
    a_worker_that_warms_up_is_not_judged_by_its_silence
    a_warm_up_ends_by_its_time_and_is_not_prolonged
    rooms_follow_their_number_where_nobody_is_told
    rooms_that_are_told_are_known_for_their_time
    who_looks_hears_that_a_worker_moved
    a_group_starts_all_at_once
    of_two_that_want_the_same_ranks_one_gets_them
    any_sequence_of_calls_is_answered_as_the_rules_say
}
