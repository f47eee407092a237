//! The queue of a reopen: the named nodes, each with the children that were opened inline with it (graph.md 4.12).
//!
//! Rules: an option is what was passed now, else what was given before (only where old options are kept, or the node is
//! queued already), else what the parent passes on, else what was in force (only where old options are kept).
//! A child that the parent's options refer to by name keeps its options; a child that they no longer mean is left alone.

use std::rc::Rc;

use serde_json::Value;

use super::options::{self, Flat};
use crate::Layer;
use crate::graph::node::{DetectZeroes, Node};
use crate::types::{OpenFlags, Role};

/// A node of the queue and what it shall be.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) node: Rc<Node>,
    pub(super) flags: OpenFlags,
    pub(super) detect_zeroes: DetectZeroes,
    /// Options to judge: with what was inherited, without what belongs to queued children.
    pub(super) all: Flat,
    /// What was given, to keep.
    pub(super) given: Flat,
    /// Nothing is said of the backing file, not even that there is none.
    pub(super) backing_missing: bool,
}

/// What a parent in the queue passes on.
struct Above<'a> {
    options: &'a Flat,
    flags: OpenFlags,
    backing: bool,
}

impl Layer {
    /// Queues a node and the children that follow it.
    pub(super) fn queue_reopen(&self, queue: &mut Vec<Entry>, node: Rc<Node>, options: Flat, keep: bool) {
        self.queue_below(queue, node, options, None, keep);
    }

    fn queue_below(
        &self,
        queue: &mut Vec<Entry>,
        node: Rc<Node>,
        mut all: Flat,
        above: Option<&Above<'_>>,
        keep: bool,
    ) {
        let at = queue.iter().position(|e| e.node.id == node.id);
        let before = at.map(|at| &queue[at]);
        if let Some(before) = before {
            options::join(&mut all, &before.given);
        } else if keep {
            options::join(&mut all, &options::given(&node));
        }
        let mut given = all.clone();
        let flags = match above {
            Some(above) => {
                options::inherit(&mut all, above.options, above.backing);
                above.flags
            }
            None => node.flags.get(),
        };
        if keep {
            options::join(&mut all, &options::in_force(&node));
        }
        let flags = options::flags_of(&all, flags);
        let named = |key: &str| all.contains_key(key);
        let backing_missing = if keep {
            before.is_some_and(|b| b.backing_missing)
        } else {
            !named("backing") && !named("backing.driver")
        };
        let children = self.inline_children(&node, &mut all, &mut given, keep);
        let entry = Entry {
            flags,
            detect_zeroes: options::detect_zeroes_of(&all),
            all: all.clone(),
            given,
            backing_missing,
            node,
        };
        match at {
            Some(at) => queue[at] = entry,
            None => queue.push(entry),
        }
        for child in children {
            let above = Above {
                options: &all,
                flags,
                backing: child.backing,
            };
            self.queue_below(queue, child.node, child.options, Some(&above), child.keep);
        }
    }

    /// The children that are reopened with their parent; their options leave the parent's.
    fn inline_children(&self, node: &Node, all: &mut Flat, given: &mut Flat, keep: bool) -> Vec<Inline> {
        let mut children = Vec::new();
        for edge in node.children.borrow().clone() {
            let edge = self.edge(edge);
            let child = self.child(edge.id).expect("a listed child edge has a child");
            if child.inherits_from.get() != Some(node.id) {
                continue;
            }
            let (options, keep) = match all.get(&*edge.name) {
                // By name: it stays, with the options it has. Another one, or none: it is not meant.
                Some(Value::String(name)) if **name == *child.name => (Flat::new(), true),
                Some(_) => continue,
                None => {
                    options::take_child(given, &edge.name);
                    (options::take_child(all, &edge.name), keep)
                }
            };
            children.push(Inline {
                node: child,
                options,
                backing: edge.role.contains(Role::COW),
                keep,
            });
        }
        children
    }
}

struct Inline {
    node: Rc<Node>,
    options: Flat,
    backing: bool,
    keep: bool,
}
