//! What can be seen of a block layer from outside, from the model and from the daemon, and where the two differ.
//!
//! Rules: nodes are told by name; edges by who is above, the edge's name, and the node below; the backends of exports
//! and of jobs have no name in the daemon's graph, so they are told by their edges only. The header of an image is
//! read from the image itself, as it is stored. A name that is a description of a whole node (`json:`) counts as the
//! name of that node's file: what it says of the layers below is not modelled.
//! The filter of a finished stream: the daemon keeps it as a node without a child until the job is dismissed (a known
//! defect); it is left out of the graph and told apart ([`State::leftovers`]).

use std::collections::BTreeMap;

use blkcheck_model::World;
use serde_json::Value;

use super::What;
use super::bitmaps::{self, Bitmaps};
use crate::image::read::Qcow2;
use crate::qemu::names::plain;

/// An edge: (above, name, below), and the masks.
type Links = Vec<(String, String, String, u8, u8)>;

/// What is recorded in a header: file and format.
pub(super) type Header = Option<(String, Option<String>)>;

/// A state.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct State {
    /// Node names.
    pub(super) nodes: Vec<String>,
    /// Edges.
    pub(super) links: Links,
    /// Jobs: id, status.
    pub(super) jobs: Vec<(String, String)>,
    /// Files and their headers.
    pub(super) headers: BTreeMap<String, Header>,
    /// Nodes and whether they are read-only; none where it was not asked for.
    pub(super) read_only: Option<Vec<(String, bool)>>,
    /// Bitmaps; none where they were not asked for.
    pub(super) bitmaps: Option<Bitmaps>,
    /// Filters of finished streams, without anything below.
    pub(super) leftovers: Vec<String>,
}

/// One difference.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Difference {
    /// In what.
    pub(super) what: What,
    /// What the model has.
    pub(super) model: String,
    /// What the daemon has.
    pub(super) qemu: String,
}

impl State {
    /// As the model has it.
    pub(super) fn of_model(world: &World) -> State {
        let mut nodes: Vec<String> = world.graph.nodes().map(|(_, n)| n.name.to_string()).collect();
        nodes.sort_unstable();
        let mut links: Links = world
            .edge_facts()
            .into_iter()
            .map(|edge| {
                let above = if edge.parent.starts_with("node ") || edge.parent.starts_with("job ") {
                    edge.parent
                } else {
                    BACKEND.to_owned()
                };
                let (perm, shared) = (edge.masks.perm.bits(), edge.masks.shared.bits());
                (above, edge.name.to_owned(), edge.child, perm, shared)
            })
            .collect();
        links.sort_unstable();
        let mut jobs: Vec<(String, String)> = world
            .jobs
            .iter()
            .map(|job| (job.id.to_string(), job.status.name().to_owned()))
            .collect();
        jobs.sort_unstable();
        let header = |facts: &blkcheck_model::FileFacts| -> Header {
            // An empty name is stored as none.
            let backing = facts
                .qcow2
                .as_ref()?
                .backing
                .as_ref()
                .filter(|b| !b.file.is_empty())?;
            Some((
                backing.file.to_string(),
                backing.format.as_deref().map(str::to_owned),
            ))
        };
        let headers = world
            .files
            .iter()
            .map(|(name, facts)| (name.to_string(), header(facts)));
        let mut read_only: Vec<(String, bool)> = world
            .graph
            .nodes()
            .map(|(_, n)| (n.name.to_string(), !n.writable))
            .collect();
        read_only.sort_unstable();
        State {
            nodes,
            links,
            jobs,
            headers: headers.collect(),
            read_only: Some(read_only),
            bitmaps: Some(bitmaps::of_model(world)),
            leftovers: Vec::new(),
        }
    }

