//! Work on several threads whose results are taken in the order of the jobs.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc::sync_channel;
use std::thread;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// More threads than this do not help: the results are applied by one.
const MAX_THREADS: usize = 8;

/// Does `work` on every job, on as many threads as there are processors, and hands the results to `apply` on
/// this thread, in the order of the jobs, while the work goes on. Few results wait at any time, so that a long
/// list of jobs does not have to fit in memory.
pub(super) fn in_order<J: Send, R: Send>(
    jobs: Vec<J>,
    work: impl Fn(J) -> R + Sync,
    mut apply: impl FnMut(R),
) {
    let threads = if jobs.len() > 1 { processors().min(MAX_THREADS).min(jobs.len()) } else { 1 };
    if threads <= 1 {
        return jobs.into_iter().for_each(|job| apply(work(job)));
    }
    let jobs = Mutex::new(jobs.into_iter().enumerate());
    let (sender, results) = sync_channel(2 * threads);
    thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            scope.spawn(|| {
                let sender = sender;
                loop {
                    // A thread that panicked left the iterator whole: taking the next is all that is done here.
                    let job = jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
                    let Some((index, job)) = job else { return };
                    if sender.send((index, work(job))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let mut next = 0;
        for (index, result) in results {
            early.insert(index, result);
            while let Some(result) = early.remove(&next) {
                apply(result);
                next += 1;
            }
        }
    });
}

/// How many processors this process may run on. Asked of the scheduler: the standard library reads the cgroup
/// files below /sys for it, and `kproxy explain --manifests` opens nothing but the manifests.
fn processors() -> usize {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return 1 };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::in_order;

    #[test]
    fn results_come_in_the_order_of_the_jobs() {
        for count in [0, 1, 2, 1000] {
            let mut squares = Vec::new();
            in_order((0..count).collect(), |n: u64| n * n, |square| squares.push(square));
            assert_eq!(squares, (0..count).map(|n| n * n).collect::<Vec<_>>());
        }
    }
}
