//! The daemon's block graph as events: two snapshots (`x-debug-query-block-graph`), and what must have happened between.
//!
//! Rules: nodes are told by name; edges by who is above, the edge's name and the child, since the numbers in a snapshot
//! mean nothing in the next one. A node that went and came back under its name between two snapshots is not seen to.
//! The filter of a finished stream stays until the job is dismissed, with nothing below it and nobody above it but the
//! job (a flaw of 10.0 that is known and looked for elsewhere); it is left out.
//! Drivers are not in a snapshot (an event then has an empty one), nor are frozen links; of the role only backing is
//! told from the rest.

use std::collections::BTreeMap;

use blkcheck_impl::event::{Event, Parent};
use blkcheck_impl::types::{BackendId, EdgeId, JobId, NodeId, Perm, Role};
use serde_json::Value;

/// Who is above an edge.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Above {
    Node(String),
    /// Of an export, or a job's own.
    Backend,
    Job(String),
}

/// An edge in a snapshot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Link {
    above: Above,
    name: String,
    child: String,
    perm: u8,
    shared: u8,
}

impl Link {
    fn same_place(&self, other: &Link) -> bool {
        (&self.above, &self.name, &self.child) == (&other.above, &other.name, &other.child)
    }

    fn role(&self) -> Role {
        match (&self.above, &*self.name) {
            (Above::Node(_), "backing") => Role::COW,
            (Above::Node(_), _) => Role::DATA,
            _ => Role::empty(),
        }
    }
}

/// The last snapshot, and the numbers that events use.
#[derive(Debug, Default)]
pub struct Snapshot {
    nodes: BTreeMap<String, NodeId>,
    links: Vec<(Link, EdgeId, Parent)>,
    jobs: Vec<String>,
    nodes_seen: u32,
    edges_seen: u32,
    backends_seen: u32,
}

impl Snapshot {
    /// Nothing was seen.
    pub fn reset(&mut self) {
        *self = Snapshot::default();
    }

    /// Nodes in the last snapshot.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// Nothing is above this node.
    #[must_use]
    pub fn is_alone(&self, node: &str) -> bool {
        !self.links.iter().any(|(l, _, _)| l.child == node)
    }

    /// Nodes with something below.
    #[must_use]
    pub fn has_children(&self, node: &str) -> bool {
        self.links
            .iter()
            .any(|(l, _, _)| matches!(&l.above, Above::Node(n) if n == node))
    }

    /// The number that events use for a job.
    pub fn job(&mut self, id: &str, is_new: bool) -> JobId {
        let known = self.jobs.iter().rposition(|j| j == id).filter(|_| !is_new);
        let at = known.unwrap_or_else(|| {
            self.jobs.push(id.to_owned());
            self.jobs.len() - 1
        });
        JobId(u32::try_from(at).expect("few jobs"))
    }

    /// Takes the next snapshot; tells what changed.
    ///
    /// # Errors
    /// When it is not a graph.
    pub fn next(&mut self, graph: &Value, mut tell: impl FnMut(Event)) -> Result<(), String> {
        let (names, mut links) = read(graph).ok_or_else(|| format!("not a block graph: {graph}"))?;
        let old = std::mem::take(&mut self.links);
        // An edge that is as it was; then one in the same place with other masks; the rest went and came.
        let mut kept: Vec<(Link, EdgeId, Parent)> = Vec::new();
        let mut left = Vec::new();
        for entry in old {
            match links.iter().position(|l| *l == entry.0) {
                Some(at) => {
                    links.remove(at);
                    kept.push(entry);
                }
                None => left.push(entry),
            }
        }
        let mut gone = Vec::new();
        for (link, edge, parent) in left {
            match links.iter().position(|l| l.same_place(&link)) {
                Some(at) => {
                    let link = links.remove(at);
                    tell(masks(edge, &link));
                    kept.push((link, edge, parent));
                }
                None => gone.push((link, edge, parent)),
            }
        }
        for (link, edge, parent) in gone {
            tell(Event::EdgeSet {
                edge,
                parent,
                role: link.role(),
                from: self.nodes.get(&link.child).copied(),
                to: None,
            });
        }
        let removed: Vec<String> = self
            .nodes
            .keys()
            .filter(|n| !names.contains(n))
            .cloned()
            .collect();
        for name in removed {
            let node = self.nodes.remove(&name).expect("just listed");
            tell(Event::NodeRemoved { node });
        }
        for name in names {
            if !self.nodes.contains_key(&name) {
                let node = NodeId(self.nodes_seen);
                self.nodes_seen += 1;
                self.nodes.insert(name.clone(), node);
                tell(Event::NodeAdded {
                    node,
                    name: name.into(),
                    driver: "",
                });
            }
        }
        for link in links {
            let parent = match &link.above {
                Above::Node(name) => Parent::Node(*self.nodes.get(name).ok_or("an edge from no node")?),
                Above::Backend => {
                    self.backends_seen += 1;
                    Parent::Backend(BackendId(self.backends_seen))
                }
                Above::Job(id) => Parent::Job(self.job(id, false)),
            };
            let edge = EdgeId(self.edges_seen);
            self.edges_seen += 1;
            tell(Event::EdgeSet {
                edge,
                parent,
                role: link.role(),
                from: None,
                to: Some(*self.nodes.get(&link.child).ok_or("an edge to no node")?),
            });
            tell(masks(edge, &link));
            kept.push((link, edge, parent));
        }
        self.links = kept;
        Ok(())
    }
}

