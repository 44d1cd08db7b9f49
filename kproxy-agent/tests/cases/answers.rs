//! The section `=== explain`: questions, each followed by its answer, indented. Before the client's address may
//! stand what it is (`pod`, `host`, `outside`), for what its interface tells and no address does.

use anyhow::{Context, Result};
use kproxy::explain::{Answer, Ground, Place, Planned, Query, ServicePort, explain};
use kproxy::model::{LeftOut, Model};
use kproxy_common::{ClientKind, FrontendKey, ServiceInfo, TrafficPolicy};

use super::input::Case;
use super::writes::CAPACITY;

/// The questions in `section`, with their answers as of the model's last update.
pub fn answer(model: &Model, case: &Case, section: &str) -> Result<String> {
    let mut out = String::new();
    let questions = section.lines().filter(|line| !line.starts_with(' ') && !line.is_empty());
    let planned = Planned::new(model, case.hooks, CAPACITY);
    for line in questions {
        let (kind, query) = question(line).with_context(|| format!("the question {line:?}"))?;
        let answer = explain(&Placed { planned: &planned, kind }, &query)?;
        out += &format!("{line}\n{}", print(&answer));
    }
    Ok(out)
}

fn question(line: &str) -> Result<(Option<ClientKind>, Query)> {
    let (from, to) = line.split_once(" -> ").context("it is no CLIENT -> ADDRESS:PORT/PROTOCOL")?;
    let (to, protocol) = to.split_once('/').context("it has no protocol")?;
    let (kind, from) = match from.split_once(' ') {
        Some(("pod", from)) => (Some(ClientKind::Pod), from),
        Some(("host", from)) => (Some(ClientKind::Host), from),
        Some(("outside", from)) => (Some(ClientKind::Outside), from),
        _ => (None, from),
    };
    Ok((kind, Query::new(from, to, Some(protocol))?))
}

/// Tables as planned, and a client of whom it is known where it is.
struct Placed<'a> {
    planned: &'a Planned<'a>,
    kind: Option<ClientKind>,
}

impl Ground for Placed<'_> {
    fn tables(&self) -> impl kproxy_common::Tables {
        self.planned.tables()
    }

    fn info(&self, number: u32) -> Option<ServiceInfo> {
        self.planned.info(number)
    }

    fn frontends(&self) -> Vec<(FrontendKey, u32)> {
        self.planned.frontends()
    }

    fn place(&self, query: &Query) -> Place {
        match self.kind {
            Some(behind) => Place { behind, because: String::new(), netns_cookie: 0 },
            None => self.planned.place(query),
        }
    }

    fn left_out(&self, port: &ServicePort, set: TrafficPolicy) -> Option<Vec<LeftOut>> {
        self.planned.left_out(port, set)
    }

    fn check(&self) -> Result<()> {
        self.planned.check()
    }
}

fn print(answer: &Answer) -> String {
    let service = answer.service.as_deref().unwrap_or("no Service port");
    let mut out = format!(
        "  {}: {} ({}), {service}{}{}\n  {}\n",
        answer.client,
        answer.verdict.word(),
        answer.reason.word(),
        answer.affinity.map(|seconds| format!(", affinity {seconds} s")).unwrap_or_default(),
        if answer.pass_through { ", pass-through" } else { "" },
        answer.rule
    );
    for backend in &answer.backends {
        let place = if backend.local { "local" } else { "remote" };
        out += &format!("  to {} {place}, source {}\n", backend.address, backend.source.word());
    }
    for left_out in &answer.left_out {
        out += &format!("  not {}: {}\n", left_out.what, left_out.why);
    }
    out
}
