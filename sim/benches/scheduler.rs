//! The bare scheduler against shuttle's, on one program: 4 tasks, 25 yields each, the next one picked at random.
//!
//! `cargo bench -p blkcheck-sim --bench scheduler`. Items are scheduling decisions, so the rates compare directly.

use blkcheck_sim::choice::{ChoiceKind, Random, pick};
use blkcheck_sim::exec::{Executor, yield_now};
use divan::counter::ItemsCount;

const TASKS: u32 = 4;
const YIELDS: u32 = 25;
/// Every task is polled once more than it yields.
const STEPS: u32 = TASKS * (YIELDS + 1);

fn main() {
    divan::main();
}

async fn program() {
    for _ in 0..YIELDS {
        yield_now().await;
    }
}

#[divan::bench]
fn blkcheck_random(bencher: divan::Bencher<'_, '_>) {
    let mut exec = Executor::new();
    let mut seed = 0;
    bencher.counter(ItemsCount::new(STEPS)).bench_local(|| {
        seed += 1;
        let mut chooser = Random::new(seed);
        for _ in 0..TASKS {
            exec.spawn("task", Box::pin(program()));
        }
        let mut steps = 0;
        loop {
            let ready = exec.ready();
            if ready == 0 {
                break;
            }
            let n = u32::try_from(ready).expect("few");
            exec.poll(pick(&mut chooser, ChoiceKind::Next, n) as usize);
            steps += 1;
        }
        exec.reset();
        assert_eq!(steps, STEPS);
        steps
    });
}

/// Shuttle with its own futures: one execution per iteration in a batch, since its runner has a set-up cost of its
/// own that is not a scheduling step.
#[divan::bench]
fn shuttle_random(bencher: divan::Bencher<'_, '_>) {
    const BATCH: u32 = 100;
    bencher.counter(ItemsCount::new(STEPS * BATCH)).bench_local(|| {
        shuttle::check_random(
            || {
                let tasks: Vec<_> = (0..TASKS)
                    .map(|_| {
                        shuttle::future::spawn(async {
                            for _ in 0..YIELDS {
                                shuttle::future::yield_now().await;
                            }
                        })
                    })
                    .collect();
                shuttle::future::block_on(async {
                    for task in tasks {
                        task.await.expect("no panic");
                    }
                });
            },
            BATCH as usize,
        );
    });
}
