//! The oracles that compare with the model: one model follows the run, several judges look at it, each under its own
//! name in verdicts: `refusals`, `graph`, `permissions` and `frozen` (settled comparison), `jobs` (what the model says a
//! job cannot do), `data`, `status`, `transparency`, `point-in-time`, `bottom`, `bitmap`, `errors`.

use std::collections::{BTreeMap, BTreeSet};

use blkcheck_impl::Layer;
use blkcheck_impl::event::Event;
use blkcheck_impl::graph::inspect::GraphView;
use blkcheck_impl::jobs::JobStatus;
use blkcheck_impl::types::NodeId as LayerNode;
use blkcheck_model::copy_before_write::OnError;
use blkcheck_model::job::{Sync, Work};
use blkcheck_model::{Driver, Node, NodeId, Outcome as JobOutcome};

use super::bitmap::Bitmaps;
use super::bottom::Bottom;
use super::data::{Copied, Data, guest};
use super::errors::Errors;
use super::graph::{self, Comparison};
use super::mirror::Mirror;
use super::{FinalContent, Oracle, OracleName, View, Violation, refusals, violation};
use crate::follow::{Follower, stands_on};
use crate::history::{Fault, Outcome, Record, StepId};
use crate::image::bitmaps::Stored;
use crate::scenario::Scenario;

/// What stands in for the events of copy-before-write filters.
#[derive(Debug, Default)]
struct Untold {
    /// Filters that are there.
    filters: BTreeSet<NodeId>,
    /// Guests' requests in flight.
    flying: usize,
}

/// The images behind a copy-before-write filter.
#[derive(Debug)]
struct Filling {
    /// The one that it fills.
    target: Option<usize>,
    /// Its source, if what is copied is discarded there.
    discarded: Option<usize>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Modelled {
    follower: Follower,
    mirror: Mirror,
    comparison: Comparison,
    data: Data,
    bottom: Bottom,
    bitmaps: Bitmaps,
    errors: Errors,
    /// A request that marks bitmaps ended while the command under way was: before the instant of its backup, maybe, or after.
    disturbed: bool,
    /// Copy-before-write filters, in the model, and the images that they fill.
    targets: BTreeMap<LayerNode, (NodeId, Option<usize>)>,
    /// Outside: copies are not told; what the filters may do is taken for done when they are there.
    untold: Option<Untold>,
    /// The sources of filters whose backups discard what they have copied.
    discarded: BTreeMap<LayerNode, usize>,
    /// Something may have changed since the layer's books were last looked at.
    changed: bool,
    /// The layer's books when everything was settled last. Records come in batches, after the fact, so that books can
    /// be looked at only where a batch ends: with a command's answer, and at the end of a main-context operation.
    books: Option<GraphView>,
}

impl Modelled {
    /// For the layer.
    pub(crate) fn layer() -> Modelled {
        Modelled {
            follower: Follower::of_layer(),
            ..Modelled::default()
        }
    }

    /// For a subject that is seen from outside only: roles, frozen links and copies are not told.
    pub(crate) fn outside() -> Modelled {
        Modelled {
            comparison: Comparison::outside(),
            bottom: Bottom::outside(),
            untold: Some(Untold::default()),
            ..Modelled::default()
        }
    }

    /// Whether the model accepts the command under way.
    #[cfg(test)]
    pub(crate) fn accepts(&self) -> bool {
        self.follower.refusal_under_way().is_none()
    }

    fn settled(&mut self, view: &View<'_>) -> Result<(), Violation> {
        let in_doubt = self.follower.in_doubt();
        let books = view
            .layer
            .filter(|_| self.changed || in_doubt)
            .map(Layer::inspect);
        let mut verdict = self.compare(books.as_ref());
        while verdict.is_err() && self.follower.reconsider(view.scenario) {
            // The first verdict is the one to report: what else may have been is less likely.
            verdict = self.compare(books.as_ref()).or(verdict);
        }
        if in_doubt {
            self.follower.sure();
            self.data
                .settle_doubt(view.scenario, &self.follower.world, &self.bottom);
        }
        self.data.end_change(&self.bottom);
        verdict?;
        if let Some(layer) = view.layer {
            self.bitmaps.judge(&self.follower.world, layer, false)?;
        }
        if books.is_some() {
            self.changed = false;
            self.books = books;
        }
        Ok(())
    }

    fn compare(&mut self, books: Option<&GraphView>) -> Result<(), Violation> {
        self.comparison.compare(&self.follower.world, &self.mirror)?;
        books.map_or(Ok(()), |books| self.comparison.books(&self.follower.world, books))
    }

