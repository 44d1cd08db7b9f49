//! The answer as a short path, for people.

use std::fmt::Write as _;

use kproxy_common::Reason;

use super::{Answer, Source, Verdict, Way};

/// How many endpoints are listed.
const LISTED: usize = 20;

/// The answer, a few lines.
pub fn text(answer: &Answer) -> String {
    let mut out = String::new();
    let protocol = answer.protocol.to_uppercase();
    let _ = writeln!(
        out,
        "{} ({}: {}) -> {}/{protocol}",
        answer.from, answer.client, answer.client_because, answer.to
    );
    let _ = writeln!(out, "{} ({}): {}", answer.verdict.word(), answer.reason.word(), what_follows(answer));
    line(&mut out, "rule", &answer.rule);
    if let Some(frontend) = &answer.frontend {
        line(&mut out, "frontend", frontend);
    }
    if let Some(service) = &answer.service {
        line(&mut out, "service", service);
    }
    if answer.verdict == Verdict::Forward {
        let masked = |source| answer.backends.iter().any(|backend| backend.source == source);
        let count = answer.backends.len();
        let chosen = if count == 1 { "1".to_owned() } else { format!("{count}, each as likely") };
        line(&mut out, "endpoints", &chosen);
        let listed = answer.backends.iter().map(|backend| {
            let place = if backend.local { "on this node" } else { "on another node" };
            format!("{}   {place}, sees {}", backend.address, sees(answer, backend.source))
        });
        list(&mut out, listed, count);
        let source = match (masked(Source::Kept), masked(Source::Masked)) {
            (_, false) => "the source stays",
            (false, true) => "the source becomes this node's",
            (true, true) => "the source becomes this node's where the endpoint is on another",
        };
        let how = match answer.way {
            Some(Way::Socket) => "at connect, by the socket hook",
            Some(Way::Packet) | None => "packet by packet, on the interfaces",
        };
        line(&mut out, "translated", &format!("{} becomes the endpoint's, {how}; {source}", answer.to));
        if let Some(seconds) = answer.affinity {
            let what =
                format!("the client stays with its endpoint for {seconds} s after each new connection");
            line(&mut out, "affinity", &what);
        }
    }
    if !answer.left_out.is_empty() {
        line(&mut out, "left out", &answer.left_out.len().to_string());
        let listed = answer.left_out.iter().map(|left_out| format!("{}   {}", left_out.what, left_out.why));
        list(&mut out, listed, answer.left_out.len());
    }
    out
}

fn line(out: &mut String, name: &str, what: &str) {
    let _ = writeln!(out, "  {name:<11}{what}");
}

fn list(out: &mut String, items: impl Iterator<Item = String>, count: usize) {
    for item in items.take(LISTED) {
        let _ = writeln!(out, "    {item}");
    }
    if count > LISTED {
        let _ = writeln!(out, "    and {} more", count - LISTED);
    }
}

fn sees(answer: &Answer, source: Source) -> String {
    match source {
        Source::Kept if answer.client == "host" && answer.from.is_loopback() => "this node".to_owned(),
        Source::Kept => format!("the client, {}", answer.from),
        Source::Masked => "this node".to_owned(),
    }
}

fn what_follows(answer: &Answer) -> &'static str {
    let is_tcp = answer.protocol == "tcp";
    match answer.verdict {
        Verdict::Forward => "it goes to an endpoint of the Service",
        Verdict::Pass if answer.reason == Reason::PassThrough => {
            "it leaves this node as it is, towards the load balancer"
        }
        Verdict::Pass => "kproxy leaves it alone",
        Verdict::Reject if is_tcp => "it is refused (ECONNREFUSED, or a TCP reset)",
        Verdict::Reject => "it is refused (ECONNREFUSED, or ICMP port unreachable)",
        Verdict::Drop => "it gets no answer",
    }
}
