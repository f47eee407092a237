//! Scenarios: what a scenario file says. Images to create, then steps by named actors, then the recorded choices.
//!
//! Rules: monitor steps are QMP commands verbatim; guest steps name an export (an export's name is its node's name
//! unless the command says otherwise). Each actor takes its steps in order; which actor goes next is a choice, 0 =
//! the order of the file. A step with `"wait": false` is left in flight. Steps of the actor `setup` are barriers: they run
//! alone, in file order.
//! Shape: JSON with a `version`; the published schema is `schema`.

pub mod listing;
pub mod parse;
pub mod schema;
pub mod validate;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::history::FaultKind;

/// The format version this build reads and writes.
pub const VERSION: u32 = 1;

/// One scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scenario {
    /// Format version, [`VERSION`].
    pub version: u32,
    /// A title for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The seed that generated it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Unit of guest requests and of the data oracle, bytes: a power of two, 16 ..= 4096. Every guest offset and
    /// length is a multiple of it.
    pub grain: u32,
    /// The storage under the images.
    #[serde(default)]
    pub disk: Disk,
    /// Images that exist before the first step, base first.
    pub images: Vec<Image>,
    /// What the actors do.
    pub steps: Vec<Step>,
    /// Commands that the model does not know may be among the steps: `compare` judges by what the guests see.
    #[serde(default, skip_serializing_if = "is_false")]
    pub beyond_model: bool,
    /// The recorded choices; missing ones are 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<u32>,
    /// Where the subject has known defects, steps that would meet one are passed over, or put off until they do not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub steer: bool,
    /// What replay is expected to find: an oracle's name, or absent for a pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
}

impl Default for Scenario {
    /// Nothing happens.
    fn default() -> Scenario {
        Scenario {
            version: VERSION,
            title: None,
            seed: None,
            grain: 512,
            disk: Disk::default(),
            images: Vec::new(),
            steps: Vec::new(),
            beyond_model: false,
            choices: Vec::new(),
            steer: false,
            expect: None,
        }
    }
}

/// Properties of the simulated storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Disk {
    /// Request alignment, bytes: 1 (buffered), 512 or 4096 (direct).
    #[serde(default = "one")]
    pub alignment: u32,
    /// Chunks of one job in flight together.
    #[serde(default = "one")]
    pub job_parallelism: u32,
    /// Zero writes and discards are supported cheaply.
    #[serde(default = "yes")]
    pub unmap: bool,
    /// Which requests may fail; absent: none. Whether one does is a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faults: Option<Faults>,
    /// The power fails when so many storage requests have ended after the setup; absent: it does not. What survives is a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_cut: Option<u32>,
    /// `power-cut` counts flushes only: the power fails instead of the end of one, when nothing is durable yet of what it is for.
    #[serde(default, skip_serializing_if = "is_false")]
    pub cut_at_flush: bool,
    /// The images are block devices. Set by the target that runs the scenario, never by a file.
    #[serde(skip)]
    pub devices: bool,
}

fn one() -> u32 {
    1
}
fn yes() -> bool {
    true
}

impl Default for Disk {
    fn default() -> Disk {
        Disk {
            alignment: 1,
            job_parallelism: 1,
            unmap: true,
            faults: None,
            power_cut: None,
            cut_at_flush: false,
            devices: false,
        }
    }
}

/// Which storage requests may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Faults {
    /// About one in so many of them does, where choices are drawn.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub one_in: u32,
    /// So many of the requests that match are spared first.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub from: u32,
    /// From the one with this number on they are spared again; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u32>,
    /// Only on this image, by its place in `images`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<u32>,
    /// Reads.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub reads: bool,
    /// Whatever changes a file.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub writes: bool,
    /// Flushes.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub flushes: bool,
    /// Also while steps of `setup` are under way.
    #[serde(default, skip_serializing_if = "is_false")]
    pub setup: bool,
}

impl Faults {
    /// Whether requests of this kind may fail.
    #[must_use]
    pub fn concerns(&self, kind: FaultKind) -> bool {
        match kind {
            FaultKind::Read => self.reads,
            FaultKind::Flush => self.flushes,
            FaultKind::Write | FaultKind::WriteZeroes | FaultKind::Discard | FaultKind::Truncate => {
                self.writes
            }
        }
    }
}

impl Default for Faults {
    /// Everything after the setup, always.
    fn default() -> Faults {
        Faults {
            one_in: 1,
            from: 0,
            until: None,
            image: None,
            reads: true,
            writes: true,
            flushes: true,
            setup: false,
        }
    }
}

fn is_one(v: &u32) -> bool {
    *v == 1
}
fn is_zero(v: &u32) -> bool {
    *v == 0
}
fn is_false(v: &bool) -> bool {
    !*v
}

/// Image formats that can be laid out before a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A flat file.
    Raw,
    /// qcow2.
    Qcow2,
}

