//! AccessPolicy: which clients may do what with which models. What no policy allows is denied.

use super::reader::Field;
use crate::units::{InvalidUnit, Name};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessPolicy {
    pub subjects: Vec<Subject>,
    pub models: Vec<Pattern>,
    /// Of the models; default all.
    pub versions: Vec<Pattern>,
    pub actions: Vec<Action>,
}

/// A tenant, or some of its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub tenant: Name,
    pub clients: Pattern,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Unary and streamed inference.
    Infer,
    /// Metadata and readiness of a model.
    Metadata,
    /// What operators do.
    Admin,
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Self::Infer => "infer",
            Self::Metadata => "metadata",
            Self::Admin => "admin",
        }
    }
}

/// A glob over names: `*` stands for any characters, also none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// What stands between the stars; at least one.
    parts: Vec<String>,
}

impl Pattern {
    pub fn parse(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit = InvalidUnit("a name in which '*' stands for any characters, such as fraud-*");
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-*".contains(&byte);
        if text.is_empty() || text.len() > Name::MAX || !text.bytes().all(allowed) {
            return Err(EXPECTED);
        }
        Ok(Self { parts: text.split('*').map(str::to_owned).collect() })
    }

    pub fn any() -> Self {
        Self { parts: vec![String::new(), String::new()] }
    }

    /// Whether there is no star: it matches the one name that it is.
    pub fn is_whole(&self) -> bool {
        self.parts.len() == 1
    }

    /// What every name that matches begins with: all of it up to the first star.
    pub fn beginning(&self) -> &str {
        self.parts.first().map(String::as_str).unwrap_or_default()
    }

    pub fn matches(&self, name: &str) -> bool {
        let [first, middle @ .., last] = &self.parts[..] else {
            // Without a star it is the name itself.
            return self.parts.first().is_some_and(|only| only == name);
        };
        // Nothing is compared with an empty part: where libc compares with AVX-512 masks that takes 90 ns instead of 1, since an
        // empty string's address cannot be read.
        let rest = if first.is_empty() { Some(name) } else { name.strip_prefix(first.as_str()) };
        let rest = rest.and_then(|rest| if last.is_empty() { Some(rest) } else { rest.strip_suffix(last.as_str()) });
        let Some(mut rest) = rest else { return false };
        // The first place where a part fits leaves most to the others.
        middle.iter().all(|part| match rest.split_once(part.as_str()) {
            Some((_, after)) => {
                rest = after;
                true
            }
            None => false,
        })
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.parts.join("*"))
    }
}

pub(super) fn read(spec: &Field<'_>) -> Option<AccessPolicy> {
    let fields = spec.map();
    let list = |name: &'static str| {
        let Some(field) = fields.required(name) else { return Vec::new() };
        let items = field.items();
        if items.is_empty() {
            field.fault("expected at least one item");
        }
        items
    };
    let subjects = list("subjects").iter().filter_map(read_subject).collect();
    let patterns = |items: Vec<Field<'_>>| items.iter().filter_map(|item| item.parse(Pattern::parse)).collect();
    let models = patterns(list("models"));
    let versions = match fields.optional("versions") {
        Some(_) => patterns(list("versions")),
        None => vec![Pattern::any()],
    };
    let actions = [Action::Infer, Action::Metadata, Action::Admin].map(|action| (action.name(), action));
    let actions = list("actions").iter().filter_map(|item| item.choice(&actions)).collect();
    fields.finish();
    Some(AccessPolicy { subjects, models, versions, actions })
}

fn read_subject(field: &Field<'_>) -> Option<Subject> {
    let fields = field.map();
    let tenant = fields.required("tenant").and_then(|field| field.parse(Name::parse));
    let clients = match fields.optional("client") {
        Some(field) => field.parse(Pattern::parse),
        None => Some(Pattern::any()),
    };
    fields.finish();
    Some(Subject { tenant: tenant?, clients: clients? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, matching, others) in [
            ("eta", &["eta"][..], &["et", "eta2", ""][..]),
            ("*", &["", "eta"], &[]),
            ("fraud-*", &["fraud-", "fraud-eu"], &["fraud", "xfraud-"]),
            ("*-canary", &["a-canary", "-canary"], &["canary", "a-canary-2"]),
            ("a*b*c", &["abc", "axbxc", "abcbc"], &["ac", "abcd", "acb"]),
            ("a*a", &["aa", "aba"], &["a"]),
            ("*b*", &["b", "abc"], &["ac"]),
        ] {
            let pattern = Pattern::parse(pattern).unwrap();
            assert!(matching.iter().all(|name| pattern.matches(name)), "{pattern}");
            assert!(others.iter().all(|name| !pattern.matches(name)), "{pattern}");
        }
        for bad in ["", "a b", "a/b", "ä"] {
            assert!(Pattern::parse(bad).is_err(), "{bad:?}");
        }
    }
}
