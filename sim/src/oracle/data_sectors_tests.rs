//! Of a grain of two sectors each is judged by its own history: what was never possible at the same time is never seen together.

use std::collections::BTreeSet;

use blkcheck_impl::event::Event;
use blkcheck_model::register::{Effect, OpId, Registers, Value};
use serde_json::json;

use super::Sectors;

use crate::history::{Fault, FaultKind, Outcome, Record, StatusRun, StepId};
use crate::oracle::data::tests::{Run, flush_fails};
use crate::oracle::tests::scenario_of;
use crate::oracle::{FinalContent, Oracle, OracleName, View, Violation};
use crate::rng::{Rng, Stream};
use crate::stamp::{self, Source};

const GRAIN: usize = 1024;
/// What the base is filled with, which ends within the second grain.
const BASE: Source = Source::Fill { image: 0, fill: 0 };
/// What the first grain of the overlay is filled with.
const TOP: Source = Source::Fill { image: 1, fill: 0 };

/// A sector: the stamp of its grain, or zeroes.
type Sector = Option<Source>;

fn step(n: u32) -> Sector {
    Some(Source::Step(StepId(6 + n)))
}

/// base ← top, exported as `x`, and these guest steps on the first grain, or the second for upper case.
fn run(guests: &[&str]) -> Run {
    let add =
        |options: serde_json::Value| json!({"actor": "m", "execute": "blockdev-add", "arguments": options});
    let export = |id: &str, node: &str| {
        json!({"actor": "m", "execute": "block-export-add",
            "arguments": {"type": "nbd", "id": id, "name": id, "node-name": node, "writable": true}})
    };
    let mut steps = vec![
        add(json!({"driver": "file", "node-name": "fb", "filename": "base"})),
        add(json!({"driver": "raw", "node-name": "b", "file": "fb"})),
        add(json!({"driver": "file", "node-name": "ft", "filename": "top"})),
        add(json!({"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "b"})),
        export("b", "b"),
        export("x", "t"),
    ];
    for guest in guests {
        let op = guest.to_lowercase();
        let at = if op == *guest { 0 } else { GRAIN };
        let what = if op == "flush" {
            json!(op)
        } else {
            json!({op: {"offset": at, "length": GRAIN}})
        };
        steps.push(json!({"actor": "g", "export": "x", "do": what}));
    }
    Run::of(scenario_of(
        &json!({"version": 1, "grain": GRAIN, "steps": steps, "images": [
            {"file": "base", "format": "raw", "size": 1536, "fill": [{"offset": 0, "length": 1536, "stored": "data"}]},
            {"file": "top", "format": "qcow2", "size": 4096, "cluster-size": 1024, "backing-file": "base",
                "backing-format": "raw", "fill": [{"offset": 0, "length": 1024, "stored": "data"}]}]})
        .to_string(),
    ))
}

/// A grain that holds this.
fn bytes(grain: usize, sectors: [Sector; 2]) -> Vec<u8> {
    let mut bytes = vec![0; GRAIN];
    for (sector, source) in bytes.chunks_mut(512).zip(sectors) {
        if let Some(source) = source {
            let grain_size = u32::try_from(GRAIN).expect("small");
            stamp::fill(sector, (grain * GRAIN) as u64, grain_size, source);
        }
    }
    bytes
}

fn issue(run: &mut Run, n: u32) {
    run.record(&Record::Issued(StepId(6 + n))).expect("begins");
}
fn end(run: &mut Run, n: u32, ok: bool) {
    if !ok {
        let fault = Fault {
            image: 1,
            kind: FaultKind::Write,
            offset: 0,
            bytes: 1024,
            done: 512,
            errno: 5,
        };
        run.record(&Record::Fault(fault)).expect("no verdict yet");
    }
    let result = if ok { Ok(()) } else { Err(5) };
    run.record(&Record::Ended(StepId(6 + n), Outcome::Done(result)))
        .expect("ends");
}
fn read(run: &mut Run, n: u32, grain: usize, sectors: [Sector; 2]) -> Result<(), Violation> {
    issue(run, n);
    let bytes = bytes(grain, sectors);
    run.record(&Record::Ended(StepId(6 + n), Outcome::Read(Ok(bytes.into()))))
}

fn is_wrong(verdict: Result<(), Violation>, text: &str) {
    let v = verdict.expect_err(text);
    assert!(v.message.contains(text), "{}", v.message);
}

#[test]
fn a_write_is_torn_only_while_it_is_under_way() {
    let mut run = run(&["write", "read", "read", "read"]);
    issue(&mut run, 0);
    assert_eq!(read(&mut run, 1, 0, [step(0), Some(TOP)]), Ok(()));
    is_wrong(
        read(&mut run, 2, 0, [Some(TOP), Some(TOP)]),
        "grain 0x0 holds fill 0 of image top",
    );
    end(&mut run, 0, true);
    is_wrong(
        read(&mut run, 3, 0, [step(0), Some(TOP)]),
        "grain 0x200 holds fill 0 of image top (overwritten by step 6",
    );
}

#[test]
fn writes_that_overlap_leave_their_own_sectors_and_nothing_older() {
    let after = |sectors: [Sector; 2]| {
        let mut run = run(&["write", "write", "read", "write", "write", "read"]);
        // A first pair, one after the other, then two at once.
        for n in [0, 1] {
            issue(&mut run, n);
            end(&mut run, n, true);
        }
        for n in [3, 4] {
            issue(&mut run, n);
        }
        for n in [3, 4] {
            end(&mut run, n, true);
        }
        read(&mut run, 5, 0, sectors)
    };
    for sectors in [[step(3), step(4)], [step(4), step(3)], [step(4), step(4)]] {
        assert_eq!(after(sectors), Ok(()), "{sectors:?}");
    }
    for sectors in [
        [step(3), step(1)],
        [step(0), step(4)],
        [Some(TOP), step(4)],
        [step(3), None],
    ] {
        assert!(after(sectors).is_err(), "{sectors:?}");
    }
}

#[test]
fn a_write_that_failed_may_have_done_a_part_and_may_do_the_rest_later() {
    let mut run = run(&["write", "read", "read", "read"]);
    issue(&mut run, 0);
    end(&mut run, 0, false);
    assert_eq!(read(&mut run, 1, 0, [Some(TOP), step(0)]), Ok(()));
    assert_eq!(read(&mut run, 2, 0, [step(0), step(0)]), Ok(()));
    is_wrong(
        read(&mut run, 3, 0, [Some(TOP), step(0)]),
        "grain 0x0 holds fill 0 of image top",
    );
}

#[test]
fn where_the_layer_below_ends_within_a_grain_there_are_zeroes() {
    let shown = |sectors: [Sector; 2]| {
        let mut run = run(&["READ"]);
        read(&mut run, 0, 1, sectors)
    };
    assert_eq!(shown([Some(BASE), None]), Ok(()));
    for sectors in [[None, None], [Some(BASE), Some(BASE)], [None, Some(BASE)]] {
        assert!(shown(sectors).is_err(), "{sectors:?}");
    }
    let mut run = run(&["WRITE", "READ", "READ"]);
    issue(&mut run, 0);
    assert_eq!(read(&mut run, 1, 1, [step(0), None]), Ok(()));
    end(&mut run, 0, true);
    is_wrong(read(&mut run, 2, 1, [step(0), None]), "grain 0x600 holds zeroes");
}

#[test]
fn a_promise_of_zeroes_is_kept_by_sectors() {
    const DATA: u8 = 0x11;
    const ZERO: u8 = 0x12;
    let promised = |what: &str, flags: [u8; 2]| {
        let mut run = run(&[what, "read", "block-status"]);
        issue(&mut run, 0);
        // A write of zeroes failed when it had done its first sector.
        end(&mut run, 0, what == "write");
        let holds = if what == "write" {
            [step(0); 2]
        } else {
            [None, Some(TOP)]
        };
        assert_eq!(read(&mut run, 1, 0, holds), Ok(()));
        issue(&mut run, 2);
        let runs = flags.map(|flags| StatusRun {
            flags,
            bytes: 512,
            depth: 1,
        });
        run.record(&Record::Ended(StepId(8), Outcome::Status(Ok(runs.to_vec()))))
    };
    for flags in [[ZERO, DATA], [DATA, ZERO]] {
        assert_eq!(promised("write-zeroes", flags), Ok(()), "{flags:?}");
    }
    assert_eq!(promised("write", [DATA, DATA]), Ok(()));
    for (flags, at) in [([ZERO, DATA], "0x0"), ([DATA, ZERO], "0x200")] {
        is_wrong(promised("write", flags), &format!("says ZERO at {at}"));
    }
}

/// What is left of the first grain, or of the second for upper case, when a flush of the overlay has failed or the power.
fn left(guests: &[&str], power: bool, sectors: [Sector; 2]) -> Result<(), Violation> {
    let mut run = run(guests);
    for n in 0..u32::try_from(guests.len()).expect("few") {
        issue(&mut run, n);
        end(&mut run, n, true);
    }
    if !power {
        flush_fails(&mut run, 1);
    }
    let grain = usize::from(guests[0].to_uppercase() == guests[0]);
    let mut all = bytes(0, [Some(TOP), Some(TOP)]);
    all.extend(bytes(1, [Some(BASE), None]));
    all.resize(4096, 0);
    all[grain * GRAIN..][..GRAIN].copy_from_slice(&bytes(grain, sectors));
    let view = View {
        scenario: &run.scenario,
        now: 1000,
        layer: None,
    };
    let content = FinalContent {
        name: "top",
        bytes: &all,
        allocated: &[],
        zeroes: &[],
    };
    if power {
        run.oracle.after_power_cut(&view, &[(content, vec![0])])
    } else {
        run.oracle.closed(&view, &[content])
    }
}

#[test]
fn half_of_a_grain_is_lost_only_if_nobody_flushed() {
    for power in [false, true] {
        for sectors in [
            [Some(TOP), Some(TOP)],
            [Some(TOP), step(0)],
            [step(0), Some(TOP)],
            [step(0), step(0)],
        ] {
            assert_eq!(left(&["write"], power, sectors), Ok(()), "{sectors:?}");
            let flushed = left(&["write", "flush"], power, sectors);
            if sectors == [step(0), step(0)] {
                assert_eq!(flushed, Ok(()));
                continue;
            }
            let v = flushed.expect_err("flushed");
            assert_eq!(v.oracle, OracleName::Transparency);
            let at = if sectors[0] == step(0) { "0x200" } else { "0x0" };
            let text = format!("top at {at} holds fill 0 of image top");
            assert!(v.message.contains(&text), "{}", v.message);
        }
        // Never was there what neither write left.
        assert!(left(&["write"], power, [None, step(0)]).is_err());
        let again = &["write", "flush", "write"];
        assert_eq!(left(again, power, [step(0), step(2)]), Ok(()));
        assert!(left(again, power, [Some(TOP), step(2)]).is_err());
    }
}

#[test]
fn what_is_lost_shows_the_end_of_the_layer_below() {
    for power in [false, true] {
        for sectors in [[Some(BASE), None], [step(0), None], [Some(BASE), step(0)]] {
            assert_eq!(left(&["WRITE"], power, sectors), Ok(()), "{sectors:?}");
            let v = left(&["WRITE", "flush"], power, sectors).expect_err("flushed");
            assert!(v.message.contains("a flush before"), "{}", v.message);
        }
        assert!(left(&["WRITE"], power, [Some(BASE), Some(BASE)]).is_err());
    }
}

/// A raw image of one grain loses its second sector, and gets it back empty.
#[test]
fn a_grain_that_is_cut_off_within_grows_back_empty() {
    let shown = |size: u64, sectors: [Sector; 2]| {
        let command = |what: &str, arguments: serde_json::Value| json!({"actor": "m", "execute": what, "arguments": arguments});
        let resize = |size: u64| command("block_resize", json!({"node-name": "n", "size": size}));
        let steps = json!([
            command(
                "blockdev-add",
                json!({"driver": "raw", "node-name": "n",
                "file": {"driver": "file", "filename": "base"}})
            ),
            resize(size),
            resize(1024),
        ]);
        let mut run = Run::unopened(scenario_of(
            &json!({"version": 1, "grain": GRAIN, "steps": steps, "images": [
                {"file": "base", "format": "raw", "size": 1024, "fill": [{"offset": 0, "length": 1024, "stored": "data"}]}]})
            .to_string(),
        ));
        for (n, what) in [(0, "blockdev-add"), (1, "block_resize"), (2, "block_resize")] {
            run.record(&Record::Issued(StepId(n))).expect("begins");
            drop(run.record(&Record::Layer(Event::MainBegin { what })));
            assert!(run.oracle.accepts(), "step {n}");
            drop(run.record(&Record::Layer(Event::MainEnd { what })));
            drop(run.record(&Record::Ended(StepId(n), Outcome::Command(Ok(json!({}))))));
        }
        let view = View {
            scenario: &run.scenario,
            now: 1000,
            layer: None,
        };
        let content = FinalContent {
            name: "base",
            bytes: &bytes(0, sectors),
            allocated: &[],
            zeroes: &[],
        };
        run.oracle.closed(&view, &[content])
    };
    assert_eq!(shown(512, [Some(BASE), None]), Ok(()));
    assert!(shown(512, [Some(BASE), Some(BASE)]).is_err(), "it was cut off");
    assert!(shown(512, [None, None]).is_err(), "it was not");
    assert_eq!(shown(1024, [Some(BASE), Some(BASE)]), Ok(()));
}

/// Whoever keeps one register per sector from the start comes to the same.
#[test]
fn sectors_that_nobody_saw_differ_share_a_register() {
    const GRAINS: usize = 3;
    let (mut differed, mut wrong) = (0, 0);
    for seed in 0..400 {
        let rng = &mut Rng::stream(seed, Stream::PowerCut);
        let below = |rng: &mut Rng, n: usize| rng.below(u32::try_from(n).expect("few")) as usize;
        let mut lazy = Sectors::new(1024, &[1, 2, 3]);
        let mut eager = Registers::new([1, 1, 2, 2, 3, 3]);
        let mut grains = GRAINS;
        let mut open: Vec<(OpId, OpId)> = Vec::new();
        for n in 0..40 {
            let first = below(rng, grains);
            let range = first..first + 1 + below(rng, grains - first);
            match below(rng, 10) {
                0..3 => {
                    let effect = if rng.one_in(4) {
                        Effect::Discard
                    } else {
                        Effect::Write(10 + n)
                    };
                    open.push((
                        lazy.begin(effect, range.clone()),
                        eager.begin(effect, range.start * 2..range.end * 2),
                    ));
                }
                3..5 if !open.is_empty() => {
                    let (one, two) = open.swap_remove(below(rng, open.len()));
                    let ok = !rng.one_in(3);
                    lazy.end(one, ok);
                    eager.end(two, ok);
                }
                5 => {
                    let only = rng.one_in(2);
                    lazy.shift(first, &[20 + n], only);
                    for part in first * 2..first * 2 + 2 {
                        eager.shift(part, &[20 + n], only);
                    }
                }
                6 if rng.one_in(3) => {
                    let parts = 1 + below(rng, grains * 2);
                    let to = parts.div_ceil(2) + below(rng, 2);
                    lazy.resize(parts as u64 * 512, to);
                    eager.resize(parts);
                    eager.resize(to * 2);
                    grains = to;
                }
                _ => {
                    let parts = range.start * 2..range.end * 2;
                    let values: Vec<Option<Value>> = parts
                        .clone()
                        .map(|part| match (below(rng, 8), eager.possible(part)) {
                            (0, _) => Some(99),
                            (1, _) => None,
                            // Given up.
                            (_, possible) if possible.is_empty() => None,
                            (_, possible) => Some(*rng.pick(&possible)),
                        })
                        .collect();
                    let (mut one, mut two) = (BTreeSet::new(), BTreeSet::new());
                    let op = lazy.begin(Effect::Read, range);
                    lazy.observe(op, &values, |v| {
                        one.insert(v.grain / 2);
                    });
                    let op = eager.begin(Effect::Read, parts);
                    eager.observe(op, values.iter().copied(), |v| {
                        two.insert(v.grain / 2);
                    });
                    assert_eq!(one, two, "seed {seed}, {n}");
                    wrong += one.len();
                }
            }
            for part in 0..grains * 2 {
                assert_eq!(
                    lazy.possible_in(part),
                    eager.possible(part),
                    "seed {seed}, {n}, {part}"
                );
            }
            differed += lazy.split.len();
        }
    }
    assert!(
        differed > 1000 && wrong > 500,
        "{differed} {wrong}: it was about nothing"
    );
}
