//! Marks, states and operations by name, and how often each was met.

macro_rules! marks {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal,)*) => {
        /// A situation worth meeting.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
        pub enum Mark { $($(#[doc = $doc])* $name,)* }

        impl Mark {
            /// Every mark.
            pub const ALL: &'static [Mark] = &[$(Mark::$name,)*];

            /// The name in reports.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Mark::$name => $text,)* }
            }
        }
    };
}

marks! {
    /// A guest write waits for a copy-on-read (or the other way round) on the same cluster.
    WriteMeetsCopyOnRead = "guest write meets copy-on-read in flight",
    /// Two serialising requests meet.
    SerialisingMeet = "two serialising requests meet",
    /// A guest write begins while a stream chunk that overlaps it is being copied.
    WriteMeetsChunk = "guest write meets a stream chunk",
    /// A guest read populates the node below a copy-on-read filter.
    ReadPopulates = "guest read copies on read",
    /// Copy-on-read found zeroes and wrote them as such.
    CopyZeroes = "copy-on-read writes zeroes as zeroes",
    /// A job is cancelled after its last chunk.
    CancelAfterLastChunk = "cancel after the last chunk",
    /// A job is cancelled while parked.
    CancelPaused = "cancel while paused",
    /// A job is cancelled while waiting for finalize.
    CancelPending = "cancel while pending",
    /// A guest's write waits for clusters that a backup has in hand.
    WriteMeetsBackup = "guest write meets a cluster being copied",
    /// A guest's write has its clusters copied first.
    WriteCopiesFirst = "guest write copies before it writes",
    /// A copy of a backup fails, and its clusters are to be copied again.
    CopyFails = "failure between copy and re-dirty",
    /// Storage copies clusters of a backup by itself.
    CopyOffloaded = "copy without reading",
    /// Storage cannot, or fails; the copy is made by reading and writing.
    OffloadFails = "copy without reading fails and is made by reading",
    /// The power fails while a backup is under way.
    PowerFailsUnderBackup = "power fails under a backup",
    /// The power fails, and what backups had put into a target had been flushed.
    PowerFailsAfterFlush = "power fails after the target of a backup was flushed",
    /// A node is to be drained while a cluster is being copied.
    DrainDuringCopy = "drain during copy",
    /// A bitmap is merged, cleared or switched while a backup runs.
    BitmapDuringBackup = "bitmap command during backup",
    /// A read of a target or snapshot is under way beside a guest's write to the source.
    FleecingRace = "fleecing read races a guest write",
    /// A backup ends well.
    BackupSucceeds = "backup succeeds",
    /// A backup is cancelled or fails.
    BackupAborts = "backup ends early",
    /// Backups of one transaction stand or fall together.
    GroupedBackups = "grouped backups",
    /// A job is paused by the user and goes on.
    PauseResume = "pause and resume by the user",
    /// A drained section begins while a request is in flight.
    DrainBusy = "drain meets requests in flight",
    /// A request is parked by a drained section and goes on later.
    RequestParked = "request parked while drained",
    /// A drained section begins inside another.
    NestedDrain = "nested drained sections",
    /// A drained section begins while a job runs.
    DrainDuringJob = "drain during a job",
    /// A job parks because of a drained section.
    JobParkedByDrain = "job parked by a drained section",
    /// A job's filter goes while a drained section of somebody else is open.
    CompletionDuringDrain = "job completes while a node is drained",
    /// A command is refused by a frozen link.
    RefusedFrozen = "command refused by a frozen link",
    /// A command is refused by a permission conflict.
    RefusedPermission = "command refused by a permission conflict",
    /// A command is refused by an op blocker.
    RefusedBlocker = "command refused by an op blocker",
    /// A job verb is refused by the status.
    RefusedVerb = "job verb refused in this status",
    /// A job is created and fails at once.
    JobEarlyFail = "job fails before it starts",
    /// A backing layer ends before its overlay, and a guest reads across that place.
    ShortBackingRead = "guest read across the end of a short backing layer",
    /// A read whose end is not aligned to a sector-long image end.
    UnalignedTailRead = "guest read of an unaligned tail",
    /// A stream has nothing to copy somewhere because only layers below its range hold data.
    ChunkSkipped = "stream skips a chunk",
    /// A stream copies a chunk.
    ChunkCopied = "stream copies a chunk",
    /// A stream with `base`.
    StreamBase = "stream with base",
    /// A stream with `base-node`.
    StreamBaseNode = "stream with base-node",
    /// A stream with `bottom`.
    StreamBottom = "stream with bottom",
    /// A stream of the whole chain.
    StreamAll = "stream of the whole chain",
    /// A stream into a node that has an overlay.
    StreamIntermediate = "stream into an intermediate node",
    /// A stream that succeeds.
    StreamSucceeds = "stream succeeds",
    /// A stream that fails or is cancelled after it copied something.
    StreamAborts = "stream ends early after copying",
    /// Two streams run in one layer.
    TwoStreams = "two streams at once",
    /// A job with a speed limit runs.
    SpeedLimited = "job with a speed limit",
    /// The speed of a running job changes.
    SpeedChanges = "speed changed while running",
    /// A job waits for finalize.
    FinalizePending = "job waits for finalize",
    /// A concluded job is dismissed by the user.
    DismissConcluded = "concluded job dismissed",
    /// An I/O error meets a job.
    JobError = "job meets an I/O error",
    /// An I/O error stops a job.
    JobStopsOnError = "job stops on an error",
    /// A user resumes a job that an error stopped.
    ResumedAfterError = "job resumed after an error",
    /// A job that an error stopped is cancelled.
    CancelledAfterError = "job cancelled after an error",
    /// A stream's run ends well, and storage fails when it is to take effect.
    CompletionFails = "stream fails to take effect for want of storage",
    /// A command other than a query fails because storage does.
    CommandFails = "command refused by failing storage",
    /// A read fails.
    FaultyRead = "storage fails a read",
    /// A write fails with nothing written.
    FaultyWrite = "storage fails a write",
    /// A write fails with a part of it written.
    PartialWrite = "storage fails a write in the middle",
    /// A write fails with all of it written.
    LateFaultyWrite = "storage fails a write that it carried out",
    /// A flush fails.
    FaultyFlush = "storage fails a flush",
    /// Storage has no space.
    NoSpace = "storage is full",
    /// A guest request fails.
    GuestError = "guest request fails",
    /// A guest write-zeroes covers stored data.
    ZeroOverData = "write-zeroes over data",
    /// A guest discards and later reads the same place.
    DiscardThenRead = "read after discard",
    /// A guest writes where the image holds a compressed cluster.
    CompressedOverwritten = "compressed cluster overwritten",
    /// A guest write that is not aligned to its node's clusters meets another: padding is read, changed, written.
    PaddedWrite = "unaligned write is padded",
    /// A guest writes to a layer that has an overlay.
    WriteBelow = "guest write to a lower layer",
    /// A node is deleted and its name used again.
    NameReused = "node name used again",
    /// A flush runs beside a write.
    FlushBesideWrite = "flush beside a write in flight",
    /// A reopen changes a backing link, and a guest write was in flight when it began.
    ReopenMeetsWrite = "reopen of a link meets a guest write in flight",
    /// A reopen is refused while a job is under way.
    ReopenRefusedBesideJob = "reopen refused while a job runs",
    /// A snapshot is taken, and a guest write was in flight when it began.
    SnapshotMeetsWrite = "snapshot meets a guest write in flight",
    /// A transaction is refused after a snapshot of it was in place.
    TransactionRolledBack = "transaction takes a snapshot back",
    /// A throttle group makes a request wait.
    ThrottleQueues = "request queued by a throttle group",
    /// A drained section begins while requests wait in a throttle group, and they go on because of it.
    ThrottleDrained = "drained section lets queued requests through",
    /// Requests of two nodes wait in one throttle group.
    ThrottleShared = "throttle group shared by two nodes",
    /// A reopen moves a filter to another throttle group, and its requests were queued when it began.
    ThrottleRegrouped = "reopen to another throttle group with requests queued",
    /// A throttle group makes a request wait while a job runs.
    ThrottleBesideJob = "request queued by a throttle group while a job runs",
    /// A node gets another length, and a guest request was in flight when that began.
    ResizeMeetsRequest = "resize meets a guest request in flight",
    /// A dirty bitmap is changed, and a guest write was in flight when that began.
    BitmapMeetsWrite = "bitmap command meets a guest write in flight",
}

/// What was going on when an operation was issued.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum State {
    /// Nothing else.
    Quiet,
    /// Other guest requests are in flight.
    Busy,
    /// A job runs.
    JobRunning,
    /// A job is parked.
    JobPaused,
    /// A job waits for finalize or dismiss.
    JobWaiting,
    /// A drained section is open or opening.
    Drained,
    /// A main-context operation is under way.
    Changing,
}

