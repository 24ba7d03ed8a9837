//! A sidecar, or its features, in this process, with real sockets, TLS and servers. One binary, so that it is linked once.

mod audit;
mod degraded;
mod features_cassandra;
mod features_confirmed;
mod features_harness;
mod features_redis;
mod features_redis_faults;
mod features_ring;
mod features_service;
mod features_sqlite;
mod onnx;
mod onnx_datatypes;
mod peers;
mod real_triton;
mod rows;
mod server;
mod starting;
mod stream;
mod support;
mod triton;
