//! `block-stream`: refusals in QEMU's order, what the job holds while it runs, and what its end does.
//!
//! Rules: while it runs, a copy-on-read filter sits above `device`, every link from it down to the last streamed
//! layer is frozen, and the job has an edge on each of these nodes. Success makes what is then below that layer the
//! device's backing node and records it. A concluded job keeps its edges until it is dismissed.
//! Differs from QEMU 10.0: a header is not written when the graph change was refused.

use std::rc::Rc;

use serde_json::Value;

use crate::blockers::Op;
use crate::command::args::Args;
use crate::command::{change_backing, filters, jobs, lookup};
use crate::graph::{BackingHeader, Graph, NodeId, Parent};
use crate::job::{Asked, Job, JobKind, Outcome, Stream, Work};
use crate::perm::{Masks, Perm};
use crate::refusal::Refusal;
use crate::world::World;

/// What the job grants others on the nodes it streams from: reading, and writing nobody can see.
const STREAMED: Perm = Perm::CONSISTENT_READ.union(Perm::WRITE_UNCHANGED);

/// The arguments, as given.
struct Request<'a> {
    asked: Asked<'a>,
    device: &'a str,
    base: Option<&'a str>,
    base_node: Option<&'a str>,
    backing_file: Option<Rc<str>>,
    mask_protocol: bool,
    bottom: Option<&'a str>,
    filter_name: Option<&'a str>,
}

