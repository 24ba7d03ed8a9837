//! What a smoke run looks at: that each work added its section, with a row for everybody. Never a time.

use anyhow::{Context, Result, ensure};

use super::results::Results;

/// Errors if there is no section of that title, or if its tables have another number of rows.
pub fn check(results: &Results, title: &str, expected: usize) -> Result<()> {
    let head = format!("## {title}");
    let section = results.sections().iter().find(|section| section.lines().next() == Some(&head));
    let section = section.with_context(|| format!("there is no section {title:?}"))?;
    let found = rows(section);
    ensure!(found == expected, "{title:?} has {found} rows instead of {expected}:\n{section}");
    Ok(())
}

/// Rows of all tables of a section, heads apart.
fn rows(section: &str) -> usize {
    let lines = section.lines().filter(|line| line.starts_with('|')).count();
    let tables = section.lines().filter(|line| line.starts_with("|---")).count();
    lines.saturating_sub(2 * tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_without_heads() {
        let table = "| | a |\n|---|---|\n| x | 1 |\n| y | 2 |\n";
        assert_eq!(rows(table), 2);
        assert_eq!(rows(&format!("## Title\n\ntext\n\n{table}\nmore\n\n{table}")), 4);
        assert_eq!(rows("no table"), 0);
    }
}
