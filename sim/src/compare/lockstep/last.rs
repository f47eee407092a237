//! The end of a scenario: every node is read, everything is taken down, and what is stored is held against the books.

use blkcheck_model::{Command, JobStatus};
use serde_json::{Map, Value, json};

use super::{Run, Stop, object};
use crate::compare::What;
use crate::compare::content::{Books, LONGEST};
use crate::qemu::nbd::client::Answer;
use crate::scenario::{GuestOp, Range, Scenario};

impl Run<'_> {
    /// Reads every node that can be read.
    pub(super) fn read_back(&mut self, scenario: &Scenario) -> Result<(), Stop> {
        let mut exports: Vec<(String, String)> = self
            .world
            .exports
            .iter()
            .map(|e| {
                (
                    e.name.to_string(),
                    self.world
                        .graph
                        .name(self.world.graph.edge(e.root).child)
                        .to_owned(),
                )
            })
            .collect();
        let (mut adds, mut dels) = (Vec::new(), Vec::new());
        let unread = |run: &Self, id| run.manner.read_all && run.books.readable(&run.world, id);
        for (id, node) in self.world.graph.nodes() {
            if exports.iter().any(|(_, n)| **n == *node.name) || !unread(self, id) {
                continue;
            }
            let name = format!("blkcheck-read-{}", adds.len());
            let add = json!({"type": "nbd", "id": name, "name": name, "node-name": &*node.name});
            // What the model refuses cannot be read.
            if self.world.check(&Command::new("block-export-add", &add)).is_ok() {
                adds.push(object(add));
                dels.push(object(json!({"id": name, "mode": "hard"})));
                exports.push((name, node.name.to_string()));
            }
        }
        if self.peer.ask_all("block-export-add", &adds)?.contains(&false) {
            let ours = "every node can be exported for reading".to_owned();
            return Err(Stop::Differs(What::Result, ours, "one cannot".to_owned()));
        }
        self.read_exports(scenario, &exports)?;
        if !adds.is_empty() {
            for add in &adds {
                self.peer.hang_up(add["name"].as_str().expect("just written"));
            }
            self.peer.ask_all("block-export-del", &dels)?;
            self.peer.rest()?;
            // Drained for an export, jobs paused and went on.
            self.events()?;
        }
        Ok(())
    }

    fn read_exports(&mut self, scenario: &Scenario, exports: &[(String, String)]) -> Result<(), Stop> {
        for (export, node) in exports {
            let Some(id) = self.world.graph.find(node) else {
                continue;
            };
            let Some(size) = self.peer.size(export)? else {
                self.is_alive(&Answer::NoExport)?;
                return Err(Stop::Differs(
                    What::Content,
                    format!("export {export}"),
                    "none".to_owned(),
                ));
            };
            self.books.probed(&self.world, id, scenario.grain);
            let now = self.world.graph.node(id).length;
            let length = self.lengths.get(export).copied().unwrap_or(now);
            if size != length {
                return Err(Stop::Differs(
                    What::Content,
                    format!("node '{node}' has {length} bytes"),
                    format!("{size}"),
                ));
            }
            let size = size.min(now);
            if size > LONGEST {
                continue;
            }
            let range = Range {
                offset: 0,
                length: size,
            };
            let op = GuestOp::Read(range);
            let answer = self.peer.request(export, Books::ask(scenario, op, 0))?;
            self.is_alive(&answer)?;
            self.books
                .guest(&self.world, id, (false, None), op, 0, &answer)
                .map_err(|(model, qemu)| {
                    Stop::Differs(What::Content, format!("node '{node}': {model}"), qemu)
                })?;
        }
        Ok(())
    }

    /// Jobs, exports and nodes go; what is stored then is held against the model.
    pub(super) fn take_down(&mut self, scenario: &Scenario) -> Result<(), Stop> {
        self.books.jobs_given_up(&self.world);
        self.empty()?;
        self.look(false)?;
        if !self.seen.nodes.is_empty() || !self.seen.jobs.is_empty() {
            let left = format!("{:?} {:?}", self.seen.nodes, self.seen.jobs);
            return Err(Stop::Differs(What::Nodes, "nothing left".to_owned(), left));
        }
        if let Some(last) = &self.last {
            let result = self.stored_bitmaps(last.clone());
            result.map_err(|(model, qemu)| Stop::Differs(What::Bitmaps, model, qemu))?;
        }
        let result = self.books.stored(scenario, self.peer.disks());
        result.map_err(|(model, qemu)| Stop::Differs(What::Allocation, model, qemu))
    }

    /// Brings the daemon back to nothing, without comparing.
    fn empty(&mut self) -> Result<(), Stop> {
        for job in self.world.jobs.clone() {
            let id = json!({"id": &*job.id});
            if job.status != JobStatus::Concluded {
                let _ = self.peer.ask("job-cancel", &object(id.clone()))?;
                self.peer.rest()?;
            }
            if !job.auto_dismiss {
                let _ = self.peer.ask("job-dismiss", &object(id))?;
            }
        }
        for export in self.world.exports.clone() {
            self.peer.hang_up(&export.name);
            let _ = self.peer.ask(
                "block-export-del",
                &object(json!({"id": &*export.id, "mode": "hard"})),
            )?;
        }
        if !self.world.exports.is_empty() || !self.world.jobs.is_empty() {
            self.peer.rest()?;
        }
        self.peer.take_events();
        let del = |node: &blkcheck_model::Node| object(json!({"node-name": &*node.name}));
        let owned = self.world.graph.nodes().filter(|(_, n)| n.monitor_owned);
        let mut owned: Vec<Map<String, Value>> = owned.map(|(_, n)| del(n)).collect();
        let groups = self.world.graph.groups().map(|id| object(json!({"id": id})));
        let groups: Vec<Map<String, Value>> = groups.collect();
        self.last = Some(std::mem::take(&mut self.world));
        // What uses others was mostly made after them.
        owned.reverse();
        loop {
            let gone = self.peer.ask_all("blockdev-del", &owned)?;
            let before = owned.len();
            let mut gone = gone.into_iter();
            owned.retain(|_| gone.next() == Some(false));
            if owned.is_empty() || owned.len() == before {
                break;
            }
        }
        if self.peer.ask_all("object-del", &groups)?.contains(&false) && owned.is_empty() {
            return Err(Stop::Differs(
                What::Result,
                "a group without nodes can be deleted".to_owned(),
                "one cannot".to_owned(),
            ));
        }
        Ok(())
    }
}
