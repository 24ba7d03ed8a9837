//! The policies that name one tenant, found by what a request is about.
//!
//! The rule: it finds what looking at every policy would find. A few are looked at one by one. Of many, those are
//! looked at whose pattern for the model can match the request's, or those whose pattern for the client can,
//! whichever are fewer: by the whole name, or by what stands before the pattern's first `*`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::resource::{AccessPolicy, Pattern};
use crate::units::Name;

/// So few policies are looked at sooner than an index.
const FEW: usize = 8;

/// In the order in which they were given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policies {
    all: Vec<Granted>,
    index: Option<Box<Index>>,
}

/// A policy, and the places of its subjects that are the tenant.
#[derive(Clone, Debug, PartialEq)]
pub struct Granted {
    pub policy: Arc<AccessPolicy>,
    subjects: Vec<u32>,
}

impl Granted {
    /// Of the tenant.
    pub fn allows_client(&self, client: &str) -> bool {
        self.clients().any(|pattern| pattern.matches(client))
    }

    fn clients(&self) -> impl Iterator<Item = &Pattern> {
        self.subjects.iter().filter_map(|at| self.policy.subjects.get(*at as usize)).map(|subject| &subject.clients)
    }
}

impl Policies {
    /// Policies that name a tenant.
    pub fn of(tenant: &Name, policies: impl IntoIterator<Item = Arc<AccessPolicy>>) -> Self {
        let granted = |policy: Arc<AccessPolicy>| {
            let named = (0..).zip(&policy.subjects).filter(|(_, subject)| subject.tenant == *tenant);
            Granted { subjects: named.map(|(at, _)| at).collect(), policy }
        };
        let all: Vec<Granted> = policies.into_iter().map(granted).collect();
        let index = (all.len() > FEW).then(|| Box::new(Index::of(&all)));
        Self { all, index }
    }

    /// All that may concern a client and, where it is known, a model, and some that do not: each is still to be
    /// held against the request.
    pub fn candidates(&self, client: &str, model: Option<&str>) -> impl Iterator<Item = &Granted> {
        let (all, few) = match &self.index {
            None => (&self.all[..], Vec::new()),
            Some(index) => (&[][..], index.fewest(client, model)),
        };
        all.iter().chain(few.into_iter().flatten().filter_map(|at| self.all.get(*at as usize)))
    }
}

/// Places of policies.
#[derive(Clone, Debug, Default, PartialEq)]
struct Index {
    by_model: Places,
    by_client: Places,
}

impl Index {
    fn of(all: &[Granted]) -> Self {
        let mut index = Self::default();
        for (at, granted) in (0..).zip(all) {
            granted.policy.models.iter().for_each(|pattern| index.by_model.add(pattern, at));
            granted.clients().for_each(|pattern| index.by_client.add(pattern, at));
        }
        index
    }

    fn fewest(&self, client: &str, model: Option<&str>) -> Vec<&[u32]> {
        let count = |places: &[&[u32]]| places.iter().map(|some| some.len()).sum::<usize>();
        let by_client = self.by_client.matching(client);
        let by_model = model.map(|model| self.by_model.matching(model));
        by_model.filter(|by_model| count(by_model) < count(&by_client)).unwrap_or(by_client)
    }
}

/// By a pattern: the whole name, or what a name must begin with.
#[derive(Clone, Debug, Default, PartialEq)]
struct Places {
    whole: BTreeMap<Box<str>, Vec<u32>>,
    beginnings: BTreeMap<Box<str>, Vec<u32>>,
    /// Bit n: some beginning has n bytes.
    lengths: u64,
}

// A pattern is no longer than a name, whose lengths have a bit each.
const _: () = assert!(Name::MAX < u64::BITS as usize);

impl Places {
    fn add(&mut self, pattern: &Pattern, at: u32) {
        let beginning = pattern.beginning();
        let places = if pattern.is_whole() {
            self.whole.entry(beginning.into())
        } else {
            self.lengths |= 1 << beginning.len();
            self.beginnings.entry(beginning.into())
        };
        let places = places.or_default();
        if places.last() != Some(&at) {
            places.push(at);
        }
    }

