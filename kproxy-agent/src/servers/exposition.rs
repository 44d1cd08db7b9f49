//! Metrics as kube-proxy writes them: Prometheus' text format 0.0.4. It always does, whatever is asked for.

use std::fmt::{self, Write};

use prometheus_client::{encoding::text::encode_registry, registry::Registry};

/// The `Content-Type` of what [`exposition`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of `registry`, read now.
pub fn exposition(registry: &Registry) -> Result<String, fmt::Error> {
    let mut lines = Lines::default();
    encode_registry(&mut lines, registry)?;
    Ok(lines.out)
}

/// Takes OpenMetrics, which is what the library writes, and makes 0.0.4 of it. The differences that matter: a
/// counter's family is called as its samples are, with `_total`; and bounds of buckets are `1`, not `1.0`,
/// which would be another series than that of a kube-proxy on the next node.
#[derive(Default)]
struct Lines {
    out: String,
    line: String,
    /// A `# HELP` line, which comes before the type that decides on its name.
    help: String,
}

impl Write for Lines {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((end, after)) = rest.split_once('\n') {
            self.line.push_str(end);
            self.end_line()?;
            rest = after;
        }
        self.line.push_str(rest);
        Ok(())
    }
}

impl Lines {
    fn end_line(&mut self) -> fmt::Result {
        if let Some(help) = self.line.strip_prefix("# HELP ") {
            self.help.clear();
            self.help.push_str(help);
        } else if let Some((name, kind)) =
            self.line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some(help) = self.help.strip_prefix(name).and_then(|rest| rest.strip_prefix(' ')) {
                writeln!(self.out, "# HELP {name}{suffix} {help}")?;
            }
            writeln!(self.out, "# TYPE {name}{suffix} {kind}")?;
        } else if !self.line.starts_with('#') {
            let (before, after) = split_bound(&self.line);
            self.out.push_str(before);
            self.out.push_str(after);
            self.out.push('\n');
        }
        self.line.clear();
        Ok(())
    }
}

/// The line without the `.0` of its bucket's bound, in two pieces.
fn split_bound(line: &str) -> (&str, &str) {
    let is_bucket = line.split_once('{').is_some_and(|(name, _)| name.ends_with("_bucket"));
    let end_of_bound = || {
        let bound = line.find("le=\"")? + "le=\"".len();
        let end = bound + line[bound..].find('"')?;
        line[bound..end].ends_with(".0").then_some(end)
    };
    match is_bucket.then(end_of_bound).flatten() {
        Some(end) => (&line[..end - ".0".len()], &line[end..]),
        None => (line, ""),
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram};

    use super::*;

    #[test]
    fn counters_gauges_and_histograms_are_in_the_old_format() {
        let mut registry = Registry::default();
        let counter: Counter = Counter::default();
        counter.inc_by(3);
        registry.register("seen", "What was seen", counter);
        let gauge: Family<Vec<(&str, &str)>, Gauge> = Family::default();
        gauge.get_or_create(&vec![("le", "1.0"), ("text", "a\"b\nle=\"2.0\"")]).set(7);
        registry.register("open_total", "What is open", gauge);
        let histogram = Histogram::new([0.25, 1.0, 20.0]);
        histogram.observe(0.5);
        histogram.observe(300.0);
        registry.register("took_seconds", "How long it took", histogram);
        let expected = r#"
# HELP seen_total What was seen.
# TYPE seen_total counter
seen_total 3
# HELP open_total What is open.
# TYPE open_total gauge
open_total{le="1.0",text="a\"b\nle=\"2.0\""} 7
# HELP took_seconds How long it took.
# TYPE took_seconds histogram
took_seconds_sum 300.5
took_seconds_count 2
took_seconds_bucket{le="0.25"} 0
took_seconds_bucket{le="1"} 1
took_seconds_bucket{le="20"} 1
took_seconds_bucket{le="+Inf"} 2
"#;
        assert_eq!(exposition(&registry).expect("a String takes all"), expected.trim_start());
    }
}
