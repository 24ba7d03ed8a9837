//! Control nodes in this process, with real sockets, TLS and a real etcd. The crate's only test binary: each one is
//! linked on its own, 300 MB and half a minute.

mod certificates;
mod cluster;
mod dns;
mod drills;
mod etcd;
mod evidence;
mod followers;
mod intent;
mod push;
#[cfg(feature = "route53")]
mod route53;
mod support;
mod trail;
