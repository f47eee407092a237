//! Dirty bitmaps, in the model and in the daemon: every field of the query, and the digest of the bits.
//!
//! Rules: bits that the model does not predict are not compared, nor those of a node above one that got another length,
//! where the daemon keeps the old one (`filter-keeps-length`). Stored bitmaps are read from the image itself.

use std::collections::BTreeMap;

use blkcheck_model::{Bitmap, Command, Outcome, StoredBitmap, World};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::lockstep::{Run, Stop, object};
use super::peer::Peer;
use crate::image::bitmaps::{Stored, stored};
use crate::image::read::Qcow2;
use crate::qemu::Broken;
use crate::scenario::GuestOp;

const DIGEST: &str = "x-debug-block-dirty-bitmap-sha256";

/// Bitmaps by node and name.
pub(super) type Bitmaps = BTreeMap<(String, String), Facts>;

/// One bitmap as it is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Facts {
    granularity: u64,
    recording: bool,
    busy: bool,
    persistent: bool,
    inconsistent: bool,
    /// None where it is not predicted.
    count: Option<u64>,
    /// None where it was not asked for.
    digest: Option<String>,
}

/// As the model has them.
pub(super) fn of_model(world: &World) -> Bitmaps {
    let mut all = Bitmaps::new();
    for (_, node) in world.graph.nodes() {
        for bitmap in &node.bitmaps {
            let known = Some(bitmap).filter(|bitmap| !bitmap.followed);
            let facts = Facts {
                granularity: bitmap.granularity,
                recording: bitmap.records(),
                busy: bitmap.is_busy(),
                persistent: bitmap.persistent,
                inconsistent: bitmap.inconsistent,
                count: known.and_then(Bitmap::count),
                digest: known.and_then(Bitmap::image).map(|bits| digest(&bits)),
            };
            all.insert((node.name.to_string(), bitmap.name.to_string()), facts);
        }
    }
    all
}

/// Some node has one.
pub(super) fn any(world: &World) -> bool {
    world.graph.nodes().any(|(_, node)| !node.bitmaps.is_empty())
}

/// What a node's description says of its bitmaps.
pub(super) fn of_node(node: &Value, all: &mut Bitmaps) -> Option<()> {
    let name = node.get("node-name")?.as_str()?;
    let Some(list) = node.get("dirty-bitmaps") else {
        return Some(());
    };
    for bitmap in list.as_array()? {
        let flag = |key: &str| bitmap.get(key)?.as_bool();
        let facts = Facts {
            granularity: bitmap.get("granularity")?.as_u64()?,
            recording: flag("recording")?,
            busy: flag("busy")?,
            persistent: flag("persistent")?,
            inconsistent: bitmap.get("inconsistent").is_some_and(|v| *v == true),
            count: Some(bitmap.get("count")?.as_u64()?),
            digest: None,
        };
        // A bitmap of a job has no name.
        if let Some(bitmap) = bitmap.get("name").and_then(Value::as_str) {
            all.insert((name.to_owned(), bitmap.to_owned()), facts);
        }
    }
    Some(())
}

/// Asks for the digests of those that the model predicts.
pub(super) fn ask_digests(peer: &mut Peer, model: &Bitmaps, seen: &mut Bitmaps) -> Result<(), Broken> {
    let mut asked = Vec::new();
    for ((node, name), facts) in seen {
        let ours = model.get(&(node.clone(), name.clone()));
        facts.count = facts
            .count
            .filter(|_| ours.is_none_or(|ours| ours.count.is_some()));
        if ours.is_some_and(|ours| ours.digest.is_some()) {
            let id = peer.send(DIGEST, &object(json!({"node": node, "name": name})));
            asked.push((id, facts));
        }
    }
    for (id, facts) in asked {
        let answer = peer.answer(id, DIGEST)?.map_err(|e| Broken::Nonsense(e.1))?;
        facts.digest = answer.get("sha256").and_then(Value::as_str).map(str::to_owned);
    }
    Ok(())
}

/// The first difference: the model's word, and the daemon's.
pub(super) fn difference(model: &Bitmaps, seen: &Bitmaps) -> Option<(String, String)> {
    let say = |facts: Option<&Facts>| facts.map_or_else(|| "none".to_owned(), |facts| format!("{facts:?}"));
    let all = model.keys().chain(seen.keys());
    all.into_iter().find_map(|key| {
        let (ours, mut theirs) = (model.get(key), seen.get(key).cloned());
        if let (Some(ours), Some(theirs)) = (ours, &mut theirs) {
            theirs.count = theirs.count.filter(|_| ours.count.is_some());
            theirs.digest = theirs.digest.take().filter(|_| ours.digest.is_some());
        }
        let (node, name) = key;
        (ours != theirs.as_ref()).then(|| {
            let said = |text| format!("bitmap '{name}' of node '{node}': {text}");
            (said(say(ours)), said(say(theirs.as_ref())))
        })
    })
}

