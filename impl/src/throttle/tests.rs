//! Groups and filters together: turns, drained sections, flags, reopen, the life of groups.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

use serde_json::{Value, json};

use crate::drivers::throttle::FACTS;
use crate::env::{Env, Nanos};
use crate::error::{Errno, QmpError};
use crate::event::Event;
use crate::graph::node::Node;
use crate::io::backend::Backend;
use crate::io::fixture::{Bench, Fixture, Op};
use crate::throttle::Group;
use crate::types::ReqFlags;

const MS: Nanos = 1_000_000;
const CLUSTER: u64 = 4096;

fn command(bench: &Bench, name: &str, arguments: &Value) -> Result<Value, QmpError> {
    bench.run(bench.layer.execute(name, arguments))
}

/// A group that lets through ten requests a second, one at once.
fn group(bench: &Bench, id: &str, limits: &Value) -> Rc<Group> {
    let add = json!({"qom-type": "throttle-group", "id": id, "limits": limits});
    command(bench, "object-add", &add).expect("good limits");
    bench.layer.throttle_group(id).expect("just added")
}

fn filter(bench: &Bench, name: &str, group: &str, file: &str) -> Rc<Node> {
    bench
        .open(&FACTS, name, json!({"throttle-group": group, "file": file}))
        .expect("opens")
}

/// What went through, and when.
#[derive(Clone, Default)]
struct Log(Rc<RefCell<Vec<(&'static str, Nanos)>>>);

impl Log {
    fn spawn(
        &self,
        bench: &Bench,
        what: &'static str,
        request: impl Future<Output = Result<(), Errno>> + 'static,
    ) {
        let (log, env) = (self.clone(), bench.env.clone());
        let task = async move {
            request.await.expect("memory does not fail");
            log.0.borrow_mut().push((what, env.now()));
        };
        bench.env.spawn("guest", Box::pin(task));
    }

    fn take(&self) -> Vec<(&'static str, Nanos)> {
        self.0.take()
    }
}

fn write(guest: &Backend, at: u64) -> impl Future<Output = Result<(), Errno>> + 'static {
    let guest = guest.clone();
    async move { guest.write(at * CLUSTER, &[7; 512], ReqFlags::empty()).await }
}

fn read(guest: &Backend, at: u64) -> impl Future<Output = Result<(), Errno>> + 'static {
    let guest = guest.clone();
    async move { guest.read(at * CLUSTER, &mut [0; 512]).await }
}

/// Lets everything happen that happens at this moment of virtual time.
fn settle(bench: &Bench) {
    let env = bench.env.clone();
    bench.run(async move { env.sleep_until(env.now()).await });
}

fn wait_until(bench: &Bench, at: Nanos) {
    let env = bench.env.clone();
    bench.run(async move { env.sleep_until(at).await });
}

fn storage(bench: &Bench, name: &str) -> Rc<Fixture> {
    bench.node(name, 64 * CLUSTER, CLUSTER).1
}

#[test]
fn requests_go_at_the_rate_of_the_group_in_their_order() {
    let bench = Bench::new();
    storage(&bench, "n");
    let group = group(&bench, "g", &json!({"iops-total": 10}));
    let guest = bench.guest(&filter(&bench, "t", "g", "n"));
    let log = Log::default();
    for (what, at) in [("a", 0), ("b", 1), ("c", 2), ("d", 3)] {
        log.spawn(&bench, what, write(&guest, at));
    }
    settle(&bench);
    assert_eq!(group.waiting(), 2, "one fits, one more may overdraw");
    wait_until(&bench, 1000 * MS);
    assert_eq!(log.take(), [("a", 0), ("b", 0), ("c", 100 * MS), ("d", 200 * MS)]);
    assert_eq!(group.waiting(), 0);
}

#[test]
fn nodes_take_turns_and_directions_do_not_wait_for_each_other() {
    let bench = Bench::new();
    storage(&bench, "n");
    storage(&bench, "m");
    group(&bench, "g", &json!({"iops-write": 10}));
    let guests = [("s", "n"), ("t", "m")].map(|(t, n)| bench.guest(&filter(&bench, t, "g", n)));
    let log = Log::default();
    for (what, guest, at) in [
        ("s0", 0, 0),
        ("s1", 0, 1),
        ("s2", 0, 2),
        ("s3", 0, 3),
        ("t0", 1, 0),
        ("t1", 1, 1),
    ] {
        log.spawn(&bench, what, write(&guests[guest], at));
    }
    log.spawn(&bench, "read", read(&guests[0], 9));
    wait_until(&bench, 1000 * MS);
    let order: Vec<&str> = log.take().into_iter().map(|(what, _)| what).collect();
    assert_eq!(order, ["s0", "s1", "read", "s2", "t0", "s3", "t1"]);
}

