//! Matchers of transactions with backups.

use super::*;

fn backup(job: &str, device: &str, target: &str, more: &Value) -> Value {
    let mut data = json!({"job-id": job, "device": device, "target": target, "sync": "full",
        "filter-node-name": format!("f{job}")});
    for (key, value) in more.as_object().expect("an object") {
        data[key] = value.clone();
    }
    json!({"type": "blockdev-backup", "data": data})
}

fn transaction(actions: &[Value], mode: &str) -> (&'static str, Value) {
    (
        "transaction",
        json!({"actions": actions, "properties": {"completion-mode": mode}}),
    )
}

#[test]
fn a_group_hangs_only_when_it_is_given_up() {
    let hangs = found(OracleName::Liveness, "step 20: nothing can happen any more");
    let first = backup("a", "t", "l", &json!({}));
    let second = backup("c", "b", "m", &json!({"sync": "none"}));
    let abort = backup("d", "t", "nowhere", &json!({}));
    let null = |name: &str| {
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": name, "size": 4096}),
        )
    };
    let of = |actions: &[Value], mode: &str, open: bool, violation: &Violation| {
        let more = [null("l"), null("m"), transaction(actions, mode)];
        after(&more, open, violation)
    };
    let all = [first, second, abort];
    let known = Some("refused-group-hangs");
    assert_eq!(of(&all, "grouped", true, &hangs), known);
    assert_eq!(of(&all, "grouped", false, &hangs), None, "answered");
    assert_eq!(of(&all, "individual", true, &hangs), None, "not a group");
    assert_eq!(of(&all[..2], "grouped", true, &hangs), None, "accepted");
    let died = found(OracleName::Daemon, "the daemon died of SIGABRT");
    assert_eq!(of(&all, "grouped", true, &died), None);
}

#[test]
fn a_bitmap_is_freed_only_under_an_earlier_action_on_it() {
    let died = found(
        OracleName::Daemon,
        "the daemon died of SIGABRT: bdrv_restore_dirty_bitmap: Assertion `!bdrv_dirty_bitmap_readonly(bitmap)'",
    );
    let bitmap = json!({"node": "t", "name": "k"});
    let node = json!({"driver": "null-co", "node-name": "l", "size": 4096});
    let clear = json!({"type": "block-dirty-bitmap-clear", "data": bitmap.clone()});
    let abort = json!({"type": "abort", "data": {}});
    let job = |mode: &str| {
        backup(
            "a",
            "t",
            "l",
            &json!({"sync": "bitmap", "bitmap": "k", "bitmap-mode": mode}),
        )
    };
    let of = |actions: &[Value], open: bool, violation: &Violation| {
        let more = [
            ("block-dirty-bitmap-add", bitmap.clone()),
            ("blockdev-add", node.clone()),
            transaction(actions, "individual"),
        ];
        after(&more, open, violation)
    };
    let all = [clear.clone(), job("always"), abort.clone()];
    assert_eq!(of(&all, true, &died), Some("aborted-backup-frees-bitmap"));
    assert_eq!(of(&all, false, &died), None, "answered");
    assert_eq!(of(&all[1..], true, &died), None, "no earlier action");
    assert_eq!(
        of(&[clear, job("on-success"), abort], true, &died),
        None,
        "it stays the same one"
    );
    let hangs = found(OracleName::Liveness, "step 20: nothing can happen any more");
    assert_eq!(of(&all, true, &hangs), None);
}
