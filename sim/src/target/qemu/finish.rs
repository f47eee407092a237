//! The end of a run: every node is read, everything is taken down.

use serde_json::{Value, json};

use super::link::LONGEST_NODE;
use super::{Leftovers, NodeContent, QemuTarget};
use crate::qemu::Broken;
use crate::qemu::nbd::client::{Answer, Ask};

/// Exports of ours.
const OURS: &str = "blk-";

impl QemuTarget {
    /// Exports every node that somebody could read, and reads it. Allocation comes first: reading through copy-on-read
    /// changes it.
    pub(super) fn read_all(&mut self) -> Result<Vec<NodeContent>, Broken> {
        self.look_quietly()?;
        let names: Vec<String> = self.snapshot.nodes().map(str::to_owned).collect();
        let mut found: Vec<(String, NodeContent)> = Vec::new();
        for name in names {
            if !self.snapshot.has_children(&name) && !self.snapshot.is_alone(&name) {
                continue;
            }
            let export = format!("{OURS}{}", found.len());
            let add = json!({"type": "nbd", "id": export, "name": export, "node-name": name});
            if self.own("block-export-add", &add)?.is_err() {
                continue;
            }
            let running = self.running();
            running
                .client
                .connect(&export)
                .map_err(|e| Broken::by("the daemon does not take connections", &e))?;
            running.until("an export does not open", |r| r.client.size(&export).is_some())?;
            let size = running.client.size(&export).expect("just opened");
            let answer = running.request(&export, Ask::Status(0, size.min(LONGEST_NODE)))?;
            let allocated = match answer {
                Answer::Status(Ok(extents)) => extents.iter().map(|e| (e.bytes, e.depth == 1)).collect(),
                _ => Vec::new(),
            };
            found.push((
                export,
                NodeContent {
                    name,
                    bytes: Vec::new(),
                    allocated: joined(allocated),
                    zeroes: Vec::new(),
                },
            ));
        }
        for (export, content) in &mut found {
            content.bytes = self.running().read_whole(export)?;
        }
        for (export, _) in &found {
            let running = self.running();
            running.client.hang_up(export);
            running.settle()?;
            let delete = json!({"id": export});
            self.own("block-export-del", &delete)?
                .map_err(|e| Broken::Nonsense(format!("an export stays: {}", e.1)))?;
        }
        Ok(found
            .into_iter()
            .map(|(_, content)| content)
            .filter(|c| !c.bytes.is_empty())
            .collect())
    }

    /// A command of ours, in a scenario's words.
    pub(super) fn own(
        &mut self,
        execute: &str,
        arguments: &Value,
    ) -> Result<Result<Value, (String, String)>, Broken> {
        let Value::Object(arguments) = arguments else {
            unreachable!("arguments are an object")
        };
        let arguments = self.names.to_daemon(execute, arguments);
        self.running().ask(execute, &arguments)
    }

    /// The graph as it is, without telling.
    pub(super) fn look_quietly(&mut self) -> Result<(), Broken> {
        let told = self.records.len();
        self.look()?;
        self.records.truncate(told);
        Ok(())
    }

    pub(super) fn take_down(&mut self) -> Result<Leftovers, Broken> {
        let running = self.running();
        while running.client.hang_up_one() {
            running.settle()?;
        }
        for (id, _) in std::mem::take(&mut self.exports) {
            // Some are gone already.
            let _ = self.own("block-export-del", &json!({"id": id, "mode": "hard"}))?;
        }
        loop {
            let before = self.nodes.len();
            for name in std::mem::take(&mut self.nodes).into_iter().rev() {
                if self.own("blockdev-del", &json!({"node-name": name}))?.is_err() {
                    self.nodes.insert(0, name);
                }
            }
            if self.nodes.is_empty() || self.nodes.len() == before {
                break;
            }
        }
        let running = self.running();
        running.until("requests do not end", |r| r.server.held().is_empty())?;
        self.look()?;
        let graph: Vec<String> = self.snapshot.nodes().map(|n| format!("node {n}")).collect();
        let mut tasks = Vec::new();
        let jobs = self.own("query-jobs", &json!({}))?;
        if !matches!(&jobs, Ok(Value::Array(jobs)) if jobs.is_empty()) {
            tasks.push("a job");
        }
        let mut storage = Vec::new();
        let open = self.running().server.connections();
        if open > 0 {
            storage.push(format!("{open} open images"));
        }
        Ok(Leftovers {
            tasks,
            storage,
            graph,
        })
    }
}

fn joined(runs: Vec<(u64, bool)>) -> Vec<(u64, bool)> {
    let mut out: Vec<(u64, bool)> = Vec::with_capacity(runs.len());
    for (bytes, allocated) in runs {
        match out.last_mut() {
            Some((last, same)) if *same == allocated => *last += bytes,
            _ => out.push((bytes, allocated)),
        }
    }
    out
}
