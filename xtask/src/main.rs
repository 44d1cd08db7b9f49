//! Everything a contributor runs: `cargo xtask setup | build | image | test | lint | demo | conformance | bench | soak | clean-cache`.

mod apt;
mod bench;
mod bpf;
mod build;
mod conformance;
mod demo;
mod image;
mod kubernetes;
mod machine;
mod paths;
mod process;
mod progress;
mod setup;
mod soak;
mod test;
mod toolchain;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::paths::Paths;
use crate::progress::Progress;
use crate::setup::Purpose;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Set-up, build, test, demo and measurements of kproxy"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find what is needed, say what is missing, and install it
    Setup {
        /// Only what this purpose needs
        #[arg(long = "for", value_name = "PURPOSE", value_enum, default_value = "test")]
        purpose: Purpose,
        /// Say what is missing and install nothing; exits with 1 if something is
        #[arg(long)]
        check: bool,
    },
    /// Build the eBPF programs and the binary that carries them, target/{debug,release}/kproxy
    Build {
        /// Build with optimisations, into target/release
        #[arg(long)]
        release: bool,
        /// Build the eBPF objects, target/bpf/*.bpf.o, and nothing else
        #[arg(long, conflicts_with = "release")]
        bpf_only: bool,
    },
    /// Build with optimisations and write the image that manifests/daemonset.yaml runs, without a container engine
    ///
    /// target/image/kproxy-VERSION.tar is for `docker load`, `podman load` and `ctr images import` alike. The same
    /// build on the same packages gives the same bytes.
    Image {
        /// Of the build without optimisations, which is made faster
        #[arg(long)]
        debug: bool,
    },
    /// Check formatting and run clippy, without running a test
    Lint,
    /// Set up, lint, build, and run every test that this machine can run
    Test {
        /// Leave out the scenarios that need root and network namespaces
        #[arg(long)]
        skip_lab: bool,
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Set up, build, and show a pass-through load balancer being reached, in the lab
    Demo {
        /// Handed on to the demo; `--keep` leaves the lab standing
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Set up, build, and run Kubernetes' own network tests against kproxy on a cluster of real kubelets, in the lab
    ///
    /// The cluster is three nodes in two zones, dual-stack, each with containerd and a kubelet, in namespaces; kproxy
    /// is installed from its image by manifests/. Prints a table as the tests go. What they printed, a JUnit file and
    /// logs of the cluster are left in target/conformance.
    Conformance(conformance::Options),
    /// Set up, build with optimisations, and measure in the lab what kproxy costs; some minutes, best on an idle
    /// machine
    ///
    /// Prints tables: a first load of many Services, split into reading, computing and writing; one changed
    /// endpoint; memory of the agent and of all maps; the size of the programs; and connections through a
    /// ClusterIP as ratios to the same pod asked directly, with one Service and with many, one arm after the other
    /// in every round. Exits with 1 if an A/A ratio is off by more than 2 %: then the machine was too busy.
    Bench {
        /// Measure only this
        #[arg(value_enum)]
        only: Option<bench::Part>,
        /// Rounds of the ratios
        #[arg(long, value_name = "N", default_value_t = 150, value_parser = clap::value_parser!(u32).range(40..=10_000))]
        rounds: u32,
        /// How many Services `many` is, of ten endpoints each
        #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=16_000))]
        services: u32,
    },
    /// Set up, build, and keep connections going in the lab while endpoints change and agents are killed
    Soak {
        /// How long
        #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=10_000))]
        minutes: u64,
    },
    /// Remove what setup built outside of the tree: bpf-linker and the Kubernetes programs
    CleanCache,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    let paths = Paths::discover()?;
    let progress = Progress::new();
    match command {
        Command::Setup { purpose, check } => {
            if check {
                return setup::check(&paths, purpose);
            }
            let tools = setup::run(&paths, &progress, purpose)?;
            println!("set up: {}", tools.bpf);
        }
        Command::Build { release, bpf_only } => {
            let tools = setup::run(&paths, &progress, Purpose::Build)?;
            let objects = bpf::build(&paths, &progress, &tools.bpf)?;
            if !bpf_only {
                build::agent(&paths, &progress, &objects, build::Profile::from(release))?;
            }
        }
        Command::Image { debug } => {
            image::run(&paths, &progress, build::Profile::from(!debug))?;
        }
        Command::Lint => return test::lint(&paths, &progress),
        Command::Test { skip_lab, filter } => {
            return test::run(&paths, &progress, skip_lab, filter.as_deref());
        }
        Command::Demo { args } => return demo::run(&paths, &progress, &args),
        Command::Conformance(options) => return conformance::run(&paths, &progress, options),
        Command::Bench { only, rounds, services } => {
            return bench::run(&paths, &progress, only, rounds, services);
        }
        Command::Soak { minutes } => return soak::run(&paths, &progress, minutes),
        Command::CleanCache => setup::clean_cache(&paths)?,
    }
    Ok(ExitCode::SUCCESS)
}
