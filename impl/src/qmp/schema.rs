//! The schema of blockdev-add: which options a driver has and their types.
//!
//! Rules: checked recursively before anything is opened, in QAPI's order: common options, those of the driver,
//! then whatever is unexpected. Only drivers of this layer are known words for `driver`.

use serde_json::Value;

use crate::drivers;
use crate::error::QmpError;
use crate::qmp::args::Args;

const DISCARD: [(&str, ()); 2] = [("ignore", ()), ("unmap", ())];
const DETECT_ZEROES: [(&str, ()); 3] = [("off", ()), ("on", ()), ("unmap", ())];
const ON_OFF_AUTO: [(&str, ()); 3] = [("auto", ()), ("on", ()), ("off", ())];
const AIO: [(&str, ()); 3] = [("threads", ()), ("native", ()), ("io_uring", ())];

/// Checks one `BlockdevOptions`.
pub(crate) fn check_blockdev(mut args: Args<'_>) -> Result<(), QmpError> {
    let driver = args.str("driver")?;
    if drivers::by_name(driver).is_none() {
        return Err(args.not_accepted("driver", driver));
    }
    args.opt_str("node-name")?;
    args.opt_enum("discard", &DISCARD)?;
    if let Some(mut cache) = args.opt_object("cache")? {
        cache.opt_bool("direct")?;
        cache.opt_bool("no-flush")?;
        cache.finish()?;
    }
    args.opt_bool("active")?;
    args.opt_bool("read-only")?;
    args.opt_bool("auto-read-only")?;
    args.opt_bool("force-share")?;
    args.opt_enum("detect-zeroes", &DETECT_ZEROES)?;
    match driver {
        "file" | "host_device" => check_file(&mut args)?,
        "null-co" => check_null(&mut args)?,
        "raw" => {
            reference(&mut args, "file", false)?;
            args.opt_int("offset")?;
            args.opt_int("size")?;
        }
        "qcow2" => check_qcow2(&mut args)?,
        "copy-on-read" => {
            reference(&mut args, "file", false)?;
            args.opt_str("bottom")?;
        }
        "throttle" => {
            args.str("throttle-group")?;
            reference(&mut args, "file", false)?;
        }
        "copy-before-write" => check_copy_before_write(&mut args)?,
        "snapshot-access" => reference(&mut args, "file", false)?,
        // A driver that this table does not know yet says itself what it does not understand.
        _ => return Ok(()),
    }
    args.finish()
}

fn check_file(args: &mut Args<'_>) -> Result<(), QmpError> {
    args.str("filename")?;
    args.opt_str("pr-manager")?;
    args.opt_enum("locking", &ON_OFF_AUTO)?;
    args.opt_enum("aio", &AIO)?;
    args.opt_int("aio-max-batch")?;
    args.opt_bool("drop-cache")?;
    args.opt_bool("x-check-cache-dropped")?;
    Ok(())
}

fn check_null(args: &mut Args<'_>) -> Result<(), QmpError> {
    // The daemon aborts on a negative size; here it is a refusal with the words it dies with.
    if let Some(size) = args.opt_int("size")?
        && size < 0
    {
        return Err(QmpError::generic(format!(
            "Value '{size}' is out of range for parameter 'size'"
        )));
    }
    args.opt_int("latency-ns")?;
    args.opt_bool("read-zeroes")?;
    Ok(())
}

fn check_copy_before_write(args: &mut Args<'_>) -> Result<(), QmpError> {
    reference(args, "file", false)?;
    reference(args, "target", false)?;
    if let Some(mut bitmap) = args.opt_object("bitmap")? {
        bitmap.str("node")?;
        bitmap.str("name")?;
        bitmap.finish()?;
    }
    args.opt_enum(
        "on-cbw-error",
        &[("break-guest-write", ()), ("break-snapshot", ())],
    )?;
    args.opt_u32("cbw-timeout")?;
    args.opt_u64("min-cluster-size")?;
    Ok(())
}

fn check_qcow2(args: &mut Args<'_>) -> Result<(), QmpError> {
    reference(args, "file", false)?;
    reference(args, "backing", true)?;
    for name in [
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "discard-no-unref",
    ] {
        args.opt_bool(name)?;
    }
    // `none`, `constant`, `cached`, `all`, or an object; the driver judges it.
    args.opt_value("overlap-check");
    for name in [
        "cache-size",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "cache-clean-interval",
    ] {
        args.opt_int(name)?;
    }
    Ok(())
}

/// A child: a node-name or a definition. Only `backing` may be absent or null.
fn reference(args: &mut Args<'_>, name: &'static str, optional: bool) -> Result<(), QmpError> {
    if !optional {
        args.require(name)?;
    }
    match args.opt_value(name) {
        None | Some((Value::String(_), _)) => Ok(()),
        Some((Value::Null, _)) if optional => Ok(()),
        Some((Value::Object(map), path)) => check_blockdev(Args::at(map, format!("{path}."))),
        // QEMU says no path here.
        Some(_) => Err(QmpError::generic(format!(
            "Invalid parameter type for '{name}', expected: {}",
            if optional {
                "BlockdevRefOrNull"
            } else {
                "BlockdevRef"
            }
        ))),
    }
}
