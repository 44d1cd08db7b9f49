//! A mask's port belongs to one flow at a time, whichever processors want it at the same instant, and however the flow
//! before has left it.

#[path = "support/test_object.rs"]
mod test_object;

use std::{
    thread,
    time::{Duration, Instant},
};

use aya::{
    maps::PerCpuArray,
    programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// So many ports are given out, between processors that want nothing else.
const GIVEN: u64 = 3_000_000;
const RUNS_A_CALL: u32 = 200_000;
/// A hundred times what a loaded machine takes.
const PATIENCE: Duration = Duration::from_secs(300);

#[test]
fn a_port_is_held_by_one_flow_at_a_time() {
    let Some(mut ebpf) = test_object::load() else { return };
    let processors = processors();
    if processors.len() < 2 {
        println!("skipped: there is one processor, and so never two at the same instant");
        return;
    }
    let program: &mut SchedClassifier = ebpf.program_mut("hold_stress").unwrap().try_into().unwrap();
    program.load().unwrap();
    let program: &SchedClassifier = ebpf.program("hold_stress").unwrap().try_into().unwrap();
    let holds: PerCpuArray<_, u64> = PerCpuArray::try_from(ebpf.map("holds").unwrap()).unwrap();
    let seen = || [0, 1, 2, 3].map(|index| holds.get(&index, 0).unwrap().iter().sum::<u64>());
    let deadline = Instant::now() + PATIENCE;
    thread::scope(|scope| {
        for processor in processors {
            let ask = || -> Result<(), ProgramError> {
                // Until both have run at the same time, however busy the machine is.
                while {
                    let [given, refused, ..] = seen();
                    (given < GIVEN || refused == 0) && Instant::now() < deadline
                } {
                    let options = TestRunOptions {
                        data_in: Some(&[0; 64]),
                        repeat: RUNS_A_CALL,
                        ..TestRunOptions::new()
                    };
                    program.test_run(options)?;
                }
                Ok(())
            };
            scope.spawn(move || {
                stay_on(processor);
                ask().expect("the program runs");
            });
        }
    });
    let [given, refused, twice, lost] = seen();
    println!("{given} given out, {refused} refused, {twice} held by two, {lost} lost");
    assert!(given >= GIVEN, "only {given} given out in {PATIENCE:?}");
    assert!(refused > 0, "nobody wanted what another had: nothing was tried");
    assert_eq!([twice, lost], [0, 0]);
}

/// Two of those that this process may run on.
fn processors() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).expect("it is known where this runs");
    (0..CpuSet::count()).filter(|processor| allowed.is_set(*processor) == Ok(true)).take(2).collect()
}

fn stay_on(processor: usize) {
    let mut here = CpuSet::new();
    here.set(processor).expect("it is one of those that there are");
    sched_setaffinity(Pid::from_raw(0), &here).expect("it is allowed to run there");
}
