//! The cache's part of the gateway's settings file.

use spillway_core::units::{ByteSize, InvalidUnit};
use spillway_runtime::settings::{Field, FromNode};

/// `results`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResultSettings {
    /// `memory`: what results take in this process; default 256MiB, at least 64KiB and at most 128GiB.
    pub memory: ByteSize,
}

impl Default for ResultSettings {
    fn default() -> Self {
        Self { memory: ByteSize(256 << 20) }
    }
}

impl FromNode for ResultSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        const EXPECTED: InvalidUnit = InvalidUnit("a size from 64KiB to 128GiB, such as 256MiB");
        let fields = field.map();
        let memory = match fields.optional("memory") {
            Some(field) => field.parse(|text| match ByteSize::parse(text)? {
                size if (64 << 10..=1 << 37).contains(&size.0) => Ok(size),
                _ => Err(EXPECTED),
            }),
            None => Some(Self::default().memory),
        };
        fields.finish();
        Some(Self { memory: memory? })
    }
}
