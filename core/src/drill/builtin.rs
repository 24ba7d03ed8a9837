//! Drills that come along: files as an operator would write them.

use super::definition::{Drill, read};

/// Name and text.
pub const ALL: [(&str, &str); 6] = [
    ("region-loss", include_str!("builtin/region-loss.yaml")),
    ("gateway-loss", include_str!("builtin/gateway-loss.yaml")),
    ("vantage-split", include_str!("builtin/vantage-split.yaml")),
    ("store-loss", include_str!("builtin/store-loss.yaml")),
    ("latency", include_str!("builtin/latency.yaml")),
    ("redis-loss", include_str!("builtin/redis-loss.yaml")),
];

/// The text of a drill that comes along.
pub fn text(name: &str) -> Option<&'static str> {
    ALL.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// All of them, read.
pub fn all() -> impl Iterator<Item = Drill> {
    ALL.iter().filter_map(|(_, text)| read(text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_can_be_read_and_is_called_as_its_file() {
        for (name, text) in ALL {
            let drill = read(text).unwrap_or_else(|faults| panic!("{name}: {faults:?}"));
            assert_eq!(drill.name.as_str(), name);
            assert!(!drill.description.is_empty() && drill.objectives.success.is_some(), "{name}");
        }
        assert_eq!(all().count(), ALL.len());
        assert!(text("region-loss").is_some() && text("other").is_none());
    }
}
