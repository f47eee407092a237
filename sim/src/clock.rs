//! The only place of the simulator that looks at a clock: for progress, summaries and time limits of campaigns. Nothing
//! that a run does depends on it.

use std::time::Duration;

/// Wall-clock and CPU time since it was made.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    started: std::time::Instant,
    cpu_started: Duration,
}

impl Stopwatch {
    /// Starts now.
    #[must_use]
    #[expect(
        clippy::disallowed_methods,
        reason = "campaign statistics, never seen by a run"
    )]
    pub fn start() -> Stopwatch {
        Stopwatch {
            started: std::time::Instant::now(),
            cpu_started: process_cpu(),
        }
    }

    /// Wall-clock time since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// CPU time of the whole process since the start.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        process_cpu().saturating_sub(self.cpu_started)
    }
}

fn process_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
