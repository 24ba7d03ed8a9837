//! An error with its causes, in one line.
//!
//! The rule: an error's own text says only its own layer, so that who shows one in a field or a record shows
//! the chain. `main` does the same with anyhow's `{:#}`.

use std::error::Error;
use std::fmt;

/// Shows `error: its cause: the cause of that`.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the file cannot be read")]
    struct Unreadable(#[source] io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("identity")]
    struct Identity(#[source] Unreadable);

    #[test]
    fn each_layer_is_told_once_the_outermost_first() {
        let error = Identity(Unreadable(io::Error::other("no disk")));
        assert_eq!(Chain(&error).to_string(), "identity: the file cannot be read: no disk");
        assert_eq!(Chain(&io::Error::other("no disk")).to_string(), "no disk");
    }
}
