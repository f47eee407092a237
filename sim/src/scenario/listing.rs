//! A scenario as a short listing for people.

use std::fmt::Write;

use serde_json::Value;

use super::{Action, Faults, Format, GuestOp, Image, Range, Scenario, Step, Stored};
use crate::image::build::forms;

/// Which requests may fail.
fn faults_line(scenario: &Scenario, faults: Faults) -> String {
    let kinds: Vec<&str> = [
        (faults.reads, "reads"),
        (faults.writes, "writes"),
        (faults.flushes, "flushes"),
    ]
    .into_iter()
    .filter_map(|(on, name)| on.then_some(name))
    .collect();
    let image = faults
        .image
        .and_then(|i| scenario.images.get(i as usize))
        .map_or_else(String::new, |i| format!(" of {}", i.file));
    let until = faults
        .until
        .map_or_else(|| "on".to_owned(), |until| format!("to {until}"));
    let setup = if faults.setup { ", setup included" } else { "" };
    format!(
        "faults: one in {} of the {}{image}, from number {} {until}{setup}",
        faults.one_in,
        kinds.join(", "),
        faults.from
    )
}

/// Widest drawing of an allocation, characters.
const WIDTH: u64 = 64;

/// The listing, with a line break at its end.
#[must_use]
pub fn listing(scenario: &Scenario) -> String {
    let mut out = String::new();
    if let Some(title) = &scenario.title {
        let _ = writeln!(out, "{title}");
    }
    let seed = scenario
        .seed
        .map_or_else(String::new, |seed| format!(", seed {seed}"));
    let disk = scenario.disk;
    let unmap = if disk.unmap { "" } else { ", no unmap" };
    let _ = writeln!(
        out,
        "grain {}, disk alignment {}{unmap}{seed}",
        scenario.grain, disk.alignment
    );
    if let Some(after) = disk.power_cut {
        let what = if disk.cut_at_flush {
            "flushes, instead of the next"
        } else {
            "storage requests"
        };
        let _ = writeln!(out, "the power fails after {after} {what}");
    }
    if let Some(faults) = disk.faults {
        let _ = writeln!(out, "{}", faults_line(scenario, faults));
    }
    if !scenario.images.is_empty() {
        let _ = writeln!(
            out,
            "\nimages  (D data, C compressed, z zero, Z zero with space, . nothing)"
        );
    }
    for image in &scenario.images {
        image_line(&mut out, image);
    }
    let _ = writeln!(out, "\nsteps");
    let actor_width = scenario.steps.iter().map(|s| s.actor.len()).max().unwrap_or(0);
    let number_width = scenario.steps.len().saturating_sub(1).to_string().len().max(2);
    for (number, step) in scenario.steps.iter().enumerate() {
        let wait = if step.wait { "" } else { "  (left in flight)" };
        let _ = writeln!(
            out,
            "{number:>number_width$}  {:actor_width$}  {}{wait}",
            step.actor,
            action(step)
        );
    }
    if !scenario.choices.is_empty() {
        let count = scenario.choices.len();
        let switches = scenario.choices.iter().filter(|&&c| c != 0).count();
        let faults = if disk.faults.is_some() { ", or a fault" } else { "" };
        let _ = writeln!(
            out,
            "\nchoices  {count} recorded, {switches} of them not 0 (out of order{faults})"
        );
    }
    if scenario.steer {
        let _ = writeln!(out, "steered around known defects");
    }
    if let Some(oracle) = &scenario.expect {
        let _ = writeln!(out, "expect   {oracle}");
    }
    out
}

fn image_line(out: &mut String, image: &Image) {
    let (format, unit) = match image.format {
        Format::Raw => ("raw".to_owned(), 512),
        Format::Qcow2 => (
            format!("qcow2 v{} c={:#x}", image.compat, image.cluster_size),
            u64::from(image.cluster_size),
        ),
    };
    let refcounts = if image.refcount_bits == 16 {
        String::new()
    } else {
        format!(" r={}", image.refcount_bits)
    };
    let backing = image
        .backing_file
        .as_ref()
        .map_or_else(String::new, |b| format!(" over '{b}'"));
    let _ = writeln!(
        out,
        "  {:<8} {format}{refcounts} {:#x} bytes{backing}",
        image.file, image.size
    );
    let _ = writeln!(out, "           {}", drawing(image, unit));
}

