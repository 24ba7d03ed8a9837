//! What one set of resources makes of another.

use std::collections::BTreeMap;

/// By kind and name; the value is the canonical text.
pub type Set = BTreeMap<(String, String), String>;

/// One resource that differs. Not both are `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub kind: String,
    pub name: String,
    /// None: it is new.
    pub before: Option<String>,
    /// None: it is removed.
    pub after: Option<String>,
}

/// How many resources differ, by how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub added: u32,
    pub changed: u32,
    pub removed: u32,
}

/// All differences, sorted by kind and name.
pub fn changes(before: &Set, after: &Set) -> Vec<Change> {
    let gone = before.iter().filter(|(key, _)| !after.contains_key(key)).map(|(key, text)| (key, Some(text), None));
    let there = after.iter().map(|(key, text)| (key, before.get(key), Some(text)));
    let mut all: Vec<Change> = gone
        .chain(there)
        .filter(|(_, before, after)| before != after)
        .map(|((kind, name), before, after)| Change {
            kind: kind.clone(),
            name: name.clone(),
            before: before.cloned(),
            after: after.cloned(),
        })
        .collect();
    all.sort_by(|one, other| (&one.kind, &one.name).cmp(&(&other.kind, &other.name)));
    all
}

impl Counts {
    pub fn of(changes: &[Change]) -> Self {
        let mut counts = Self::default();
        for change in changes {
            *match (&change.before, &change.after) {
                (None, _) => &mut counts.added,
                (_, None) => &mut counts.removed,
                _ => &mut counts.changed,
            } += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(entries: &[(&str, &str, &str)]) -> Set {
        let entry = |(kind, name, text): &(&str, &str, &str)| (((*kind).into(), (*name).into()), (*text).into());
        entries.iter().map(entry).collect()
    }

    #[test]
    fn each_difference_is_told_once_in_order() {
        let before = set(&[("Pool", "a", "1"), ("Pool", "b", "1"), ("Region", "eu", "1")]);
        let after = set(&[("Model", "m", "1"), ("Pool", "a", "2"), ("Region", "eu", "1")]);
        let found = changes(&before, &after);
        let told: Vec<_> = found
            .iter()
            .map(|change| (&*change.kind, &*change.name, change.before.as_deref(), change.after.as_deref()))
            .collect();
        let expected =
            [("Model", "m", None, Some("1")), ("Pool", "a", Some("1"), Some("2")), ("Pool", "b", Some("1"), None)];
        assert_eq!(told, expected);
        assert_eq!(Counts::of(&found), Counts { added: 1, changed: 1, removed: 1 });
    }

    fn any_set() -> impl Strategy<Value = Set> {
        proptest::collection::btree_map(("[AB]", "[a-d]"), "[x-z]", 0..8)
    }

    proptest! {
        #[test]
        fn changes_make_one_set_of_the_other(before in any_set(), after in any_set()) {
            let mut made = before.clone();
            for Change { kind, name, before: was, after: is } in changes(&before, &after) {
                prop_assert_ne!(&was, &is);
                let key = (kind, name);
                let replaced = match is {
                    Some(text) => made.insert(key, text),
                    None => made.remove(&key),
                };
                prop_assert_eq!(replaced, was);
            }
            prop_assert_eq!(made, after);
        }
    }
}
