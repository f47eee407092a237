//! What a power cut may leave of stored bitmaps, and what not.

use blkcheck_impl::event::{Event, ReqKind};
use blkcheck_impl::types::{EdgeId, NodeId, ReqFlags, RequestId};
use serde_json::{Value, json};

use crate::history::{Fault, FaultKind, Outcome, Record, StepId};
use crate::image::bitmaps::Stored;
use crate::oracle::modelled::Modelled;
use crate::oracle::tests::scenario_of;
use crate::oracle::{Oracle, OracleName, View, Violation};
use crate::scenario::Scenario;

/// One image, `top`, of eight bits of 512 bytes each; what was done to it.
struct Run {
    scenario: Scenario,
    oracle: Modelled,
    now: u64,
}

impl Run {
    fn new() -> Run {
        let scenario = json!({"version": 1, "grain": 64, "steps": [],
            "images": [{"file": "top", "format": "qcow2", "size": 4096, "cluster-size": 512}]});
        let mut run = Run {
            scenario: scenario_of(&scenario.to_string()),
            oracle: Modelled::layer(),
            now: 0,
        };
        run.oracle.reset(&run.scenario);
        run
    }

    fn tell(&mut self, record: &Record) {
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: None,
        };
        self.now += 1;
        // Events of the graph are left out, since only what is stored is looked at here.
        if let Err(v) = self.oracle.record(&view, record) {
            assert_eq!(v.oracle, OracleName::Graph, "{v:?}");
        }
    }

    /// A command has its effect, and is under way yet.
    fn begin(&mut self, what: &'static str, arguments: &Value) -> StepId {
        let step = json!({"actor": "m", "execute": what, "arguments": arguments});
        self.scenario
            .steps
            .push(serde_json::from_value(step).expect("a step"));
        let step = StepId(u32::try_from(self.scenario.steps.len() - 1).expect("few"));
        self.tell(&Record::Issued(step));
        self.tell(&Record::Layer(Event::MainBegin { what }));
        assert!(self.oracle.accepts(), "{what}");
        step
    }

    fn command(&mut self, what: &'static str, arguments: &Value) {
        let step = self.begin(what, arguments);
        self.tell(&Record::Layer(Event::MainEnd { what }));
        self.tell(&Record::Ended(step, Outcome::Command(Ok(json!({})))));
    }

    /// The image is opened as the layer's node of this number.
    fn open(&mut self, node: u32, read_only: bool) {
        let node = NodeId(node);
        let added = Event::NodeAdded {
            node,
            name: "t".into(),
            driver: "qcow2",
        };
        self.tell(&Record::Layer(added));
        self.command(
            "blockdev-add",
            &json!({"driver": "qcow2", "node-name": "t", "read-only": read_only,
                "file": {"driver": "file", "filename": "top"}}),
        );
    }

    /// A bitmap `k` that is to be stored.
    fn add(&mut self) {
        let bitmap = json!({"node": "t", "name": "k", "granularity": 512, "persistent": true});
        self.command("block-dirty-bitmap-add", &bitmap);
    }

    fn close(&mut self, node: u32) {
        self.command("blockdev-del", &json!({"node-name": "t"}));
        self.tell(&Record::Layer(Event::NodeRemoved { node: NodeId(node) }));
    }

    /// A write of what one bit stands for ended well.
    fn write(&mut self, node: u32, bit: u64) {
        let (request, node) = (RequestId(self.now), NodeId(node));
        self.tell(&Record::Layer(Event::RequestBegin {
            request,
            node,
            edge: EdgeId(0),
            kind: ReqKind::Write,
            offset: bit * 512,
            bytes: 512,
            flags: ReqFlags::default(),
        }));
        let result = Ok(());
        self.tell(&Record::Layer(Event::RequestEnd {
            request,
            node,
            result,
        }));
    }

    fn left(&mut self, found: &[Stored]) -> Result<(), Violation> {
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: None,
        };
        self.oracle.bitmaps_left(&view, "top", found)
    }

    fn may_leave(&mut self, found: &[Stored]) {
        assert_eq!(self.left(found), Ok(()), "{found:?}");
    }

    fn may_not_leave(&mut self, found: &[Stored], why: &str) {
        let v = self.left(found).expect_err(why);
        assert_eq!(v.oracle, OracleName::Bitmap);
        assert!(
            v.message.starts_with("after a power cut, bitmap '") && v.message.contains(why),
            "{v:?}, expected: {why}"
        );
    }
}

