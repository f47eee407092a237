//! The end of a scenario: everything is read, taken down, and read again from the images alone.

use serde_json::{Map, Value, json};

use super::watch::Watch;
use crate::compare::lockstep::{Stop, object};
use crate::compare::{What, content};
use crate::image::check::{Severity, check_with_snapshots};
use crate::image::read::{Content, Files, Qcow2, Reader};
use crate::qemu::nbd::client::Answer;
use crate::scenario::{Format, GuestOp, Range, Scenario};

/// Rounds of cancelling and dismissing jobs.
const ROUNDS: u32 = 8;

/// Closed images, under the names that scenarios give them.
struct Closed<'a> {
    scenario: &'a Scenario,
    files: Vec<(String, Vec<u8>)>,
}

impl Files for Closed<'_> {
    fn file(&self, name: &str) -> Option<(&[u8], Format)> {
        let name = plain(name);
        let image = self.scenario.images.iter().find(|i| i.file == name)?;
        let (_, bytes) = self.files.iter().find(|(file, _)| *file == name)?;
        Some((bytes, image.format))
    }
}

/// The export in a name of ours.
fn plain(name: &str) -> &str {
    let name = name.rsplit("nbd+unix:///").next().unwrap_or(name);
    name.split('?').next().unwrap_or(name)
}

