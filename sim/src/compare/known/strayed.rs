//! Streams of which the daemon loses the way (`stream-undoes-reopen`): whose last layer was given another backing node meanwhile.
//!
//! Rules: one is noted when it succeeds, with the names of all that it can have changed; a difference has to be about one of these,
//! or about a node that shows the stream's device. One that is still under way, fails or is cancelled changes nothing.

use blkcheck_model::World;
use blkcheck_model::job::Stream;

/// A stream that strayed and succeeded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::compare) struct Strayed {
    /// The node whose backing link it changed.
    device: String,
    /// That node, its image, and the nodes that were and are below its last layer, with their images.
    names: Vec<String>,
}

impl Strayed {
    /// The stream of this job, which is about to succeed in this world, if it has strayed.
    pub(in crate::compare) fn of(world: &World, id: &str) -> Option<Strayed> {
        let stream = world.job(id)?.stream()?;
        stream
            .has_strayed(&world.graph)
            .then(|| Strayed::new(world, stream))
    }

    fn new(world: &World, stream: &Stream) -> Strayed {
        let graph = &world.graph;
        let device = graph.skip_filters(stream.device);
        let new = graph.cow_child(stream.base_overlay);
        let below = new.map(|new| graph.topological([new])).unwrap_or_default();
        let old = [stream.above_base, graph.skip_filters(stream.above_base)];
        let mut names = Vec::new();
        for node in [device, stream.base_overlay].into_iter().chain(old).chain(below) {
            names.push(graph.name(node).to_owned());
            names.extend(world.image_file(node).map(|file| file.to_string()));
        }
        Strayed {
            device: graph.name(device).to_owned(),
            names,
        }
    }

    /// The text names one of what it changed, or a node that shows it.
    pub(in crate::compare) fn is_told(&self, world: &World, text: &str) -> bool {
        let graph = &world.graph;
        let shows = |name: &str| {
            let node = graph.find(name);
            node.is_some_and(|node| {
                graph
                    .topological([node])
                    .iter()
                    .any(|below| *graph.name(*below) == *self.device)
            })
        };
        words(text).any(|word| self.names.iter().any(|name| name == word) || shows(word))
    }

    /// The node shows what it changed.
    pub(in crate::compare) fn is_below(&self, world: &World, node: blkcheck_model::NodeId) -> bool {
        self.is_told(world, world.graph.name(node))
    }
}

/// What in a text can be a name of a node or of a file.
pub(in crate::compare) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || "-_.#/".contains(c)))
        .map(|word| word.trim_end_matches('.'))
        .filter(|word| !word.is_empty())
}
