//! Sequential `compare`, beside the daemon's own cost: the same messages in the same run, and nobody who looks at the answers.
//!
//! `cargo bench -p blkcheck-sim --bench compare`. Needs qemu-storage-daemon 10.x; says so when there is none. One process pair,
//! one thread each, of which one waits for the other.

use blkcheck_sim::compare::cost::measure;

/// Scenarios measured.
const SEEDS: u64 = 1000;

fn main() {
    let cost = match measure(0..SEEDS, None) {
        Ok(cost) => cost,
        Err(why) => return println!("skipped: {why}"),
    };
    let (compared, daemon) = (cost.compared.as_secs_f64(), cost.daemon.as_secs_f64());
    let scenarios = f64::from(cost.scenarios);
    println!("scenarios           {}", cost.scenarios);
    println!("steps               {}", cost.steps);
    println!(
        "compared            {compared:.2} s, {:.1} scenarios/s",
        scenarios / compared
    );
    println!(
        "the daemon alone    {daemon:.2} s, {:.1} scenarios/s",
        scenarios / daemon
    );
    println!("ratio               {:.2}", compared / daemon);
}
