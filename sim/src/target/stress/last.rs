//! What is looked at when nothing more is asked for: the graph, every node, and what is left once everything is taken down.

use serde_json::{Map, Value, json};

use super::{Graph, HANGS_AFTER, LONGEST_NODE, StressTarget, object};
use crate::clock::Stopwatch;
use crate::qemu::Broken;
use crate::qemu::nbd::client::{Answer, Ask};
use crate::target::{Leftovers, NodeContent};

/// Exports of ours, for the reads at the end.
const OURS: &str = "blkcheck-read-";

impl StressTarget {
    /// Nodes as the daemon shows them, and who is above whom.
    pub(super) fn look(&mut self) -> Result<Graph, Broken> {
        let graph = self.running().ask("x-debug-query-block-graph", &Map::new())?;
        let graph = graph.map_err(|e| Broken::Nonsense(format!("no graph: {}", e.1)))?;
        let list = |key: &str| graph[key].as_array().cloned().unwrap_or_default();
        let all: Vec<(u64, String, bool)> = list("nodes")
            .iter()
            .filter_map(|n| {
                let is_node = n["type"] == "block-driver";
                Some((n["id"].as_u64()?, n["name"].as_str()?.to_owned(), is_node))
            })
            .collect();
        let name = |id: &Value| all.iter().find(|(n, ..)| Some(*n) == id.as_u64());
        let edges = list("edges");
        let edges = edges.iter().filter_map(|e| {
            let (_, parent, is_node) = name(&e["parent"])?;
            let above = if *is_node { parent.clone() } else { String::new() };
            Some((above, name(&e["child"])?.1.clone()))
        });
        let edges = edges.collect();
        let nodes = all
            .into_iter()
            .filter(|(.., is_node)| *is_node)
            .map(|(_, n, _)| n);
        Ok((nodes.collect(), edges))
    }

    /// Reads every node that somebody could read.
    pub(super) fn read_all(&mut self) -> Result<Vec<NodeContent>, Broken> {
        let (nodes, edges) = self.look()?;
        let mut found = Vec::new();
        for name in nodes {
            let has_children = edges.iter().any(|(above, _)| *above == name);
            let is_alone = !edges.iter().any(|(_, below)| *below == name);
            // Whoever has a made-up name is not known by it.
            if name.starts_with('#') || !(has_children || is_alone) {
                continue;
            }
            let export = format!("{OURS}{}", found.len());
            let add = object(
                json!({"type": "nbd", "id": export, "name": export, "node-name": name,
                "allocation-depth": true}),
            );
            let running = self.running();
            if running.ask("block-export-add", &add)?.is_err() {
                continue;
            }
            let connected = running.client.connect(&export);
            connected.map_err(|e| Broken::by("the daemon takes no connection", &e))?;
            running.until("an export does not open", |r| r.client.size(&export).is_some())?;
            let size = running.client.size(&export).expect("just opened");
            let allocated = match running.request(&export, Ask::Status(0, size.min(LONGEST_NODE)))? {
                Answer::Status(Ok(extents)) => extents.iter().map(|e| (e.bytes, e.depth == 1)).collect(),
                _ => Vec::new(),
            };
            let content = NodeContent {
                name,
                bytes: Vec::new(),
                allocated,
                zeroes: Vec::new(),
            };
            found.push((export, size, content));
        }
        for (export, size, content) in &mut found {
            content.bytes = self.running().read_whole(export, *size)?;
        }
        for (export, ..) in &found {
            let running = self.running();
            running.client.hang_up(export);
            let delete = object(json!({"id": export, "mode": "hard"}));
            let deleted = running.ask("block-export-del", &delete)?;
            deleted.map_err(|e| Broken::Nonsense(format!("an export stays: {}", e.1)))?;
        }
        let contents = found.into_iter().map(|(.., content)| content);
        Ok(contents.filter(|c| !c.bytes.is_empty()).collect())
    }

    pub(super) fn take_down(&mut self) -> Result<Leftovers, Broken> {
        self.running().client.reset();
        for (id, _) in std::mem::take(&mut self.exports) {
            // Some are gone already.
            let delete = object(json!({"id": id, "mode": "hard"}));
            let _ = self.running().ask("block-export-del", &delete)?;
        }
        // An export that goes takes its time.
        let watch = Stopwatch::start();
        loop {
            let exports = self.running().ask("query-block-exports", &Map::new())?;
            let none = matches!(&exports, Ok(Value::Array(exports)) if exports.is_empty());
            if none || watch.elapsed() > HANGS_AFTER {
                break;
            }
        }
        loop {
            let before = self.nodes.len();
            for name in std::mem::take(&mut self.nodes).into_iter().rev() {
                let delete = object(json!({ "node-name": name }));
                if self.running().ask("blockdev-del", &delete)?.is_err() {
                    self.nodes.insert(0, name);
                }
            }
            if self.nodes.is_empty() || self.nodes.len() == before {
                break;
            }
        }
        let (nodes, _) = self.look()?;
        let mut tasks = Vec::new();
        let jobs = self.running().ask("query-jobs", &Map::new())?;
        if !matches!(&jobs, Ok(Value::Array(jobs)) if jobs.is_empty()) {
            tasks.push("a job");
        }
        Ok(Leftovers {
            tasks,
            storage: Vec::new(),
            graph: nodes.into_iter().map(|n| format!("node {n}")).collect(),
        })
    }
}
