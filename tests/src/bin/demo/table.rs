//! The table in which the demo ends: what each client's request met, under each variant.

use crate::objects::Variant;
use crate::observe::Observation;
use crate::tell::{Style, Tell};

/// A request of the table.
#[derive(Debug)]
pub struct Row {
    /// Under which variant of the Service it was made.
    pub variant: Variant,
    /// Who asked, in words.
    pub client: String,
    /// What was seen.
    pub observation: Observation,
    /// What is wrong with it, if anything is.
    pub fault: Option<String>,
}

const HEADER: [&str; 5] = ["CLIENT", "WAY", "ANSWERED BY", "POD SAW", "ELB COUNT"];

/// Prints the rows, grouped by variant.
pub fn print(tell: &Tell, rows: &[Row]) {
    let cells: Vec<[String; 5]> = rows.iter().map(cells).collect();
    let widths: [usize; 5] = std::array::from_fn(|column| {
        let longest = cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        longest.max(HEADER[column].len())
    });
    let line = |cells: [&str; 5]| -> String {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  "));
        padded.collect::<String>()
    };
    tell.line(format!("    {}", tell.style(Style::Dim, line(HEADER).trim_end())));
    let mut variant = None;
    for (row, cells) in rows.iter().zip(&cells) {
        if variant != Some(row.variant) {
            variant = Some(row.variant);
            tell.line(tell.style(Style::Bold, row.variant.title()));
        }
        tell.line(format!(
            "  {} {}",
            tell.sign(row.fault.is_none()),
            line(cells.each_ref().map(String::as_str)).trim_end()
        ));
        if let Some(fault) = &row.fault {
            tell.line(format!("      {}", tell.style(Style::Bad, fault)));
        }
    }
}

fn cells(row: &Row) -> [String; 5] {
    let seen = &row.observation;
    [row.client.clone(), seen.way(), seen.answered_by().to_owned(), seen.seen().to_owned(), seen.count()]
}
