//! Every entry is complete, and its near misses are not explained.

mod backup;
mod bitmaps;
mod content;
mod graph;

use serde_json::json;

use super::*;
use crate::scenario::parse;

/// A command as a step.
fn command(execute: &str, arguments: Value) -> Value {
    let mut step = json!({"actor": "m", "execute": execute});
    step["arguments"] = arguments;
    step
}

/// A qcow2 node over an inline file of the same name with an `f` before it.
fn qcow2(name: &str, backing: Value) -> Value {
    let file = json!({"driver": "file", "node-name": format!("f{name}"), "filename": name});
    let mut node = json!({"driver": "qcow2", "node-name": name, "file": file});
    node["backing"] = backing;
    command("blockdev-add", node)
}

/// Images b, t over it, and o, as long as it is said; one node each, and then these steps.
fn chain(o_size: u64, more: &[Value]) -> String {
    let mut nodes = vec![
        qcow2("b", Value::Null),
        qcow2("t", json!("b")),
        qcow2("o", Value::Null),
    ];
    nodes.extend_from_slice(more);
    let image = |name: &str, size: u64| json!({"file": name, "format": "qcow2", "size": size});
    let mut t = image("t", 4096);
    t["backing-file"] = json!("b");
    t["backing-format"] = json!("qcow2");
    json!({"version": 1, "grain": 512, "images": [image("b", 4096), t, image("o", o_size)], "steps": nodes})
        .to_string()
}

