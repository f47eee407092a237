//! What a backup does with the bitmap that it works by: while it runs, a successor records in the bitmap's place; in the
//! end the bitmap either lets the successor's record replace its own, or takes it in.
//!
//! Rules (io.md 6.2): the bitmap is busy and does not record meanwhile, the successor has no name. Whatever the end, no write
//! is missed: from the moment the successor is there each is recorded once, and the caller has drained the node.

use std::rc::Rc;

use super::DirtyBitmap;
use crate::error::QmpError;
use crate::graph::node::Node;

impl DirtyBitmap {
    /// From now on a successor records.
    pub(crate) fn create_successor(&self, node: &Node) -> Result<(), QmpError> {
        if self.busy.get() {
            let text = format!(
                "Cannot create a successor for a bitmap that is in-use by an operation: {}",
                self.name
            );
            return Err(QmpError::generic(text));
        }
        if self.successor.borrow().is_some() {
            return Err(QmpError::generic(
                "Cannot create a successor for a bitmap that already has one",
            ));
        }
        let child = DirtyBitmap::anonymous(self.granularity, self.length.get());
        child.enabled.set(self.enabled.replace(false));
        self.busy.set(true);
        let child = Rc::new(child);
        node.bitmaps.borrow_mut().insert(0, Rc::clone(&child));
        self.successor.replace(Some(child));
        Ok(())
    }

    /// The successor's record replaces the bitmap's, also in its place in the list.
    pub(crate) fn abdicate(self: &Rc<Self>, node: &Node) {
        let child = self.end_succession();
        self.bits.replace(child.bits.take());
        let mut bitmaps = node.bitmaps.borrow_mut();
        bitmaps.retain(|b| !Rc::ptr_eq(b, self));
        for bitmap in bitmaps.iter_mut().filter(|b| Rc::ptr_eq(b, &child)) {
            *bitmap = Rc::clone(self);
        }
    }

    /// The bitmap takes the successor's record in.
    pub(crate) fn reclaim(self: &Rc<Self>, node: &Node) {
        let child = self.end_succession();
        self.merge(&child);
        node.bitmaps.borrow_mut().retain(|b| !Rc::ptr_eq(b, &child));
    }

    fn end_succession(&self) -> Rc<DirtyBitmap> {
        let child = self.successor.take().expect("a bitmap in use has a successor");
        self.enabled.set(child.enabled.get());
        self.busy.set(false);
        child
    }
}
