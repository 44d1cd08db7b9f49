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
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (width, cell) in widths.iter().zip(cells) {
            text.push_str(&format!("{cell:<width$}   "));
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
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
