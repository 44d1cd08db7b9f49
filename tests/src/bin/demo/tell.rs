//! What the reader sees while the demo runs: numbered steps, lines below them, marks.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::process;
use std::time::{Duration, Instant};

/// Prints on standard output; in colour only where that is a terminal and NO_COLOR is not set.
#[derive(Debug)]
pub struct Tell {
    start: Instant,
    steps: u32,
    styled: bool,
}

/// How a piece of text stands out.
#[derive(Clone, Copy, Debug)]
pub enum Style {
    Bold,
    Dim,
    Good,
    Bad,
}

impl Tell {
    pub fn new() -> Self {
        let styled = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { start: Instant::now(), steps: 0, styled }
    }

    /// Begins a step.
    pub fn step(&mut self, title: impl Display) {
        self.steps += 1;
        let number = self.style(Style::Bold, format!("{:2}", self.steps));
        let title = self.style(Style::Bold, title);
        let elapsed = self.style(Style::Dim, format!("[{:4.1} s]", self.elapsed().as_secs_f64()));
        put(&format!("\n{elapsed} {number}  {title}"));
    }

    /// A line below a step.
    pub fn line(&self, text: impl Display) {
        put(&format!("      {text}"));
    }

    /// Something that was looked at, and what is wrong with it if anything is.
    pub fn mark(&self, text: impl Display, fault: Option<&str>) {
        let sign = self.sign(fault.is_none());
        match fault {
            None => self.line(format!("{sign} {text}")),
            Some(fault) => self.line(format!("{sign} {text}: {}", self.style(Style::Bad, fault))),
        }
    }

    /// Several lines as they are, below a step.
    pub fn block(&self, text: &str) {
        for line in text.lines() {
            put(format!("      {line}").trim_end());
        }
    }

    pub fn blank(&self) {
        put("");
    }

    /// A tick or a cross.
    pub fn sign(&self, good: bool) -> String {
        if good { self.style(Style::Good, "✓") } else { self.style(Style::Bad, "✗") }
    }

    pub fn style(&self, style: Style, text: impl Display) -> String {
        let code = match style {
            Style::Bold => 1,
            Style::Dim => 2,
            Style::Good => 32,
            Style::Bad => 31,
        };
        if self.styled { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Since the demo began.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

fn put(line: &str) {
    let mut stdout = io::stdout().lock();
    if writeln!(stdout, "{line}").and_then(|()| stdout.flush()).is_err() {
        // Nobody reads any more; the run takes everything down when its process ends.
        process::exit(1);
    }
}