pub(super) const STATES: [(State, &str); 7] = [
    (State::Quiet, "quiet"),
    (State::Busy, "busy"),
    (State::JobRunning, "job-running"),
    (State::JobPaused, "job-paused"),
    (State::JobWaiting, "job-waiting"),
    (State::Drained, "drained"),
    (State::Changing, "changing"),
];

pub(super) const OPERATIONS: [&str; 33] = [
    "read",
    "write",
    "write-fua",
    "write-zeroes",
    "write-zeroes-unmap",
    "discard",
    "flush",
    "block-status",
    "drained-begin",
    "drained-end",
    "blockdev-add",
    "blockdev-del",
    "block-export-add",
    "block-export-del",
    "block-stream",
    "blockdev-backup",
    "change-backing-file",
    "blockdev-reopen",
    "blockdev-snapshot",
    "transaction",
    "block_resize",
    "object-add",
    "object-del",
    "pause",
    "resume",
    "cancel",
    "complete",
    "finalize",
    "dismiss",
    "set-speed",
    "change",
    "query",
    "other",
];

/// How often each mark and each (operation, state) pair was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    marks: Vec<u64>,
    pairs: Vec<u64>,
}

impl Default for Counts {
    fn default() -> Counts {
        Counts {
            marks: vec![0; Mark::ALL.len()],
            pairs: vec![0; OPERATIONS.len() * STATES.len()],
        }
    }
}

