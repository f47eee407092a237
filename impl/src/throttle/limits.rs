//! What a throttle group may be configured with (QAPI `ThrottleLimits`), and what it may not.
//!
//! Rules: each of bytes and requests has a limit in total or limits for reads and writes, never both. A burst is above the
//! average. Members of `limits` and the single properties `x-…` mean the same and differ in what is told of mistakes.

use crate::error::QmpError;
use crate::qmp::args::Args;

/// No rate is higher.
pub(crate) const RATE_MAX: u64 = 1_000_000_000_000_000;

/// Limits of one kind: total, reads, writes.
pub(crate) const KINDS: usize = 3;

/// One limit. Rates in bytes or requests per second; 0: none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rate {
    /// In the long run.
    pub(crate) average: u64,
    /// In a burst.
    pub(crate) burst: u64,
    /// How long a burst may last, seconds.
    pub(crate) seconds: u32,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate {
            average: 0,
            burst: 0,
            seconds: 1,
        }
    }
}

/// All limits of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Limits {
    /// Bytes: total, read, written.
    pub(crate) bytes: [Rate; KINDS],
    /// Requests: total, reads, writes.
    pub(crate) requests: [Rate; KINDS],
    /// Bytes that count as one request; 0: every request counts once.
    pub(crate) request_size: u64,
}

type Triple = [&'static str; 3];

const BYTES: [Triple; KINDS] = [
    ["bps-total", "bps-total-max", "bps-total-max-length"],
    ["bps-read", "bps-read-max", "bps-read-max-length"],
    ["bps-write", "bps-write-max", "bps-write-max-length"],
];
const REQUESTS: [Triple; KINDS] = [
    ["iops-total", "iops-total-max", "iops-total-max-length"],
    ["iops-read", "iops-read-max", "iops-read-max-length"],
    ["iops-write", "iops-write-max", "iops-write-max-length"],
];
const X_BYTES: [Triple; KINDS] = [
    ["x-bps-total", "x-bps-total-max", "x-bps-total-max-length"],
    ["x-bps-read", "x-bps-read-max", "x-bps-read-max-length"],
    ["x-bps-write", "x-bps-write-max", "x-bps-write-max-length"],
];
const X_REQUESTS: [Triple; KINDS] = [
    ["x-iops-total", "x-iops-total-max", "x-iops-total-max-length"],
    ["x-iops-read", "x-iops-read-max", "x-iops-read-max-length"],
    ["x-iops-write", "x-iops-write-max", "x-iops-write-max-length"],
];

/// What a command says of one limit: average, burst, seconds.
type SaidRate = [Option<i64>; 3];

/// What a command says of limits.
#[derive(Debug)]
pub(crate) struct Said {
    single: bool,
    bytes: [SaidRate; KINDS],
    requests: [SaidRate; KINDS],
    request_size: Option<i64>,
}

impl Said {
    /// Reads the members of `limits`, or (`single`) the properties `x-…`.
    ///
    /// # Errors
    /// One is no integer.
    pub(crate) fn read(args: &mut Args<'_>, single: bool) -> Result<Said, QmpError> {
        let (bytes, requests, size) = if single {
            (&X_BYTES, &X_REQUESTS, "x-iops-size")
        } else {
            (&BYTES, &REQUESTS, "iops-size")
        };
        let requests = Said::rates(args, requests)?;
        Ok(Said {
            single,
            bytes: Said::rates(args, bytes)?,
            requests,
            request_size: args.opt_int(size)?,
        })
    }

    fn rates(args: &mut Args<'_>, names: &[Triple; KINDS]) -> Result<[SaidRate; KINDS], QmpError> {
        let mut said = [[None; 3]; KINDS];
        for (rate, names) in said.iter_mut().zip(names) {
            for (value, name) in rate.iter_mut().zip(names) {
                *value = args.opt_int(name)?;
            }
        }
        Ok(said)
    }

    fn is_negative(&self) -> bool {
        let rates = self.bytes.iter().chain(&self.requests).flatten();
        rates
            .chain([&self.request_size])
            .any(|value| value.is_some_and(|value| value < 0))
    }
}

impl Limits {
    /// Takes over what was said. Negative numbers wrap, as far as they are let through.
    ///
    /// # Errors
    /// A negative property, or a burst of more seconds than there can be.
    pub(crate) fn take(&mut self, said: &Said) -> Result<(), QmpError> {
        if said.single && said.is_negative() {
            return Err(QmpError::generic("Property values cannot be negative"));
        }
        let (bytes, requests) = if said.single {
            (&X_BYTES, &X_REQUESTS)
        } else {
            (&BYTES, &REQUESTS)
        };
        for (at, rate) in self.bytes.iter_mut().enumerate() {
            rate.take(said.bytes[at], bytes[at][2], said.single)?;
        }
        for (at, rate) in self.requests.iter_mut().enumerate() {
            rate.take(said.requests[at], requests[at][2], said.single)?;
        }
        if let Some(size) = said.request_size {
            self.request_size = size.cast_unsigned();
        }
        Ok(())
    }

    /// Whether the limits can be kept all at once.
    ///
    /// # Errors
    /// They cannot.
    pub(crate) fn check(&self) -> Result<(), QmpError> {
        let kinds = [&self.bytes, &self.requests];
        let both = |of: fn(&Rate) -> u64| {
            kinds
                .iter()
                .any(|[total, apart @ ..]| of(total) > 0 && apart.iter().any(|rate| of(rate) > 0))
        };
        if both(|rate| rate.average) || both(|rate| rate.burst) {
            return Err(QmpError::generic(
                "bps/iops/max total values and read/write values cannot be used at the same time",
            ));
        }
        if self.request_size > 0 && self.requests.iter().all(|rate| rate.average == 0) {
            return Err(QmpError::generic("iops size requires an iops value to be set"));
        }
        kinds.into_iter().flatten().try_for_each(Rate::check)
    }
}

impl Rate {
    fn take(&mut self, said: SaidRate, seconds_name: &str, single: bool) -> Result<(), QmpError> {
        let [average, burst, seconds] = said;
        if let Some(average) = average {
            self.average = average.cast_unsigned();
        }
        if let Some(burst) = burst {
            self.burst = burst.cast_unsigned();
        }
        let Some(seconds) = seconds else { return Ok(()) };
        let most = u32::MAX;
        if seconds > i64::from(most) {
            // One of the two texts of QEMU lacks a blank.
            let blank = if single { "" } else { " " };
            return Err(QmpError::generic(format!(
                "{seconds_name} value must be in the{blank}range [0, {most}]"
            )));
        }
        let low = seconds.cast_unsigned() & u64::from(most);
        self.seconds = u32::try_from(low).expect("32 bits");
        Ok(())
    }

    fn check(&self) -> Result<(), QmpError> {
        let refuse = |text: &str| Err(QmpError::generic(text));
        if self.average.max(self.burst) > RATE_MAX {
            return Err(QmpError::generic(format!(
                "bps/iops/max values must be within [0, {RATE_MAX}]"
            )));
        }
        match (self.seconds, self.burst) {
            (0, _) => refuse("the burst length cannot be 0"),
            (2.., 0) => refuse("burst length set without burst rate"),
            (_, 0) => Ok(()),
            _ if self.average == 0 => refuse("bps_max/iops_max require corresponding bps/iops values"),
            (_, burst) if burst < self.average => refuse("bps_max/iops_max cannot be lower than bps/iops"),
            (2.., burst) if burst > RATE_MAX / u64::from(self.seconds) => {
                refuse("burst length too high for this burst rate")
            }
            _ => Ok(()),
        }
    }
}