    /// Takes in the daemon's graph.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn read_graph(&mut self, graph: &Value) -> Result<(), String> {
        self.try_graph(graph)
            .ok_or_else(|| format!("not a block graph: {graph}"))
    }

    fn try_graph(&mut self, graph: &Value) -> Option<()> {
        let mut named: BTreeMap<u64, String> = BTreeMap::new();
        self.nodes.clear();
        self.links.clear();
        self.leftovers.clear();
        for node in graph.get("nodes")?.as_array()? {
            let name = node.get("name")?.as_str()?;
            let above = match node.get("type")?.as_str()? {
                "block-driver" => {
                    self.nodes.push(name.to_owned());
                    format!("node '{name}'")
                }
                "block-backend" => BACKEND.to_owned(),
                "block-job" => format!("job '{name}'"),
                _ => return None,
            };
            named.insert(node.get("id")?.as_u64()?, above);
        }
        for edge in graph.get("edges")?.as_array()? {
            let end = |key: &str| named.get(&edge.get(key)?.as_u64()?);
            let child = end("child")?
                .strip_prefix("node '")?
                .strip_suffix('\'')?
                .to_owned();
            self.links.push((
                end("parent")?.clone(),
                edge.get("name")?.as_str()?.to_owned(),
                child,
                mask(edge.get("perm")?)?,
                mask(edge.get("shared-perm")?)?,
            ));
        }
        self.links.sort_unstable();
        self.nodes.sort_unstable();
        self.put_leftovers_apart();
        Some(())
    }

    fn put_leftovers_apart(&mut self) {
        let links = &mut self.links;
        let leftovers = &mut self.leftovers;
        self.nodes.retain(|name| {
            let above = format!("node '{name}'");
            let childless = !links.iter().any(|l| l.0 == above);
            let mut parents = links.iter().filter(|l| l.2 == *name).peekable();
            let left = childless
                && parents.peek().is_some()
                && parents.all(|l| l.0.starts_with("job '") && l.1 == "main node");
            if left {
                links.retain(|l| l.2 != *name);
                leftovers.push(name.clone());
            }
            !left
        });
    }

    /// Takes in the answer to `query-jobs`.
    pub(super) fn read_jobs(&mut self, jobs: &Value) -> Result<(), String> {
        let job = |job: &Value| {
            let text = |key: &str| Some(job.get(key)?.as_str()?.to_owned());
            Some((text("id")?, text("status")?))
        };
        let jobs: Option<Vec<_>> = jobs.as_array().and_then(|jobs| jobs.iter().map(job).collect());
        self.jobs = jobs.ok_or("not a list of jobs")?;
        self.jobs.sort_unstable();
        Ok(())
    }

    /// Takes in the answer to `query-named-block-nodes`.
    pub(super) fn read_nodes(&mut self, nodes: &Value) -> Result<(), String> {
        let mut bitmaps = Bitmaps::new();
        let mut node = |node: &Value| {
            bitmaps::of_node(node, &mut bitmaps)?;
            let name = node.get("node-name")?.as_str()?.to_owned();
            Some((name, node.get("ro")?.as_bool()?))
        };
        let nodes: Option<Vec<_>> = nodes
            .as_array()
            .and_then(|nodes| nodes.iter().map(&mut node).collect());
        let mut nodes = nodes.ok_or("not a list of nodes")?;
        nodes.sort_unstable();
        self.read_only = Some(nodes);
        self.bitmaps = Some(bitmaps);
        Ok(())
    }

    /// Takes in a file. `ours`: a file name as a scenario has it.
    pub(super) fn read_header(&mut self, name: &str, bytes: &[u8], ours: impl Fn(&str) -> String) {
        let header = Qcow2::parse(bytes).ok().and_then(|image| {
            let file = image.backing_file.as_deref().filter(|f| !f.is_empty())?;
            // The daemon has its images from our server, where a scenario has files.
            let format = image.backing_format.map(|format| {
                if format == "nbd" {
                    "file".to_owned()
                } else {
                    format
                }
            });
            Some((plain(&ours(file)), format))
        });
        self.headers.insert(name.to_owned(), header);
    }

    /// Where the daemon (`self`) is not as the model says, most telling first.
    pub(super) fn against(&self, model: &State) -> Vec<Difference> {
        let mut found = Vec::new();
        let mut put = |what: What, model: String, qemu: String| found.push(Difference { what, model, qemu });
        if self.nodes != model.nodes {
            let (ours, theirs) = only(&model.nodes, &self.nodes);
            put(What::Nodes, say(&ours), say(&theirs));
        }
        let place = |links: &Links| -> Vec<(String, String, String)> {
            links
                .iter()
                .map(|l| (l.0.clone(), l.1.clone(), l.2.clone()))
                .collect()
        };
        let (ours, theirs) = only(&place(&model.links), &place(&self.links));
        if ours.is_empty() && theirs.is_empty() {
            let (ours, theirs) = only(&model.links, &self.links);
            if !ours.is_empty() || !theirs.is_empty() {
                put(What::Masks, say_links(&ours), say_links(&theirs));
            }
        } else {
            let text = |links: Vec<(String, String, String)>| -> Vec<String> {
                links
                    .into_iter()
                    .map(|(a, n, c)| format!("{a} -{n}-> {c}"))
                    .collect()
            };
            put(What::Edges, say(&text(ours)), say(&text(theirs)));
        }
        if self.jobs != model.jobs {
            put(
                What::Jobs,
                format!("{:?}", model.jobs),
                format!("{:?}", self.jobs),
            );
        }
        for (name, header) in &model.headers {
            let theirs = self.headers.get(name).unwrap_or(&None);
            if theirs != header {
                put(
                    What::Backing,
                    format!("{name}: {header:?}"),
                    format!("{name}: {theirs:?}"),
                );
            }
        }
        if let (Some(ours), Some(theirs)) = (&model.read_only, &self.read_only)
            && ours != theirs
        {
            let (ours, theirs) = only(ours, theirs);
            if !ours.iter().all(|n| self.nodes.iter().all(|m| *m != n.0)) {
                put(What::ReadOnly, format!("{ours:?}"), format!("{theirs:?}"));
            }
        }
        if let (Some(ours), Some(theirs)) = (&model.bitmaps, &self.bitmaps)
            && let Some((ours, theirs)) = bitmaps::difference(ours, theirs)
        {
            put(What::Bitmaps, ours, theirs);
        }
        found
    }
}

