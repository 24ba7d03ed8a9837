//! Canonical specs as people read and write them.
//!
//! The rule: what is written here reads back as the same resource. All scalars are texts; one that YAML would take for
//! something else is quoted.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

/// One resource as a document.
pub fn document(kind: &str, name: &str, spec: &Value) -> String {
    let mut text = format!("apiVersion: spillway/v1\nkind: {kind}\nmetadata:\n  name: {}\nspec:", scalar(name));
    block(spec, 1, &mut text);
    text
}

/// Each scalar by its path.
pub fn fields(spec: &Value) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    flatten(spec, "spec".into(), &mut found);
    found
}

fn flatten(value: &Value, path: String, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            map.iter().for_each(|(key, value)| flatten(value, format!("{path}.{key}"), into));
        }
        Value::Array(items) if !items.is_empty() => {
            let numbered = items.iter().enumerate();
            numbered.for_each(|(index, value)| flatten(value, format!("{path}[{index}]"), into));
        }
        other => drop(into.insert(path, inline(other))),
    }
}

/// Behind a key or a dash: on the same line, or on lines of its own.
fn block(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    // Writing to memory cannot fail.
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            for (key, value) in map {
                let _ = write!(text, "{indent}{}:", scalar(key));
                block(value, depth + 1, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            text.push('\n');
            for item in items {
                let mut inner = String::new();
                block(item, depth + 1, &mut inner);
                // The first line of a map stands behind the dash.
                let inner = inner.strip_prefix('\n').map_or(&*inner, str::trim_start);
                let _ = write!(text, "{indent}- {}", inner.trim_start());
            }
        }
        other => {
            let _ = writeln!(text, " {}", inline(other));
        }
    }
}

fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

fn scalar(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._/-%".contains(&byte);
    let word = text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric()) && text.bytes().all(plain);
    let taken = ["null", "true", "false", "yes", "no"].iter().any(|taken| taken.eq_ignore_ascii_case(text));
    // A JSON string is a YAML one.
    if word && !taken { text.to_owned() } else { Value::String(text.to_owned()).to_string() }
}

#[cfg(test)]
mod tests {
    use spillway_core::resource;

    use super::*;

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        let resources = concat!(env!("CARGO_MANIFEST_DIR"), "/dev/resources");
        let mut seen = 0;
        for entry in std::fs::read_dir(resources).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            for wanted in resource::parse(&text).unwrap() {
                let spec = serde_json::from_str(&wanted.canonical).unwrap();
                let written = document(wanted.spec.kind(), wanted.name.as_str(), &spec);
                let read = resource::parse(&written).unwrap_or_else(|faults| panic!("{faults:?}\n{written}"));
                assert_eq!((&read[0].canonical, &read[0].spec), (&wanted.canonical, &wanted.spec), "{written}");
                seen += 1;
            }
        }
        assert!(seen > 5);
    }

    #[test]
    fn texts_that_look_like_something_else_are_quoted() {
        for (text, written) in [
            ("eu-west", "eu-west"),
            ("30m", "30m"),
            ("", "\"\""),
            ("null", "\"null\""),
            ("No", "\"No\""),
            ("a: b", "\"a: b\""),
            ("- x", "\"- x\""),
            ("a\n\"b\"", "\"a\\n\\\"b\\\"\""),
        ] {
            assert_eq!(scalar(text), written);
        }
        let nested = serde_json::json!({"a": [["1", "2"], [{"b": "c", "d": {"e": "f"}}], []], "g": {}});
        let written = document("Pool", "p", &nested);
        let lines: Vec<&str> = written.lines().skip(4).collect();
        let expected = [
            "spec:",
            "  a:",
            "    - - 1",
            "      - 2",
            "    - - b: c",
            "        d:",
            "          e: f",
            "    - []",
            "  g: {}",
        ];
        assert_eq!(lines, expected, "{written}");
    }
}
