//! A raw image that is cut off within its last sector is empty behind its new end, and what is before is there.

use blkcheck_impl::event::Event;
use serde_json::{Value, json};

use crate::history::{Outcome, Record, StepId};
use crate::oracle::data::tests::{Run, flush_fails};
use crate::oracle::tests::scenario_of;
use crate::oracle::{FinalContent, Oracle, View, Violation};
use crate::stamp::{self, Source};

const FILL: Source = Source::Fill { image: 0, fill: 0 };

/// A filled raw image of 1024 bytes; steps 1 and 5 make it `size` bytes long, step 3 is a write of everything through an export that is there
/// in between: it would not let the length change. Step 6 flushes.
fn opened(size: u64) -> Run {
    let resize =
        || json!({"actor": "m", "execute": "block_resize", "arguments": {"node-name": "n", "size": size}});
    let steps: [Value; 7] = [
        json!({"actor": "m", "execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "n",
            "file": {"driver": "file", "filename": "i"}}}),
        resize(),
        json!({"actor": "m", "execute": "block-export-add",
            "arguments": {"type": "nbd", "id": "x", "name": "x", "node-name": "n", "writable": true}}),
        json!({"actor": "g", "export": "x", "do": {"write": {"offset": 0, "length": size.max(1024)}}}),
        json!({"actor": "m", "execute": "block-export-del", "arguments": {"id": "x"}}),
        resize(),
        json!({"actor": "g", "export": "x", "do": "flush"}),
    ];
    let mut run = Run::unopened(scenario_of(
        &json!({"version": 1, "grain": 64, "images": [{"file": "i", "format": "raw", "size": 1024,
            "fill": [{"offset": 0, "length": 1024, "stored": "data"}]}], "steps": steps})
        .to_string(),
    ));
    command(&mut run, 0, "blockdev-add");
    run
}

fn command(run: &mut Run, step: u32, what: &'static str) {
    run.record(&Record::Issued(StepId(step))).expect("begins");
    drop(run.record(&Record::Layer(Event::MainBegin { what })));
    assert!(run.oracle.accepts(), "step {step}");
    drop(run.record(&Record::Layer(Event::MainEnd { what })));
    drop(run.record(&Record::Ended(StepId(step), Outcome::Command(Ok(json!({}))))));
}

/// The file at the end, with this in its first `bytes` bytes and zeroes behind.
fn holds(run: &mut Run, source: Source, bytes: usize) -> Result<(), Violation> {
    let mut content = vec![0; bytes.max(1024)];
    stamp::fill(&mut content, 0, 64, source);
    content[bytes..].fill(0);
    judged(run, &content)
}

fn judged(run: &mut Run, content: &[u8]) -> Result<(), Violation> {
    let view = View {
        scenario: &run.scenario,
        now: 1000,
        layer: None,
    };
    let content = FinalContent {
        name: "i",
        bytes: content,
        allocated: &[],
        zeroes: &[],
    };
    run.oracle.closed(&view, &[content])
}

#[test]
fn what_is_behind_the_end_is_gone_and_the_rest_is_not() {
    let after = |bytes: usize| {
        let mut run = opened(520);
        command(&mut run, 1, "block_resize");
        holds(&mut run, FILL, bytes)
    };
    assert_eq!(after(520), Ok(()), "as it is");
    assert_eq!(after(512), Ok(()), "8 bytes tell nothing");
    let v = after(1024).expect_err("nothing was cut off");
    assert!(v.message.contains("at 0x240 holds fill 0"), "{}", v.message);
    assert!(after(448).is_err(), "too much is gone");
}

#[test]
fn what_was_written_behind_the_end_is_there_until_it_is_cut_off_again() {
    let mut run = opened(520);
    command(&mut run, 1, "block_resize");
    command(&mut run, 2, "block-export-add");
    run.record(&Record::Issued(StepId(3))).expect("begins");
    run.record(&Record::Ended(StepId(3), Outcome::Done(Ok(()))))
        .expect("ends");
    let written = Source::Step(StepId(3));
    assert!(
        holds(&mut run, written, 520).is_err(),
        "an acknowledged write is lost"
    );
    assert_eq!(holds(&mut run, written, 1024), Ok(()));
    command(&mut run, 4, "block-export-del");
    command(&mut run, 5, "block_resize");
    assert!(holds(&mut run, written, 1024).is_err(), "it was cut off");
    assert_eq!(holds(&mut run, written, 520), Ok(()));
}

/// What an image has grown by it decides from then on, as soon as somebody has written there and flushed.
#[test]
fn what_was_flushed_after_a_change_of_length_is_not_lost() {
    let after = |flushed: bool, source: Source, bytes: usize| {
        let mut run = opened(2048);
        command(&mut run, 1, "block_resize");
        command(&mut run, 2, "block-export-add");
        for step in if flushed { &[3, 6][..] } else { &[3] } {
            run.record(&Record::Issued(StepId(*step))).expect("begins");
            run.record(&Record::Ended(StepId(*step), Outcome::Done(Ok(()))))
                .expect("ends");
        }
        flush_fails(&mut run, 0);
        let mut content = vec![0; 2048];
        stamp::fill(&mut content[..bytes], 0, 64, source);
        judged(&mut run, &content)
    };
    let written = Source::Step(StepId(3));
    assert_eq!(after(true, written, 2048), Ok(()));
    assert_eq!(after(false, written, 1024), Ok(()), "lost in part");
    assert!(after(true, written, 1024).is_err(), "flushed");
}
