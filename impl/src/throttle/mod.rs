//! Throttle groups: limits that several nodes share, and requests that wait for their turn.
//!
//! Rules: a group belongs to the layer, by name; nodes of driver `throttle` join it and leave it. What a group allows
//! depends on the environment's clock alone. Who does what: `limits` what may be configured; `bucket` how much has gone
//! through; `group` who waits for whom.
//! Not here: new limits for a group that exists, and asking for them (QEMU: `qom-set`, `qom-get`).

mod bucket;
mod group;
mod limits;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

pub use group::Group;
pub(crate) use limits::{Limits, Said};

use crate::Layer;
use crate::error::QmpError;

/// Reads wait for reads, everything that changes data for what changes data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes, zero writes, discards.
    Write,
}

/// The groups of a layer, by name.
#[derive(Debug, Default)]
pub(crate) struct Groups(RefCell<BTreeMap<Rc<str>, Rc<Group>>>);

impl Layer {
    /// The throttle group of this name.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn throttle_group(&self, name: &str) -> Result<Rc<Group>, QmpError> {
        let groups = self.inner.throttle.0.borrow();
        groups
            .get(name)
            .cloned()
            .ok_or_else(|| QmpError::generic(format!("Throttle group '{name}' does not exist")))
    }

    /// Names of the throttle groups, sorted.
    #[must_use]
    pub fn throttle_groups(&self) -> Vec<Rc<str>> {
        self.inner.throttle.0.borrow().keys().cloned().collect()
    }

    /// A new group.
    ///
    /// # Errors
    /// There is one of this name.
    pub(crate) fn add_throttle_group(&self, name: &str, limits: Limits) -> Result<(), QmpError> {
        let mut groups = self.inner.throttle.0.borrow_mut();
        if groups.contains_key(name) {
            return Err(QmpError::generic(format!(
                "attempt to add duplicate property '{name}' to object (type 'container')"
            )));
        }
        groups.insert(name.into(), Rc::new(Group::new(name, limits)));
        Ok(())
    }

    /// Deletes a group without nodes.
    ///
    /// # Errors
    /// There is none of this name, or a node belongs to it.
    pub(crate) fn del_throttle_group(&self, name: &str) -> Result<(), QmpError> {
        let mut groups = self.inner.throttle.0.borrow_mut();
        let Some(group) = groups.get(name) else {
            return Err(QmpError::generic(format!("object '{name}' not found")));
        };
        if group.is_in_use() {
            return Err(QmpError::generic(format!(
                "object '{name}' is in use, can not be deleted"
            )));
        }
        groups.remove(name);
        Ok(())
    }

    /// All groups go, at the end of the layer.
    pub(crate) fn drop_throttle_groups(&self) {
        let mut groups = self.inner.throttle.0.borrow_mut();
        groups.retain(|_, group| group.is_in_use());
        assert!(groups.is_empty(), "throttle groups are still in use: {groups:?}");
    }
}
