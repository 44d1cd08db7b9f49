//! `kproxy cleanup`: takes everything of kproxy off this node. Its traffic then goes untranslated.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    cli::{CleanupArgs, Common},
    devices, firewall, node,
    programs::{self, filters},
    source_routes,
};

/// Removes filters, links and maps, in this order, so that no program runs without what it needs.
pub fn run(common: &Common, _args: &CleanupArgs) -> Result<()> {
    let root = &common.bpf_root;
    if !root.exists() {
        match withdraw_rules() {
            0 => println!("nothing of kproxy is here: {} does not exist", root.display()),
            rules => println!("removed {rules} firewall rules of kproxy; {} does not exist", root.display()),
        }
        return Ok(());
    }
    programs::check_bpf_root(root)?;
    let _lock = node::Lock::take(root, || crate::maps::kernel::owner_text(root))?;
    let rules = withdraw_rules();
    let filters = remove_filters()?;
    let links = remove_all(&root.join("links"), |_| true)?;
    programs::remove_next(root)?;
    let maps = remove_all(root, |name| programs::pinned_maps().contains(&name))?;
    println!(
        "removed {links} links, {filters} filters, {maps} maps and {rules} firewall rules of kproxy from {}",
        root.display()
    );
    Ok(())
}

/// Those of `--accept-forward`, counted, and routing rules.
fn withdraw_rules() -> usize {
    if let Err(error) = source_routes::withdraw() {
        eprintln!("kproxy: routing rules of kproxy are left, if there are any: {error:#}");
    }
    firewall::withdraw().unwrap_or_else(|error| {
        eprintln!("kproxy: rules of --accept-forward are left, if there are any: {error}");
        0
    })
}

fn remove_filters() -> Result<usize> {
    let mut removed = 0;
    for (index, device) in devices::list_now()? {
        removed += filters::remove(&device.name, index)?;
    }
    Ok(removed)
}

/// Removes what is pinned in `folder` under names that `ours` knows, and the folder if it is then empty.
fn remove_all(folder: &Path, ours: impl Fn(&str) -> bool) -> Result<usize> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", folder.display())),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        if entry.path().is_dir() || !entry.file_name().to_str().is_some_and(&ours) {
            continue;
        }
        // Without its pin a link goes too, but in its own time.
        programs::detach(&entry.path());
        fs::remove_file(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        removed += 1;
    }
    fs::remove_dir(folder).or_else(|error| match error.raw_os_error() {
        // Something of somebody else's is in it: that stays.
        Some(libc::ENOTEMPTY) => Ok(()),
        _ => Err(error).with_context(|| format!("cannot remove the folder {}", folder.display())),
    })?;
    Ok(removed)
}
