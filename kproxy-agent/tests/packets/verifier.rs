//! Every program passes the kernel's verifier in every configuration, well below what it walks at most.

use std::collections::BTreeMap;

use kproxy::programs::{Capacities, Features, Programs};

/// A tenth of what a kernel's verifier walks before it gives up.
const WALKED_AT_MOST: u32 = 100_000;

#[test]
fn every_program_loads_in_every_configuration() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: loading programs takes root");
        return;
    }
    // Per program: what the kernel holds of it and what was walked, in each configuration.
    let mut sizes: BTreeMap<String, Vec<(u32, u32)>> = BTreeMap::new();
    let configurations = [
        ("this kernel", Capacities::default(), Features::probe()),
        ("small maps", Capacities::SMALL, Features::probe()),
        ("without bpf_set_retval", Capacities::default(), Features { set_retval: false }),
    ];
    for (name, capacities, features) in configurations {
        let programs = Programs::load_unpinned_for(&capacities, &features)
            .unwrap_or_else(|error| panic!("{name}: {error}: {:?}", std::error::Error::source(&error)));
        for (program, held, walked) in programs.sizes() {
            // Since 5.16; a kernel that does not tell has still accepted the program.
            let walked = walked.unwrap_or(0);
            assert!(walked <= WALKED_AT_MOST, "{name}: {program}: the verifier walked {walked} instructions");
            sizes.entry(program).or_default().push((held, walked));
        }
    }
    println!("{:<20} {}", "loaded / walked", configurations.map(|(name, ..)| format!("{name:>24}")).concat());
    for (program, sizes) in sizes {
        assert_eq!(sizes.len(), configurations.len(), "{program} is not in every configuration");
        let sizes: String =
            sizes.iter().map(|(held, walked)| format!("{:>24}", format!("{held} / {walked}"))).collect();
        println!("{program:<20} {sizes}");
    }
}
