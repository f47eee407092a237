//! What a run is known by at its end, and where two ends differ.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use blkcheck_impl::event::{Event, Parent};
use serde_json::Value;

use super::workload::{FILTER, determined};
use crate::finish::status_name;
use crate::history::{Outcome, Record, StepId};
use crate::oracle::{FinalContent, Mirror, Oracle, OracleName, View, Violation};
use crate::scenario::Scenario;

/// Unit in which allocation is compared, bytes.
const SECTOR: usize = 512;

/// A node or image: bytes, and which of them it decides itself.
type Content = BTreeMap<String, (Vec<u8>, Vec<(u64, bool)>)>;

/// A backing file on record, and its format.
type Header = Option<(String, Option<String>)>;

/// An end.
#[derive(Clone, Debug, Default)]
pub(super) struct End {
    pub(super) trace_hash: u64,
    pub(super) steps: u64,
    pub(super) violation: Option<Violation>,
    answers: BTreeMap<StepId, Outcome>,
    /// Statuses of each job without those of a pause, and its events.
    jobs: BTreeMap<String, Vec<String>>,
    graph: Vec<String>,
    headers: BTreeMap<String, Header>,
    nodes: Content,
    images: Content,
}

/// What differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// In which respect.
    pub what: &'static str,
    /// The step, where one is concerned.
    pub step: Option<usize>,
    /// On the layer here.
    pub ours: String,
    /// On the daemon.
    pub qemu: String,
}

/// What a comparison came to.
#[derive(Clone, Debug, Default)]
pub(super) struct Compared {
    pub(super) answers: u64,
    pub(super) bytes: u64,
    pub(super) difference: Option<Difference>,
}

/// Sees a run; never has a verdict.
#[derive(Clone, Debug, Default)]
pub(super) struct Witness(Rc<RefCell<(End, Mirror)>>);

impl Witness {
    /// The end of the last run.
    pub(super) fn take(&self) -> End {
        std::mem::take(&mut self.0.borrow_mut().0)
    }
}

