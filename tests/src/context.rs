//! A scenario's context: labs are made through it, so that a failure's evidence can be saved before
//! they are taken down.

use std::any::Any;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow};

use crate::isolate::Run;
use crate::lab::{Lab, LabBuilder};
use crate::member::Member;

/// What a scenario is given.
#[derive(Debug)]
pub struct Context {
    run: Run,
    name: String,
    labs: Mutex<Vec<Lab>>,
}

impl Context {
    /// Does a scenario. When it fails or panics, the evidence of its labs is saved, and the error
    /// says where.
    ///
    /// # Errors
    /// With the scenario's error.
    pub fn scenario(run: &Run, name: &str, scenario: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let context = Self { run: run.clone(), name: name.to_owned(), labs: Mutex::default() };
        let result = catch_unwind(AssertUnwindSafe(|| scenario(&context)))
            .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&*panic))));
        let Err(error) = result else {
            return Ok(());
        };
        Err(match context.save_evidence() {
            Ok(Some(folder)) => error.context(format!("evidence: {}", folder.display())),
            Ok(None) => error,
            Err(trouble) => error.context(format!("and no evidence could be saved: {trouble:#}")),
        })
    }

    /// The run that the scenario is in.
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// The scenario's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Builds a lab as described by `describe`, from an empty description.
    ///
    /// # Errors
    /// See [`LabBuilder::build`].
    pub fn lab(&self, describe: impl FnOnce(LabBuilder) -> LabBuilder) -> Result<Lab> {
        let lab = describe(LabBuilder::new(&self.run)).build().context("cannot build the lab")?;
        self.labs.lock().unwrap_or_else(PoisonError::into_inner).push(lab.clone());
        Ok(lab)
    }

    /// Takes down all labs of this scenario that nothing else holds, before it ends.
    pub fn forget_labs(&self) {
        self.labs.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn save_evidence(&self) -> Result<Option<PathBuf>> {
        let labs = self.labs.lock().unwrap_or_else(PoisonError::into_inner);
        if labs.is_empty() {
            return Ok(None);
        }
        let folder = self.run.evidence().join(self.name.replace("::", "/"));
        for (index, lab) in labs.iter().enumerate() {
            let folder =
                if labs.len() == 1 { folder.clone() } else { folder.join(format!("lab-{}", index + 1)) };
            lab.save_evidence(&folder)?;
        }
        Ok(Some(folder))
    }
}

impl Lab {
    /// Saves what tells what happened: all files of the members (logs, configurations, captures),
    /// their interfaces, routes and rules, the maps pinned by the agents, the gateway's counters.
    ///
    /// # Errors
    /// When the folder cannot be written. What cannot be found out is written there as an error.
    pub fn save_evidence(&self, folder: &Path) -> Result<()> {
        copy_tree(self.folder(), folder)?;
        for member in self.members() {
            write(&folder.join(member.name()).join("network.txt"), &network(member))?;
        }
        for node in self.nodes() {
            for (name, dump) in node.dump_maps()? {
                let name = format!("map-{}.txt", name.replace('/', "-"));
                write(&folder.join(node.name()).join(name), &dump)?;
            }
        }
        let strays = match self.strays() {
            Ok(strays) => format!("{strays:#?}\n"),
            Err(error) => format!("{error:#}\n"),
        };
        write(&folder.join("strays.txt"), &strays)
    }
}

/// A member's network as the usual tools print it.
fn network(member: &Member) -> String {
    let commands: [&[&str]; 8] = [
        &["ip", "-s", "address", "show"],
        &["ip", "-4", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "neighbour", "show"],
        &["ss", "-tuna"],
        &["nft", "list", "ruleset"],
        &["cat", "/proc/net/nf_conntrack"],
        &["bpftool", "net", "show"],
    ];
    let mut text = String::new();
    for command in commands {
        let printed = match member.run(command) {
            Ok(output) if output.status.success() => output.stdout,
            Ok(output) => format!("{output}\n"),
            Err(error) => format!("{error:#}\n"),
        };
        text.push_str(&format!("# {}\n{printed}\n", command.join(" ")));
    }
    text
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), &target)
                .with_context(|| format!("cannot copy to {}", target.display()))?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a text")
}
