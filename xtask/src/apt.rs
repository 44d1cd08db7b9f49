//! Installing Debian packages without starting or enabling what they serve.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use nix::unistd::geteuid;

use crate::process;
use crate::progress::Progress;

/// Packages that bring a service, and the service's name.
const SERVICES: [(&str, &str); 3] =
    [("containerd", "containerd"), ("haproxy", "haproxy"), ("nginx-light", "nginx")];

/// What invoke-rc.d and deb-systemd-invoke ask whether a package may start its service.
const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_MARK: &str = "written by `cargo xtask setup`, for as long as apt-get runs";
/// The exit status of the policy that means no.
const POLICY_FORBIDS: i32 = 101;

/// The package lists are fetched once per run.
static UPDATED: AtomicBool = AtomicBool::new(false);

/// Installs the packages, or says in one sentence what to do instead.
pub fn install(progress: &Progress, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if !Path::new("/etc/debian_version").exists() || process::find("apt-get").is_none() {
        bail!("this system has no apt-get: install what Debian calls {list} by its own means");
    }
    if !geteuid().is_root() {
        bail!(
            "installing needs root: run `sudo apt-get install --no-install-recommends {list}`, \
             then this command again"
        );
    }
    if !UPDATED.load(Ordering::Relaxed) {
        progress.step("apt-get update", || process::run(apt_get().args(["-q", "update"])))?;
        UPDATED.store(true, Ordering::Relaxed);
    }
    progress.step(format!("apt-get install {list}"), || {
        let services: Vec<_> = SERVICES
            .iter()
            .filter(|(package, _)| packages.contains(package))
            .map(|(_, service)| *service)
            .collect();
        let mut guarded = guarded_apt_get(&services)?;
        process::run(guarded.args(packages))?;
        // Installed for their programs: nothing of them is to start at the next boot either.
        for service in services {
            if Path::new("/etc/init.d").join(service).exists() {
                process::run(Command::new("/usr/sbin/update-rc.d").args([service, "disable"]))?;
            } else if let Some(systemctl) = process::find("systemctl") {
                process::run(Command::new(systemctl).args(["disable", service]))?;
            }
        }
        Ok(())
    })
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// An `apt-get install` under which no package starts a service; lacks only the packages' names.
fn guarded_apt_get(services: &[&str]) -> Result<Command> {
    const OPTIONS: [&str; 7] =
        ["-q", "-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120"];
    let policy = fs::read_to_string(POLICY).ok();
    if policy.is_some_and(|text| !text.contains(POLICY_MARK)) {
        // The machine has a policy of its own. It stays as it is; where it says no, all is well.
        for service in services {
            let answer = Command::new(POLICY).args([service, "start"]).status()?;
            if answer.code() != Some(POLICY_FORBIDS) {
                bail!(
                    "{POLICY} of this machine lets packages start their services: \
                     install what brings {} yourself, with the services off",
                    services.join(" and ")
                );
            }
        }
        let mut command = apt_get();
        command.arg("install").args(OPTIONS);
        return Ok(command);
    }

    // A shell holds the file, so that it also goes when xtask is interrupted.
    let script = format!(
        "trap 'rm -f {POLICY}' EXIT; trap 'exit 130' INT TERM HUP\n\
         printf '#!/bin/sh\\n# %s\\nexit {POLICY_FORBIDS}\\n' '{POLICY_MARK}' > {POLICY}\n\
         chmod 755 {POLICY}\n\
         apt-get install \"$@\""
    );
    let mut command = Command::new("/bin/sh");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-e", "-c", &script, "apt-get"]).args(OPTIONS);
    Ok(command)
}