impl Format {
    /// The driver for it, which is also what headers call it.
    #[must_use]
    pub const fn driver(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// An image file that exists before the first step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Image {
    /// File name, as `filename` in blockdev-add uses it.
    pub file: String,
    /// Format.
    pub format: Format,
    /// Virtual size, bytes. qcow2: a multiple of 512. raw: any.
    pub size: u64,
    /// qcow2 cluster size, bytes.
    #[serde(default = "default_cluster", skip_serializing_if = "is_default_cluster")]
    pub cluster_size: u32,
    /// qcow2 version, 2 or 3.
    #[serde(default = "default_compat", skip_serializing_if = "is_default_compat")]
    pub compat: u32,
    /// qcow2 refcount width, bits: 1 ..= 64, a power of two.
    #[serde(default = "default_refcount", skip_serializing_if = "is_default_refcount")]
    pub refcount_bits: u32,
    /// Backing file name in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// Backing format in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<String>,
    /// What is in it, later entries over earlier ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fill: Vec<Fill>,
    /// qcow2: so many host clusters at the end that nothing refers to. Two of three hold garbage, the others zeroes; they
    /// are the first to be taken.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub free: u32,
}

fn default_cluster() -> u32 {
    65536
}
fn is_default_cluster(v: &u32) -> bool {
    *v == 65536
}
fn default_compat() -> u32 {
    3
}
fn is_default_compat(v: &u32) -> bool {
    *v == 3
}
fn default_refcount() -> u32 {
    16
}
fn is_default_refcount(v: &u32) -> bool {
    *v == 16
}

/// How a range of an image is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stored {
    /// Data, stamped.
    Data,
    /// Reads as zero, no host cluster (qcow2 v3); zeroes (raw).
    Zero,
    /// Reads as zero, host cluster reserved (qcow2 v3 only).
    ZeroAllocated,
    /// Data, compressed (qcow2 only), stamped.
    Compressed,
}

/// A filled range. In a qcow2 image whole clusters become allocated; the part of a cluster outside the range is zero.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Fill {
    /// Start, bytes, multiple of the grain.
    pub offset: u64,
    /// Length, bytes, multiple of the grain (the last one may end at the image's end).
    pub length: u64,
    /// How.
    pub stored: Stored,
}

/// A range of bytes in a guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Range {
    /// Start, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub length: u64,
}

/// What a guest asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestOp {
    /// Read and check.
    Read(Range),
    /// Write this step's stamp.
    Write(Range),
    /// Write this step's stamp, durable on completion.
    WriteFua(Range),
    /// Write zeroes.
    WriteZeroes(Range),
    /// Write zeroes, deallocating where possible.
    WriteZeroesUnmap(Range),
    /// Discard.
    Discard(Range),
    /// Flush.
    Flush,
    /// Ask for the block status of the range and check it.
    BlockStatus(Range),
}

/// The actions of a transaction, with their arguments; nothing for another command.
pub(crate) fn actions<'a>(
    execute: &str,
    arguments: &'a Map<String, Value>,
) -> impl DoubleEndedIterator<Item = (&'a str, &'a Map<String, Value>)> + use<'a> {
    let list = arguments.get("actions").and_then(Value::as_array);
    let list = list.filter(|_| execute == "transaction");
    let action = |action: &'a Value| Some((action.get("type")?.as_str()?, action.get("data")?.as_object()?));
    list.into_iter().flatten().filter_map(action)
}

impl GuestOp {
    /// Where; `None` for a flush.
    #[must_use]
    pub fn range(&self) -> Option<Range> {
        match *self {
            GuestOp::Read(range)
            | GuestOp::Write(range)
            | GuestOp::WriteFua(range)
            | GuestOp::WriteZeroes(range)
            | GuestOp::WriteZeroesUnmap(range)
            | GuestOp::Discard(range)
            | GuestOp::BlockStatus(range) => Some(range),
            GuestOp::Flush => None,
        }
    }
}

/// Job statuses a step can wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct WaitJob {
    /// Job id.
    pub id: String,
    /// QAPI status name; the step is over once the job has been there or is gone.
    pub status: String,
    /// And once it has also dealt with its device up to this offset, bytes, or is past running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Action {
    /// A QMP command, verbatim.
    Command {
        /// Name.
        execute: String,
        /// Arguments.
        #[serde(default, skip_serializing_if = "Map::is_empty")]
        arguments: Map<String, Value>,
    },
    /// A guest request on an export.
    Guest {
        /// Export name.
        export: String,
        /// The request.
        #[serde(rename = "do")]
        op: GuestOp,
    },
    /// Begin a drained section (returns when the node is quiet). Not on every target.
    DrainBegin {
        /// node-name.
        #[serde(rename = "drained-begin")]
        node: String,
    },
    /// End a drained section begun by the same actor on the same node.
    DrainEnd {
        /// node-name.
        #[serde(rename = "drained-end")]
        node: String,
    },
    /// Wait for a job.
    WaitJob {
        /// Which, and for what.
        #[serde(rename = "wait-job")]
        job: WaitJob,
    },
    /// Wait until every request this actor left in flight is done.
    Settle {
        /// Empty object.
        settle: Map<String, Value>,
    },
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Who: `monitor`, `guest0`, `drain0`, …
    pub actor: String,
    /// What.
    #[serde(flatten)]
    pub action: Action,
    /// Go on only when it is done.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub wait: bool,
}

fn is_true(v: &bool) -> bool {
    *v
}