#[test]
fn a_drained_section_lets_everything_of_its_node_through() {
    let bench = Bench::new();
    storage(&bench, "n");
    storage(&bench, "m");
    let group = group(&bench, "g", &json!({"iops-total": 1}));
    let (s, t) = (filter(&bench, "s", "g", "n"), filter(&bench, "t", "g", "m"));
    let (on_s, on_t) = (bench.guest(&s), bench.guest(&t));
    let log = Log::default();
    for (what, at) in [("s0", 0), ("s1", 1), ("s2", 2)] {
        log.spawn(&bench, what, write(&on_s, at));
    }
    log.spawn(&bench, "t0", write(&on_t, 0));
    settle(&bench);
    assert_eq!(group.waiting(), 3);
    // Of the node below: what stands above is drained with it.
    let below = bench.named("n");
    let section = bench.run(bench.layer.drained(below));
    let through: Vec<&str> = log.take().into_iter().map(|(what, _)| what).collect();
    assert_eq!(through, ["s0", "s1", "s2"]);
    assert_eq!(group.waiting(), 1, "the other node's requests stay");
    let released = |e: &Event| matches!(e, Event::ThrottleResumed { drained: true, .. });
    assert_eq!(bench.count(released), 2);
    drop(section);
    wait_until(&bench, 10_000 * MS);
    let last: Vec<_> = log.take();
    assert_eq!(
        last,
        [("t0", 2900 * MS)],
        "what was let through is charged all the same"
    );
}

#[test]
fn a_request_on_a_drained_node_does_not_wait() {
    let bench = Bench::new();
    storage(&bench, "n");
    let group = group(&bench, "g", &json!({"iops-total": 1}));
    let t = filter(&bench, "t", "g", "n");
    // Jobs go on in a drained section to their next pause point.
    let perm = crate::types::Perm::all();
    let job = Backend::new(&bench.layer, t.id, None, perm, perm, false).expect("no conflict");
    let section = bench.run(bench.layer.drained(t.id));
    for at in 0..4 {
        bench.run(write(&job, at)).expect("writes");
    }
    assert_eq!(bench.env.now(), 0);
    drop(section);
    let log = Log::default();
    log.spawn(&bench, "after", write(&job, 5));
    settle(&bench);
    assert_eq!(group.waiting(), 1);
    wait_until(&bench, 100_000 * MS);
    assert_eq!(log.take(), [("after", 3900 * MS)]);
}

#[test]
fn flags_and_kinds_are_forwarded() {
    let bench = Bench::new();
    let below = storage(&bench, "n");
    below.write_flags.set(crate::driver::WriteFlags {
        write: ReqFlags::FUA,
        zero: ReqFlags::FUA | ReqFlags::MAY_UNMAP,
        truncate: ReqFlags::empty(),
    });
    bench.refresh(&bench.layer.node(bench.named("n")));
    group(&bench, "g", &json!({}));
    let t = filter(&bench, "t", "g", "n");
    let flags = t.io.write_flags.get();
    assert_eq!(flags.write, ReqFlags::FUA | ReqFlags::WRITE_UNCHANGED);
    assert_eq!(
        flags.zero,
        ReqFlags::FUA | ReqFlags::MAY_UNMAP | ReqFlags::WRITE_UNCHANGED
    );
    let guest = bench.guest(&t);
    bench
        .run(guest.write(0, &[1; 512], ReqFlags::FUA))
        .expect("writes");
    bench
        .run(guest.write_zeroes(512, 512, ReqFlags::MAY_UNMAP))
        .expect("zeroes");
    bench.run(guest.discard(0, 4096)).expect("discards");
    bench.read(&guest, 0, 512).expect("reads");
    let kinds: Vec<Op> = below.take_ops().into_iter().map(|(op, ..)| op).collect();
    assert_eq!(kinds, [Op::Write, Op::Zero, Op::Discard, Op::Read]);
}

#[test]
fn copying_happens_below() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 4 * CLUSTER, CLUSTER);
    let (top, top_driver) = bench.node("top", 4 * CLUSTER, CLUSTER);
    base_driver.put(0, &[5; 16384]);
    bench.back(&top, &base);
    group(&bench, "g", &json!({}));
    filter(&bench, "t", "g", "top");
    let cor = bench
        .open(&crate::drivers::copy_on_read::FACTS, "cor", json!({"file": "t"}))
        .expect("opens");
    let guest = bench.guest(&cor);
    assert_eq!(bench.read(&guest, 0, 512), Ok(vec![5; 512]));
    bench.run(guest.prefetch(2 * CLUSTER, 512)).expect("prefetches");
    let copied: Vec<bool> = (0..4).map(|c| top_driver.is_allocated(c * CLUSTER)).collect();
    assert_eq!(copied, [true, false, true, false]);
    let nodes = Cell::new(0);
    bench.count(|event| {
        if let Event::CopyOnRead { node, .. } = event {
            assert_eq!(*node, top.id);
            nodes.set(nodes.get() + 1);
        }
        false
    });
    assert_eq!(nodes.get(), 2);
}

