//! YAML as a small tree in which each node knows its line.
//!
//! Scalars stay text until a field says what it wants, so `name: no` is the text "no" and a version
//! may be written `1` or `"1"`. Anchors, aliases and tags are refused: an operator's file says what
//! it means, and an alias can make a small file huge. JSON is read by the same door.

use saphyr_parser::{Event, Parser, ScalarStyle, Span, SpannedEventReceiver};

/// Nesting beyond this is refused; our deepest resource needs 7.
const DEPTH: usize = 32;

#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Counted from 1; 0 where the text did not come from a file.
    pub line: usize,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    pub line: usize,
    pub text: String,
}

/// The text is no YAML that we accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidYaml {
    pub line: usize,
    pub problem: String,
}

/// Reads all documents of a file. Empty documents are left out.
pub fn documents(text: &str) -> Result<Vec<Node>, InvalidYaml> {
    let mut builder = Builder::default();
    let loaded = Parser::new_from_str(text).load(&mut builder, true);
    if let Some(fault) = builder.fault {
        return Err(fault);
    }
    match loaded {
        Ok(()) => Ok(builder.documents),
        Err(error) => Err(InvalidYaml { line: error.marker().line(), problem: error.info().to_owned() }),
    }
}

impl Node {
    /// The canonical text: JSON, keys sorted, every scalar a string.
    pub fn canonical(&self) -> String {
        self.to_json().to_string()
    }

    fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Scalar(text) => text.clone().into(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            // serde_json's map is sorted by key.
            Value::Map(entries) => serde_json::Value::Object(
                entries.iter().map(|(key, node)| (key.text.clone(), node.to_json())).collect(),
            ),
        }
    }

    /// The line of a node below this one, by its path: `.inputs[0].shape`.
    pub fn line_of(&self, path: &str) -> Option<usize> {
        if path.is_empty() {
            return Some(self.line).filter(|line| *line > 0);
        }
        let end = path[1..].find(['.', '[']).map_or(path.len(), |at| at + 1);
        let (step, rest) = path.split_at(end);
        match &self.value {
            Value::Map(entries) => {
                entries.iter().find(|(key, _)| step.strip_prefix('.') == Some(&key.text))?.1.line_of(rest)
            }
            Value::List(items) => {
                let index: usize = step.strip_prefix('[')?.strip_suffix(']')?.parse().ok()?;
                items.get(index)?.line_of(rest)
            }
            Value::Null | Value::Scalar(_) => None,
        }
    }

    /// What this node is, for a message that says what was expected instead.
    pub fn what(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Scalar(_) => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        }
    }
}

#[derive(Default)]
struct Builder {
    documents: Vec<Node>,
    open: Vec<Open>,
    fault: Option<InvalidYaml>,
}

enum Open {
    List(usize, Vec<Node>),
    Map(usize, Vec<(Key, Node)>, Option<Key>),
}

impl<'input> SpannedEventReceiver<'input> for Builder {
    fn on_event(&mut self, event: Event<'input>, span: Span) {
        if self.fault.is_some() {
            return;
        }
        let line = span.start.line();
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                if anchor != 0 || tag.is_some() {
                    return self.refuse(line, "anchors and tags are not accepted");
                }
                let null = style == ScalarStyle::Plain && matches!(&*text, "" | "~" | "null");
                let value = if null { Value::Null } else { Value::Scalar(text.into_owned()) };
                self.put(Node { line, value });
            }
            Event::SequenceStart(anchor, tag) | Event::MappingStart(anchor, tag) if anchor != 0 || tag.is_some() => {
                self.refuse(line, "anchors and tags are not accepted");
            }
            Event::SequenceStart(..) => self.begin(Open::List(line, Vec::new())),
            Event::MappingStart(..) => self.begin(Open::Map(line, Vec::new(), None)),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::List(line, items)) => self.put(Node { line, value: Value::List(items) }),
                Some(Open::Map(line, entries, _)) => self.put(Node { line, value: Value::Map(entries) }),
                None => self.refuse(line, "unbalanced"),
            },
            Event::Alias(_) => self.refuse(line, "aliases are not accepted"),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd => {}
        }
    }
}

impl Builder {
    fn refuse(&mut self, line: usize, problem: &str) {
        self.fault = Some(InvalidYaml { line, problem: problem.to_owned() });
    }

    fn begin(&mut self, open: Open) {
        if self.open.len() >= DEPTH {
            let (Open::List(line, _) | Open::Map(line, ..)) = open;
            return self.refuse(line, "nested deeper than 32");
        }
        self.open.push(open);
    }

    fn put(&mut self, node: Node) {
        match self.open.last_mut() {
            None if node.value == Value::Null => {}
            None => self.documents.push(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, waiting)) => match waiting.take() {
                Some(key) => entries.push((key, node)),
                None => match node.value {
                    Value::Scalar(text) if entries.iter().any(|(key, _)| key.text == text) => {
                        self.refuse(node.line, &format!("the key '{text}' is given twice"));
                    }
                    Value::Scalar(text) => *waiting = Some(Key { line: node.line, text }),
                    _ => self.refuse(node.line, "a key must be a single value"),
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_texts_survive() {
        let documents = documents("a: 1\nb:\n  - no\n  - '1'\n---\n# only a comment\n---\nc: ~\n").unwrap();
        assert_eq!(documents.len(), 2);
        assert_eq!(documents[0].canonical(), r#"{"a":"1","b":["no","1"]}"#);
        let Value::Map(entries) = &documents[0].value else { panic!("a map") };
        assert_eq!((entries[0].0.line, entries[1].0.line), (1, 2));
        assert_eq!(documents[1].canonical(), r#"{"c":null}"#);
    }

    #[test]
    fn a_path_finds_its_line() {
        let node = documents("a:\n  - b: 1\n    c:\n      - 2\n").unwrap().remove(0);
        assert_eq!(node.line_of(".a[0].c[0]"), Some(4));
        assert_eq!(node.line_of(".a[0].b"), Some(2));
        assert_eq!(node.line_of(".a[1]"), None);
        assert_eq!(node.line_of(".x.y"), None);
    }

    #[test]
    fn canonical_text_reads_back_as_itself() {
        let node = documents("z: {y: [1, 'two', {three: 4}]}\na: \"line\\nbreak\"\n").unwrap().remove(0);
        let canonical = node.canonical();
        assert_eq!(documents(&canonical).unwrap()[0].canonical(), canonical);
    }

    #[test]
    fn what_could_mislead_or_explode_is_refused_with_its_line() {
        for (text, line) in
            [("a: 1\na: 2", 2), ("a: &x 1\nb: *x", 1), ("a: !!int 1", 1), ("a: [1", 2), ("\n? [1]\n: 2", 2)]
        {
            let fault = documents(text).unwrap_err();
            assert!(fault.line.abs_diff(line) <= 1, "{text:?}: {fault:?}");
        }
        assert!(documents(&"[".repeat(100)).is_err());
    }
}