    /// What the backup behind this filter is to copy, it owes its bitmap.
    fn owes(&mut self, filter: LayerNode, id: NodeId) {
        let world = &self.follower.world;
        for job in &world.jobs {
            if let Work::Backup(backup) = &job.work
                && backup.filter == Some(id)
            {
                let source = &world.graph.node(backup.source).name;
                self.bitmaps.backup_begins(filter, &job.id, source, backup);
            }
        }
    }

    /// A copy-before-write filter is there: from now on it keeps what its source holds.
    fn begins_to_copy(&mut self, scenario: &Scenario, id: NodeId, now: u64) -> Filling {
        let graph = &self.follower.world.graph;
        let disk = |child: Option<NodeId>| Data::disk_of(scenario, &self.follower.world, child?);
        let target = graph.children(id).find(|(_, edge)| edge.name == "target");
        let target = disk(target.map(|(_, edge)| edge.child));
        let source = disk(graph.filter_child(id));
        let job = self.follower.world.jobs.iter().find_map(|job| match &job.work {
            Work::Backup(backup) if backup.filter == Some(id) => Some((&job.id, backup)),
            _ => None,
        });
        let kept = graph.node(id).kept.as_ref();
        let bottom = &self.bottom;
        // QEMU's job says what is to be copied when it first runs: a write that comes before has all of its clusters copied.
        let early = self.untold.as_ref().is_some_and(|untold| untold.flying > 0);
        let copied = |start: u64, end: u64| match (job, kept) {
            (Some((_, backup)), _) => {
                let copied = Copied::by(backup, source, bottom, start, end);
                // A bitmap may have got more marks by then.
                let more = self.disturbed && backup.sync == Sync::Bitmap;
                if copied == Copied::Not && (more || early) {
                    Copied::Perhaps
                } else {
                    copied
                }
            }
            (None, Some(kept)) => {
                Copied::among(kept.initial.as_ref(), kept.cluster, start, Copied::WhenWritten)
            }
            (None, None) => Copied::Perhaps,
        };
        self.data
            .copying_begins(id, (source, target), bottom, (job.map(|(id, _)| id), copied), now);
        if let (Some(kept), Some(source)) = (kept, source)
            && kept.discards_source
        {
            self.data.discards_source(id, source);
        }
        Filling {
            target,
            discarded: source.filter(|_| kept.is_some_and(|kept| kept.discards_source)),
        }
    }

    /// A command was answered: filters that came with it copy from now on, and nobody tells what. `of`: a job ends whose command was
    /// not answered yet, its filter alone has come for certain.
    fn filters_came(&mut self, scenario: &Scenario, of: Option<&str>) {
        let Some(untold) = &mut self.untold else { return };
        let world = &self.follower.world;
        let nodes = world.graph.nodes();
        let filters = nodes.filter(|(_, node)| node.driver == Driver::CopyBeforeWrite);
        let now: BTreeSet<NodeId> = filters.map(|(id, _)| id).collect();
        let own = of.map(|id| world.job(id).and_then(|job| job.backup()?.filter));
        let has_come = |filter: &NodeId| own.is_none_or(|own| own == Some(*filter));
        let new: Vec<NodeId> = now
            .difference(&untold.filters)
            .copied()
            .filter(has_come)
            .collect();
        untold.filters.retain(|filter| now.contains(filter));
        untold.filters.extend(&new);
        for filter in new {
            // Its copies may have begun before anybody was told.
            let filling = self.begins_to_copy(scenario, filter, 0);
            if let Some(target) = filling.target {
                self.bottom.filled(target, 0, u64::MAX);
            }
            if let Some(source) = filling.discarded {
                self.bottom.discarded(source, 0, u64::MAX);
            }
        }
    }

    /// Nobody tells of a snapshot that breaks: where storage fails an image below a filter that lets it, it counts as broken.
    fn may_break(&mut self, scenario: &Scenario, fault: &Fault) {
        if self.untold.is_none() {
            return;
        }
        let world = &self.follower.world;
        let Some(file) = fault.file(scenario) else { return };
        let lets = |node: &Node| {
            let kept = node.kept.as_ref();
            kept.is_some_and(|kept| kept.on_error == OnError::BreakSnapshot)
        };
        let filters = world.graph.nodes().filter(|(_, node)| lets(node));
        for (filter, _) in filters.filter(|(filter, _)| stands_on(world, *filter, file)) {
            self.data.snapshot_breaks(filter);
        }
    }

    fn guest_ended(&mut self, step: StepId, outcome: &Outcome) {
        if let Some(untold) = &mut self.untold {
            if let Some((what, bytes)) = self.bitmaps.guest_ended(step, outcome) {
                self.follower.marked(what, bytes);
            }
            untold.flying = untold.flying.saturating_sub(1);
            // Only a bitmap that nobody wrote to meanwhile is known to the bit.
            self.disturbed = true;
        }
    }

