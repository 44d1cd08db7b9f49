//! The object with the programs for tests, for those who can load it.

use aya::Ebpf;

/// Named by `cargo xtask test`.
const OBJECT: &str = "KPROXY_TEST_OBJECT";

/// Loads it; `None`, and why, where that is not to be had.
pub fn load() -> Option<Ebpf> {
    let Some(path) = std::env::var_os(OBJECT) else {
        println!("skipped: {OBJECT} does not name the test object; `cargo xtask test` builds it");
        return None;
    };
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: loading programs takes root");
        return None;
    }
    let object = std::fs::read(&path).expect("the test object can be read");
    Some(Ebpf::load(&object).expect("the test object loads"))
}
