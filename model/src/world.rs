//! The world: graph, jobs, exports and image files, and what commands and job completions do to it.
//!
//! Rules: [`World::execute`] is called when a command takes the main lock and says what the command answers; it
//! changes everything or nothing. Between commands the caller reports what it observes: every status change
//! ([`World::job_status`]) and every job that goes through its completion ([`World::job_completed`]); an `Err` from
//! those is a violation, as a sentence. Commands and completions are totally ordered, so the model has no time.
//! Not here: guest data (see [`crate::layer`], [`crate::register`]), progress and rate limits.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use serde_json::Value;

use crate::bitmap::StoredBitmap;
use crate::command::{self, Command};
use crate::graph::{BackingHeader, EdgeId, Graph, NodeId, Parent};
use crate::job::{Ghost, Job, JobStatus, Outcome, Work};
use crate::perm::{Driver, Masks, Role};
use crate::refusal::Refusal;

/// What kind of thing a file name names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Device,
}

/// The qcow2 header of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Qcow2Facts {
    /// Guest-visible size, bytes.
    pub virtual_size: u64,
    /// Cluster size, bytes.
    pub cluster_size: u64,
    /// 2 or 3.
    pub version: u8,
    /// The backing file on record.
    pub backing: Option<BackingHeader>,
    /// Bitmaps that are stored, in the order of the directory.
    pub bitmaps: Vec<StoredBitmap>,
}

/// A file as the outside world knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileFacts {
    /// Regular file or device.
    pub kind: FileKind,
    /// Length of the file itself, bytes.
    pub length: u64,
    /// Smallest request on it, bytes; 1 when buffered.
    pub request_alignment: u64,
    /// It starts with a qcow2 header.
    pub qcow2: Option<Qcow2Facts>,
}

/// An export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// Its id.
    pub id: Rc<str>,
    /// NBD export name.
    pub name: Rc<str>,
    /// Guests may write.
    pub writable: bool,
    /// Its root edge; follows the graph.
    pub root: EdgeId,
    /// Clients connected now; a safe delete is refused while there are any.
    pub clients: u32,
}

/// Everything. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct World {
    /// Nodes and edges.
    pub graph: Graph,
    /// Jobs, newest first.
    pub jobs: Vec<Job>,
    /// Exports, oldest first.
    pub exports: Vec<Export>,
    /// Files by name.
    pub files: BTreeMap<Rc<str>, Rc<FileFacts>>,
    /// Jobs that are gone but for their last events.
    ghosts: Vec<Ghost>,
    /// Jobs that are yet to start, those of each transaction together, the next one first.
    to_start: Vec<Vec<Rc<str>>>,
    /// The last number that a group of jobs was given.
    next_group: u32,
    /// Groups of which a job ended otherwise than well; it may be gone already when the others end.
    given_up: BTreeSet<u32>,
    /// How many node names have been made up; a refused command may have used some.
    pub auto_names: u32,
}

/// One edge in words, for comparison with another block layer's report.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct EdgeFacts {
    /// `node 'x'`, `export 'e'`, `backend of job 'j'`, `job 'j'`.
    pub parent: String,
    /// `file`, `backing`, `root`, …
    pub name: &'static str,
    /// Node name below.
    pub child: String,
    /// What the child is to the parent.
    pub role: Role,
    /// The masks.
    pub masks: Masks,
    /// The link is frozen.
    pub frozen: bool,
}

impl World {
    /// A world with these files, and nothing open.
    #[must_use]
    pub fn new(files: impl IntoIterator<Item = (Rc<str>, FileFacts)>) -> World {
        let files = files
            .into_iter()
            .map(|(name, facts)| (name, Rc::new(facts)))
            .collect();
        World {
            files,
            ..World::default()
        }
    }

    /// Runs a command.
    ///
    /// # Errors
    /// The refusal; the world is as before, except that names made up for nodes stay used.
    pub fn execute(&mut self, command: &Command<'_>) -> Result<Value, Refusal> {
        let mut next = self.clone();
        let result = command::apply(&mut next, command);
        match &result {
            Ok(_) => {
                next.reap();
                next.cut_backups();
                debug_assert_eq!(next.graph.check(), Ok(()), "after {command:?}");
                *self = next;
            }
            Err(refusal) => {
                self.auto_names = next.auto_names;
                let ghost = |taken_back| {
                    move |id: &Rc<str>| Ghost {
                        id: id.clone(),
                        status: JobStatus::Undefined,
                        taken_back,
                    }
                };
                self.ghosts.extend(refusal.taken_back.iter().map(ghost(true)));
                self.ghosts
                    .extend(refusal.early_failed_job.iter().map(ghost(false)));
            }
        }
        result
    }

