//! Files of resources, read as one set: the one reader of `spillway check` and `spillway apply`.

use std::collections::BTreeSet;
use std::fmt;

use crate::resource::{self, Fault, Resource};
use crate::snapshot::Snapshot;

/// A file as an operator named it.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: String,
    /// Its text, or why it cannot be read.
    pub text: Result<String, String>,
}

/// A fault and the file that it is in. The text is `file:line: kind/name: field: problem`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlacedFault {
    pub path: String,
    pub fault: Fault,
}

impl fmt::Display for PlacedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.fault.line, self.fault)
    }
}

/// Reads and checks all files together; every fault is found.
pub fn compile(version: u64, sources: &[Source]) -> Result<(Vec<Resource>, Snapshot), Vec<PlacedFault>> {
    let mut resources: Vec<Resource> = Vec::new();
    let mut origins: Vec<&str> = Vec::new(); // of the resource at the same index
    let mut faults = Vec::new();
    let mut place = |path: &str, fault| faults.push(PlacedFault { path: path.to_owned(), fault });
    for Source { path, text } in sources {
        match text {
            Ok(text) => {
                let (found, wrong) = resource::parse_each(text);
                origins.resize(origins.len() + found.len(), path);
                resources.extend(found);
                wrong.into_iter().for_each(|fault| place(path, fault));
            }
            Err(problem) => place(path, unreadable(problem)),
        }
    }
    let broken: BTreeSet<String> = faults.iter().map(|placed| placed.fault.resource.clone()).collect();
    let compiled = Snapshot::compile_beside(version, &resources, &broken);
    let found = match compiled {
        Ok(snapshot) if faults.is_empty() => return Ok((resources, snapshot)),
        Ok(_) => Vec::new(),
        Err(found) => found,
    };
    faults.extend(found.into_iter().map(|fault| {
        // Of two with one name, the fault is in the later one, which stands at its line or before it.
        let mut of_this_name = (0..resources.len()).filter(|at| resources[*at].label() == fault.resource);
        let at = of_this_name.rfind(|at| resources[*at].line <= fault.line);
        let first = sources.first().map_or("-", |source| &source.path);
        PlacedFault { path: at.map_or(first, |at| origins[at]).to_owned(), fault }
    }));
    faults.sort();
    Err(faults)
}

fn unreadable(problem: &str) -> Fault {
    Fault { line: 0, resource: "-".into(), field: "-".into(), problem: format!("cannot be read: {problem}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: &str = "{apiVersion: spillway/v1, kind: Region, metadata: {name: eu}, spec: {trustDomain: td}}";

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.into(), text: Ok(text.into()) }
    }

    fn pool(region: &str, more: &str) -> String {
        format!(
            "apiVersion: spillway/v1\nkind: Pool\nmetadata: {{name: scorers}}\nspec:\n  region: {region}\n  pods: [{{name: a, address: '10.0.0.1:1'}}]\n{more}"
        )
    }

    #[test]
    fn files_are_one_set() {
        let (resources, snapshot) = compile(7, &[source("p", &pool("eu", "")), source("r", REGION)]).unwrap();
        assert_eq!((resources.len(), snapshot.version, snapshot.pools.len()), (2, 7, 1));
    }

    #[test]
    fn every_fault_names_its_file_and_line() {
        let sources = [
            source("r", REGION),
            source("p", &pool("us", "")),
            source("q", &pool("eu", "  colour: blue\n")),
            Source { path: "s".into(), text: Err("permission denied".into()) },
        ];
        let faults: Vec<String> = compile(1, &sources).unwrap_err().iter().map(ToString::to_string).collect();
        assert_eq!(faults[0], "p:5: Pool/scorers: spec.region: there is no Region 'us'");
        assert!(faults[1].starts_with("q:7: Pool/scorers: spec.colour: unknown key"), "{faults:?}");
        assert_eq!(faults[2], "s:0: -: -: cannot be read: permission denied");
        assert_eq!(faults.len(), 3);
    }

    #[test]
    fn of_two_with_one_name_the_later_file_is_at_fault() {
        let faults = compile(1, &[source("a", REGION), source("b", REGION)]).unwrap_err();
        assert_eq!((faults.len(), &*faults[0].path), (1, "b"));
    }

    #[test]
    fn no_files_are_a_fault_too() {
        assert_eq!(compile(1, &[]).unwrap_err()[0].path, "-");
    }
}