fn kept(contents: &[FinalContent<'_>]) -> Content {
    contents
        .iter()
        .map(|c| (c.name.to_owned(), (c.bytes.to_vec(), c.allocated.to_vec())))
        .collect()
}

/// Nodes and edges in words; jobs and backends have no names that mean anything on both sides.
fn graph(mirror: &Mirror) -> Vec<String> {
    let mut lines: Vec<String> = mirror.nodes().map(|(_, n)| format!("node {}", n.name)).collect();
    lines.extend(mirror.edges().map(|(_, e)| {
        let above = match e.parent {
            Some(Parent::Node(n)) => mirror.name(n),
            Some(Parent::Backend(_)) => "a backend",
            Some(Parent::Job(_)) => "a job",
            None => "nobody",
        };
        let below = e.child.map_or("nothing", |c| mirror.name(c));
        format!("{above} -> {below}: {:?} / {:?}", e.perm, e.shared)
    }));
    lines.sort_unstable();
    lines
}

impl Oracle for Witness {
    fn name(&self) -> OracleName {
        OracleName::Liveness
    }
    fn reset(&mut self, _scenario: &Scenario) {
        let (end, mirror) = &mut *self.0.borrow_mut();
        *end = End::default();
        mirror.reset();
    }
    fn record(&mut self, _view: &View<'_>, record: &Record) -> Result<(), Violation> {
        let (end, mirror) = &mut *self.0.borrow_mut();
        match record {
            Record::Ended(step, outcome) => {
                end.answers.insert(*step, outcome.clone());
            }
            Record::Layer(event) => {
                // A contradiction is for the graph oracle to tell.
                let _ = mirror.apply(event);
                match event {
                    Event::JobStatus { id, to, .. } => {
                        let name = status_name(*to);
                        let statuses = end.jobs.entry(id.to_string()).or_default();
                        // How often it paused depends on who drained when.
                        if name != "paused" && statuses.last().is_none_or(|last| last != name) {
                            statuses.push(name.to_owned());
                        }
                    }
                    Event::Qmp { name, data } if name.starts_with("BLOCK_JOB_") => {
                        let device = data.get("device").and_then(Value::as_str).unwrap_or_default();
                        let said = format!("{name} {}", sorted(data));
                        end.jobs.entry(device.to_owned()).or_default().push(said);
                    }
                    _ => {}
                }
            }
            Record::Issued(_) | Record::Fault(_) | Record::PowerCut { .. } => {}
        }
        Ok(())
    }
    fn quiescent(&mut self, _view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        let (end, mirror) = &mut *self.0.borrow_mut();
        end.graph = graph(mirror);
        end.nodes = kept(contents);
        Ok(())
    }
    fn header(
        &mut self,
        _view: &View<'_>,
        file: &str,
        backing: Option<(&str, Option<&str>)>,
    ) -> Result<(), Violation> {
        let backing = backing.map(|(name, format)| (name.to_owned(), format.map(str::to_owned)));
        self.0.borrow_mut().0.headers.insert(file.to_owned(), backing);
        Ok(())
    }
    fn closed(&mut self, _view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        self.0.borrow_mut().0.images = kept(contents);
        Ok(())
    }
}

/// The members of an object in the order of their names.
fn sorted(value: &Value) -> String {
    let members = value.as_object().map(|o| o.iter().collect::<BTreeMap<_, _>>());
    format!("{members:?}")
}

/// Holds two ends against each other.
pub(super) fn compare(scenario: &Scenario, ours: &End, qemu: &End) -> Compared {
    let mut compared = Compared::default();
    let difference = all(scenario, ours, qemu, &mut compared);
    compared.difference = difference.err();
    compared
}

fn differ(
    what: &'static str,
    step: Option<usize>,
    ours: impl Into<String>,
    qemu: impl Into<String>,
) -> Difference {
    Difference {
        what,
        step,
        ours: ours.into(),
        qemu: qemu.into(),
    }
}

fn all(scenario: &Scenario, ours: &End, qemu: &End, compared: &mut Compared) -> Result<(), Difference> {
    let said = |end: &End| {
        end.violation.as_ref().map_or_else(
            || "no oracle has anything to say".to_owned(),
            |v| format!("{}: {}", v.oracle.as_str(), v.message),
        )
    };
    if ours.violation.is_some() || qemu.violation.is_some() {
        return Err(differ("verdict", None, said(ours), said(qemu)));
    }
    for at in 0..scenario.steps.len() {
        let step = StepId(u32::try_from(at).expect("few steps"));
        let (Some(one), Some(two)) = (ours.answers.get(&step), qemu.answers.get(&step)) else {
            if ours.answers.contains_key(&step) == qemu.answers.contains_key(&step) {
                continue;
            }
            let has = |end: &End| format!("answered: {}", end.answers.contains_key(&step));
            return Err(differ("answer", Some(at), has(ours), has(qemu)));
        };
        compared.answers += 1;
        answer(scenario, at, one, two, &mut compared.bytes)?;
    }
    same("jobs", &ours.jobs, &qemu.jobs)?;
    lines("graph", &ours.graph, &qemu.graph)?;
    same("headers", &ours.headers, &qemu.headers)?;
    contents("node", &ours.nodes, &qemu.nodes, &mut compared.bytes)?;
    contents("image", &ours.images, &qemu.images, &mut compared.bytes)
}

/// Keys of two maps, one after the other.
fn same<V: PartialEq + std::fmt::Debug>(
    what: &'static str,
    ours: &BTreeMap<String, V>,
    qemu: &BTreeMap<String, V>,
) -> Result<(), Difference> {
    let keys = ours.keys().chain(qemu.keys().filter(|k| !ours.contains_key(*k)));
    for key in keys {
        let (one, two) = (ours.get(key), qemu.get(key));
        if one != two {
            return Err(differ(
                what,
                None,
                format!("{key}: {one:?}"),
                format!("{key}: {two:?}"),
            ));
        }
    }
    Ok(())
}

fn lines(what: &'static str, ours: &[String], qemu: &[String]) -> Result<(), Difference> {
    if ours == qemu {
        return Ok(());
    }
    let only = |a: &[String], b: &[String]| {
        let only: Vec<&str> = a.iter().filter(|l| !b.contains(l)).map(String::as_str).collect();
        if only.is_empty() {
            "nothing more".to_owned()
        } else {
            only.join("; ")
        }
    };
    Err(differ(what, None, only(ours, qemu), only(qemu, ours)))
}

fn answer(
    scenario: &Scenario,
    at: usize,
    ours: &Outcome,
    qemu: &Outcome,
    bytes: &mut u64,
) -> Result<(), Difference> {
    if let (Outcome::Read(Ok(one)), Outcome::Read(Ok(two))) = (ours, qemu) {
        let grain = scenario.grain as usize;
        let chunks = one.chunks(grain).zip(two.chunks(grain));
        for (n, ((one, two), known)) in chunks.zip(determined(scenario, at)).enumerate() {
            if known && one != two {
                return Err(differ(
                    "read",
                    Some(at),
                    held(one, n * grain),
                    held(two, n * grain),
                ));
            }
            *bytes += if known { one.len() as u64 } else { 0 };
        }
        let length = |b: &[u8]| format!("{} bytes", b.len());
        return if one.len() == two.len() {
            Ok(())
        } else {
            Err(differ("read", Some(at), length(one), length(two)))
        };
    }
    // Which layer and where is the interleaving's affair.
    if matches!((ours, qemu), (Outcome::Status(Ok(_)), Outcome::Status(Ok(_)))) || ours == qemu {
        return Ok(());
    }
    Err(differ(
        "answer",
        Some(at),
        format!("{ours:?}"),
        format!("{qemu:?}"),
    ))
}

fn held(bytes: &[u8], at: usize) -> String {
    format!("at {at:#x}: {:02x?}", &bytes[..bytes.len().min(16)])
}

fn contents(what: &'static str, ours: &Content, qemu: &Content, bytes: &mut u64) -> Result<(), Difference> {
    for (name, (one, own)) in ours {
        let Some((two, theirs)) = qemu.get(name) else {
            return Err(differ(what, None, format!("{name} can be read"), "it cannot"));
        };
        if let Some(at) = (0..one.len().max(two.len())).find(|&i| one.get(i) != two.get(i)) {
            let piece = |b: &[u8]| {
                format!(
                    "{name} {}",
                    held(b.get(at / 16 * 16..).unwrap_or_default(), at / 16 * 16)
                )
            };
            return Err(differ(what, None, piece(one), piece(two)));
        }
        *bytes += one.len() as u64;
        // A filter decides nothing itself.
        if name != FILTER
            && let Some(at) = allocated_otherwise(one, own, theirs)
        {
            let runs = |r: &[(u64, bool)]| format!("{name} at {at:#x}, decides {r:?}");
            return Err(differ("allocation", None, runs(own), runs(theirs)));
        }
    }
    match qemu.keys().find(|k| !ours.contains_key(*k)) {
        Some(name) => Err(differ(what, None, "it cannot", format!("{name} can be read"))),
        None => Ok(()),
    }
}

/// Where one side decides and the other does not. Not where zeroes are read: an NBD export asks for block status first,
/// so that a guest's read of zeroes never comes to a copy-on-read filter on the daemon.
fn allocated_otherwise(bytes: &[u8], ours: &[(u64, bool)], theirs: &[(u64, bool)]) -> Option<u64> {
    let decided = |runs: &[(u64, bool)], at: u64| {
        let mut end = 0;
        let run = runs.iter().find(|(n, _)| {
            end += n;
            at < end
        });
        run.is_some_and(|(_, own)| *own)
    };
    (0u64..)
        .step_by(SECTOR)
        .zip(bytes.chunks(SECTOR))
        .filter(|(_, sector)| sector.iter().any(|b| *b != 0))
        .map(|(at, _)| at)
        .find(|at| decided(ours, *at) != decided(theirs, *at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Refusal;

    fn end(answer: Outcome, content: &[u8]) -> End {
        let mut end = End::default();
        end.answers.insert(StepId(0), answer);
        let own = vec![(content.len() as u64, true)];
        end.nodes.insert("n".to_owned(), (content.to_vec(), own));
        end.jobs.insert("j".to_owned(), vec!["created".to_owned()]);
        end
    }

    #[test]
    fn every_kind_of_difference_is_seen() {
        let steps = r#"[{"actor": "m", "execute": "block-stream"}]"#;
        let scenario = Scenario {
            steps: serde_json::from_str(steps).expect("a step"),
            ..Scenario::default()
        };
        let ok = || Outcome::Command(Ok(Value::Null));
        let refused = Outcome::Command(Err(Refusal {
            class: "GenericError".to_owned(),
            desc: "no".to_owned(),
        }));
        let what = |one: &End, two: &End| compare(&scenario, one, two).difference.map(|d| d.what);
        let one = end(ok(), &[1, 2, 3]);
        assert_eq!(what(&one, &one), None);
        assert_eq!(what(&one, &end(refused, &[1, 2, 3])), Some("answer"));
        assert_eq!(what(&one, &end(ok(), &[1, 2, 4])), Some("node"));
        assert_eq!(what(&one, &end(ok(), &[1, 2])), Some("node"));
        let mut other = one.clone();
        other.nodes.get_mut("n").expect("it is there").1 = vec![(3, false)];
        assert_eq!(what(&one, &other), Some("allocation"));
        let mut other = one.clone();
        other.jobs.clear();
        assert_eq!(what(&one, &other), Some("jobs"));
        let mut other = one.clone();
        other.graph.push("node x".to_owned());
        assert_eq!(what(&other, &one), Some("graph"));
        let mut other = one.clone();
        other.headers.insert("i".to_owned(), None);
        assert_eq!(what(&one, &other), Some("headers"));
        let mut other = one.clone();
        other.answers.clear();
        assert_eq!(what(&one, &other), Some("answer"));
    }
}
