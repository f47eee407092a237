//! Requests beside each other on one image: each is as if it were alone.

use super::*;

/// Runs tasks beside each other to their ends.
fn run_all(env: &MemoryEnv, tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>>) {
    let left = Rc::new(Cell::new(tasks.len()));
    for task in tasks {
        let left = Rc::clone(&left);
        env.spawn(
            "guest",
            Box::pin(async move {
                task.await;
                left.set(left.get() - 1);
            }),
        );
    }
    let clock = env.clone();
    env.block_on(async move {
        while left.get() > 0 {
            clock.sleep_until(clock.now() + 1000).await;
        }
    });
}

#[test]
fn concurrent_guests_share_clusters_without_harm() {
    for (case, (bits, order, version)) in GEOMETRIES.into_iter().enumerate() {
        if bits == 21 {
            continue;
        }
        let env = MemoryEnv::new();
        let size: u64 = 1 << 20;
        make(&env, "a", &options(bits, order, version, size));
        env.set_latency(1000);
        let disk = open(&env, "a");
        let content = Rc::new(RefCell::new(vec![0u8; usize::try_from(size).unwrap()]));
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for who in 0..8u64 {
            let (guest, content, env) = (disk.guest.clone(), Rc::clone(&content), env.clone());
            let mut rng = Rng(77 + who + 100 * case as u64);
            tasks.push(Box::pin(async move {
                for step in 0..60u64 {
                    // Every eighth 256-byte piece belongs to `who`: neighbours in one cluster are others'.
                    let at = (rng.below(size / 2048) * 8 + who) * 256;
                    let range = usize::try_from(at).unwrap()..usize::try_from(at + 256).unwrap();
                    match rng.below(5) {
                        0 => {
                            let mut buf = [0; 256];
                            guest.read(at, &mut buf).await.unwrap();
                            assert!(buf == content.borrow()[range], "guest {who} step {step} at {at}");
                        }
                        1 => {
                            guest.write_zeroes(at, 256, ReqFlags::MAY_UNMAP).await.unwrap();
                            content.borrow_mut()[range].fill(0);
                        }
                        2 if who == 0 => guest.flush().await.unwrap(),
                        _ => {
                            let data = [u8::try_from(1 + (step * 8 + who) % 251).unwrap(); 256];
                            guest.write(at, &data, ReqFlags::empty()).await.unwrap();
                            content.borrow_mut()[range].copy_from_slice(&data);
                        }
                    }
                    env.sleep_until(env.now() + rng.below(3000)).await;
                }
            }));
        }
        run_all(&env, tasks);
        assert!(
            disk.read(0, usize::try_from(size).unwrap()) == *content.borrow(),
            "case {case}"
        );
        disk.close();
        judged_by_qemu(&env, "a", &[], &content.borrow());
    }
}

#[test]
fn reads_beside_discards_and_new_writes_never_see_foreign_data() {
    let env = MemoryEnv::new();
    let size: u64 = 1 << 18;
    make(&env, "a", &options(9, 4, 3, size));
    env.set_latency(1000);
    let disk = open(&env, "a");
    // Sector i only ever holds zeroes or its own number.
    let stamp = |sector: u64| [u8::try_from(1 + sector % 251).unwrap(); 512];
    let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
    for who in 0..10u64 {
        let (guest, env) = (disk.guest.clone(), env.clone());
        let mut rng = Rng(4242 + who);
        tasks.push(Box::pin(async move {
            for _ in 0..300 {
                let first = rng.below(size / 512);
                let count = (1 + rng.below(8)).min(size / 512 - first);
                match who % 3 {
                    0 => {
                        let data: Vec<u8> = (first..first + count).flat_map(stamp).collect();
                        guest.write(first * 512, &data, ReqFlags::empty()).await.unwrap();
                    }
                    1 => guest.discard(first * 512, count * 512).await.unwrap(),
                    _ => {
                        let mut buf = vec![0xee; usize::try_from(count * 512).unwrap()];
                        guest.read(first * 512, &mut buf).await.unwrap();
                        for (sector, bytes) in (first..).zip(buf.chunks_exact(512)) {
                            let own = stamp(sector);
                            assert!(
                                bytes == own || bytes == [0; 512],
                                "sector {sector} has {}",
                                bytes[0]
                            );
                        }
                    }
                }
                if rng.below(20) == 0 {
                    guest.flush().await.unwrap();
                }
                env.sleep_until(env.now() + rng.below(2500)).await;
            }
        }));
    }
    run_all(&env, tasks);
    let content = disk.read(0, usize::try_from(size).unwrap());
    disk.close();
    judged_by_qemu(&env, "a", &[], &content);
}
