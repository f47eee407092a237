//! `object-add` and `object-del`. The only type of object here is `throttle-group`.
//!
//! Rules: refusals in QEMU's order: the schema, the id, the properties `x-…`, `limits`, the name that is taken.

use crate::Layer;
use crate::error::QmpError;
use crate::jobs::id_wellformed;
use crate::qmp::args::Args;
use crate::throttle::{Limits, Said};

impl Layer {
    pub(crate) fn object_add(&self, mut args: Args<'_>) -> Result<(), QmpError> {
        args.require("qom-type")?;
        args.opt_enum("qom-type", &[("throttle-group", ())])?;
        let id = args.str("id")?;
        let mut together = None;
        if let Some(mut members) = args.opt_object("limits")? {
            together = Some(Said::read(&mut members, false)?);
            members.finish()?;
        }
        let single = Said::read(&mut args, true)?;
        args.finish()?;
        if !id_wellformed(id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        let mut limits = Limits::default();
        limits.take(&single)?;
        if let Some(together) = together {
            limits.take(&together)?;
            limits.check()?;
        }
        if self.throttle_group(id).is_err() {
            // A name that is taken is told before what single properties make of each other.
            limits.check()?;
        }
        self.add_throttle_group(id, limits)
    }

    pub(crate) fn object_del(&self, mut args: Args<'_>) -> Result<(), QmpError> {
        let id = args.str("id")?;
        args.finish()?;
        self.del_throttle_group(id)
    }
}
