//! `block_resize`: changes the length of a node that nobody minds changing.
//!
//! Rules: a backend of its own asks for RESIZE, so every user that does not share it refuses; the change happens in a drained
//! section. Growing shows zeroes, also over a longer backing file.

use crate::Layer;
use crate::error::QmpError;
use crate::graph::blockers::OpType;
use crate::io::backend::Backend;
use crate::qmp::args::Args;
use crate::types::{Perm, ReqFlags, Role};

impl Layer {
    /// Executes the command. Main lock held.
    pub(crate) async fn block_resize(&self, mut args: Args<'_>) -> Result<(), QmpError> {
        let device = args.opt_str("device")?.unwrap_or_default();
        let name = args.opt_str("node-name")?.unwrap_or_default();
        let size = args.int("size")?;
        args.finish()?;
        let node = self.lookup(device, name)?;
        let Ok(size) = u64::try_from(size) else {
            return Err(QmpError::generic("Parameter 'size' expects a >0 size"));
        };
        self.op_blocked(node, OpType::Resize)?;
        let backend = Backend::new(self, node, None, Perm::RESIZE, Perm::all(), false)?;
        let drained = self.drained(node).await;
        let edge = backend.root_edge().expect("just attached");
        let result = {
            let _read = self.graph_read().await;
            self.truncate(edge, size, false, ReqFlags::empty()).await
        };
        if result.is_ok() {
            self.changed_lengths_follow(node);
        }
        drop(drained);
        backend.remove().await;
        result
    }

    /// The length changed at the node, or far below it through what passes it on.
    fn changed_lengths_follow(&self, node: crate::types::NodeId) {
        let mut at = self.node(node);
        while let Some(child) = at
            .file
            .get()
            .filter(|e| !self.edge(*e).role.contains(Role::METADATA))
        {
            let Some(child) = self.child(child) else { break };
            at = child;
        }
        self.lengths_follow_for_good(at.id);
    }
}