impl Counts {
    /// How often this was met.
    #[must_use]
    pub fn of(&self, mark: Mark) -> u64 {
        self.marks[mark as usize]
    }

    pub(super) fn mark(&mut self, mark: Mark) {
        self.marks[mark as usize] += 1;
    }

    pub(super) fn pair(&mut self, operation: usize, state: State) {
        self.pairs[operation * STATES.len() + state as usize] += 1;
    }

    /// Adds another thread's.
    pub fn merge(&mut self, other: &Counts) {
        for (a, b) in self.marks.iter_mut().zip(&other.marks) {
            *a += b;
        }
        for (a, b) in self.pairs.iter_mut().zip(&other.pairs) {
            *a += b;
        }
    }

    /// Every (operation, state) pair that was met: names and count.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let states = STATES.len();
        self.pairs
            .iter()
            .enumerate()
            .filter(|(_, n)| **n > 0)
            .map(move |(i, n)| (OPERATIONS[i / states], STATES[i % states].1, *n))
    }

    /// How many pairs there could be.
    #[must_use]
    pub fn possible_pairs() -> usize {
        OPERATIONS.len() * STATES.len()
    }
}

impl Mark {
    /// Whether it can only occur when storage fails, so that a campaign without faults does not owe it.
    #[must_use]
    pub fn needs_faults(self) -> bool {
        matches!(
            self,
            Mark::JobError
                | Mark::JobStopsOnError
                | Mark::ResumedAfterError
                | Mark::CancelledAfterError
                | Mark::CompletionFails
                | Mark::CommandFails
                | Mark::FaultyRead
                | Mark::FaultyWrite
                | Mark::PartialWrite
                | Mark::LateFaultyWrite
                | Mark::FaultyFlush
                | Mark::NoSpace
                | Mark::CopyFails
        )
    }
}

impl Mark {
    /// Whether it belongs to commands that are not generated where storage fails.
    #[must_use]
    pub fn needs_sound_storage(self) -> bool {
        matches!(
            self,
            Mark::SnapshotMeetsWrite | Mark::TransactionRolledBack | Mark::BitmapMeetsWrite
        )
    }

    /// Whether it belongs to backups, which are generated with failing storage for their own profile only.
    #[must_use]
    pub fn is_of_backups(self) -> bool {
        matches!(
            self,
            Mark::WriteMeetsBackup
                | Mark::WriteCopiesFirst
                | Mark::DrainDuringCopy
                | Mark::BitmapDuringBackup
                | Mark::FleecingRace
                | Mark::BackupSucceeds
                | Mark::BackupAborts
                | Mark::GroupedBackups
                | Mark::CopyOffloaded
                | Mark::OffloadFails
                | Mark::CopyFails
                | Mark::PowerFailsUnderBackup
                | Mark::PowerFailsAfterFlush
        )
    }

    /// Whether it can only occur when the power fails.
    #[must_use]
    pub fn needs_power_cuts(self) -> bool {
        matches!(self, Mark::PowerFailsUnderBackup | Mark::PowerFailsAfterFlush)
    }
}

/// Marks that were never met.
#[must_use]
pub fn unmet(counts: &Counts) -> Vec<Mark> {
    Mark::ALL.iter().copied().filter(|m| counts.of(*m) == 0).collect()
}