    /// Lengths below filters may have changed.
    fn cut_backups(&mut self) {
        for job in &mut self.jobs {
            if let Work::Backup(backup) = &mut job.work
                && let Some(below) = backup.filter.and_then(|filter| self.graph.filter_child(filter))
            {
                backup.reach = backup.reach.min(self.graph.node(below).length);
            }
        }
    }

    /// What [`World::execute`] would answer.
    ///
    /// # Errors
    /// The refusal.
    pub fn check(&self, command: &Command<'_>) -> Result<Value, Refusal> {
        self.clone().execute(command)
    }

    /// Whether the command moves links that are there, or takes some away, as far as it gets. A block layer that works in place
    /// puts them back when it refuses the command, and then they are newer than they were.
    #[must_use]
    pub fn moves_links(&self, command: &Command<'_>) -> bool {
        let mut half = self.clone();
        let _ = command::apply(&mut half, command);
        let now: BTreeMap<EdgeId, NodeId> = half.graph.edges().map(|(id, edge)| (id, edge.child)).collect();
        let mut links = self.graph.edges();
        links.any(|(id, edge)| now.get(&id) != Some(&edge.child))
    }

    /// A status change of a job was observed.
    ///
    /// # Errors
    /// The change is not in the state machine, or the job ought not to do that now.
    pub fn job_status(&mut self, id: &str, to: JobStatus) -> Result<(), String> {
        if let Some(at) = self.ghosts.iter().position(|ghost| &*ghost.id == id) {
            let ghost = &mut self.ghosts[at];
            if !ghost.may_become(to) {
                return Err(format!(
                    "job '{id}' is gone ({}), yet becomes {}",
                    ghost.status.name(),
                    to.name()
                ));
            }
            ghost.status = to;
            if to == JobStatus::Null {
                self.ghosts.remove(at);
            }
            return Ok(());
        }
        let Some(job) = self.jobs.iter_mut().find(|job| &*job.id == id) else {
            return Err(format!(
                "job '{id}' becomes {}, but there is no such job",
                to.name()
            ));
        };
        if !job.status.may_become(to) {
            return Err(format!(
                "job '{id}' goes from {} to {}",
                job.status.name(),
                to.name()
            ));
        }
        let allowed = match (to, job.outcome) {
            (JobStatus::Concluded, None) => Err("its completion has not been reported"),
            (JobStatus::Concluded, Some(Outcome::Success)) if job.status == JobStatus::Aborting => {
                Err("it succeeded")
            }
            (JobStatus::Concluded, Some(outcome))
                if outcome != Outcome::Success && job.status != JobStatus::Aborting =>
            {
                Err("it failed but never went through aborting")
            }
            (JobStatus::Null, _) if !job.auto_dismiss => Err("nobody dismissed it"),
            _ => Ok(()),
        };
        let starts = job.status == JobStatus::Created && to == JobStatus::Running;
        let is_next = |turn: &Vec<Rc<str>>| turn.first().is_some_and(|next| &**next == id);
        let waits = |turn: &&Vec<Rc<str>>| turn.iter().any(|next| &**next == id);
        let early = starts && self.to_start.iter().filter(waits).any(|turn| !is_next(turn));
        let allowed = if early {
            Err("another one of its transaction starts first")
        } else {
            allowed
        };
        allowed.map_err(|why| {
            format!(
                "job '{id}' goes from {} to {}: {why}",
                job.status.name(),
                to.name()
            )
        })?;
        job.status = to;
        job.waited |= to == JobStatus::Waiting;
        if to != JobStatus::Created {
            self.starts_no_more(id);
        }
        if to == JobStatus::Null {
            self.forget_job(id);
        }
        Ok(())
    }

