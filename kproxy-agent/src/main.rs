//! The binary: reads the command line, sets up the log, and hands over.

use std::process::ExitCode;

use clap::Parser as _;
use kproxy::{
    agent,
    cli::{Cli, Command, Common, LogFormat},
    commands::{self, UsageError},
    source::kubernetes::LOG_FILTER,
};
use tracing_subscriber::EnvFilter;

/// The call or its input was wrong (`cli.md`; clap uses the same).
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(&cli.common);
    let result = match cli.command {
        Command::Agent(args) => agent::run(&cli.common, &args),
        Command::Explain(args) => commands::explain::run(&cli.common, &args),
        Command::Services(args) => commands::services::run(&cli.common, &args),
        Command::Flows(args) => commands::flows::run(&cli.common, &args),
        Command::Drops(args) => commands::drops::run(&cli.common, &args),
        Command::Check(args) => commands::check::run(&cli.common, &args),
        Command::Cleanup(args) => commands::cleanup::run(&cli.common, &args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kproxy: {}", commands::in_words(&error));
            if error.is::<UsageError>() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}

fn start_log(common: &Common) {
    let filter = match common.verbose {
        0 => format!("kproxy=info,warn,{LOG_FILTER}"),
        1 => format!("kproxy=debug,info,{LOG_FILTER}"),
        _ => "trace".to_owned(),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match common.log_format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => builder.json().flatten_event(true).with_ansi(false).init(),
    }
}
