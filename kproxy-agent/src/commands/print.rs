//! How results are printed: tables as kubectl's, JSON, YAML.

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{cli::OutputFormat, programs::cut};

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

/// What is longer is cut: nobody reads it in a column. JSON and YAML have all.
const CELL: usize = 400;

/// Columns as wide as their widest cell, three blanks between, none at the ends of lines. A cell is one line, and cut
/// where it is very long.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|text| cell(text)).collect()).collect();
    let mut columns = Columns::new(header);
    columns.fit(&rows);
    let mut out = columns.line(header.iter().copied());
    for row in &rows {
        out.push_str(&columns.line(row.iter().map(String::as_str)));
    }
    out
}

/// What stands in a table for this text.
fn cell(text: &str) -> String {
    let text = cut(text, CELL);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
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
                *width = (*width).max(cell.chars().count().min(CELL));
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
    use proptest::prelude::*;

    use super::*;

    /// Texts around every length at which something could give way: none, a cell's, what a width can be.
    fn text() -> impl Strategy<Value = String> {
        let length = prop_oneof![0..20_usize, CELL - 2..CELL + 3, 65_533..65_540_usize, Just(300_000)];
        let piece = prop_oneof![Just("x"), Just("é"), Just("\n"), Just("\u{1b}"), Just("a b\t")];
        (length, piece).prop_map(|(length, piece)| piece.repeat(length))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_table_can_be_printed_of_any_texts(
            rows in proptest::collection::vec(proptest::collection::vec(text(), 0..5), 0..4),
        ) {
            let printed = table(&["A", "B", "C"], &rows);
            prop_assert_eq!(printed.lines().count(), rows.len() + 1);
            prop_assert!(printed.lines().all(|line| line.chars().count() <= 3 * (CELL + 4)));
            prop_assert!(printed.chars().all(|c| c == '\n' || !c.is_control()));
            // The same by lines, as tables are printed that have no end.
            let mut columns = Columns::new(&["A", "B", "C"]);
            for row in &rows {
                columns.fit(std::slice::from_ref(row));
                columns.line(row.iter().map(String::as_str));
            }
        }
    }

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