    /// A job stopped at an error whose action is `stop`: it is paused as if by the user.
    ///
    /// # Errors
    /// There is no such job.
    pub fn job_stopped_on_error(&mut self, id: &str) -> Result<(), String> {
        let job = self
            .jobs
            .iter_mut()
            .find(|job| &*job.id == id)
            .ok_or_else(|| format!("there is no job '{id}'"))?;
        job.user_paused = true;
        Ok(())
    }

    /// A job went through its completion: what that does to the graph and the headers. Returns the error text with
    /// which the job must end, if any.
    ///
    /// # Errors
    /// The outcome is impossible for this job.
    pub fn job_completed(&mut self, id: &str, outcome: Outcome) -> Result<Option<String>, String> {
        self.job_completed_leaving(id, outcome, false)
    }

    /// The same; `writable`: storage failed when the node that was made writable for the job was to become read-only
    /// again, and so it stays writable.
    ///
    /// # Errors
    /// The outcome is impossible for this job.
    pub fn job_completed_leaving(
        &mut self,
        id: &str,
        outcome: Outcome,
        writable: bool,
    ) -> Result<Option<String>, String> {
        let at = self
            .jobs
            .iter()
            .position(|job| &*job.id == id)
            .ok_or_else(|| format!("there is no job '{id}'"))?;
        let job = &self.jobs[at];
        match (outcome, job.cancelled || self.group_gives_up(job)) {
            _ if job.outcome.is_some() => return Err(format!("job '{id}' completes twice")),
            (Outcome::Success | Outcome::NotFlushed, true) => {
                return Err(format!("job '{id}' was cancelled, yet takes effect"));
            }
            (Outcome::Cancelled, false) => return Err(format!("nobody cancelled job '{id}'")),
            _ => {}
        }
        if outcome != Outcome::Success && self.group(job).next().is_some() {
            self.given_up.insert(job.group);
        }
        let error = match &self.jobs[at].work {
            Work::Stream(_) => command::stream::complete(self, at, outcome, writable),
            Work::Backup(_) => {
                command::backup::complete(self, at, outcome);
                None
            }
        };
        self.reap();
        debug_assert_eq!(self.graph.check(), Ok(()), "after job '{id}' completed");
        Ok(error)
    }

    /// Another job of the same group was cancelled or failed, so that this one is as well.
    fn group_gives_up(&self, job: &Job) -> bool {
        let gives_up = |other: &Job| {
            let failed = other.outcome.is_some_and(|outcome| outcome != Outcome::Success);
            other.cancelled || failed || other.status == JobStatus::Aborting
        };
        self.given_up.contains(&job.group) || self.group(job).any(gives_up)
    }

    /// The other jobs that end with this one.
    pub fn group(&self, job: &Job) -> impl Iterator<Item = &Job> {
        let (group, id) = (job.group, job.id.clone());
        self.jobs
            .iter()
            .filter(move |other| other.group == group && other.id != id)
    }

    /// A number that no job has.
    pub(crate) fn new_group(&mut self) -> u32 {
        self.next_group += 1;
        self.next_group
    }

    /// Jobs were made by one transaction, in this order; the last one starts first.
    pub(crate) fn start_in_turn(&mut self, made: Vec<Rc<str>>) {
        if !made.is_empty() {
            self.to_start.push(made.into_iter().rev().collect());
        }
    }

    /// It started, or never will: nobody waits for it.
    fn starts_no_more(&mut self, id: &str) {
        for turn in &mut self.to_start {
            turn.retain(|next| &**next != id);
        }
        self.to_start.retain(|turn| !turn.is_empty());
    }

    /// Removes a job with its edges.
    pub(crate) fn forget_job(&mut self, id: &str) {
        let at = self
            .jobs
            .iter()
            .position(|job| &*job.id == id)
            .expect("the job exists");
        for edge in self.jobs.remove(at).edges {
            self.graph.remove_edge_and_refresh(edge);
        }
        self.starts_no_more(id);
        self.reap();
    }

    /// Removes a job whose `null` a client is yet to see.
    pub(crate) fn dismiss_job(&mut self, id: &Rc<str>) {
        self.forget_job(id);
        self.ghosts.push(Ghost {
            id: id.clone(),
            status: JobStatus::Concluded,
            taken_back: false,
        });
    }

