//! Where the control plane is.
//!
//! ```yaml
//! control: {servers: ['10.0.0.1:7443', 'control-1.spillway:7443']}
//! ```

use crate::settings::{Field, FromNode};
use crate::store::settings::host_and_port;

const MOST_SERVERS: usize = 16;

/// How a process reaches the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSettings {
    /// `servers`: `host:port` of some control nodes, 1 to 16. One at a time is followed, whichever it is.
    pub servers: Vec<String>,
}

impl FromNode for ControlSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let servers = fields.required("servers").and_then(|field| {
            let items = field.items();
            if items.is_empty() || items.len() > MOST_SERVERS {
                field.fault(format!("expected 1 to {MOST_SERVERS} servers"));
                return None;
            }
            items.iter().map(server).collect::<Option<Vec<_>>>()
        });
        fields.finish();
        Some(Self { servers: servers? })
    }
}

fn server(field: &Field<'_>) -> Option<String> {
    let text = field.text()?;
    if host_and_port(text).is_none() {
        field.fault(format!("'{text}' is not valid: expected host:port"));
        return None;
    }
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::parse;

    #[test]
    fn control_nodes_are_some_hosts_and_ports() {
        let settings: ControlSettings = parse("servers: ['127.0.0.1:7443', 'control:7443', '[::1]:1']").unwrap();
        assert_eq!(settings.servers, ["127.0.0.1:7443", "control:7443", "[::1]:1"]);
        let many = format!("servers: [{}]", "'c:1', ".repeat(17));
        for bad in ["{}", "servers: []", "servers: [control]", "servers: ['c:0']", "servers: ['c:1']\nmore: 1", &many] {
            assert!(parse::<ControlSettings>(bad).is_err(), "{bad}");
        }
    }
}