    /// What a copy-before-write filter does to its target.
    fn copies(&mut self, scenario: &Scenario, event: &Event, now: u64) {
        match *event {
            Event::CopyBeforeWrite { filter, .. } => {
                if let Some(id) = self.follower.world.graph.find(self.mirror.name(filter)) {
                    self.owes(filter, id);
                    let filling = self.begins_to_copy(scenario, id, now);
                    self.targets.insert(filter, (id, filling.target));
                    self.discarded
                        .extend(filling.discarded.map(|source| (filter, source)));
                }
            }
            Event::SnapshotBroken { filter, .. } => {
                if let Some(filter) = self.follower.world.graph.find(self.mirror.name(filter)) {
                    self.data.snapshot_breaks(filter);
                }
            }
            Event::MainBegin { what } => {
                self.disturbed = false;
                let brings_filters = matches!(what, "blockdev-add" | "blockdev-backup" | "transaction");
                if brings_filters && self.untold.is_some() {
                    self.data.instants_begin();
                }
            }
            Event::RequestEnd { request, .. } => self.disturbed |= self.bitmaps.watches(request),
            Event::CopyBegin {
                filter,
                task,
                offset,
                bytes,
                ..
            } => {
                if let Some((id, target)) = self.targets.get(&filter) {
                    self.data.copy_begins(*id, task, (offset, bytes), now);
                    if let Some(target) = target {
                        self.bottom.filled(*target, offset, bytes);
                    }
                }
                if let Some(source) = self.discarded.get(&filter) {
                    self.bottom.discarded(*source, offset, bytes);
                }
            }
            Event::CopyEnd { filter, task, result } => {
                if let Some((id, _)) = self.targets.get(&filter) {
                    self.data.copy_ends(*id, task, result.is_ok(), now);
                }
            }
            _ => {}
        }
    }

    /// A refused command left everything as it was.
    fn refused(&mut self, view: &View<'_>, step: StepId) -> Result<(), Violation> {
        let (Some(before), Some(layer), false) = (&self.books, view.layer, self.changed) else {
            return Ok(());
        };
        let Some(difference) = refusals::difference(before, &layer.inspect()) else {
            return Ok(());
        };
        let message = format!(
            "{} is refused, yet changes something",
            super::liveness::step_text(view.scenario, step)
        );
        Err(violation(
            OracleName::Refusals,
            Some(step),
            message,
            vec![difference],
        ))
    }
}

impl Oracle for Modelled {
    fn name(&self) -> OracleName {
        OracleName::Graph
    }

    fn reset(&mut self, scenario: &Scenario) {
        self.follower.reset(scenario);
        self.mirror.reset();
        self.data.reset(scenario);
        self.bottom.reset(scenario);
        self.bitmaps.reset(scenario);
        self.errors.reset();
        self.targets.clear();
        if let Some(untold) = &mut self.untold {
            *untold = Untold::default();
        }
        self.discarded.clear();
        self.disturbed = false;
        self.changed = false;
        self.books = None;
    }