    /// The job of this id.
    #[must_use]
    pub fn job(&self, id: &str) -> Option<&Job> {
        self.jobs.iter().find(|job| &*job.id == id)
    }

    /// The export of this id.
    #[must_use]
    pub fn export(&self, id: &str) -> Option<&Export> {
        self.exports.iter().find(|export| &*export.id == id)
    }

    /// The node that an export shows now.
    #[must_use]
    pub fn export_node(&self, id: &str) -> Option<NodeId> {
        self.export(id).map(|export| self.graph.edge(export.root).child)
    }

    /// How many clients an export has now.
    pub fn set_export_clients(&mut self, id: &str, clients: u32) {
        if let Some(export) = self.exports.iter_mut().find(|export| &*export.id == id) {
            export.clients = clients;
        }
    }

    /// The pause count that a job must have while these nodes are drained.
    #[must_use]
    pub fn pause_count(&self, id: &str, drained: impl Fn(NodeId) -> bool) -> Option<usize> {
        let job = self.job(id)?;
        let edges = job
            .edges
            .iter()
            .filter(|edge| drained(self.graph.edge(**edge).child))
            .count();
        Some(job.pause_count(edges))
    }

    /// The file whose plain bytes a node shows, if it does not interpret them.
    fn content_file(&self, node: NodeId) -> Option<Rc<str>> {
        let facts = self.graph.node(node);
        match facts.driver {
            Driver::File | Driver::HostDevice | Driver::NullCo => facts.filename.clone(),
            Driver::Raw if facts.windowed => None,
            Driver::Raw | Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => {
                self.content_file(self.graph.primary_child(node)?)
            }
            Driver::Qcow2 | Driver::SnapshotAccess => None,
        }
    }

    /// The file whose header a qcow2 node reads and writes.
    #[must_use]
    pub fn image_file(&self, node: NodeId) -> Option<Rc<str>> {
        self.content_file(self.graph.primary_child(node)?)
    }

    /// The same, also where the node is given only the beginning of the file.
    pub(crate) fn header_file(&self, node: NodeId) -> Option<Rc<str>> {
        let below = self.graph.primary_child(node)?;
        let facts = self.graph.node(below);
        let begins = facts.options.get("offset").is_none_or(|offset| *offset == 0);
        match facts.driver {
            Driver::Raw if facts.windowed && begins => self.content_file(self.graph.primary_child(below)?),
            _ => self.content_file(below),
        }
    }

    /// What the header of a qcow2 node says.
    #[must_use]
    pub fn header(&self, node: NodeId) -> Option<&Qcow2Facts> {
        self.files.get(&self.header_file(node)?)?.qcow2.as_ref()
    }

    /// Records another backing file in the header of a qcow2 node.
    pub(crate) fn set_header(&mut self, node: NodeId, backing: Option<BackingHeader>) {
        let facts = self.graph.node_mut(node);
        facts.recorded_backing = backing.as_ref().map(|backing| backing.file.clone());
        facts.names_backing = backing.as_ref().is_some_and(|backing| !backing.file.is_empty());
        if let Some(header) = self.header_mut(node) {
            header.backing = backing;
        }
    }

    /// The header that a qcow2 node writes; none if it was given a file that has none.
    pub(crate) fn header_mut(&mut self, node: NodeId) -> Option<&mut Qcow2Facts> {
        let file = self.header_file(node)?;
        Rc::make_mut(self.files.get_mut(&file)?).qcow2.as_mut()
    }

    /// Every edge in words, sorted.
    #[must_use]
    pub fn edge_facts(&self) -> Vec<EdgeFacts> {
        let parent = |parent: &Parent| match parent {
            Parent::Node(id) => format!("node '{}'", self.graph.name(*id)),
            Parent::Export(id) => format!("export '{id}'"),
            Parent::JobBackend(id) => format!("backend of job '{id}'"),
            Parent::Job(id, _) => format!("job '{id}'"),
        };
        let mut facts: Vec<EdgeFacts> = self
            .graph
            .edges()
            .map(|(_, edge)| EdgeFacts {
                parent: parent(&edge.parent),
                name: edge.name,
                child: self.graph.name(edge.child).to_owned(),
                role: edge.role,
                masks: edge.masks,
                frozen: edge.frozen_by.is_some(),
            })
            .collect();
        facts.sort();
        facts
    }
}
