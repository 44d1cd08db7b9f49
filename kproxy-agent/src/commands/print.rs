//! How results are printed: tables as kubectl's, JSON, YAML.

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::cli::OutputFormat;

/// Prints `value` as JSON or YAML, or what `table` makes of it for people.
pub fn print<T: Serialize>(
    value: &T,
    format: OutputFormat,
    table: impl FnOnce(&T, bool) -> String,
) -> Result<()> {
    match format {
        OutputFormat::Table => print!("{}", table(value, false)),
        OutputFormat::Wide => print!("{}", table(value, true)),
        OutputFormat::Json => {
            println!("{}", serde_json::to_string_pretty(value).context("cannot print JSON")?);
        }
        OutputFormat::Yaml => print!("{}", serde_saphyr::to_string(value).context("cannot print YAML")?),
    }
    Ok(())
}

/// Columns as wide as their widest cell, three blanks between, none at the ends of lines.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut columns = Columns::new(header);
    columns.fit(rows);
    let mut out = columns.line(header.iter().copied());
    for row in rows {
        out.push_str(&columns.line(row.iter().map(String::as_str)));
    }
    out
}

/// The widths of a table's columns, for one that is printed in parts.
pub struct Columns {
    widths: Vec<usize>,
}

impl Columns {
    /// As wide as the header.
    pub fn new(header: &[&str]) -> Self {
        Self { widths: header.iter().map(|cell| cell.chars().count()).collect() }
    }

    /// Widens them for these rows.
    pub fn fit(&mut self, rows: &[Vec<String>]) {
        for row in rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
    }

    /// A line of the table.
    pub fn line<'a>(&self, cells: impl Iterator<Item = &'a str>) -> String {
        let mut text = String::new();
        for (width, cell) in self.widths.iter().zip(cells) {
            text.push_str(&format!("{cell:<width$}   "));
        }
        let mut line = text.trim_end().to_owned();
        line.push('\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".into(), "long cell".into(), String::new()],
            vec!["bbbb".into(), "x".into(), "y".into()],
        ];
        assert_eq!(
            table(&["N", "CELL", "Z"], &rows),
            "N      CELL        Z\na      long cell\nbbbb   x           y\n"
        );
    }
}
