//! A guest's request, and whether its answer is one that the books allow.

use serde_json::Map;

use super::{Run, Stop};
use crate::compare::What;
use crate::compare::content::Books;
use crate::compare::known;
use crate::qemu::Broken;
use crate::qemu::nbd::client::Answer;
use crate::scenario::{GuestOp, Scenario};

impl Run<'_> {
    pub(super) fn guest(
        &mut self,
        scenario: &Scenario,
        export: &str,
        op: GuestOp,
        at: usize,
    ) -> Result<(), Stop> {
        let Some(found) = self
            .world
            .exports
            .iter()
            .find(|e| &*e.name == export || &*e.id == export)
        else {
            return Ok(());
        };
        let (name, writable) = (found.name.to_string(), found.writable);
        let node = self.world.graph.edge(found.root).child;
        // A failure is answered twice (status-error-answered-twice).
        if self.manner.steer
            && matches!(op, GuestOp::BlockStatus(_))
            && !self.books.can_tell(&self.world, node, op)
        {
            self.shown.steered += 1;
            return Ok(());
        }
        let ask = Books::ask(scenario, op, at);
        let answer = self.peer.request(&name, ask)?;
        self.is_alive(&answer)?;
        if answer == Answer::NoExport {
            return Err(Stop::Differs(
                What::Result,
                "an export".to_owned(),
                "no such export".to_owned(),
            ));
        }
        let shown = self.lengths.get(&name).copied();
        let expected = self
            .books
            .guest(&self.world, node, (writable, shown), op, at, &answer);
        expected.map_err(|(model, qemu)| Stop::Differs(What::Content, model, qemu))?;
        if self.books.take_copied_below_bottom() {
            self.aside(known::copies_below_bottom(), at);
        }
        if !self.world.jobs.is_empty() {
            self.peer.rest()?;
            self.events()?;
            self.jobs_rest()?;
        }
        let done = matches!(answer, Answer::Read(Ok(_)) | Answer::Done(Ok(())));
        if done {
            self.guest_marked(&name, op)
        } else {
            Ok(())
        }
    }

    /// A connection that was lost may be that of a daemon that died.
    pub(super) fn is_alive(&mut self, answer: &Answer) -> Result<(), Stop> {
        if answer.is_lost() {
            self.peer.rest()?;
            self.peer
                .ask("query-jobs", &Map::new())?
                .map_err(|e| Broken::Nonsense(e.1))?;
        }
        Ok(())
    }
}
