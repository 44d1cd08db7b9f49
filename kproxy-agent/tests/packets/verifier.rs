//! Every program passes the kernel's verifier in every configuration, well below what it walks at most; what verifiers on
//! other processors would refuse is looked for in the object.

use std::collections::{BTreeMap, BTreeSet};

use aya_obj::{Object, ProgramSection, generated::bpf_insn};
use kproxy::programs::{Capacities, Features, OBJECT, Programs};
use kproxy_common::PACKET_PARTS;

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
            .unwrap_or_else(|error| panic!("{name}: {error}"));
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

/// Processors other than x86-64 do not take both in one program before Linux 6.0.
#[test]
fn what_calls_functions_goes_on_in_no_other_program() {
    let mut object = Object::parse(OBJECT).expect("the object can be read");
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    // Behind each program then stand all functions that it reaches.
    object.relocate_calls(&sections).expect("every function is there");
    let (mut callers, mut tail_callers) = (BTreeSet::new(), BTreeSet::new());
    for (name, program) in &object.programs {
        if !matches!(program.section, ProgramSection::SchedClassifier) {
            continue;
        }
        let instructions = &object.functions[&program.function_key()].instructions;
        callers.extend(instructions.iter().any(calls_function).then_some(name.as_str()));
        tail_callers.extend(instructions.iter().any(calls_program).then_some(name.as_str()));
    }
    let both: Vec<_> = callers.intersection(&tail_callers).collect();
    assert!(both.is_empty(), "{both:?} call functions and go on in other programs");
    // What was looked for is there to be found.
    let is_part = |name: &&str| PACKET_PARTS.contains(name);
    assert!(callers.iter().any(is_part), "no part calls a function: {callers:?}");
    assert!(
        tail_callers.iter().any(|name| !is_part(name)),
        "nothing attached goes on in a part: {tail_callers:?}"
    );
}

/// `BPF_JMP | BPF_CALL`.
const CALL: u8 = 0x85;

fn calls_function(instruction: &bpf_insn) -> bool {
    const PSEUDO_CALL: u8 = 1;
    instruction.code == CALL && instruction.src_reg() == PSEUDO_CALL
}

fn calls_program(instruction: &bpf_insn) -> bool {
    const HELPER: u8 = 0;
    const TAIL_CALL: i32 = 12;
    instruction.code == CALL && instruction.src_reg() == HELPER && instruction.imm == TAIL_CALL
}
