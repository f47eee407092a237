//! What a scenario must obey beyond its shape, so that everything behind this door may rely on it.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Action, Fill, Format, GuestOp, Image, Range, Scenario, Stored, VERSION};
use crate::finish::STATUSES;

/// Largest virtual size, bytes.
pub const MAX_SIZE: u64 = 1 << 30;
/// Most clusters of an image that nothing refers to.
pub(super) const MAX_FREE: u32 = 64;
/// Most data that the fills of one scenario may lay out, bytes.
pub const MAX_FILLED: u64 = 1 << 30;
/// Most steps.
pub const MAX_STEPS: usize = 100_000;
/// Most images.
pub const MAX_IMAGES: usize = 1024;
/// Longest guest request, bytes.
pub const MAX_REQUEST: u64 = 64 << 20;

/// One step on the way to a place in the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seg {
    /// Member of an object.
    Key(&'static str),
    /// Element of an array.
    Index(usize),
}

/// What is wrong and where in the document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// From the top.
    pub path: Vec<Seg>,
    /// What was expected, what is there.
    pub message: String,
}

fn check(ok: bool, path: &[Seg], message: impl FnOnce() -> String) -> Result<(), Invalid> {
    if ok {
        Ok(())
    } else {
        Err(Invalid {
            path: path.to_vec(),
            message: message(),
        })
    }
}

/// Checks everything.
///
/// # Errors
/// The first thing that is wrong.
pub fn validate(scenario: &Scenario) -> Result<(), Invalid> {
    use Seg::{Index, Key};
    let version = scenario.version;
    check(version == VERSION, &[Key("version")], || {
        format!("this build reads version {VERSION}, not {version}")
    })?;
    let grain = scenario.grain;
    check(
        grain.is_power_of_two() && (16..=4096).contains(&grain),
        &[Key("grain")],
        || format!("expected a power of two from 16 to 4096, not {grain}"),
    )?;
    let disk = scenario.disk;
    check(
        [1, 512, 4096].contains(&disk.alignment),
        &[Key("disk"), Key("alignment")],
        || format!("expected 1, 512 or 4096, not {}", disk.alignment),
    )?;
    check(
        (1..=64).contains(&disk.job_parallelism),
        &[Key("disk"), Key("job-parallelism")],
        || format!("expected 1 to 64, not {}", disk.job_parallelism),
    )?;
    let images = &scenario.images;
    if let Some(faults) = disk.faults {
        let key = |key| [Key("disk"), Key("faults"), Key(key)];
        check(faults.one_in >= 1, &key("one-in"), || {
            "expected at least 1, not 0".into()
        })?;
        let image = faults.image.unwrap_or(0) as usize;
        check(
            faults.image.is_none() || image < images.len(),
            &key("image"),
            || format!("there is no image {image}"),
        )?;
    }
    check(images.len() <= MAX_IMAGES, &[Key("images")], || {
        format!("{} images, at most {MAX_IMAGES}", images.len())
    })?;
    let mut names = BTreeSet::new();
    let mut filled = 0u64;
    for (i, image) in images.iter().enumerate() {
        let at = [Key("images"), Index(i)];
        check(names.insert(&image.file), &[at[0], at[1], Key("file")], || {
            format!("another image is called '{}' already", image.file)
        })?;
        check_image(image, grain, &at)?;
        filled = filled.saturating_add(image.fill.iter().map(|f| f.length).sum());
        check(filled <= MAX_FILLED, &[at[0], at[1], Key("fill")], || {
            format!("the fills lay out more than {MAX_FILLED} bytes in all")
        })?;
    }
    let steps = scenario.steps.len();
    check(steps <= MAX_STEPS, &[Key("steps")], || {
        format!("{steps} steps, at most {MAX_STEPS}")
    })?;
    for (i, step) in scenario.steps.iter().enumerate() {
        let at = [Key("steps"), Index(i)];
        check(
            (1..=64).contains(&step.actor.len()),
            &[at[0], at[1], Key("actor")],
            || "expected a name of 1 to 64 bytes".into(),
        )?;
        check_action(&step.action, grain, &at)?;
    }
    Ok(())
}

fn check_image(image: &Image, grain: u32, at: &[Seg; 2]) -> Result<(), Invalid> {
    let key = |key| [at[0], at[1], Seg::Key(key)];
    let plain = (1..=255).contains(&image.file.len()) && !image.file.contains('\0');
    check(plain, &key("file"), || {
        "expected a name of 1 to 255 bytes, none of them 0".into()
    })?;
    check(image.size <= MAX_SIZE, &key("size"), || {
        format!("{} bytes, at most {MAX_SIZE}", image.size)
    })?;
    match image.format {
        Format::Raw => {
            let none = image.backing_file.is_none() && image.backing_format.is_none();
            check(none, &key("backing-file"), || {
                "a raw image has no backing file".into()
            })?;
        }
        Format::Qcow2 => check_qcow2(image, at)?,
    }
    check(image.free <= MAX_FREE, &key("free"), || {
        format!("{} free clusters, at most {MAX_FREE}", image.free)
    })?;
    check(image.fill.len() <= 65535, &key("fill"), || {
        format!("{} fills, at most 65535", image.fill.len())
    })?;
    for (i, fill) in image.fill.iter().enumerate() {
        check_fill(
            image,
            fill,
            grain,
            &[at[0], at[1], Seg::Key("fill"), Seg::Index(i)],
        )?;
    }
    Ok(())
}