/// One character per unit, or per equal share of the image when there are many units.
fn drawing(image: &Image, unit: u64) -> String {
    let units = image.size.div_ceil(unit);
    let columns = units.min(WIDTH);
    let mut cells = vec!['.'; usize::try_from(columns).expect("at most 64")];
    let mut set = |unit: u64, stored: Stored| {
        let cell = &mut cells
            [usize::try_from(u128::from(unit) * u128::from(columns) / u128::from(units)).expect("a column")];
        let letter = match stored {
            Stored::Data => 'D',
            Stored::Compressed => 'C',
            Stored::Zero => 'z',
            Stored::ZeroAllocated => 'Z',
        };
        // Several units in one column: the one that matters most is shown.
        let rank = |c: char| ".zZCD".find(c);
        if rank(letter) > rank(*cell) || units <= WIDTH {
            *cell = letter;
        }
    };
    match image.format {
        Format::Qcow2 => forms(image)
            .into_iter()
            .for_each(|(cluster, stored)| set(cluster, stored)),
        Format::Raw => {
            for fill in &image.fill {
                (fill.offset / unit..(fill.offset + fill.length).div_ceil(unit))
                    .for_each(|u| set(u, fill.stored));
            }
        }
    }
    cells.into_iter().collect()
}

/// What a step does, in one line.
#[must_use]
pub fn action(step: &Step) -> String {
    match &step.action {
        Action::Command { execute, arguments } => {
            let mut line = execute.clone();
            for (key, value) in arguments {
                let _ = write!(line, " {key}={}", brief(value));
            }
            line
        }
        Action::Guest { export, op } => {
            let line = request(*op);
            let (name, range) = line.split_once(' ').unwrap_or((&line, ""));
            format!("{export:<8} {name:<12} {range}").trim_end().to_owned()
        }
        Action::DrainBegin { node } => format!("{node:<8} drained-begin"),
        Action::DrainEnd { node } => format!("{node:<8} drained-end"),
        Action::WaitJob { job } => match job.offset {
            None => format!("wait until job '{}' was {}", job.id, job.status),
            Some(offset) => format!("wait until job '{}' was {} up to {offset:#x}", job.id, job.status),
        },
        Action::Settle { .. } => "wait for what is in flight".into(),
    }
}

fn brief(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Object(map) => {
            let members: Vec<String> = map.iter().map(|(k, v)| format!("{k}={}", brief(v))).collect();
            format!("{{{}}}", members.join(" "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(brief).collect::<Vec<_>>().join(" ")),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// A guest's request, in one line.
#[must_use]
pub fn request(op: GuestOp) -> String {
    let with = |name: &str, r: Range| format!("{name} [{:#x}, +{:#x})", r.offset, r.length);
    match op {
        GuestOp::Read(r) => with("read", r),
        GuestOp::Write(r) => with("write", r),
        GuestOp::WriteFua(r) => with("write-fua", r),
        GuestOp::WriteZeroes(r) => with("write-zeroes", r),
        GuestOp::WriteZeroesUnmap(r) => with("zero-unmap", r),
        GuestOp::Discard(r) => with("discard", r),
        GuestOp::BlockStatus(r) => with("block-status", r),
        GuestOp::Flush => "flush".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_says_it_all_in_few_lines() {
        let text = r#"{"version":1,"grain":64,"seed":7,"images":[
            {"file":"base","format":"raw","size":2048,"fill":[{"offset":512,"length":512,"stored":"data"}]},
            {"file":"top","format":"qcow2","size":4096,"cluster-size":512,"backing-file":"base","fill":[
                {"offset":0,"length":512,"stored":"data"},{"offset":1024,"length":512,"stored":"zero"},
                {"offset":2048,"length":64,"stored":"compressed"}]}],
          "steps":[
            {"actor":"monitor","execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"top","file":{"driver":"file","filename":"top"}}},
            {"actor":"guest0","export":"top","do":{"write":{"offset":1024,"length":512}},"wait":false},
            {"actor":"drain0","drained-begin":"top"}],
          "choices":[0,0,3]}"#;
        let scenario: Scenario = serde_json::from_str(text).expect("a scenario");
        let expected = "\
grain 64, disk alignment 1, seed 7

images  (D data, C compressed, z zero, Z zero with space, . nothing)
  base     raw 0x800 bytes
           .D..
  top      qcow2 v3 c=0x200 0x1000 bytes over 'base'
           D.z.C...

steps
 0  monitor  blockdev-add driver=qcow2 node-name=top file={driver=file filename=top}
 1  guest0   top      write        [0x400, +0x200)  (left in flight)
 2  drain0   top      drained-begin

choices  3 recorded, 1 of them not 0 (out of order)
";
        assert_eq!(listing(&scenario), expected);
    }

    #[test]
    fn large_images_stay_on_one_line() {
        let text = r#"{"version":1,"grain":512,"images":[{"file":"a","format":"qcow2","size":1073741824,
            "fill":[{"offset":1073741312,"length":512,"stored":"data"}]}],"steps":[]}"#;
        let scenario: Scenario = serde_json::from_str(text).expect("a scenario");
        assert!(listing(&scenario).contains(&format!("{}D\n", ".".repeat(63))));
    }
}
