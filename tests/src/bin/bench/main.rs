//! What kproxy costs, measured in the lab: connections through a ClusterIP as a ratio to the same pod asked
//! directly, a first load, one changed endpoint, memory, and the size of the programs.
//!
//! Times on a shared machine drift; ratios of what was done in turn hold. See [`arms`].

mod api;
mod arms;
mod connections;
mod kube_proxy;
mod load;
mod masquerade;
mod objects;
mod options;
mod print;
mod server;
mod through;

use std::process::ExitCode;

use kproxy_lab::{Context, Run};

use options::{Options, Part, USAGE};

/// The call was wrong, as everywhere in kproxy.
const WRONG_CALL: u8 = 2;

fn main() -> ExitCode {
    if let Some(code) = kproxy_lab::worker::serve_if_asked() {
        return code;
    }
    match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => kproxy_lab::isolated(|run| Ok(inside(&run, &options))),
        Ok(None) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}\n\n{USAGE}");
            ExitCode::from(WRONG_CALL)
        }
    }
}

fn inside(run: &Run, options: &Options) -> ExitCode {
    print::machine();
    let mut are_steady = true;
    let result = Context::scenario(run, "bench", |ctx| {
        if options.does(Part::Load) {
            load::measure(ctx, options)?;
            ctx.forget_labs();
        }
        if options.does(Part::Api) {
            api::measure(ctx, options)?;
            ctx.forget_labs();
        }
        if options.does(Part::Connections) {
            are_steady = connections::measure(ctx, options)?;
            ctx.forget_labs();
        }
        if options.does(Part::KubeProxy) {
            match kube_proxy::binaries() {
                Ok(assets) => are_steady &= kube_proxy::measure(ctx, options, &assets)?,
                Err(error) if !options.must(Part::KubeProxy) => {
                    println!("\nskipped: the comparison with kube-proxy: {error:#}");
                }
                Err(error) => return Err(error),
            }
        }
        ctx.forget_labs();
        if options.does(Part::Masquerade) {
            match kube_proxy::binaries() {
                Ok(assets) => masquerade::measure(ctx, &assets)?,
                Err(error) if !options.must(Part::Masquerade) => {
                    println!("\nskipped: masqueraded clients beside kube-proxy: {error:#}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    });
    print::load_average("at the end");
    match result {
        Ok(()) if are_steady => ExitCode::SUCCESS,
        Ok(()) => {
            eprintln!(
                "error: an A/A ratio is off by more than 2 %: the machine was too busy for these figures to count; \
                 run it again when it is idle, or with more --rounds"
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
