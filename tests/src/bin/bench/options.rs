//! The command line.

/// As `cargo xtask bench --help` says it.
pub const USAGE: &str = "\
Measures in the lab what kproxy costs, and prints tables: a first load of many Services, one changed
endpoint, memory, the size of the programs; and connections through a ClusterIP as ratios to the same
pod asked directly, one arm after the other in every round.

Usage: cargo xtask bench [load|api|connections|kube-proxy|masquerade] [--rounds N] [--services N]

  load           only what loading and changing costs
  api            only how long a change takes from a kube-apiserver to the map
  connections    only the ratios
  kube-proxy     only what a real kube-proxy is beside: ratios to it, from inside and outside
  masquerade     only clients that are masqueraded, beside a real kube-proxy: how long they wait for
                 connections, and how many are held at once
  --rounds N     rounds of the ratios, 40 or more [default: 150]
  --services N   how many Services `many` is, of ten endpoints each [default: 10000]
  --help         print this

Exit status: 0 measured, 1 it failed or the machine was too busy (an A/A ratio is off by more than 2 %),
2 the call was wrong.";

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Load,
    Api,
    Connections,
    KubeProxy,
    Masquerade,
}

/// How it is measured.
#[derive(Debug)]
pub struct Options {
    /// Nothing: all.
    only: Option<Part>,
    pub rounds: usize,
    pub services: usize,
}

impl Options {
    /// `None`: the usage was asked for.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut options = Self { only: None, rounds: 150, services: 10_000 };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "-h" | "--help" => return Ok(None),
                "load" => options.only = Some(Part::Load),
                "api" => options.only = Some(Part::Api),
                "connections" => options.only = Some(Part::Connections),
                "kube-proxy" => options.only = Some(Part::KubeProxy),
                "masquerade" => options.only = Some(Part::Masquerade),
                "--rounds" => options.rounds = number(&argument, arguments.next(), 40..=10_000)?,
                "--services" => options.services = number(&argument, arguments.next(), 1..=16_000)?,
                _ => return Err(format!("there is no argument {argument}")),
            }
        }
        Ok(Some(options))
    }

    /// Whether it was asked for by name.
    pub fn must(&self, part: Part) -> bool {
        self.only == Some(part)
    }

    pub fn does(&self, part: Part) -> bool {
        self.only.is_none_or(|only| only == part)
    }
}

fn number(
    flag: &str,
    value: Option<String>,
    range: std::ops::RangeInclusive<usize>,
) -> Result<usize, String> {
    let number = value.as_deref().and_then(|value| value.parse().ok());
    number
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("{flag} takes a number from {} to {}", range.start(), range.end()))
}