    fn record(&mut self, view: &View<'_>, record: &Record) -> Result<(), Violation> {
        let graph_event = match record {
            Record::Layer(event) => graph::follow(&mut self.mirror, event),
            Record::Issued(_) | Record::Ended(..) | Record::Fault(_) | Record::PowerCut { .. } => Ok(()),
        };
        graph_event?;
        self.errors.record(view.scenario, &self.follower, record)?;
        if let Some(id) = completed(record) {
            self.filters_came(view.scenario, Some(id));
        }
        let followed = self.follower.record(view.scenario, record);
        // Edges of a concluded job go with it; those of one that never started are gone when its command is refused.
        self.changed |= matches!(
            record,
            Record::Layer(Event::JobStatus {
                from: JobStatus::Concluded,
                ..
            })
        );
        if let Some(wrong) = followed.wrong {
            let refusal = self.follower.refusal_under_way();
            let evidence = refusal.map(|r| format!("the command under way ought to be refused: {r}"));
            return Err(violation(
                OracleName::Jobs,
                None,
                wrong,
                evidence.into_iter().collect(),
            ));
        }
        if followed.executed.is_some() && followed.changed {
            self.changed = true;
            self.bottom.executed(view.scenario, &self.follower.world);
        }
        let (follower, bottom) = (&self.follower, &mut self.bottom);
        self.data
            .follow(view.scenario, follower, &followed, bottom, view.now);
        match record {
            Record::Issued(step) => {
                self.data
                    .asked(view.scenario, &self.follower.world, *step, view.now);
                if let Some((export, op)) = guest(view.scenario, *step) {
                    if let Some(untold) = &mut self.untold {
                        untold.flying += 1;
                        self.bitmaps.guest_asks(&self.follower.world, *step, export, *op);
                    }
                    let beside = (&self.follower, &self.bottom);
                    self.data.issued(view, beside, *step, export, op);
                    if let Some(disk) = self.data.disk_under(*step) {
                        self.bottom.issued(*step, disk, op);
                    }
                    self.data.tell_crossed(view.scenario, &mut self.bottom);
                }
            }
            Record::Ended(step, Outcome::Command(got)) if followed.answered.is_some() => {
                refusals::judge(view.scenario, *step, self.follower.prediction(), got)?;
                self.filters_came(view.scenario, None);
                self.data
                    .answered(view.scenario, &self.follower.world, *step, got.is_ok());
                // What failing storage may leave is settled below.
                if got.is_err() && followed.settled && !self.follower.in_doubt() {
                    self.refused(view, *step)?;
                }
            }
            Record::Ended(step, outcome) => {
                if guest(view.scenario, *step).is_some() {
                    self.guest_ended(*step, outcome);
                }
                self.bottom.ended(*step, outcome);
                self.data.ended(view, *step, outcome)?;
            }
            Record::PowerCut { .. } => {}
            Record::Fault(fault) => {
                self.bitmaps.fault();
                self.data.fault(fault);
                self.may_break(view.scenario, fault);
            }
            Record::Layer(event) => {
                self.copies(view.scenario, event, view.now);
                if let (Some(outcome), Some(id)) = (followed.completed, completed(record)) {
                    self.changed = true;
                    self.bottom.completed(id, outcome);
                    self.bitmaps.job_ended(id, outcome == JobOutcome::Success);
                    self.data
                        .backup_ended(id, outcome == JobOutcome::Success, view.now);
                }
                self.bitmaps.event(&mut self.follower, &self.mirror, event);
                self.bottom
                    .event(view.scenario, &self.follower.world, &self.mirror, event)?;
            }
        }
        if followed.settled {
            self.settled(view)
        } else {
            Ok(())
        }
    }

    fn quiescent(&mut self, view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        if !self.follower.is_off() {
            self.settled(view)?;
        }
        if let Some(layer) = view.layer {
            graph::counters(&layer.inspect())?;
            if !self.follower.is_off() {
                self.bitmaps.judge(&self.follower.world, layer, true)?;
            }
        }
        self.data.quiescent(view, &self.follower, contents)?;
        self.bottom
            .quiescent(view, &self.follower.world, &self.data, contents)
    }

    fn header(
        &mut self,
        view: &View<'_>,
        file: &str,
        backing: Option<(&str, Option<&str>)>,
    ) -> Result<(), Violation> {
        let facts = self.follower.world.files.get(file).and_then(|f| f.qcow2.as_ref());
        let Some(facts) = facts else { return Ok(()) };
        let expected = facts.backing.as_ref().map(|b| (&*b.file, b.format.as_deref()));
        // A layer in this process was asked what its headers say each time that something failed.
        let unsure = view.layer.is_none() && self.follower.header_may_name(file, backing);
        if backing == expected || unsure {
            return Ok(());
        }
        let message = format!("the closed image '{file}' names another backing file than it should");
        let evidence = vec![
            format!("expected: {expected:?}"),
            format!("found:    {backing:?}"),
        ];
        Err(violation(OracleName::Image, None, message, evidence))
    }

    fn bitmaps(&mut self, _view: &View<'_>, file: &str, stored: &[Stored]) -> Result<(), Violation> {
        self.bitmaps.stored(&self.follower.world, file, stored)
    }

    fn bitmaps_left(&mut self, _view: &View<'_>, file: &str, stored: &[Stored]) -> Result<(), Violation> {
        self.bitmaps.left(&self.follower.world, file, stored)
    }

    fn after_power_cut(
        &mut self,
        view: &View<'_>,
        contents: &[(FinalContent<'_>, Vec<usize>)],
    ) -> Result<(), Violation> {
        self.data.after_power_cut(view, &self.bottom, contents)
    }

    fn closed(&mut self, view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        self.data.closed(view, (&self.follower, &self.bottom), contents)
    }
}

/// The job that this says to be over.
fn completed(record: &Record) -> Option<&str> {
    match record {
        Record::Layer(Event::Qmp {
            name: "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_COMPLETED",
            data,
        }) => data.get("device").and_then(serde_json::Value::as_str),
        _ => None,
    }
}
