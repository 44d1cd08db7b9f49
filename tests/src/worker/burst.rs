//! Bursts: many short connections by several threads, counted by what came of them.

use std::io::BufReader;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::protocol::{Answer, BurstReport, BurstSpec};
use super::sockets::{Failed, Headers, tcp_connect, tcp_exchange};

/// A burst that runs.
pub struct Burst {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    endless: bool,
}

struct Shared {
    spec: BurstSpec,
    start: Instant,
    begun: AtomicU64,
    stop: AtomicBool,
    report: Mutex<BurstReport>,
}

impl Burst {
    pub fn start(spec: BurstSpec) -> Self {
        let endless = spec.count.is_none() && spec.seconds.is_none();
        let threads = spec.concurrency.max(1);
        let shared = Arc::new(Shared {
            spec,
            start: Instant::now(),
            begun: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            report: Mutex::default(),
        });
        let threads = (0..threads)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.work())
            })
            .collect();
        Self { shared, threads, endless }
    }

    pub fn look(&self) -> BurstReport {
        let report = self.shared.lock();
        BurstReport { seconds: self.shared.start.elapsed().as_secs_f64(), ..report.clone() }
    }

    /// Waits for its end, or ends it now; `None` where it would never end.
    pub fn finish(self, now: bool) -> Option<BurstReport> {
        if self.endless && !now {
            return None;
        }
        if now {
            self.shared.stop.store(true, Ordering::Relaxed);
        }
        for thread in self.threads {
            // One that panicked has said so on stderr, and is missing in the count.
            let _ = thread.join();
        }
        let mut report = self.shared.lock().clone();
        report.seconds = self.shared.start.elapsed().as_secs_f64();
        Some(report)
    }
}

impl Shared {
    fn work(&self) {
        while self.another() {
            let result = once(&self.spec);
            let mut report = self.lock();
            match result {
                Ok(server) => {
                    report.ok += 1;
                    if let Some(server) = server {
                        *report.servers.entry(server).or_default() += 1;
                    }
                }
                Err(failure) => *report.failed.entry(failure).or_default() += 1,
            }
            drop(report);
            thread::sleep(Duration::from_millis(self.spec.pause_ms));
        }
    }

    /// Whether there is another connection to make; counts it.
    fn another(&self) -> bool {
        if self.stop.load(Ordering::Relaxed) {
            return false;
        }
        let over = |seconds| self.start.elapsed().as_secs_f64() >= seconds;
        if self.spec.seconds.is_some_and(over) {
            return false;
        }
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        self.spec.count.is_none_or(|count| number < count)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BurstReport> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection: the server that answered, or what failed.
fn once(spec: &BurstSpec) -> Result<Option<String>, String> {
    let text = |failed: Failed| format!("{} {:?}", failed.call, failed.errno);
    let timeout = Duration::from_millis(spec.timeout_ms);
    let stream = tcp_connect(spec.to, None, Headers::Usual, timeout).map_err(text)?;
    if spec.connect_only {
        return Ok(None);
    }
    let mut stream = BufReader::new(stream);
    let line = tcp_exchange(&mut stream, "burst", timeout).map_err(text)?;
    let answer: Answer =
        serde_json::from_str(&line).map_err(|_| format!("no echo server's answer: {line}"))?;
    Ok(Some(answer.server))
}
