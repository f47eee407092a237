//! Exports: where guests come in. An export is a backend with the permissions of an NBD export.
//!
//! Rules: it needs consistent reads, and writes if writable; it shares everything but resizing. Its root edge moves
//! with the graph, so a job's filter slides in below it. There is no NBD server here: whoever embeds the layer
//! serves [`Layer::export`]'s backend as it likes.

use std::rc::Rc;

use serde_json::{Value, json};

use crate::Layer;
use crate::dirty::commands::{Source, sources};
use crate::dirty::{DirtyBitmap, Use};
use crate::error::QmpError;
use crate::event::Event;
use crate::io::backend::{Backend, BackendRef};
use crate::jobs::id_wellformed;
use crate::qmp::args::Args;
use crate::types::{NodeId, Perm};

/// Arguments of block-export-add.
#[derive(Debug)]
pub(crate) struct ExportArgs {
    id: String,
    node_name: String,
    name: Option<String>,
    writable: bool,
    bitmaps: Vec<Source>,
}

impl ExportArgs {
    pub(crate) fn read(mut args: Args<'_>) -> Result<ExportArgs, QmpError> {
        args.require("type")?;
        args.opt_enum("type", &[("nbd", ())])?;
        let id = args.str("id")?.to_owned();
        args.opt_bool("fixed-iothread")?;
        args.opt_str("iothread")?;
        let node_name = args.str("node-name")?.to_owned();
        let writable = args.opt_bool("writable")?.unwrap_or(false);
        args.opt_bool("writethrough")?;
        args.opt_bool("allow-inactive")?;
        let name = args.opt_string("name")?;
        args.opt_str("description")?;
        let bitmaps = sources(&mut args)?;
        args.opt_bool("allocation-depth")?;
        args.finish()?;
        Ok(ExportArgs {
            id,
            node_name,
            name,
            writable,
            bitmaps,
        })
    }
}

#[derive(Debug)]
struct Export {
    id: Rc<str>,
    /// Name by which clients ask for it.
    name: Rc<str>,
    backend: BackendRef,
    /// Bitmaps that its clients see: they are busy, and their nodes are held.
    bitmaps: Vec<(NodeId, Rc<DirtyBitmap>)>,
    /// Being deleted: its last requests are still under way.
    shutting_down: bool,
}

/// All exports of a layer, oldest first.
#[derive(Debug, Default)]
pub struct Exports {
    list: Vec<Export>,
}

impl Layer {
    /// The backend of an export, by export name or else by id. `None` once it is being deleted.
    #[must_use]
    pub fn export(&self, id_or_name: &str) -> Option<Backend> {
        let exports = self.inner.exports.borrow();
        let live = || exports.list.iter().filter(|export| !export.shutting_down);
        live()
            .find(|export| *export.name == *id_or_name)
            .or_else(|| live().find(|export| *export.id == *id_or_name))
            .map(|export| export.backend.backend())
    }

    /// Adds an export. Main lock held.
    pub(crate) async fn export_add(&self, args: ExportArgs) -> Result<(), QmpError> {
        let refusal = |text: String| Err(QmpError::generic(text));
        if !id_wellformed(&args.id) {
            return refusal("Invalid block export id".to_owned());
        }
        if self
            .inner
            .exports
            .borrow()
            .list
            .iter()
            .any(|export| *export.id == *args.id)
        {
            return refusal(format!("Block export id '{}' is already in use", args.id));
        }
        let node = self.lookup("", &args.node_name)?;
        if args.writable && !self.node(node).is_writable() {
            return refusal("Cannot export read-only node as writable".to_owned());
        }
        let mut perm = Perm::CONSISTENT_READ;
        perm.set(Perm::WRITE, args.writable);
        let name = args.name.unwrap_or(args.node_name);
        let backend = Backend::new(self, node, None, perm, Perm::all() - Perm::RESIZE, true)?;
        if self
            .inner
            .exports
            .borrow()
            .list
            .iter()
            .any(|export| *export.name == *name)
        {
            backend.remove().await;
            return refusal(format!("NBD server already has export named '{name}'"));
        }
        let bitmaps = match self.shown_bitmaps(node, &args.bitmaps, args.writable) {
            Ok(bitmaps) => bitmaps,
            Err(refusal) => {
                backend.remove().await;
                return Err(refusal);
            }
        };
        for (node, bitmap) in &bitmaps {
            if !bitmap.busy.replace(true) {
                self.hold(*node);
            }
        }
        let export = Export {
            bitmaps,
            id: args.id.into(),
            name: name.into(),
            backend: backend.downgrade(),
            shutting_down: false,
        };
        self.inner.exports.borrow_mut().list.push(export);
        Ok(())
    }

