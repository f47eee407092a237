//! The queries about nodes: `query-named-block-nodes`, `x-debug-query-block-graph`.
//!
//! Rules: nodes newest first, implicit filters included; a node that lost its child or its driver is listed as far
//! as it can be. Not here: statistics and throttling members, which this layer has nothing to say about.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::Layer;
use crate::event::Parent;
use crate::graph::node::{DetectZeroes, Node};
use crate::types::{BackendId, EdgeId, JobId, NodeId, OpenFlags, Perm};

/// Who is numbered in the graph query.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Vertex {
    Backend(BackendId),
    Job(JobId),
    Node(NodeId),
}

#[derive(Default)]
struct GraphReply {
    ids: BTreeMap<Vertex, u64>,
    nodes: Vec<Value>,
    edges: Vec<Value>,
}

impl GraphReply {
    /// The number of a vertex; at its first mention it gets the next one and is listed.
    fn id(&mut self, vertex: Vertex, kind: &str, name: &str) -> u64 {
        let next = self.ids.len() as u64 + 1;
        *self.ids.entry(vertex).or_insert_with(|| {
            self.nodes.push(json!({"id": next, "type": kind, "name": name}));
            next
        })
    }

    fn edge(&mut self, layer: &Layer, parent: u64, edge: EdgeId) {
        let Some(child) = layer.child(edge) else { return };
        let child = self.id(Vertex::Node(child.id), "block-driver", &child.name);
        let edge = layer.edge(edge);
        self.edges.push(json!({
            "parent": parent,
            "child": child,
            "name": *edge.name,
            "perm": perm_names(edge.perm.get()),
            "shared-perm": perm_names(edge.shared.get()),
        }));
    }
}

fn perm_names(perm: Perm) -> Vec<&'static str> {
    [
        (Perm::RESIZE, "resize"),
        (Perm::WRITE_UNCHANGED, "write-unchanged"),
        (Perm::WRITE, "write"),
        (Perm::CONSISTENT_READ, "consistent-read"),
    ]
    .into_iter()
    .filter_map(|(bit, name)| perm.contains(bit).then_some(name))
    .collect()
}

impl Layer {
    pub(crate) fn query_graph(&self) -> Value {
        let nodes = self.nodes();
        let mut backends: BTreeMap<BackendId, Vec<EdgeId>> = BTreeMap::new();
        for node in &nodes {
            for edge in node.parents.borrow().iter() {
                if let Parent::Backend(backend) = self.edge(*edge).parent {
                    backends.entry(backend).or_default().push(*edge);
                }
            }
        }
        let mut reply = GraphReply::default();
        for (backend, edges) in backends {
            let parent = reply.id(Vertex::Backend(backend), "block-backend", "");
            for edge in edges {
                reply.edge(self, parent, edge);
            }
        }
        for job in self.jobs() {
            let parent = reply.id(Vertex::Job(job.id), "block-job", job.name());
            for edge in job.edges() {
                reply.edge(self, parent, edge);
            }
        }
        for node in &nodes {
            let parent = reply.id(Vertex::Node(node.id), "block-driver", &node.name);
            for edge in node.children.borrow().clone() {
                reply.edge(self, parent, edge);
            }
        }
        // QEMU builds both lists by prepending.
        reply.nodes.reverse();
        reply.edges.reverse();
        json!({"nodes": reply.nodes, "edges": reply.edges})
    }

    pub(crate) fn query_nodes(&self) -> Value {
        self.nodes()
            .iter()
            .rev()
            .map(|node| self.node_info(node))
            .collect()
    }

    fn node_info(&self, node: &Node) -> Value {
        let flags = node.flags.get();
        let driver = node.driver_opt();
        // A filter in the middle of being dropped has no child to take a name from.
        let filename = driver.as_ref().map_or_else(String::new, |driver| {
            driver.filename(&crate::driver::Cx {
                layer: self.clone(),
                node: self.node(node.id),
            })
        });
        let mut depth = 0;
        let mut at = node.backing.get().and(self.backing_chain_next(node.id));
        while let Some(below) = at {
            depth += 1;
            at = self.backing_chain_next(below);
        }
        let mut image = json!({
            "filename": filename,
            "format": node.facts.name,
            "virtual-size": node.length(),
            "dirty-flag": false,
        });
        let cx = crate::driver::Cx {
            layer: self.clone(),
            node: self.node(node.id),
        };
        if let Some(info) = driver.as_ref().and_then(|driver| driver.info(&cx)) {
            image["cluster-size"] = json!(info.cluster_size);
        }
        let mut info = json!({
            "node-name": *node.name,
            "drv": node.facts.name,
            "ro": !flags.contains(OpenFlags::RDWR),
            "file": filename,
            "active": true,
            "encrypted": false,
            "detect_zeroes": match node.detect_zeroes.get() {
                DetectZeroes::Off => "off",
                DetectZeroes::On => "on",
                DetectZeroes::Unmap => "unmap",
            },
            "backing_file_depth": depth,
            "cache": {
                "writeback": true,
                "direct": flags.contains(OpenFlags::NOCACHE),
                "no-flush": flags.contains(OpenFlags::NO_FLUSH),
            },
            "write_threshold": 0,
        });
        if let Some(bitmaps) = node.bitmaps_info() {
            info["dirty-bitmaps"] = bitmaps;
        }
        if let Some((file, format)) = driver.and_then(|driver| driver.backing_header()) {
            image["backing-filename"] = json!(file);
            image["full-backing-filename"] = json!(crate::graph::open::combine_filename(&filename, &file));
            if let Some(format) = format {
                image["backing-filename-format"] = json!(format);
            }
            info["backing_file"] = json!(file);
        }
        info["image"] = image;
        info
    }
}
