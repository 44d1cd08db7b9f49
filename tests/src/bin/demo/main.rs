//! The demo: a Service whose load balancer must see its traffic, on real parts, in the lab. Requests
//! from a pod with a backend on its node, a pod without, and a host; without the annotation, with
//! it, and with ipMode Proxy; with the load balancer's own count as the proof of the way they took.

mod cluster;
mod dump;
mod keep;
mod objects;
mod observe;
mod picture;
mod story;
mod table;
mod tell;

use std::ffi::OsString;
use std::process::ExitCode;

use kproxy_lab::{Context, Run};

const USAGE: &str = "\
Shows a load balancer that is really reached: nginx behind a Service, HAProxy as the load balancer,
kproxy on three nodes, all in network namespaces of their own.

Usage: cargo xtask demo [--keep]

  --keep    leave the lab standing afterwards and say how to look around
  --help    print this

Exit status: 0 all was as it must be, 1 something was not (what, on stderr), 2 the call was wrong.";

/// The call was wrong, as everywhere in kproxy.
const WRONG_CALL: u8 = 2;

fn main() -> ExitCode {
    if let Some(code) = kproxy_lab::worker::serve_if_asked() {
        return code;
    }
    let mut keep = false;
    for argument in std::env::args_os().skip(1) {
        match argument.to_str() {
            Some("--keep") => keep = true,
            Some("-h" | "--help") => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            _ => return wrong_call(&argument),
        }
    }
    kproxy_lab::isolated(|run| Ok(inside(&run, keep)))
}

fn wrong_call(argument: &OsString) -> ExitCode {
    eprintln!("error: the demo has no argument {}\n\n{USAGE}", argument.display());
    ExitCode::from(WRONG_CALL)
}

fn inside(run: &Run, keep: bool) -> ExitCode {
    match Context::scenario(run, "demo", |ctx| story::tell(ctx, keep)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The scenario puts where the evidence is in front of what happened.
            let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            let evidence = causes.first().is_some_and(|text| text.starts_with("evidence: "));
            let evidence = evidence.then(|| causes.remove(0));
            eprintln!("error: {}", causes.join(": "));
            if let Some(text) = evidence {
                eprintln!("{text} (logs, maps, rules and routes of everybody in the lab)");
            }
            ExitCode::FAILURE
        }
    }
}
