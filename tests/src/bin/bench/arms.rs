//! Arms: the same work done in different ways, in turn, in one process.
//!
//! What a shared machine does to one arm it does to its neighbours in the same round, so the ratio of two arms is
//! taken in each round, and the median over the rounds counts. An arm that stands in twice shows what such a
//! ratio is worth. Another way to compare with (another proxy, say) is one more [`Arm`] in a place of its own.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kproxy_lab::Member;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::sys::socket::{setsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// Where a client stands.
pub struct Place {
    netns: File,
    cgroup: PathBuf,
}

impl Place {
    /// Where the processes of a member are.
    pub fn of(member: &Member) -> Result<Self> {
        let path = member.netns().path();
        let netns = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { netns, cgroup: member.cgroup().to_owned() })
    }

    /// Moves this thread into the namespace and this process into the cgroup, which is what socket hooks see.
    pub fn enter(&self) -> Result<()> {
        setns(self.netns.as_fd(), CloneFlags::CLONE_NEWNET).context("cannot enter a network namespace")?;
        let procs = self.cgroup.join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("cannot write {}", procs.display()))
    }
}

/// One way to do the work.
pub struct Arm {
    pub name: String,
    pub place: Place,
    /// Each connection goes to one of these, by chance.
    pub targets: Vec<SocketAddrV4>,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// It is made, and closed.
    Connect,
    /// An octet goes there and one comes back.
    Request,
}

/// What one batch of connections took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// By the clock.
    pub wall: Duration,
    /// Of the processors' time, client and server together: what other work on the machine took is not in it.
    pub processor: Duration,
}

/// Of each arm, what its batch took in each round.
pub struct Rounds(Vec<Vec<Took>>);

/// Before each batch. Who has slept is let run for a while on a busy machine: so all arms begin alike, whether or
/// not the move to their place has slept.
const REST: Duration = Duration::from_millis(4);

/// What chance begins with, so that every run is like every other.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Connections that begin a batch and do not count.
const WARM: usize = 10;

/// Does `batch` connections in every arm, one arm after the other, `rounds` times.
pub fn run(arms: &[Arm], work: Work, rounds: usize, batch: usize) -> Result<Rounds> {
    let mut chance = Chance(SEED);
    in_turn(arms, rounds, |arm| {
        self::batch(arm, work, batch, &mut chance).with_context(|| format!("{}, {work:?}", arm.name))
    })
}

/// Does what a batch is in every arm, one arm after the other, `rounds` times.
pub fn in_turn<A>(arms: &[A], rounds: usize, batch: impl FnMut(&A) -> Result<Took>) -> Result<Rounds> {
    pin()?;
    let home = Home::of_this_process()?;
    let took = all_rounds(arms, rounds, batch);
    // Also after a failure: whoever takes a lab down ends all that is in its cgroups.
    home.enter()?;
    took
}

fn all_rounds<A>(arms: &[A], rounds: usize, mut batch: impl FnMut(&A) -> Result<Took>) -> Result<Rounds> {
    let mut chance = Chance(SEED);
    let mut took = vec![Vec::with_capacity(rounds); arms.len()];
    let mut order: Vec<usize> = (0..arms.len()).collect();
    for _ in 0..rounds {
        // By chance: one that always followed its like would find everything warm.
        chance.shuffle(&mut order);
        for index in &order {
            took[*index].push(batch(&arms[*index])?);
        }
    }
    Ok(Rounds(took))
}

/// What something takes.
pub fn timed(work: impl FnOnce() -> Result<()>) -> Result<Took> {
    let (wall, processor) = (Instant::now(), processor_time()?);
    work()?;
    Ok(Took { wall: wall.elapsed(), processor: processor_time()?.saturating_sub(processor) })
}

/// Lets this process begin a batch as every other one is begun.
pub fn rest() {
    std::thread::sleep(REST);
}

impl Rounds {
    /// The median over the rounds of what `arm` took as a multiple of what `base` took.
    pub fn ratio(&self, arm: usize, base: usize, of: impl Fn(&Took) -> Duration) -> f64 {
        let pairs = self.0[arm].iter().zip(&self.0[base]);
        median(pairs.map(|(arm, base)| of(arm).as_secs_f64() / of(base).as_secs_f64()).collect())
    }

    /// The median over the rounds of connections per second.
    pub fn rate(&self, arm: usize, batch: usize) -> f64 {
        median(self.0[arm].iter().map(|took| batch as f64 / took.wall.as_secs_f64()).collect())
    }
}

/// Keeps this thread on one processor: client and server take turns there, and nothing depends on which
/// processor wakes which.
pub fn pin() -> Result<()> {
    let mut set = CpuSet::new();
    let last = std::thread::available_parallelism().map_or(0, |count| usize::from(count) - 1);
    set.set(last).context("no such processor")?;
    sched_setaffinity(Pid::from_raw(0), &set).context("cannot be kept on one processor")
}

fn batch(arm: &Arm, work: Work, count: usize, chance: &mut Chance) -> Result<Took> {
    arm.place.enter()?;
    rest();
    for _ in 0..WARM {
        connection(chance.among(&arm.targets), work)?;
    }
    let targets: Vec<SocketAddrV4> = (0..count).map(|_| chance.among(&arm.targets)).collect();
    timed(|| {
        let mut targets = targets.into_iter();
        targets.try_for_each(|target| connection(target, work).with_context(|| format!("to {target}")))
    })
}

fn connection(target: SocketAddrV4, work: Work) -> Result<()> {
    let mut stream = TcpStream::connect(SocketAddr::V4(target))?;
    // Closed by a reset: ports that wait for stragglers would run out.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    if matches!(work, Work::Request) {
        let mut octet = [7];
        stream.write_all(&octet)?;
        stream.read_exact(&mut octet)?;
    }
    Ok(())
}

fn processor_time() -> Result<Duration> {
    let time =
        clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).context("cannot read the processor's clock")?;
    Ok(Duration::from(time))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        even if even % 2 == 0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    }
}

/// Where this process was before.
struct Home(Place);

impl Home {
    fn of_this_process() -> Result<Self> {
        let netns = File::open("/proc/thread-self/ns/net").context("cannot open this network namespace")?;
        let groups = fs::read_to_string("/proc/self/cgroup").context("cannot tell this cgroup")?;
        // `0::/path` is the line of cgroup v2.
        let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        Ok(Self(Place { netns, cgroup: kproxy_lab::cgroup_mount_point()?.join(path) }))
    }

    fn enter(&self) -> Result<()> {
        self.0.enter()
    }
}

/// Numbers that look like chance and are the same in every run (xorshift64*).
struct Chance(u64);

impl Chance {
    /// Below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    fn among(&mut self, targets: &[SocketAddrV4]) -> SocketAddrV4 {
        let place = self.below(targets.len().max(1));
        targets.get(place).copied().unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0))
    }

    fn shuffle(&mut self, order: &mut [usize]) {
        for place in (1..order.len()).rev() {
            order.swap(place, self.below(place + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let took = |ms| Took { wall: Duration::from_millis(ms), processor: Duration::from_millis(ms) };
        // The second round was slow for both.
        let rounds = Rounds(vec![vec![took(10), took(100), took(10)], vec![took(11), took(110), took(40)]]);
        let ratio = rounds.ratio(1, 0, |took| took.wall);
        assert!((ratio - 1.1).abs() < 1e-9, "{ratio}");
        assert!((rounds.rate(0, 10) - 1_000.0).abs() < 1e-6);
    }
}