    /// Of the patterns that this name can match.
    fn matching(&self, name: &str) -> Vec<&[u32]> {
        let lengths = (0..=name.len().min(Name::MAX)).filter(|length| self.lengths >> length & 1 == 1);
        // A name that a client made up may have no such place between its letters: patterns are ASCII.
        let beginnings = lengths.filter_map(|length| self.beginnings.get(name.get(..length)?));
        self.whole.get(name).into_iter().chain(beginnings).map(Vec::as_slice).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::resource::{Action, Subject};

    fn policy(clients: &[String], models: &[String]) -> Arc<AccessPolicy> {
        let pattern = |text: &String| Pattern::parse(text).unwrap();
        let tenant = |name| Name::parse(name).unwrap();
        let other = Subject { tenant: tenant("globex"), clients: Pattern::any() };
        let ours = clients.iter().map(|client| Subject { tenant: tenant("acme"), clients: pattern(client) });
        Arc::new(AccessPolicy {
            subjects: std::iter::once(other).chain(ours).collect(),
            models: models.iter().map(pattern).collect(),
            versions: vec![Pattern::any()],
            actions: vec![Action::Infer],
        })
    }

    fn found(policies: &Policies, client: &str, model: Option<&str>) -> usize {
        policies.candidates(client, model).count()
    }

    fn acme(policies: impl IntoIterator<Item = Arc<AccessPolicy>>) -> Policies {
        Policies::of(&Name::parse("acme").unwrap(), policies)
    }

    #[test]
    fn of_many_policies_few_are_looked_at() {
        let any = || vec!["*".to_owned()];
        let models = acme((0..1_000).map(|at| policy(&any(), &[format!("m-{at:03}")])));
        assert_eq!([Some("m-007"), Some("m-*"), None].map(|model| found(&models, "web", model)), [1, 0, 1_000]);
        let clients = acme((0..1_000).map(|at| policy(&[format!("c-{at:03}-*")], &any())));
        assert_eq!(["c-007-a", "c-007", "é"].map(|client| found(&clients, client, Some("m"))), [1, 0, 0]);
        assert_eq!(found(&clients, "c-007-a", None), 1);
    }

    #[test]
    fn another_tenants_subject_lets_nobody_in() {
        let policies = acme([policy(&["web".to_owned()], &["*".to_owned()])]);
        let allowed = |client| policies.candidates(client, None).any(|granted| granted.allows_client(client));
        assert!(allowed("web") && !allowed("batch"), "globex may come with any client");
    }

    proptest! {
        #[test]
        fn nothing_that_matches_is_left_out(
            given in vec((vec("[ab*]{1,4}", 1..3), vec("[ab*]{1,4}", 1..3)), 0..40),
            client in "[ab]{1,5}",
            model in "[abé]{0,5}",
        ) {
            let all: Vec<_> = given.iter().map(|(clients, models)| policy(clients, models)).collect();
            let policies = acme(all.clone());
            let fits = |granted: &Granted, model: Option<&str>| {
                let models = &granted.policy.models;
                granted.allows_client(&client)
                    && model.is_none_or(|model| models.iter().any(|pattern| pattern.matches(model)))
            };
            for model in [None, Some(model.as_str())] {
                let naive = policies.all.iter().filter(|granted| fits(granted, model)).map(|one| one.policy.clone());
                let mut naive: Vec<_> = naive.map(|policy| Arc::as_ptr(&policy)).collect();
                let candidates = policies.candidates(&client, model).filter(|granted| fits(granted, model));
                let mut found: Vec<_> = candidates.map(|granted| Arc::as_ptr(&granted.policy)).collect();
                naive.sort_unstable();
                found.sort_unstable();
                found.dedup();
                prop_assert_eq!(found, naive);
            }
        }
    }
}
