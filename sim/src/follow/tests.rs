//! Commands, refusals and jobs as the model follows them, record by record.

use serde_json::json;

use super::*;
use crate::oracle::tests::scenario_of;

fn scenario() -> Scenario {
    scenario_of(
        r#"{"version":1,"grain":512,"images":[{"file":"a.img","format":"raw","size":4096}],"steps":[
        {"actor":"m","execute":"blockdev-add","arguments":{"driver":"file","node-name":"f","filename":"a.img"}},
        {"actor":"m","execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"f"}}]}"#,
    )
}

fn main(what: &'static str, end: bool) -> Record {
    Record::Layer(if end {
        Event::MainEnd { what }
    } else {
        Event::MainBegin { what }
    })
}

#[test]
fn commands_take_effect_at_the_main_lock_and_settle_with_their_answer() {
    let scenario = scenario();
    let mut follower = Follower::default();
    follower.reset(&scenario);
    follower.record(&scenario, &Record::Issued(StepId(0)));
    assert_eq!(follower.world.graph.find("f"), None);
    assert_eq!(
        follower.record(&scenario, &main("blockdev-add", false)).executed,
        Some(StepId(0))
    );
    assert!(follower.world.graph.find("f").is_some());
    assert!(!follower.record(&scenario, &main("blockdev-add", true)).settled);
    let ended = Record::Ended(StepId(0), history::Outcome::Command(Ok(json!({}))));
    let followed = follower.record(&scenario, &ended);
    assert!(followed.settled && followed.answered == Some(StepId(0)));
    assert!(matches!(follower.prediction(), Some(Ok(_))));
}

#[test]
fn a_refusal_by_failing_storage_is_taken_back() {
    let scenario = scenario();
    let mut follower = Follower::default();
    follower.reset(&scenario);
    let refusal = history::Refusal {
        class: "GenericError".into(),
        desc: "Input/output error".into(),
    };
    for record in [
        Record::Issued(StepId(0)),
        main("blockdev-add", false),
        Record::Fault(history::Fault {
            image: 0,
            kind: FaultKind::Read,
            offset: 0,
            bytes: 512,
            done: 0,
            errno: Errno::EIO.0,
        }),
        main("blockdev-add", true),
        Record::Ended(StepId(0), history::Outcome::Command(Err(refusal))),
    ] {
        assert!(follower.record(&scenario, &record).wrong.is_none());
    }
    assert_eq!(follower.world.graph.find("f"), None);
    assert_eq!(follower.prediction(), None);
}

fn fault(kind: FaultKind) -> Record {
    Record::Fault(history::Fault {
        image: 0,
        kind,
        offset: 0,
        bytes: 512,
        done: 0,
        errno: Errno::EIO.0,
    })
}

fn refused(step: u32, desc: &str) -> Record {
    let refusal = history::Refusal {
        class: "GenericError".into(),
        desc: desc.into(),
    };
    Record::Ended(StepId(step), history::Outcome::Command(Err(refusal)))
}

#[test]
fn a_refusal_is_storages_only_if_storage_failed_and_the_text_says_so() {
    let scenario = scenario();
    let predicted_by = |mut follower: Follower, records: &[Record]| {
        follower.reset(&scenario);
        follower.ordered = true;
        for record in records {
            follower.record(&scenario, record);
        }
        follower.prediction().is_some()
    };
    let (begin, end) = (main("blockdev-add", false), main("blockdev-add", true));
    let issued = Record::Issued(StepId(0));
    let eio = refused(0, "Could not open: Input/output error");
    let of = |follower: Follower, at: usize, answer: Record| {
        let mut records = vec![issued.clone(), begin.clone(), end.clone(), answer];
        records.insert(at, fault(FaultKind::Read));
        predicted_by(follower, &records)
    };
    let run = |at: usize, answer: Record| of(Follower::default(), at, answer);
    assert!(!run(2, eio.clone()), "a fault in the middle of it explains it");
    assert!(run(1, eio.clone()), "one before it does not");
    assert!(
        run(2, refused(0, "no reason")),
        "nor does it explain just any text"
    );
    let reopen = refused(0, "failed while preparing to reopen image 'f'");
    assert!(!run(2, reopen.clone()), "so says the daemon of a format");
    assert!(of(Follower::of_layer(), 2, reopen), "the layer says why");
}

#[test]
fn what_failing_storage_left_is_one_of_a_short_list() {
    let scenario = scenario_of(
        r#"{"version":1,"grain":512,"images":[
        {"file":"b","format":"qcow2","size":4096},
        {"file":"a","format":"qcow2","size":4096,"backing-file":"b","backing-format":"qcow2"}],"steps":[
        {"actor":"m","execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"a","read-only":true,
            "file":{"driver":"file","filename":"a"}}},
        {"actor":"m","execute":"change-backing-file","arguments":{
            "device":"a","image-node-name":"a","backing-file":"c"}}]}"#,
    );
    let run = |faults: usize| {
        let mut follower = Follower::default();
        follower.reset(&scenario);
        follower.ordered = true;
        let mut records = vec![
            Record::Issued(StepId(0)),
            main("blockdev-add", false),
            main("blockdev-add", true),
            Record::Ended(StepId(0), history::Outcome::Command(Ok(json!({})))),
            Record::Issued(StepId(1)),
            main("change-backing-file", false),
        ];
        records.extend(std::iter::repeat_n(fault(FaultKind::Write), faults));
        records.push(main("change-backing-file", true));
        records.push(refused(1, "Could not change: Input/output error"));
        for record in &records {
            assert_eq!(follower.record(&scenario, record).wrong, None);
        }
        assert!(follower.in_doubt());
        let mut states = Vec::new();
        loop {
            let a = follower.world.graph.find("a").expect("open");
            let header = follower.world.header(a).and_then(|h| h.backing.as_ref());
            states.push((
                follower.world.graph.node(a).writable,
                header.is_some_and(|b| &*b.file == "c"),
            ));
            if !follower.reconsider(&scenario) {
                break;
            }
        }
        assert!(!follower.in_doubt());
        states
    };
    assert_eq!(run(1), [(false, false), (true, true)]);
    assert_eq!(run(2), [(false, false), (true, false), (true, true)]);
}

#[test]
fn an_unknown_job_is_wrong() {
    let scenario = scenario();
    let mut follower = Follower::default();
    follower.reset(&scenario);
    let status = Event::JobStatus {
        job: blkcheck_impl::types::JobId(0),
        id: "j".into(),
        from: Seen::Undefined,
        to: Seen::Created,
    };
    assert!(
        follower
            .record(&scenario, &Record::Layer(status))
            .wrong
            .expect("wrong")
            .contains("no such job")
    );
}