/// The image was opened, written to in bit 1, and closed; it holds `k`.
fn closed() -> Run {
    let mut run = Run::new();
    run.open(0, false);
    run.add();
    run.write(0, 1);
    run.close(0);
    run
}

/// Then it was opened again, and written to in bit 2.
fn opened_again() -> Run {
    let mut run = closed();
    run.open(1, false);
    run.write(1, 2);
    run
}

/// `k` vouches for these bits.
fn vouches(bits: u8) -> Stored {
    Stored {
        name: "k".to_owned(),
        granularity: 512,
        auto: true,
        in_use: false,
        bits: vec![bits],
        places: Vec::new(),
    }
}

/// `k` is marked as in use.
fn in_use() -> Stored {
    Stored {
        in_use: true,
        bits: Vec::new(),
        ..vouches(0)
    }
}

const GONE: &str = "'k' in image 'top' is gone, or marked as in use, though it was stored";
const LACKS: &str = "'k' in image 'top' vouches for 0x400, which was changed";
const OPEN: &str = "'k' in image 'top' is not marked as in use, though the image is open for writing";

#[test]
fn a_bitmap_of_a_closed_image_is_there_for_good() {
    let mut run = closed();
    run.may_leave(&[vouches(0b10)]);
    run.may_not_leave(&[vouches(0b100)], "vouches for 0x200, which was changed");
    run.may_not_leave(&[], GONE);
    run.may_not_leave(&[in_use()], GONE);
    let other = |granularity, auto| Stored {
        granularity,
        auto,
        ..vouches(0b10)
    };
    run.may_not_leave(&[other(1024, true)], "ought to be");
    run.may_not_leave(&[other(512, false)], "ought to be");
    let name = "l".to_owned();
    let more = Stored {
        name,
        ..vouches(0b10)
    };
    run.may_not_leave(&[vouches(0b10), more], "'l' in image 'top' ought not to be there");
}

#[test]
fn a_bitmap_that_is_loaded_is_marked_as_in_use() {
    let mut run = opened_again();
    run.may_leave(&[in_use()]);
    // The header does not count it.
    run.may_leave(&[]);
    // Even if it misses nothing.
    run.may_not_leave(&[vouches(0b110)], OPEN);
    run.may_not_leave(&[vouches(0b10)], LACKS);
}

#[test]
fn one_that_was_never_stored_is_not_there() {
    let mut run = Run::new();
    run.open(0, false);
    run.add();
    run.write(0, 2);
    run.may_leave(&[]);
    run.may_not_leave(&[vouches(0b100)], "ought not to be there");
    run.may_not_leave(&[vouches(0)], LACKS);
}

#[test]
fn an_image_that_is_open_for_reading_only_keeps_its_bitmaps() {
    let mut run = closed();
    run.open(1, true);
    run.may_leave(&[vouches(0b10)]);
    run.may_not_leave(&[in_use()], GONE);
    run.may_not_leave(&[vouches(0)], "vouches for 0x200, which was changed");
}

/// As long as a command is under way, an image may be open or closed; but nothing may be missed.
#[test]
fn a_bitmap_that_vouches_for_itself_misses_nothing_while_a_command_is_under_way() {
    let file = json!({"driver": "null-co", "node-name": "n"});
    let del = json!({"node-name": "t"});
    for (what, arguments) in [("blockdev-add", &file), ("blockdev-del", &del)] {
        let mut run = opened_again();
        run.begin(what, arguments);
        run.may_leave(&[in_use()]);
        run.may_leave(&[]);
        run.may_leave(&[vouches(0b110)]);
        run.may_not_leave(&[vouches(0b10)], LACKS);
    }
}

#[test]
fn nothing_is_said_once_storage_failed() {
    let mut run = opened_again();
    run.tell(&Record::Fault(Fault {
        image: 0,
        kind: FaultKind::Flush,
        offset: 0,
        bytes: 0,
        done: 0,
        errno: 5,
    }));
    run.may_leave(&[vouches(0)]);
}