fn masks(edge: EdgeId, link: &Link) -> Event {
    Event::EdgePerms {
        edge,
        perm: Perm::from_bits_truncate(link.perm),
        shared: Perm::from_bits_truncate(link.shared),
    }
}

/// Node names and edges, both in order of their content.
fn read(graph: &Value) -> Option<(Vec<String>, Vec<Link>)> {
    let text = |value: &Value, key: &str| Some(value.get(key)?.as_str()?.to_owned());
    let mut named: BTreeMap<u64, Above> = BTreeMap::new();
    let mut names = Vec::new();
    for node in graph.get("nodes")?.as_array()? {
        let name = text(node, "name")?;
        let above = match node.get("type")?.as_str()? {
            "block-driver" => {
                names.push(name.clone());
                Above::Node(name)
            }
            "block-backend" => Above::Backend,
            "block-job" => Above::Job(name),
            _ => return None,
        };
        named.insert(node.get("id")?.as_u64()?, above);
    }
    let mut links = Vec::new();
    for edge in graph.get("edges")?.as_array()? {
        let end = |key: &str| named.get(&edge.get(key)?.as_u64()?).cloned();
        let Above::Node(child) = end("child")? else {
            return None;
        };
        links.push(Link {
            above: end("parent")?,
            name: text(edge, "name")?,
            child,
            perm: mask(edge.get("perm")?)?,
            shared: mask(edge.get("shared-perm")?)?,
        });
    }
    names.retain(|name| {
        let has_children = links
            .iter()
            .any(|l: &Link| matches!(&l.above, Above::Node(n) if n == name));
        let mut parents = links.iter().filter(|l| l.child == *name).peekable();
        let finished = !has_children
            && parents.peek().is_some()
            && parents.all(|l| matches!(l.above, Above::Job(_)) && l.name == "main node");
        if finished {
            links.retain(|l| l.child != *name);
        }
        !finished
    });
    names.sort_unstable();
    links.sort_unstable();
    Some((names, links))
}

fn mask(value: &Value) -> Option<u8> {
    value
        .as_array()?
        .iter()
        .try_fold(Perm::empty().bits(), |mask, name| {
            let bit = match name.as_str()? {
                "consistent-read" => Perm::CONSISTENT_READ,
                "write" => Perm::WRITE,
                "write-unchanged" => Perm::WRITE_UNCHANGED,
                "resize" => Perm::RESIZE,
                _ => return None,
            };
            Some(mask | bit.bits())
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn graph(perm: &[&str], with_export: bool) -> Value {
        let mut edges =
            vec![json!({"parent": 1, "child": 2, "name": "file", "perm": perm, "shared-perm": []})];
        let mut nodes = vec![
            json!({"id": 1, "name": "n", "type": "block-driver"}),
            json!({"id": 2, "name": "f", "type": "block-driver"}),
        ];
        if with_export {
            nodes.push(json!({"id": 3, "name": "", "type": "block-backend"}));
            edges
                .push(json!({"parent": 3, "child": 1, "name": "root", "perm": [], "shared-perm": ["write"]}));
        }
        json!({"nodes": nodes, "edges": edges})
    }

    fn next(snapshot: &mut Snapshot, graph: &Value) -> Vec<Event> {
        let mut events = Vec::new();
        snapshot.next(graph, |e| events.push(e)).expect("a graph");
        events
    }

    #[test]
    fn only_what_changed_is_told() {
        let mut snapshot = Snapshot::default();
        assert_eq!(next(&mut snapshot, &graph(&[], true)).len(), 2 + 2 * 2);
        assert_eq!(next(&mut snapshot, &graph(&[], true)), []);
        let events = next(&mut snapshot, &graph(&["write"], true));
        assert!(
            matches!(
                events[..],
                [Event::EdgePerms {
                    perm: Perm::WRITE,
                    ..
                }]
            ),
            "{events:?}"
        );
        let events = next(&mut snapshot, &graph(&["write"], false));
        let [
            Event::EdgeSet {
                to: None,
                parent: Parent::Backend(_),
                ..
            },
        ] = events[..]
        else {
            panic!("{events:?}")
        };
        assert!(snapshot.has_children("n") && !snapshot.has_children("f"));
        let events = next(&mut snapshot, &json!({"nodes": [], "edges": []}));
        assert_eq!(events.len(), 3);
        assert!(snapshot.next(&json!({"nodes": 1}), |_| ()).is_err());
    }
}
