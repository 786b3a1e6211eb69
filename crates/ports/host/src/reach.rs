//! Whom a port can reach: the same host, booted once, and the same user in the same namespaces and in the
//! same domain.

use crossdock_transport::{Error, Result};

/// A text that is equal in two processes exactly if their ports can connect: abstract sockets belong to a network
/// namespace, process numbers to a PID namespace, user numbers to a user namespace.
pub(crate) fn of_this_process(domain: &str) -> Result<String> {
    if domain.len() > MAX_DOMAIN_BYTES {
        return Err(Error::Limit { what: "bytes of a domain", limit: MAX_DOMAIN_BYTES as u64 });
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(failed("read(boot_id)"))?;
    let mut reach = format!("boot:{} uid:{}", boot.trim(), rustix::process::geteuid().as_raw());
    for (namespace, call) in
        [("net", "readlink(ns/net)"), ("pid", "readlink(ns/pid)"), ("user", "readlink(ns/user)")]
    {
        let name = std::fs::read_link(format!("/proc/self/ns/{namespace}")).map_err(failed(call))?;
        reach.push(' ');
        reach.push_str(&name.to_string_lossy());
    }
    // The last, since it may hold anything.
    if !domain.is_empty() {
        reach.push_str(" domain:");
        reach.push_str(domain);
    }
    Ok(reach)
}

/// A reach travels in the first frame of a handshake.
const MAX_DOMAIN_BYTES: usize = 255;

fn failed(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::Os { call, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

#[cfg(test)]
mod tests {
    use super::Error;

    #[test]
    fn it_names_boot_user_and_namespaces() {
        let reach = super::of_this_process("").expect("/proc is mounted");
        for part in ["boot:", " uid:", " net:[", " pid:[", " user:["] {
            assert!(reach.contains(part), "{reach} lacks {part}");
        }
        assert_eq!(reach, super::of_this_process("").expect("/proc is mounted"));
    }

    #[test]
    fn domains_are_told_apart() {
        let of = |domain: &str| super::of_this_process(domain).expect("/proc is mounted");
        let reaches = ["", "a", "b", "a domain:b"].map(of);
        let distinct: std::collections::BTreeSet<&String> = reaches.iter().collect();
        assert_eq!(distinct.len(), reaches.len(), "{reaches:?}");
        assert_eq!(of("a"), of("a"));
        let long = super::of_this_process(&"x".repeat(256));
        assert_eq!(long, Err(Error::Limit { what: "bytes of a domain", limit: 255 }));
    }
}