/// What a case at the last step of a scenario is explained by. The model is as it was before that step.
fn at_last(scenario: &str, case: impl FnOnce(&mut Case<'_>)) -> Option<&'static str> {
    let scenario = parse::parse("test", scenario.as_bytes()).expect("a scenario");
    let past = replayed(&scenario, scenario.steps.len());
    let step = scenario.steps.len() - 1;
    let Action::Command { execute, arguments } = &scenario.steps[step].action else {
        panic!("a command")
    };
    let world = &past.last().expect("some").world;
    let mut about = Case {
        scenario: &scenario,
        step,
        execute,
        arguments,
        world,
        past: &past,
        strayed: &[],
        leftovers: &[],
        what: None,
        failed: None,
        model: "",
        qemu: "",
    };
    case(&mut about);
    explain(&about).map(|d| d.id)
}

/// The daemon failed.
fn fails(kind: Kind, words: &'static str) -> impl Fn(&mut Case<'_>) {
    move |case| (case.failed, case.qemu) = (Some(kind), words)
}

/// They differ.
fn differs(what: What, model: &'static str, qemu: &'static str) -> impl Fn(&mut Case<'_>) {
    move |case| (case.what, case.model, case.qemu) = (Some(what), model, qemu)
}

#[test]
fn every_entry_has_a_scenario_and_a_page() {
    for defect in DEFECTS {
        let scenario = parse::parse(defect.id, defect.scenario.as_bytes());
        assert!(scenario.is_ok(), "{}: {scenario:?}", defect.id);
        assert!(defect.page.starts_with("# "), "{}", defect.id);
        assert!(
            defect.page.contains(&format!("{}.json", defect.id)),
            "{} does not name its scenario",
            defect.id
        );
        let others = DEFECTS.iter().filter(|d| d.id == defect.id).count();
        assert_eq!(others, 1, "{}", defect.id);
    }
}

#[test]
fn steering_is_narrow() {
    let world = World::default();
    let steered = |execute: &str, arguments: Value| {
        let Value::Object(arguments) = arguments else {
            panic!("an object")
        };
        steers_around(&world, &["gone".to_owned()], execute, &arguments).map(|d| d.id)
    };
    let null_co =
        |size: i64| serde_json::json!({"driver": "raw", "file": {"driver": "null-co", "size": size}});
    assert_eq!(steered("blockdev-add", null_co(-1)), Some("null-co-size"));
    assert_eq!(steered("blockdev-add", null_co(512)), None);
    let del = |name: &str| serde_json::json!({"node-name": name});
    assert_eq!(steered("blockdev-del", del("gone")), Some("filter-outlives-job"));
    assert_eq!(steered("blockdev-del", del("here")), None);
    let reopen = |name: &str| serde_json::json!({"options": [{"driver": "copy-on-read", "node-name": name}]});
    assert_eq!(
        steered("blockdev-reopen", reopen("gone")),
        Some("filter-outlives-job")
    );
    assert_eq!(steered("blockdev-reopen", reopen("here")), None);
    let snapshot = |name: &str| {
        let data = serde_json::json!({"node": name, "overlay": "o"});
        serde_json::json!({"actions": [{"type": "blockdev-snapshot", "data": data}]})
    };
    assert_eq!(
        steered("transaction", snapshot("gone")),
        Some("filter-outlives-job")
    );
    assert_eq!(steered("transaction", snapshot("here")), None);
}

/// What a case in a scenario of these steps is explained by.
fn explained(scenario: &str, case: impl FnOnce(&mut Case<'_>)) -> Option<&'static str> {
    let scenario = parse::parse("test", scenario.as_bytes()).expect("a scenario");
    let (none, world) = (Map::new(), World::default());
    let past = replayed(&scenario, scenario.steps.len());
    let mut about = Case {
        scenario: &scenario,
        step: scenario.steps.len(),
        execute: "",
        arguments: &none,
        world: &world,
        past: &past,
        strayed: &[],
        leftovers: &[],
        what: None,
        failed: None,
        model: "",
        qemu: "",
    };
    case(&mut about);
    explain(&about).map(|d| d.id)
}

fn steps(images: &str, steps: &str) -> String {
    format!(r#"{{"version":1,"grain":512,"images":[{images}],"steps":[{steps}]}}"#)
}

const EVEN: &str = r#"{"file":"a","format":"raw","size":1024},{"file":"b","format":"raw","size":1024}"#;
const UNEVEN: &str = r#"{"file":"a","format":"raw","size":1024},{"file":"b","format":"raw","size":512}"#;

#[test]
fn near_misses_of_hangs_are_not_explained() {
    let reopen = |second: &str| {
        format!(
            r#"{{"actor":"m","execute":"blockdev-reopen","arguments":{{"options":[{{"node-name":"n"}},{{"node-name":"{second}"}}]}}}}"#
        )
    };
    let hangs = |case: &mut Case<'_>| case.failed = Some(Kind::Hang);
    let dies = |case: &mut Case<'_>| case.failed = Some(Kind::Crash);
    let twice = steps(EVEN, &reopen("n"));
    assert_eq!(explained(&twice, hangs), Some("reopen-drains-for-ever"));
    assert_eq!(explained(&twice, dies), None);
    assert_eq!(explained(&steps(EVEN, &reopen("m")), hangs), None);
    let paused = |case: &mut Case<'_>| {
        case.what = Some(What::Jobs);
        case.model = "job 'j' does not stay paused: ...";
    };
    assert_eq!(explained(&twice, paused), Some("reopen-drains-for-ever"));
    assert_eq!(explained(&steps(EVEN, &reopen("m")), paused), None);
    let running = |case: &mut Case<'_>| {
        case.what = Some(What::Jobs);
        case.model = "job 'j' does not stay running: ...";
    };
    assert_eq!(explained(&twice, running), None);
}

#[test]
fn near_misses_of_wrong_content_are_not_explained() {
    let commit = r#"{"actor":"m","execute":"block-commit","arguments":{"device":"n"}}"#;
    fn old(case: &mut Case<'_>) {
        case.what = Some(What::Content);
        (case.model, case.qemu) = ("x at 0x200: zeroes", "Stamp(Fill { image: 0, fill: 0 })");
    }
    assert_eq!(
        explained(&steps(UNEVEN, commit), old),
        Some("commit-uncovers-base")
    );
    assert_eq!(explained(&steps(EVEN, commit), old), None);
    assert_eq!(explained(&steps(UNEVEN, ""), old), None);
    let lost = |case: &mut Case<'_>| {
        old(case);
        (case.model, case.qemu) = ("x at 0x200: the write of step 3", "Zero");
    };
    assert_eq!(
        explained(&steps(UNEVEN, commit), lost),
        None,
        "lost data is something else"
    );
    let resize = r#"{"actor":"m","execute":"block_resize","arguments":{"node-name":"n","size":512}}"#;
    assert_eq!(
        explained(&steps(EVEN, &[resize, resize].join(",")), old),
        Some("resize-shows-old-tail")
    );
    assert_eq!(explained(&steps(EVEN, resize), old), None);
    let torn = |case: &mut Case<'_>| {
        old(case);
        case.qemu = "Torn";
    };
    let filter = |bottom: &str| {
        let node = format!(r#"{{"driver":"copy-on-read","file":"n"{bottom}}}"#);
        format!(r#"{{"actor":"m","execute":"blockdev-add","arguments":{node}}}"#)
    };
    let with = filter(r#","bottom":"m""#);
    assert_eq!(explained(&steps(UNEVEN, &with), torn), Some("cor-bottom-garbage"));
    assert_eq!(explained(&steps(EVEN, &with), torn), None);
    assert_eq!(explained(&steps(UNEVEN, &filter("")), torn), None);
    assert_eq!(explained(&steps(UNEVEN, &with), old), None);
}

#[test]
fn near_misses_of_aborts_are_not_explained() {
    let snapshot = |file: &str| {
        format!(
            r#"{{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"raw","node-name":"o","file":{{"driver":"file","filename":"{file}"}}}}}},
                {{"actor":"m","execute":"blockdev-snapshot","arguments":{{"node":"n","overlay":"o"}}}}"#
        )
    };
    let aborts = |words: &'static str| {
        move |case: &mut Case<'_>| {
            case.failed = Some(Kind::Assert);
            case.qemu = words;
        }
    };
    let sparse = "nbd_co_send_sparse_read: Assertion `pnum' failed";
    let shorter = Some("snapshot-over-shorter-overlay");
    assert_eq!(explained(&steps(UNEVEN, &snapshot("b")), aborts(sparse)), shorter);
    assert_eq!(explained(&steps(UNEVEN, &snapshot("a")), aborts(sparse)), None);
    assert_eq!(
        explained(&steps(UNEVEN, &snapshot("b")), aborts("another assertion")),
        None
    );
    assert_eq!(explained(&steps(UNEVEN, ""), aborts(sparse)), None);
    let count = "mirror_dirty_init: Assertion `count' failed";
    assert_eq!(
        explained(&steps(EVEN, &snapshot("a")), aborts(count)),
        Some("filter-keeps-length")
    );
    assert_eq!(explained(&steps(EVEN, ""), aborts(count)), None);
}