    /// Deletes an export after its requests. Main lock held. Nobody is ever connected, so both modes are the same.
    pub(crate) async fn export_del(&self, id: &str) -> Result<(), QmpError> {
        let found = {
            let mut exports = self.inner.exports.borrow_mut();
            exports
                .list
                .iter_mut()
                .find(|export| *export.id == *id)
                .map(|export| {
                    (
                        std::mem::replace(&mut export.shutting_down, true),
                        export.backend.backend(),
                    )
                })
        };
        let Some((shutting_down, backend)) = found else {
            return Err(QmpError::generic(format!("Export '{id}' is not found")));
        };
        if shutting_down {
            return Err(QmpError::generic(format!(
                "Export '{id}' is already shutting down"
            )));
        }
        backend.remove().await;
        let gone: Vec<Export> = {
            let mut exports = self.inner.exports.borrow_mut();
            exports.list.extract_if(.., |export| *export.id == *id).collect()
        };
        for (node, bitmap) in gone.into_iter().flat_map(|export| export.bitmaps) {
            if bitmap.busy.replace(false) {
                self.unhold(node);
            }
        }
        self.emit(|| Event::Qmp {
            name: "BLOCK_EXPORT_DELETED",
            data: Rc::new(json!({"id": id})),
        });
        Ok(())
    }

    /// The bitmaps that are named, and their nodes: by name alone the first one on the way down the chain.
    fn shown_bitmaps(
        &self,
        node: NodeId,
        sources: &[Source],
        writable: bool,
    ) -> Result<Vec<(NodeId, Rc<DirtyBitmap>)>, QmpError> {
        let find = |source: &Source| {
            let own = matches!(source, Source::Here(_));
            let (owner, bitmap) = match source {
                Source::Of(node, name) => self.find_bitmap(node, name)?,
                Source::Here(name) => {
                    let chain = std::iter::successors(Some(node), |id| self.filter_or_cow(*id));
                    let mut nodes = chain.map(|id| self.node(id));
                    nodes
                        .find_map(|node| node.bitmap(name).map(|bitmap| (node, bitmap)))
                        .ok_or_else(|| QmpError::generic(format!("Bitmap '{name}' is not found")))?
                }
            };
            bitmap.check(Use::Look)?;
            if own && !writable && owner.is_writable() && bitmap.enabled.get() {
                let name = &bitmap.name;
                return Err(QmpError::generic(format!(
                    "Enabled bitmap '{name}' incompatible with readonly export"
                )));
            }
            Ok((owner.id, bitmap))
        };
        sources.iter().map(find).collect()
    }

    /// Deletes all exports. Main lock held.
    pub(crate) async fn close_exports(&self) {
        loop {
            let id = self
                .inner
                .exports
                .borrow()
                .list
                .first()
                .map(|export| Rc::clone(&export.id));
            let Some(id) = id else { return };
            self.export_del(&id)
                .await
                .expect("the export is listed and nobody else deletes it");
        }
    }

    pub(crate) fn query_exports(&self) -> Value {
        let exports = self.inner.exports.borrow();
        exports
            .list
            .iter()
            .map(|export| {
                let node = export
                    .backend
                    .backend()
                    .root()
                    .map_or_else(String::new, |id| self.node(id).name.to_string());
                json!({
                    "id": *export.id,
                    "type": "nbd",
                    "node-name": node,
                    "shutting-down": export.shutting_down,
                })
            })
            .collect()
    }
}
