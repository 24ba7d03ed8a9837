//! What is done to whom.
//!
//! Processes and links have names of one or two parts, such as `eu-west/gateway-0` or `etcd-1`. A drill names them by
//! patterns, in which `*` stands for any characters of a part and `$target` for the region that the drill is about.

use std::fmt;
use std::time::Duration;

use crate::resource::Pattern;
use crate::units::{InvalidUnit, Name};

/// What stands for the target region in a pattern.
const TARGET: &str = "$target";
/// Parts of a name.
const MOST_PARTS: usize = 3;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The process dies at once (SIGKILL), and is not started again.
    Kill,
    /// The process stands still (SIGSTOP); its connections stay open.
    Pause,
    /// Connections to it are reset, open ones and new ones.
    Refuse,
    /// What goes through its link arrives so much later, in each direction.
    Delay(Duration),
    /// Nothing goes through its link any more. Connections stay open, and those who open them learn nothing.
    Drop,
}

impl Act {
    /// Whether it is done to a link; the others are done to processes.
    pub fn is_of_links(self) -> bool {
        match self {
            Self::Kill | Self::Pause => false,
            Self::Refuse | Self::Delay(_) | Self::Drop => true,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Refuse => "refuse",
            Self::Delay(_) => "delay",
            Self::Drop => "drop",
        }
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delay(delay) => write!(f, "delay by {} ms", delay.as_millis()),
            other => f.write_str(other.name()),
        }
    }
}

/// One fault of a drill.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    pub act: Act,
    /// The processes, or the processes that the links lead to.
    pub on: Vec<Names>,
    /// Of links: only what comes from these processes. Empty: from anybody.
    pub from: Vec<Names>,
}

/// A pattern over names of processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names(String);

impl Names {
    pub fn parse(text: &str) -> Result<Self, InvalidUnit> {
        const EXPECTED: InvalidUnit =
            InvalidUnit("a pattern of process names such as $target/gateway-* or etcd-*, of up to three parts");
        // Any name will do to see whether it is a pattern.
        parts(&text.replace(TARGET, "a")).ok_or(EXPECTED)?;
        Ok(Self(text.to_owned()))
    }

    /// Whether it depends on which region is the target.
    pub fn needs_target(&self) -> bool {
        self.0.contains(TARGET)
    }

    pub fn matches(&self, name: &str, target: Option<&Name>) -> bool {
        let text = match target {
            Some(target) => self.0.replace(TARGET, target.as_str()),
            None if self.needs_target() => return false,
            None => self.0.clone(),
        };
        let Some(patterns) = parts(&text) else { return false };
        let named: Vec<&str> = name.split('/').collect();
        named.len() == patterns.len() && patterns.iter().zip(named).all(|(pattern, part)| pattern.matches(part))
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn parts(text: &str) -> Option<Vec<Pattern>> {
    let parts: Vec<Pattern> = text.split('/').map(Pattern::parse).collect::<Result<_, _>>().ok()?;
    (parts.len() <= MOST_PARTS).then_some(parts)
}

/// Those of `known` that a list of patterns names, in their order.
pub fn named<'a>(patterns: &[Names], target: Option<&Name>, known: &'a [String]) -> Vec<&'a str> {
    let known = known.iter().map(String::as_str);
    known.filter(|name| patterns.iter().any(|pattern| pattern.matches(name, target))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_processes_part_by_part() {
        let target = Name::parse("eu-west").unwrap();
        for (pattern, name, matches) in [
            ("$target/*", "eu-west/gateway", true),
            ("$target/*", "us-east/gateway", false),
            ("$target/*", "eu-west", false),
            ("$target/*", "eu-west/a/b", false),
            ("*/gateway*", "us-east/gateway-1", true),
            ("*/gateway*", "us-east/scorer-1", false),
            ("etcd-*", "etcd-2", true),
            ("etcd-*", "eu-west/etcd-2", false),
        ] {
            assert_eq!(Names::parse(pattern).unwrap().matches(name, Some(&target)), matches, "{pattern} {name}");
        }
        assert!(!Names::parse("$target/*").unwrap().matches("a/gateway", None), "without a target it names nobody");
        for bad in ["", "/", "a/", "a b", "a/b/c/d", "$other/x", "ä"] {
            assert!(Names::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn each_process_is_named_once() {
        let known = ["etcd-0", "eu/gateway", "eu/scorer"].map(str::to_owned);
        let patterns = ["eu/*", "*/gateway"].map(|text| Names::parse(text).unwrap());
        assert_eq!(named(&patterns, None, &known), ["eu/gateway", "eu/scorer"]);
    }
}