fn check_qcow2(image: &Image, at: &[Seg; 2]) -> Result<(), Invalid> {
    let key = |key| [at[0], at[1], Seg::Key(key)];
    let (cluster, refcount) = (image.cluster_size, image.refcount_bits);
    check(image.size.is_multiple_of(512), &key("size"), || {
        format!("{} is not a multiple of 512", image.size)
    })?;
    check(
        cluster.is_power_of_two() && (512..=2 << 20).contains(&cluster),
        &key("cluster-size"),
        || format!("expected a power of two from 512 to 2 MiB, not {cluster}"),
    )?;
    check((2..=3).contains(&image.compat), &key("compat"), || {
        format!("expected 2 or 3, not {}", image.compat)
    })?;
    check(
        refcount.is_power_of_two() && refcount <= 64,
        &key("refcount-bits"),
        || format!("expected a power of two from 1 to 64, not {refcount}"),
    )?;
    check(image.compat == 3 || refcount == 16, &key("refcount-bits"), || {
        "version 2 has 16 bits".into()
    })?;
    let format = image.backing_format.as_ref().map_or(0, String::len);
    check(format < 16, &key("backing-format"), || "at most 15 bytes".into())?;
    check(
        format == 0 || image.backing_file.is_some(),
        &key("backing-format"),
        || "a backing format without a backing file".into(),
    )?;
    if let Some(name) = &image.backing_file {
        // Header, one extension with its head, the end mark.
        let room = (cluster as usize - 112 - 8 - 16 - 8).min(1023);
        check((1..=room).contains(&name.len()), &key("backing-file"), || {
            format!("expected a name of 1 to {room} bytes, so that the header fits its cluster")
        })?;
    }
    Ok(())
}

fn check_fill(image: &Image, fill: &Fill, grain: u32, at: &[Seg; 4]) -> Result<(), Invalid> {
    let key = |key| [at[0], at[1], at[2], at[3], Seg::Key(key)];
    let grain = u64::from(grain);
    check(fill.offset.is_multiple_of(grain), &key("offset"), || {
        format!("{} is not a multiple of the grain {grain}", fill.offset)
    })?;
    let end = fill.offset.checked_add(fill.length);
    check(
        fill.length > 0 && end.is_some_and(|e| e <= image.size),
        &key("length"),
        || {
            format!(
                "expected at least 1 byte, and an end within the image's {} bytes",
                image.size
            )
        },
    )?;
    check(
        fill.length.is_multiple_of(grain) || end == Some(image.size),
        &key("length"),
        || {
            format!(
                "{} is neither a multiple of the grain {grain} nor up to the image's end",
                fill.length
            )
        },
    )?;
    let fits = match fill.stored {
        Stored::Data => true,
        Stored::Zero => image.format == Format::Raw || image.compat == 3,
        Stored::ZeroAllocated => image.format == Format::Qcow2 && image.compat == 3,
        Stored::Compressed => image.format == Format::Qcow2,
    };
    check(fits, &key("stored"), || {
        format!("{:?} does not exist in this format and version", fill.stored)
    })
}

fn check_action(action: &Action, grain: u32, at: &[Seg; 2]) -> Result<(), Invalid> {
    match action {
        Action::Guest { op, .. } => {
            let (name, range) = match op {
                GuestOp::Read(r) => ("read", r),
                GuestOp::Write(r) => ("write", r),
                GuestOp::WriteFua(r) => ("write-fua", r),
                GuestOp::WriteZeroes(r) => ("write-zeroes", r),
                GuestOp::WriteZeroesUnmap(r) => ("write-zeroes-unmap", r),
                GuestOp::Discard(r) => ("discard", r),
                GuestOp::BlockStatus(r) => ("block-status", r),
                GuestOp::Flush => return Ok(()),
            };
            check_range(range, grain, &[at[0], at[1], Seg::Key("do"), Seg::Key(name)])
        }
        Action::WaitJob { job } => {
            let known = STATUSES.iter().any(|(_, name)| *name == job.status);
            check(
                known,
                &[at[0], at[1], Seg::Key("wait-job"), Seg::Key("status")],
                || {
                    let names: Vec<&str> = STATUSES.iter().map(|(_, name)| *name).collect();
                    format!("expected one of {}, not '{}'", names.join(", "), job.status)
                },
            )
        }
        Action::Settle { settle } => check(settle.is_empty(), &[at[0], at[1], Seg::Key("settle")], || {
            "expected an empty object".into()
        }),
        Action::Command { execute, arguments } if execute == "block_resize" => {
            let size = arguments.get("size").and_then(Value::as_u64).unwrap_or(0);
            let at = [at[0], at[1], Seg::Key("arguments"), Seg::Key("size")];
            check(size <= MAX_SIZE, &at, || {
                format!("{size} bytes, at most {MAX_SIZE}")
            })
        }
        Action::Command { .. } | Action::DrainBegin { .. } | Action::DrainEnd { .. } => Ok(()),
    }
}

fn check_range(range: &Range, grain: u32, at: &[Seg; 4]) -> Result<(), Invalid> {
    let key = |key| [at[0], at[1], at[2], at[3], Seg::Key(key)];
    let grain = u64::from(grain);
    for (name, value) in [("offset", range.offset), ("length", range.length)] {
        check(value.is_multiple_of(grain), &key(name), || {
            format!("{value} is not a multiple of the grain {grain}")
        })?;
    }
    check(range.length <= MAX_REQUEST, &key("length"), || {
        format!("{} bytes, at most {MAX_REQUEST}", range.length)
    })?;
    // Requests past the end of a node are fine, they fail; requests past the end of numbers are not.
    let end = range.offset.checked_add(range.length);
    check(
        end.is_some_and(|e| e <= i64::MAX.unsigned_abs()),
        &key("offset"),
        || "the request ends past 2^63".into(),
    )
}
