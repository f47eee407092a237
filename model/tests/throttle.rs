//! Throttle groups and their filters: the exact refusals of qemu-storage-daemon 10.0, and that a refusal changes nothing.

use blkcheck_model::{Command, World};
use serde_json::{Value, json};

fn run(world: &mut World, execute: &str, arguments: &Value) -> Result<(), String> {
    let before = world.clone();
    let answer = world.execute(&Command::new(execute, arguments));
    if answer.is_err() {
        assert_eq!(*world, before, "{execute} {arguments}");
    }
    answer.map(drop).map_err(|refusal| refusal.to_string())
}

fn refused(world: &mut World, execute: &str, arguments: &Value, text: &str) {
    let answer = run(world, execute, arguments);
    assert_eq!(
        answer,
        Err(format!("GenericError: {text}")),
        "{execute} {arguments}"
    );
}

fn filter(group: &str, file: &str) -> Value {
    json!({"driver": "throttle", "node-name": "t", "throttle-group": group, "file": file})
}

/// Groups `a` and `b`, nodes `n` and `m`.
fn world() -> World {
    let mut world = World::new([]);
    for id in ["a", "b"] {
        run(
            &mut world,
            "object-add",
            &json!({"qom-type": "throttle-group", "id": id}),
        )
        .unwrap();
    }
    for (name, size) in [("n", 65536), ("m", 131_072)] {
        let add = json!({"driver": "null-co", "node-name": name, "size": size});
        run(&mut world, "blockdev-add", &add).unwrap();
    }
    world
}

#[test]
fn limits_that_do_not_go_together_are_refused() {
    let range = "bps/iops/max values must be within [0, 1000000000000000]";
    let cases = [
        (
            json!({"iops-total": 5, "iops-read": 5}),
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        (
            json!({"iops-total-max": 5}),
            "bps_max/iops_max require corresponding bps/iops values",
        ),
        (
            json!({"iops-total-max": 5, "iops-total": 6}),
            "bps_max/iops_max cannot be lower than bps/iops",
        ),
        (
            json!({"iops-total": 6, "iops-total-max-length": 0}),
            "the burst length cannot be 0",
        ),
        (
            json!({"iops-total": 6, "iops-total-max-length": 2}),
            "burst length set without burst rate",
        ),
        (
            json!({"iops-total-max-length": -2}),
            "burst length set without burst rate",
        ),
        (
            json!({"iops-total-max-length": 1i64 << 32}),
            "iops-total-max-length value must be in the range [0, 4294967295]",
        ),
        (
            json!({"iops-total": 1, "iops-total-max": 1i64 << 49, "iops-total-max-length": 1i64 << 31}),
            "burst length too high for this burst rate",
        ),
        (json!({"iops-total": -6}), range),
        (json!({"iops-total-max": 1i64 << 62}), range),
        (
            json!({"iops-size": 5}),
            "iops size requires an iops value to be set",
        ),
        (json!({"nosuch": 5}), "Parameter 'limits.nosuch' is unexpected"),
        (
            json!({"iops-total": "x"}),
            "Invalid parameter type for 'limits.iops-total', expected: integer",
        ),
        (json!(3), "Invalid parameter type for 'limits', expected: object"),
    ];
    let mut world = world();
    for (limits, text) in cases {
        // Such limits are told before the name that is taken.
        let add = json!({"qom-type": "throttle-group", "id": "a", "limits": limits});
        refused(&mut world, "object-add", &add, text);
    }
    let fine = json!({"bps-read": 100, "bps-read-max": 200, "bps-read-max-length": 3, "iops-total": 1});
    run(
        &mut world,
        "object-add",
        &json!({"qom-type": "throttle-group", "id": "c", "limits": fine}),
    )
    .unwrap();
}

#[test]
fn single_limits_and_names() {
    let mut world = world();
    let cases = [
        (
            json!({"id": "g", "x-iops-total": -1}),
            "Property values cannot be negative",
        ),
        (
            json!({"id": "g", "x-iops-total-max-length": 1i64 << 33}),
            "x-iops-total-max-length value must be in therange [0, 4294967295]",
        ),
        (
            json!({"id": "g", "x-iops-total": 5, "x-iops-read": 5}),
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        (
            json!({"id": "a"}),
            "attempt to add duplicate property 'a' to object (type 'container')",
        ),
        (json!({"id": "1a"}), "Parameter 'id' expects an identifier"),
        (json!({}), "Parameter 'id' is missing"),
    ];
    for (mut add, text) in cases {
        add["qom-type"] = json!("throttle-group");
        refused(&mut world, "object-add", &add, text);
    }
    refused(
        &mut world,
        "object-add",
        &json!({"id": "g"}),
        "Parameter 'qom-type' is missing",
    );
    refused(
        &mut world,
        "object-del",
        &json!({"id": "g"}),
        "object 'g' not found",
    );
    let both =
        json!({"qom-type": "throttle-group", "id": "g", "x-iops-total": 5, "limits": {"iops-total": 0}});
    run(&mut world, "object-add", &both).unwrap();
}

#[test]
fn a_group_stays_while_a_filter_names_it() {
    let mut world = world();
    let missing = "Throttle group 'c' does not exist";
    refused(&mut world, "blockdev-add", &filter("c", "n"), missing);
    run(&mut world, "blockdev-add", &filter("a", "n")).unwrap();
    let in_use = "object 'a' is in use, can not be deleted";
    refused(&mut world, "object-del", &json!({"id": "a"}), in_use);
    refused(
        &mut world,
        "blockdev-reopen",
        &json!({"options": [filter("c", "n")]}),
        missing,
    );
    refused(
        &mut world,
        "blockdev-reopen",
        &json!({"options": [filter("c", "t")]}),
        missing,
    );
    let raw = json!({"driver": "raw", "node-name": "t", "file": "n"});
    refused(
        &mut world,
        "blockdev-reopen",
        &json!({"options": [raw]}),
        "Option 'throttle-group' cannot be reset to its default value",
    );
    refused(&mut world, "object-del", &json!({"id": "a"}), in_use);
    run(
        &mut world,
        "blockdev-reopen",
        &json!({"options": [filter("b", "m")]}),
    )
    .unwrap();
    let node = world.graph.find("t").expect("the filter");
    assert_eq!(
        world.graph.node(node).length,
        131_072,
        "it shows another node now"
    );
    run(&mut world, "object-del", &json!({"id": "a"})).unwrap();
    refused(
        &mut world,
        "object-del",
        &json!({"id": "b"}),
        "object 'b' is in use, can not be deleted",
    );
    run(&mut world, "blockdev-del", &json!({"node-name": "t"})).unwrap();
    run(&mut world, "object-del", &json!({"id": "b"})).unwrap();
}