const BACKEND: &str = "backend";

/// What only the one and only the other has, counting.
fn only<T: PartialEq + Clone>(a: &[T], b: &[T]) -> (Vec<T>, Vec<T>) {
    let mut rest = b.to_vec();
    let mut ours = Vec::new();
    for item in a {
        match rest.iter().position(|r| r == item) {
            Some(at) => {
                rest.remove(at);
            }
            None => ours.push(item.clone()),
        }
    }
    (ours, rest)
}

fn say(items: &[String]) -> String {
    if items.is_empty() {
        "nothing more".to_owned()
    } else {
        items.join(", ")
    }
}

fn say_links(links: &Links) -> String {
    let link = |l: &(String, String, String, u8, u8)| {
        let names = |bits: u8| blkcheck_model::Perm::from_bits_truncate(bits).names();
        format!(
            "{} -{}-> {}: perm '{}' shared '{}'",
            l.0,
            l.1,
            l.2,
            names(l.3),
            names(l.4)
        )
    };
    links.iter().map(link).collect::<Vec<_>>().join("; ")
}

fn mask(value: &Value) -> Option<u8> {
    use blkcheck_model::Perm;
    value.as_array()?.iter().try_fold(0, |mask, name| {
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

    fn graph(perm: &[&str]) -> Value {
        json!({"nodes": [
            {"id": 1, "name": "n", "type": "block-driver"},
            {"id": 2, "name": "f", "type": "block-driver"},
            {"id": 3, "name": "", "type": "block-backend"}],
            "edges": [
            {"parent": 1, "child": 2, "name": "file", "perm": perm, "shared-perm": []},
            {"parent": 3, "child": 1, "name": "root", "perm": [], "shared-perm": []}]})
    }

    fn state(graph: &Value) -> State {
        let mut state = State::default();
        state.read_graph(graph).expect("a graph");
        state
    }

    #[test]
    fn a_mask_an_edge_and_a_node_are_told_apart() {
        let ours = state(&graph(&["write"]));
        assert_eq!(state(&graph(&["write"])).against(&ours), []);
        let differences = state(&graph(&[])).against(&ours);
        assert!(
            matches!(&differences[..], [d] if d.what == What::Masks),
            "{differences:?}"
        );
        let mut other = graph(&["write"]);
        other["edges"].as_array_mut().expect("edges").pop();
        let differences = state(&other).against(&ours);
        assert!(
            matches!(&differences[..], [d] if d.what == What::Edges),
            "{differences:?}"
        );
        other["nodes"][0]["name"] = json!("m");
        let differences = state(&other).against(&ours);
        assert!(
            matches!(&differences[..], [d, _] if d.what == What::Nodes),
            "{differences:?}"
        );
    }

    #[test]
    fn the_filter_of_a_finished_stream_is_put_apart() {
        let mut with = graph(&[]);
        let nodes = with["nodes"].as_array_mut().expect("nodes");
        nodes.push(json!({"id": 4, "name": "filter", "type": "block-driver"}));
        nodes.push(json!({"id": 5, "name": "j", "type": "block-job"}));
        let edge = json!({"parent": 5, "child": 4, "name": "main node", "perm": [], "shared-perm": []});
        with["edges"].as_array_mut().expect("edges").push(edge);
        let with = state(&with);
        assert_eq!(with.leftovers, ["filter"]);
        assert_eq!(with.against(&state(&graph(&[]))), []);
    }

    #[test]
    fn a_description_of_a_node_counts_as_its_file() {
        let json = r#"json:{"backing":{"file":{"filename":"b"}},"driver":"qcow2","file":{"driver":"file","filename":"a"}}"#;
        assert_eq!((plain(json), plain("c")), ("a".to_owned(), "c".to_owned()));
    }

    #[test]
    fn what_is_no_graph_is_an_error() {
        assert!(State::default().read_graph(&json!({"nodes": 1})).is_err());
        assert!(
            State::default()
                .read_graph(&json!({"nodes": [], "edges": [{}]}))
                .is_err()
        );
        assert!(State::default().read_jobs(&json!([{}])).is_err());
    }
}