#[test]
fn a_reopen_moves_the_node_and_lets_what_waits_through() {
    let bench = Bench::new();
    let add = |name: &str, arguments: Value| command(&bench, name, &arguments);
    add(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": 65536}),
    )
    .expect("adds");
    let old = group(&bench, "old", &json!({"iops-total": 1}));
    group(&bench, "new", &json!({}));
    let node = json!({"driver": "throttle", "node-name": "t", "throttle-group": "old", "file": "n"});
    add("blockdev-add", node).expect("adds");
    let guest = bench.guest(&bench.layer.node(bench.named("t")));
    let log = Log::default();
    for (what, at) in [("a", 0), ("b", 1), ("c", 2)] {
        log.spawn(&bench, what, write(&guest, at));
    }
    settle(&bench);
    assert_eq!(old.waiting(), 2);
    let other = json!({"driver": "throttle", "node-name": "t", "throttle-group": "new", "file": "n"});
    add("blockdev-reopen", json!({"options": [other]})).expect("reopens");
    assert_eq!((log.take().len(), bench.env.now(), old.waiting()), (3, 0, 0));
    for at in 0..8 {
        bench.run(write(&guest, at)).expect("writes");
    }
    assert_eq!(bench.env.now(), 0, "the new group has no limits");
    add("object-del", json!({"id": "old"})).expect("nobody is left in it");
    let refused = add("object-del", json!({"id": "new"})).expect_err("in use");
    assert_eq!(refused.desc, "object 'new' is in use, can not be deleted");
    bench.run(guest.remove());
    add("blockdev-del", json!({"node-name": "t"})).expect("closes");
    add("object-del", json!({"id": "new"})).expect("nobody is left in it");
}

#[test]
fn a_refused_reopen_leaves_the_node_where_it_was() {
    let bench = Bench::new();
    let add = |name: &str, arguments: Value| command(&bench, name, &arguments);
    for name in ["n", "m"] {
        add(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": name, "size": 65536}),
        )
        .expect("adds");
    }
    for id in ["old", "new"] {
        group(&bench, id, &json!({}));
    }
    let node = |name: &str, group: &str| json!({"driver": "throttle", "node-name": name, "throttle-group": group, "file": "n"});
    add("blockdev-add", node("t", "old")).expect("adds");
    add("blockdev-add", node("s", "old")).expect("adds");
    let both = json!({"options": [node("t", "new"), node("s", "gone")]});
    let refused = add("blockdev-reopen", both).expect_err("no such group");
    assert_eq!(refused.desc, "Throttle group 'gone' does not exist");
    add("object-del", json!({"id": "new"})).expect("nobody has moved");
    let raw = json!({"options": [{"driver": "raw", "node-name": "t", "file": "n"}]});
    let refused = add("blockdev-reopen", raw).expect_err("no default");
    assert_eq!(
        refused.desc,
        "Option 'throttle-group' cannot be reset to its default value"
    );
    let refused = add("blockdev-add", node("u", "gone")).expect_err("no such group");
    assert_eq!(refused.desc, "Throttle group 'gone' does not exist");
    assert!(bench.layer.find_node("u").is_none());
}

#[test]
fn refusals_of_objects() {
    let bench = Bench::new();
    group(&bench, "a", &json!({}));
    let total = "bps/iops/max total values and read/write values cannot be used at the same time";
    let range = "bps/iops/max values must be within [0, 1000000000000000]";
    let cases = [
        (json!({"id": "b"}), "Parameter 'qom-type' is missing"),
        (
            json!({"qom-type": "iothread", "id": "b"}),
            "Parameter 'qom-type' does not accept value 'iothread'",
        ),
        (json!({"qom-type": "throttle-group"}), "Parameter 'id' is missing"),
        (
            json!({"qom-type": "throttle-group", "id": "1b"}),
            "Parameter 'id' expects an identifier",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "b", "limits": {"iops": 1}}),
            "Parameter 'limits.iops' is unexpected",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "a", "x-iops-read": -1}),
            "Property values cannot be negative",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "b", "x-bps-read-max-length": 1i64 << 32}),
            "x-bps-read-max-length value must be in therange [0, 4294967295]",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "a", "limits": {"iops-total": 5, "iops-read": 5}}),
            total,
        ),
        (
            json!({"qom-type": "throttle-group", "id": "a", "x-iops-total": 5, "x-iops-read": 5}),
            "attempt to add duplicate property 'a' to object (type 'container')",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "b", "limits": {"bps-read": -1}}),
            range,
        ),
        (
            json!({"qom-type": "throttle-group", "id": "b", "limits": {"iops-size": 512}}),
            "iops size requires an iops value to be set",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "b", "limits": {"bps-read": 2, "bps-read-max": 1}}),
            "bps_max/iops_max cannot be lower than bps/iops",
        ),
        (
            json!({"qom-type": "throttle-group", "id": "b", "limits": {"bps-read-max-length": -2}}),
            "burst length set without burst rate",
        ),
    ];
    for (add, text) in cases {
        let refused = command(&bench, "object-add", &add).expect_err("refused");
        assert_eq!(refused.desc, text, "{add}");
    }
    let refused = command(&bench, "object-del", &json!({"id": "b"})).expect_err("refused");
    assert_eq!(refused.desc, "object 'b' not found");
    assert_eq!(bench.layer.throttle_groups().len(), 1);
}
