//! The protocols that Spillway's processes meet in. Generated code only, no logic.
//!
//! * [`inference`]: the Open Inference Protocol (KServe v2), north-bound and inner.
//! * [`control`]: `spillway.control.v1`, the [`control::Snapshot`].
//! * [`feature`]: `spillway.feature.v1`, features in.
//! * [`drill`]: `spillway.drill.v1`, faults on purpose.
#![allow(clippy::large_enum_variant, clippy::doc_markdown, unused_qualifications)]

pub mod inference {
    tonic::include_proto!("inference");
}

pub mod control {
    tonic::include_proto!("spillway.control.v1");
}

pub mod feature {
    tonic::include_proto!("spillway.feature.v1");
}

pub mod drill {
    tonic::include_proto!("spillway.drill.v1");
}
