//! Control nodes in this process, with real sockets, TLS and a real etcd. One binary, so that it is linked once.

mod cluster;
mod drills;
mod etcd;
mod followers;
mod intent;
mod push;
mod support;