impl Watch<'_> {
    pub(super) fn last(&mut self) -> Result<(), Stop> {
        self.events(false)?;
        self.read_all()?;
        let guests = self.what_guests_see();
        self.take_down()?;
        if !self.stored_bitmaps {
            self.images_are_sound()?;
        }
        if self.headers_apply {
            self.headers_tell_the_chain(&guests)?;
        }
        Ok(())
    }

    /// Reads every export, and every node that can be exported.
    fn read_all(&mut self) -> Result<(), Stop> {
        let exports: Vec<String> = self.exports.keys().cloned().collect();
        for export in exports {
            let (view, length) = (self.exports[&export].view.clone(), self.exports[&export].length);
            self.read(&export, &view, Some(length), &export)?;
        }
        let judged = |(name, view): (&String, &super::follow::View)| {
            self.disks[view.disk]
                .trusted
                .then(|| (name.clone(), view.clone()))
        };
        let nodes: Vec<_> = self.nodes.iter().filter_map(judged).collect();
        for (node, view) in nodes {
            let add = object(json!({"type": "nbd", "id": "blkcheck", "name": "blkcheck", "node-name": node}));
            if !self.state.nodes.contains(&node) || self.peer.ask("block-export-add", &add)?.is_err() {
                continue;
            }
            let read = self.read("blkcheck", &view, None, &format!("node '{node}'"));
            self.peer.hang_up("blkcheck");
            let _ = self.peer.ask(
                "block-export-del",
                &object(json!({"id": "blkcheck", "mode": "hard"})),
            )?;
            self.peer.rest()?;
            read?;
        }
        Ok(())
    }

    fn read(
        &mut self,
        export: &str,
        view: &super::follow::View,
        length: Option<u64>,
        who: &str,
    ) -> Result<(), Stop> {
        if !self.disks[view.disk].trusted {
            return Ok(());
        }
        let Some(size) = self.peer.size(export)? else {
            self.is_alive(&Answer::NoExport)?;
            return Err(Stop::Differs(
                What::Content,
                format!("export {export}"),
                "none".to_owned(),
            ));
        };
        let length = length.unwrap_or_else(|| self.length(view));
        if size != length {
            return Err(Stop::Differs(
                What::Content,
                format!("{who} has {length} bytes"),
                format!("{size}"),
            ));
        }
        let range = Range {
            offset: 0,
            length: size,
        };
        let answer = self.peer.request(
            export,
            content::Books::ask(self.scenario, GuestOp::Read(range), 0),
        )?;
        self.is_alive(&answer)?;
        match answer {
            Answer::Read(Ok(bytes)) => self.compare(view, range, &bytes, who),
            other => Err(Stop::Differs(
                What::Content,
                format!("{who} can be read"),
                format!("{other:?}"),
            )),
        }
    }

    /// The images that hold what guests see, and what that is.
    fn what_guests_see(&self) -> Vec<(String, super::follow::View)> {
        let disks: Vec<usize> = self.exports.values().map(|e| e.view.disk).collect();
        let mut seen = Vec::new();
        for (node, view) in &self.nodes {
            let whole = view.first == 0 && view.count.is_none();
            let judged = self.disks[view.disk].trusted && disks.contains(&view.disk);
            if whole
                && judged
                && let Some(file) = self.files.get(node)
                && !self.detached.contains(file)
                && self.state.nodes.contains(node)
            {
                seen.push((file.clone(), view.clone()));
            }
        }
        // Two images of one disk: it moved, and one of them is old.
        let disks: Vec<usize> = seen.iter().map(|(_, v)| v.disk).collect();
        seen.retain(|(_, v)| disks.iter().filter(|d| **d == v.disk).count() == 1);
        seen
    }

    fn take_down(&mut self) -> Result<(), Stop> {
        self.end_jobs()?;
        for (name, export) in std::mem::take(&mut self.exports) {
            self.peer.hang_up(&name);
            let _ = self.peer.ask(
                "block-export-del",
                &object(json!({"id": export.id, "mode": "hard"})),
            )?;
        }
        self.peer.rest()?;
        self.look()?;
        loop {
            // What is below others cannot go yet.
            let names: Vec<Map<String, Value>> = self
                .state
                .nodes
                .iter()
                .map(|n| object(json!({"node-name": n})))
                .collect();
            let gone = self.peer.ask_all("blockdev-del", &names)?;
            self.peer.rest()?;
            self.look()?;
            if !gone.contains(&true) || self.state.nodes.is_empty() {
                break;
            }
        }
        for object_id in std::mem::take(&mut self.objects) {
            let _ = self.peer.ask("object-del", &object(json!({"id": object_id})))?;
        }
        self.events(true)?;
        let left = &self.state;
        if !left.nodes.is_empty()
            || !left.links.is_empty()
            || !left.jobs.is_empty()
            || !left.leftovers.is_empty()
        {
            let left = format!(
                "{:?} {:?} {:?} {:?}",
                left.nodes, left.links, left.jobs, left.leftovers
            );
            return Err(Stop::Differs(What::Nodes, "nothing is left".to_owned(), left));
        }
        Ok(())
    }

    fn end_jobs(&mut self) -> Result<(), Stop> {
        for _ in 0..ROUNDS {
            self.look()?;
            if self.state.jobs.is_empty() {
                break;
            }
            for (id, status) in self.state.jobs.clone() {
                let execute = match status.as_str() {
                    "concluded" => "job-dismiss",
                    _ => "job-cancel",
                };
                let _ = self.peer.ask(execute, &object(json!({"id": id})))?;
                self.peer.rest()?;
                // Not like a guest: nobody may be waited for any more.
                if execute == "job-cancel" {
                    let _ = self
                        .peer
                        .ask("block-job-cancel", &object(json!({"device": id, "force": true})))?;
                    self.peer.rest()?;
                }
            }
            self.events(true)?;
        }
        Ok(())
    }

    fn images_are_sound(&self) -> Result<(), Stop> {
        for (name, bytes) in self.peer.disks() {
            let format = self
                .scenario
                .images
                .iter()
                .find(|i| i.file == name)
                .map(|i| i.format);
            if format != Some(Format::Qcow2) || Qcow2::parse(bytes).is_err() {
                continue;
            }
            let problems = check_with_snapshots(bytes);
            let worst = problems.iter().max_by_key(|p| p.severity);
            if let Some(problem) = worst {
                let kind = match problem.severity {
                    Severity::Corruption => "corruption",
                    Severity::Leak => "leak",
                };
                let text = format!("{kind}: {}", problem.text);
                return Err(Stop::Differs(What::Allocation, format!("{name} is sound"), text));
            }
        }
        Ok(())
    }

    fn headers_tell_the_chain(&mut self, guests: &[(String, super::follow::View)]) -> Result<(), Stop> {
        let files = self
            .peer
            .disks()
            .map(|(name, bytes)| (name.to_owned(), bytes.to_vec()))
            .collect();
        let closed = Closed {
            scenario: self.scenario,
            files,
        };
        let mut reader = Reader::new(&closed);
        let mut found = Vec::new();
        for (file, view) in guests {
            let content: Result<Content, String> = reader.content(file).cloned();
            found.push((file.clone(), view.clone(), content));
        }
        for (file, view, content) in found {
            // The description of a node says more than a header does.
            if content.as_ref().is_err_and(|why| why.contains("json:")) {
                continue;
            }
            let content = content.map_err(|why| {
                Stop::Differs(
                    What::Backing,
                    format!("the chain of {file} can be opened by its headers"),
                    why,
                )
            })?;
            let range = Range {
                offset: 0,
                length: content.bytes.len() as u64,
            };
            self.compare(
                &view,
                range,
                &content.bytes,
                &format!("{file}, opened by its headers,"),
            )
            .map_err(|stop| match stop {
                Stop::Differs(_, model, qemu) => Stop::Differs(What::Backing, model, qemu),
                other @ Stop::Broke(_) => other,
            })?;
        }
        Ok(())
    }
}