impl<'a> Request<'a> {
    fn parse(arguments: &'a Value) -> Result<Request<'a>, Refusal> {
        let args = Args::new(arguments)?;
        let id = args.opt_str("job-id")?;
        let mut request = Request {
            asked: Asked {
                id,
                speed: 0,
                auto_finalize: true,
                auto_dismiss: true,
            },
            device: args.str("device")?,
            base: args.opt_str("base")?,
            base_node: args.opt_str("base-node")?,
            backing_file: args.opt_name("backing-file")?,
            mask_protocol: args.opt_bool("backing-mask-protocol")?.unwrap_or(false),
            bottom: args.opt_str("bottom")?,
            filter_name: None,
        };
        request.asked.speed = args.opt_int("speed")?.unwrap_or(0);
        args.opt_enum("on-error", &jobs::ON_ERROR)?;
        request.filter_name = args.opt_str("filter-node-name")?;
        request.asked.auto_finalize = args.opt_bool("auto-finalize")?.unwrap_or(true);
        request.asked.auto_dismiss = args.opt_bool("auto-dismiss")?.unwrap_or(true);
        args.finish()?;
        Ok(request)
    }
}

/// The part of a chain that a stream is about.
struct Range {
    device: NodeId,
    base_overlay: NodeId,
    above_base: NodeId,
}

pub(crate) fn block_stream(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let request = Request::parse(arguments)?;
    let range = resolve(world, &request)?;
    let was_read_only = !world.graph.node(range.device).writable;
    if was_read_only {
        world
            .graph
            .check_freezable(range.device, Some(range.above_base))?;
        world.graph.set_read_only(range.device, false)?;
    }
    let filter = insert_filter(world, &request, &range)?;
    create_job(world, &request, &range, filter, was_read_only)
}

/// Who is streamed into, and from how far below.
fn resolve(world: &World, request: &Request<'_>) -> Result<Range, Refusal> {
    for (a, b, text) in [
        (request.base, request.base_node, "'base' and 'base-node'"),
        (request.base, request.bottom, "'base' and 'bottom'"),
        (request.bottom, request.base_node, "'bottom' and 'base-node'"),
    ] {
        if a.is_some() && b.is_some() {
            return Err(Refusal::new(format!(
                "{text} cannot be specified at the same time"
            )));
        }
    }
    let graph = &world.graph;
    let name = request.device;
    let device = lookup(world, name, name)?;
    let base = resolve_base(world, request, device)?;
    let bottom = resolve_bottom(world, request, device)?;

    let end = bottom.map_or(base, |bottom| graph.chain_child(bottom));
    for node in graph.chain(device).take_while(|node| Some(*node) != end) {
        graph.check_op(node, Op::Stream)?;
    }
    if base.is_none() && request.backing_file.is_some() {
        return Err(Refusal::new(
            "backing file specified, but streaming the entire chain",
        ));
    }
    if let Some(bottom) = bottom {
        return Ok(Range {
            device,
            base_overlay: bottom,
            above_base: bottom,
        });
    }
    let Some(base_overlay) = graph.find_overlay(device, base) else {
        let (base, device) = (
            graph.name(base.expect("a chain always has a last layer")),
            graph.name(device),
        );
        return Err(Refusal::new(format!(
            "'{base}' is not in the backing chain of '{device}'"
        )));
    };
    Ok(Range {
        device,
        base_overlay,
        above_base: above_base(graph, base_overlay, base),
    })
}

fn resolve_base(world: &World, request: &Request<'_>, device: NodeId) -> Result<Option<NodeId>, Refusal> {
    let graph = &world.graph;
    if let Some(file) = request.base {
        let found = find_by_filename(graph, device, file);
        return found
            .map(Some)
            .ok_or_else(|| Refusal::new(format!("Can't find '{file}' in the backing chain")));
    }
    let Some(name) = request.base_node else {
        return Ok(None);
    };
    let base = lookup(world, "", name)?;
    if base == device || !graph.chain_contains(device, base) {
        return Err(Refusal::new(format!(
            "Node '{name}' is not a backing image of '{}'",
            request.device
        )));
    }
    Ok(Some(base))
}

fn resolve_bottom(world: &World, request: &Request<'_>, device: NodeId) -> Result<Option<NodeId>, Refusal> {
    let Some(name) = request.bottom else {
        return Ok(None);
    };
    let bottom = lookup(world, "", name)?;
    if world.graph.node(bottom).driver.is_filter() {
        return Err(Refusal::new(format!(
            "Node '{name}' is a filter, use a non-filter node as 'bottom'"
        )));
    }
    if !world.graph.chain_contains(device, bottom) {
        return Err(Refusal::new(format!(
            "Node '{name}' is not in a chain starting from '{}'",
            request.device
        )));
    }
    Ok(Some(bottom))
}

/// The layer below `device` that is called by this file name: as its overlay's header has it, or, where the graph
/// differs from the header, by its own name.
fn find_by_filename(graph: &Graph, device: NodeId, file: &str) -> Option<NodeId> {
    let mut overlay = graph.skip_filters(device);
    while let Some(below) = graph.backing_chain_next(overlay) {
        let name = if graph.backing_overridden(overlay) {
            graph.full_name(below)
        } else {
            graph.node(overlay).recorded_backing.clone()
        };
        if name.is_some_and(|name| &*name == file) {
            return Some(below);
        }
        overlay = below;
    }
    None
}

/// The node whose child is `base`: the overlay itself, or the last filter between the two.
fn above_base(graph: &Graph, base_overlay: NodeId, base: Option<NodeId>) -> NodeId {
    graph
        .chain(base_overlay)
        .find(|node| graph.chain_child(*node) == base)
        .expect("the overlay is above base")
}

/// Puts the copy-on-read filter above the device.
fn insert_filter(world: &mut World, request: &Request<'_>, range: &Range) -> Result<NodeId, Refusal> {
    let filter = filters::open_job_filter(world, request.filter_name, range.device, range.base_overlay)
        .map_err(|refusal| refusal.prefixed("Could not create node: "))?;
    world
        .graph
        .replace_node(range.device, filter)
        .map_err(|refusal| refusal.prefixed("Could not replace node: "))?;
    Ok(filter)
}

fn create_job(
    world: &mut World,
    request: &Request<'_>,
    range: &Range,
    filter: NodeId,
    was_read_only: bool,
) -> Result<(), Refusal> {
    let id = jobs::check_id(world, request.asked.id)?;
    let group = world.new_group();
    let stream = Stream {
        device: range.device,
        filter: Some(filter),
        base_overlay: range.base_overlay,
        above_base: range.above_base,
        backing_file: request.backing_file.clone(),
        mask_protocol: request.mask_protocol,
        was_read_only,
    };
    let mut job = Job::new(id.clone(), &request.asked, group, Work::Stream(stream));
    // From here on a refusal is that of a job which exists.
    attach_job(&mut world.graph, &mut job, filter, range).map_err(|refusal| Refusal {
        early_failed_job: Some(id),
        ..refusal
    })?;
    world.jobs.insert(0, job);
    Ok(())
}

/// The edges of the job, in the order in which they are made.
fn attach_job(graph: &mut Graph, job: &mut Job, filter: NodeId, range: &Range) -> Result<(), Refusal> {
    let on = Parent::Job(job.id.clone(), JobKind::Stream);
    job.edges.insert(
        0,
        graph.attach_root(on.clone(), filter, "main node", Masks::NONE)?,
    );
    jobs::check_speed(job.speed)?;
    let io = Masks::new(Perm::CONSISTENT_READ, STREAMED | Perm::WRITE);
    job.backend = Some(graph.attach_root(Parent::JobBackend(job.id.clone()), filter, "root", io)?);
    let active = Masks::new(Perm::empty(), STREAMED | Perm::WRITE);
    job.edges.insert(
        0,
        graph.attach_root(on.clone(), range.device, "active node", active)?,
    );
    let base = graph.chain_child(range.above_base);
    let between: Vec<NodeId> = graph
        .chain(range.device)
        .skip(1)
        .take_while(|node| Some(*node) != base)
        .collect();
    for node in between {
        let masks = Masks::new(Perm::empty(), STREAMED);
        job.edges.insert(
            0,
            graph.attach_root(on.clone(), node, "intermediate node", masks)?,
        );
    }
    Ok(())
}

/// The job at this place of the list went through its completion. The error text that it must end with, if any.
/// `writable`: see [`World::job_completed_leaving`].
pub(crate) fn complete(world: &mut World, at: usize, outcome: Outcome, writable: bool) -> Option<String> {
    let mut error = None;
    let mut outcome = outcome;
    if matches!(outcome, Outcome::Success | Outcome::NotFlushed) {
        error = prepare(world, at);
        if error.is_some() {
            outcome = Outcome::Failed;
        }
    }
    clean(world, at, writable);
    world.jobs[at].outcome = Some(outcome);
    error
}

/// Makes the stream take effect.
fn prepare(world: &mut World, at: usize) -> Option<String> {
    drop_filter(world, at);
    let stream = stream_of(world, at).clone();
    let graph = &mut world.graph;
    let top = graph.skip_filters(stream.device);
    let below = graph.cow_child(top)?;
    let base = stream.base(graph);
    if graph.attempt(|graph| graph.set_backing(top, base)).is_err() {
        return Some("Operation not permitted".to_owned());
    }
    let header = base.map(|base| header_for(graph, graph.skip_filters(base), &stream));
    let errno = change_backing::write_header(world, top, header).err()?;
    // The header goes on naming the layers below; so does the graph.
    world
        .graph
        .set_backing(top, Some(below))
        .expect("the link of a moment ago is allowed");
    Some(errno.to_owned())
}

/// What is recorded for a base.
fn header_for(graph: &Graph, base: NodeId, stream: &Stream) -> BackingHeader {
    let driver = graph.node(base).driver;
    let format = if stream.mask_protocol && driver.is_protocol() {
        "raw"
    } else {
        driver.name()
    };
    let file = stream
        .backing_file
        .clone()
        .or_else(|| graph.name_on_record(base))
        .unwrap_or_else(|| Rc::from(""));
    BackingHeader {
        file,
        format: Some(Rc::from(format)),
    }
}

fn stream_of(world: &mut World, at: usize) -> &mut Stream {
    match &mut world.jobs[at].work {
        Work::Stream(stream) => stream,
        Work::Backup(_) => unreachable!("a stream is completed"),
    }
}

fn drop_filter(world: &mut World, at: usize) {
    let Some(filter) = stream_of(world, at).filter.take() else {
        return;
    };
    // Its parents asked no more of the filter than its child grants, so this is never refused.
    world
        .graph
        .drop_filter(filter)
        .expect("dropping a filter only loosens");
    world.graph.node_mut(filter).held_by_jobs -= 1;
}

/// Whatever happened: no filter, no backend, the device as writable as before.
fn clean(world: &mut World, at: usize, writable: bool) {
    drop_filter(world, at);
    if let Some(backend) = world.jobs[at].backend.take() {
        world.graph.remove_edge_and_refresh(backend);
    }
    // The filter must not outlive its job as a node without a child (QEMU keeps it until dismiss, and a query then
    // crashes); the job's other edges stay until dismiss, as there.
    let main_node = world.jobs[at]
        .edges
        .pop()
        .expect("a started stream has its main node");
    world.graph.remove_edge_and_refresh(main_node);
    let Stream {
        device,
        was_read_only,
        ..
    } = *stream_of(world, at);
    if was_read_only && !writable {
        // A writer may have come meanwhile; then the device stays writable.
        let _ = world.graph.attempt(|graph| graph.set_read_only(device, true));
    }
}