fn digest(bits: &[u8]) -> String {
    let hash = Sha256::digest(bits);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Run<'_> {
    /// A guest's request was carried out: bitmaps are marked, and the daemon's are looked at.
    pub(super) fn guest_marked(&mut self, export: &str, op: GuestOp) -> Result<(), Stop> {
        if !any(&self.world) {
            return Ok(());
        }
        let node = self
            .world
            .exports
            .iter()
            .find(|e| &*e.name == export)
            .map(|e| e.root);
        let Some(node) = node.map(|root| self.world.graph.edge(root).child) else {
            return Ok(());
        };
        match op {
            GuestOp::Write(r)
            | GuestOp::WriteFua(r)
            | GuestOp::WriteZeroes(r)
            | GuestOp::WriteZeroesUnmap(r) => self.world.guest_wrote(node, r.offset..r.offset + r.length),
            GuestOp::Discard(r) => self.world.guest_discarded(node, r.offset..r.offset + r.length),
            GuestOp::Read(_) | GuestOp::BlockStatus(_) | GuestOp::Flush => {}
        }
        self.look(true)?;
        match self.differences().into_iter().next() {
            Some((what, model, qemu)) => Err(Stop::Differs(what, model, qemu)),
            None => Ok(()),
        }
    }

    /// What images hold of bitmaps when everything is closed.
    pub(super) fn stored_bitmaps(&self, mut world: World) -> Result<(), (String, String)> {
        // A stream that was given up leaves its device as it was; a backup gives its bitmap back. The rest closes as it stands.
        let backups = world
            .jobs
            .iter()
            .filter(|job| job.backup().is_some() && job.outcome.is_none());
        for id in backups.map(|job| job.id.to_string()).collect::<Vec<_>>() {
            let given_up = json!({ "id": id });
            let cancelled = world.execute(&Command::new("job-cancel", &given_up));
            let ended = cancelled
                .map_err(|refusal| refusal.desc)
                .and_then(|_| world.job_completed(&id, Outcome::Cancelled));
            ended.map_err(|why| (format!("backup '{id}' can be cancelled"), why))?;
        }
        world.close_all();
        for (name, bytes) in self.peer.disks() {
            let header = world.files.get(name).and_then(|facts| facts.qcow2.as_ref());
            let Some(header) = header.filter(|header| header.version > 2) else {
                continue;
            };
            let image = Qcow2::parse(bytes).map_err(|e| (format!("{name} is an image"), e))?;
            let theirs = stored(&image).map_err(|e| (format!("{name} has sound bitmaps"), e))?;
            let theirs = theirs.map_or_else(Vec::new, |directory| directory.bitmaps);
            one_image(name, &header.bitmaps, theirs)?;
        }
        Ok(())
    }
}

fn one_image(name: &str, ours: &[StoredBitmap], theirs: Vec<Stored>) -> Result<(), (String, String)> {
    let mut theirs: BTreeMap<String, Stored> = theirs.into_iter().map(|b| (b.name.clone(), b)).collect();
    for bitmap in ours {
        let told = |b: &Stored| {
            let bits = bitmap.dirty.as_ref().filter(|_| !b.in_use).is_none_or(|dirty| {
                let bit = |at: u64| {
                    b.bits
                        .get(usize::try_from(at / 8).ok()?)
                        .map(|byte| byte >> (at % 8) & 1 == 1)
                };
                (0..b.bits.len() as u64 * 8).all(|at| bit(at) == Some(dirty.contains(at)))
            });
            b.granularity == bitmap.granularity && b.auto == bitmap.auto && b.in_use == bitmap.in_use && bits
        };
        let found = theirs.remove(&*bitmap.name);
        if !found.as_ref().is_some_and(told) {
            return Err((format!("{name} holds {bitmap:?}"), format!("{found:?}")));
        }
    }
    match theirs.into_iter().next() {
        Some((_, more)) => Err((format!("{name} holds no more bitmaps"), format!("{more:?}"))),
        None => Ok(()),
    }
}
