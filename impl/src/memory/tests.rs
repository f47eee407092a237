//! Content of simulated files, their tasks, and time that passes when nobody can go on.

use super::*;

#[test]
fn holes_and_data() {
    let file = Content::default();
    file.length.set(4 * PAGE + 100);
    assert_eq!(
        file.extent(0),
        Extent {
            data: false,
            bytes: 4 * PAGE + 100
        }
    );
    file.write(PAGE + 5, &[7; 10]).expect("fits");
    assert_eq!(
        file.extent(10),
        Extent {
            data: false,
            bytes: PAGE - 10
        }
    );
    assert_eq!(
        file.extent(PAGE + 1),
        Extent {
            data: true,
            bytes: PAGE - 1
        }
    );
    assert_eq!(
        file.extent(2 * PAGE),
        Extent {
            data: false,
            bytes: 2 * PAGE + 100
        }
    );
    file.clear(0, 3 * PAGE, true);
    assert_eq!(
        file.extent(0),
        Extent {
            data: false,
            bytes: 4 * PAGE + 100
        }
    );
}

#[test]
fn shrink_forgets_the_tail() {
    let file = Content::default();
    file.write(0, &[1; 5000]).expect("fits");
    file.truncate(100).expect("shrinks");
    file.truncate(5000).expect("grows");
    let mut all = [9; 5000];
    assert_eq!(file.read(0, &mut all), 5000);
    assert!(all[..100].iter().all(|b| *b == 1) && all[100..].iter().all(|b| *b == 0));
}

#[test]
fn short_read_at_the_end() {
    let file = Content::default();
    file.write(0, &[1; 10]).expect("fits");
    assert_eq!(file.read(4, &mut [0; 20]), 6);
    assert_eq!(file.read(100, &mut [0; 20]), 0);
}

#[test]
fn tasks_and_virtual_time() {
    let env = MemoryEnv::new();
    let log: Rc<RefCell<Vec<(&str, Nanos)>>> = Rc::default();
    for (name, at) in [("late", 500), ("early", 20)] {
        let (env2, log) = (env.clone(), Rc::clone(&log));
        env.spawn(
            "test",
            Box::pin(async move {
                env2.sleep_until(at).await;
                log.borrow_mut().push((name, env2.now()));
            }),
        );
    }
    env.block_on(env.sleep_until(500));
    env.block_on(async {});
    assert_eq!(*log.borrow(), [("early", 20), ("late", 500)]);
}

#[test]
#[should_panic(expected = "deadlock")]
fn deadlock_is_noticed() {
    MemoryEnv::new().block_on(std::future::pending::<()>());
}
