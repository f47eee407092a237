//! `object-add` and `object-del`, of throttle groups.
//!
//! Rules: `limits` is judged before the name is, the single values (`x-iops-total`, …) after it; what `limits` says wins.
//! A group that a node names cannot be deleted. Numbers are taken as unsigned, so a negative limit is a huge one.
//! Not here: other types of objects, what limits do to requests (the model has no time).

use std::rc::Rc;

use serde_json::Value;

use crate::command::args::Args;
use crate::command::is_well_formed;
use crate::refusal::Refusal;
use crate::world::World;

/// No average or burst rate is higher.
const VALUE_MAX: u64 = 1_000_000_000_000_000;

/// One limit: average rate, burst rate, seconds that a burst may last.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    average: u64,
    burst: u64,
    seconds: u32,
}

const UNLIMITED: Bucket = Bucket {
    average: 0,
    burst: 0,
    seconds: 1,
};

/// Names of the limits, in the order in which they are looked at: member of `limits`, the same alone.
const NAMES: [[&str; 6]; 6] = [
    [
        "bps-total",
        "bps-total-max",
        "bps-total-max-length",
        "x-bps-total",
        "x-bps-total-max",
        "x-bps-total-max-length",
    ],
    [
        "bps-read",
        "bps-read-max",
        "bps-read-max-length",
        "x-bps-read",
        "x-bps-read-max",
        "x-bps-read-max-length",
    ],
    [
        "bps-write",
        "bps-write-max",
        "bps-write-max-length",
        "x-bps-write",
        "x-bps-write-max",
        "x-bps-write-max-length",
    ],
    [
        "iops-total",
        "iops-total-max",
        "iops-total-max-length",
        "x-iops-total",
        "x-iops-total-max",
        "x-iops-total-max-length",
    ],
    [
        "iops-read",
        "iops-read-max",
        "iops-read-max-length",
        "x-iops-read",
        "x-iops-read-max",
        "x-iops-read-max-length",
    ],
    [
        "iops-write",
        "iops-write-max",
        "iops-write-max-length",
        "x-iops-write",
        "x-iops-write-max",
        "x-iops-write-max-length",
    ],
];

/// All limits of a group: bytes total, read, write; requests total, read, write.
#[derive(Clone, Debug)]
struct Limits {
    buckets: [Bucket; 6],
    /// Bytes that count as one request; 0: however long.
    request_size: u64,
}

/// What was said: average, burst and seconds of every limit, and the size of a request.
#[derive(Debug)]
struct Said {
    buckets: [[Option<i64>; 3]; 6],
    request_size: Option<i64>,
}

impl Said {
    fn parse(args: &Args<'_>, alone: bool) -> Result<Said, Refusal> {
        let mut buckets = [[None; 3]; 6];
        // The schema has requests first.
        for at in [3, 4, 5, 0, 1, 2] {
            for (value, name) in buckets[at].iter_mut().zip(names(at, alone)) {
                *value = args.opt_int(name)?;
            }
        }
        let request_size = args.opt_int(if alone { "x-iops-size" } else { "iops-size" })?;
        Ok(Said {
            buckets,
            request_size,
        })
    }
}

fn names(limit: usize, alone: bool) -> &'static [&'static str] {
    let (together, apart) = NAMES[limit].split_at(3);
    if alone { apart } else { together }
}

impl Limits {
    fn take(&mut self, said: &Said, alone: bool) -> Result<(), Refusal> {
        let numbers = said.buckets.iter().flatten().chain([&said.request_size]);
        if alone && numbers.flatten().any(|value| *value < 0) {
            return Err(Refusal::new("Property values cannot be negative"));
        }
        for (at, (bucket, said)) in self.buckets.iter_mut().zip(said.buckets).enumerate() {
            let [average, burst, seconds] = said;
            bucket.average = average.map_or(bucket.average, i64::cast_unsigned);
            bucket.burst = burst.map_or(bucket.burst, i64::cast_unsigned);
            let Some(seconds) = seconds else { continue };
            if seconds > i64::from(u32::MAX) {
                let (name, gap) = (names(at, alone)[2], if alone { "" } else { " " });
                return Err(Refusal::new(format!(
                    "{name} value must be in the{gap}range [0, {}]",
                    u32::MAX
                )));
            }
            // A negative one wraps.
            bucket.seconds = u32::try_from(seconds.cast_unsigned() & u64::from(u32::MAX)).expect("32 bits");
        }
        self.request_size = said.request_size.map_or(self.request_size, i64::cast_unsigned);
        Ok(())
    }

    /// The limits go together.
    fn check(&self) -> Result<(), Refusal> {
        let conflict = |of: fn(&Bucket) -> u64| {
            self.buckets
                .chunks(3)
                .any(|kind| of(&kind[0]) != 0 && (of(&kind[1]) != 0 || of(&kind[2]) != 0))
        };
        if conflict(|bucket| bucket.average) || conflict(|bucket| bucket.burst) {
            return Err(Refusal::new(
                "bps/iops/max total values and read/write values cannot be used at the same time",
            ));
        }
        if self.request_size != 0 && self.buckets[3..].iter().all(|bucket| bucket.average == 0) {
            return Err(Refusal::new("iops size requires an iops value to be set"));
        }
        self.buckets.iter().try_for_each(|bucket| bucket.check())
    }
}

impl Bucket {
    fn check(self) -> Result<(), Refusal> {
        let Bucket {
            average,
            burst,
            seconds,
        } = self;
        let wrong = if average > VALUE_MAX || burst > VALUE_MAX {
            return Err(Refusal::new(format!(
                "bps/iops/max values must be within [0, {VALUE_MAX}]"
            )));
        } else if seconds == 0 {
            "the burst length cannot be 0"
        } else if seconds > 1 && burst == 0 {
            "burst length set without burst rate"
        } else if burst != 0 && average == 0 {
            "bps_max/iops_max require corresponding bps/iops values"
        } else if burst != 0 && burst < average {
            "bps_max/iops_max cannot be lower than bps/iops"
        } else if seconds > 1 && burst > VALUE_MAX / u64::from(seconds) {
            "burst length too high for this burst rate"
        } else {
            return Ok(());
        };
        Err(Refusal::new(wrong))
    }
}

pub(crate) fn object_add(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    args.one_of("qom-type", &["throttle-group"])?;
    let id = args.str("id")?;
    let together = match args.opt_object("limits")? {
        Some(members) => {
            let said = Said::parse(&members, false)?;
            members.finish()?;
            Some(said)
        }
        None => None,
    };
    let alone = Said::parse(&args, true)?;
    args.finish()?;
    if !is_well_formed(id) {
        return Err(Refusal::new("Parameter 'id' expects an identifier"));
    }
    let mut limits = Limits {
        buckets: [UNLIMITED; 6],
        request_size: 0,
    };
    limits.take(&alone, true)?;
    if let Some(together) = together {
        limits.take(&together, false)?;
        limits.check()?;
    }
    if world.graph.has_group(id) {
        return Err(Refusal::new(format!(
            "attempt to add duplicate property '{id}' to object (type 'container')"
        )));
    }
    limits.check()?;
    world.graph.groups.insert(Rc::from(id));
    Ok(())
}

pub(crate) fn object_del(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let id = args.str("id")?;
    args.finish()?;
    if !world.graph.has_group(id) {
        return Err(Refusal::new(format!("object '{id}' not found")));
    }
    if world.graph.group_is_in_use(id) {
        return Err(Refusal::new(format!(
            "object '{id}' is in use, can not be deleted"
        )));
    }
    world.graph.groups.remove(id);
    Ok(())
}
