//! Puts the compiled programs where the agent embeds them from.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=KPROXY_BPF_OBJECT");
    let object = env::var_os("KPROXY_BPF_OBJECT")
        .map_or_else(|| PathBuf::from("../target/bpf/kproxy.bpf.o"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    let Some(out) = env::var_os("OUT_DIR") else {
        println!("cargo::error=cargo did not set OUT_DIR");
        return;
    };
    if let Err(error) = fs::copy(&object, PathBuf::from(out).join("kproxy.bpf.o")) {
        println!(
            "cargo::error=cannot read the compiled programs at {}: {error}; `cargo xtask build` makes them",
            object.display()
        );
    }
}
