//! One throttle group: its nodes, and the requests that wait.
//!
//! Rules: requests of one direction and one node go in the order in which they came; nodes take turns. Who has the turn
//! watches the clock, everybody else waits for the turn. A drained node's requests wait for nothing, neither those that wait
//! already nor new ones, but they count. Whoever leaves a queue hands the turn on, so that no node's requests are forgotten.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::bucket::Buckets;
use super::{Direction, Limits};
use crate::Layer;
use crate::env::{Fut, Nanos};
use crate::event::Event;
use crate::types::NodeId;

/// A group.
#[derive(Debug)]
pub struct Group {
    name: Rc<str>,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    buckets: Buckets,
    /// In the order of joining.
    members: Vec<Member>,
    /// By direction: whose oldest request goes next. Set while requests wait.
    turns: [Option<NodeId>; 2],
    next_ticket: u64,
}

#[derive(Debug)]
struct Member {
    node: NodeId,
    drained: bool,
    /// By direction, oldest first.
    waiting: [VecDeque<Waiting>; 2],
}

#[derive(Debug)]
struct Waiting {
    ticket: u64,
    waker: Option<Waker>,
}

/// A timer and when it rings.
type Alarm = Option<(Nanos, Fut<'static, ()>)>;

impl State {
    fn member(&mut self, node: NodeId) -> &mut Member {
        let found = self.members.iter_mut().find(|member| member.node == node);
        found.expect("a node throttles through the group that it is a member of")
    }

    /// Whether a request that comes now waits.
    fn is_to_wait(&mut self, node: NodeId, direction: Direction, now: Nanos) -> bool {
        if self.member(node).drained {
            return false;
        }
        self.turns[direction as usize].is_some() || self.buckets.wait(direction, now) > 0
    }

    fn enqueue(&mut self, node: NodeId, direction: Direction) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let waiting = &mut self.member(node).waiting[direction as usize];
        waiting.push_back(Waiting { ticket, waker: None });
        self.turns[direction as usize].get_or_insert(node);
        ticket
    }

    /// How long a request still has to wait; `None`: for others.
    fn still_waits(&mut self, node: NodeId, direction: Direction, ticket: u64, now: Nanos) -> Option<Nanos> {
        let first = {
            let member = self.member(node);
            if member.drained {
                return Some(0);
            }
            member.waiting[direction as usize]
                .front()
                .is_some_and(|waiting| waiting.ticket == ticket)
        };
        let its_turn = first && self.turns[direction as usize] == Some(node);
        its_turn.then(|| self.buckets.wait(direction, now))
    }

    /// A request leaves its queue; if it had the turn, the next node that waits has it now.
    fn leave(&mut self, node: NodeId, direction: Direction, ticket: u64) {
        let waiting = &mut self.member(node).waiting[direction as usize];
        let at = waiting.iter().position(|waiting| waiting.ticket == ticket);
        waiting.remove(at.expect("it leaves once"));
        if self.turns[direction as usize] != Some(node) {
            return;
        }
        let here = self.members.iter().position(|member| member.node == node);
        let here = here.expect("just found");
        let (before, after) = self.members.split_at(here + 1);
        let next = after
            .iter()
            .chain(before)
            .find(|member| !member.waiting[direction as usize].is_empty());
        self.turns[direction as usize] = next.map(|member| member.node);
    }

    /// Whoever has the turn is to look at the clock.
    fn first_waker(&mut self, direction: Direction) -> Option<Waker> {
        let node = self.turns[direction as usize]?;
        let first = self.member(node).waiting[direction as usize].front_mut();
        first.expect("only who waits has the turn").waker.take()
    }
}

impl Group {
    pub(super) fn new(name: &str, limits: Limits) -> Group {
        Group {
            name: name.into(),
            state: RefCell::new(State {
                buckets: Buckets::new(&limits),
                members: Vec::new(),
                turns: [None; 2],
                next_ticket: 0,
            }),
        }
    }

    /// Its QOM id.
    #[must_use]
    pub fn name(&self) -> &Rc<str> {
        &self.name
    }

    /// Some node belongs to it.
    pub(super) fn is_in_use(&self) -> bool {
        !self.state.borrow().members.is_empty()
    }

    /// Requests that wait here.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let state = self.state.borrow();
        let all = state.members.iter().flat_map(|member| &member.waiting);
        all.map(VecDeque::len).sum()
    }

    /// A node joins. `drained`: it is, at this moment.
    pub(crate) fn join(&self, node: NodeId, drained: bool) {
        let mut state = self.state.borrow_mut();
        assert!(
            state.members.iter().all(|member| member.node != node),
            "{node:?} joins group {} twice",
            self.name
        );
        state.members.push(Member {
            node,
            drained,
            waiting: Default::default(),
        });
    }

    /// A node leaves; none of its requests waits.
    pub(crate) fn leave(&self, node: NodeId) {
        let mut state = self.state.borrow_mut();
        assert!(
            state.member(node).waiting.iter().all(VecDeque::is_empty),
            "{node:?} leaves group {} with requests waiting",
            self.name
        );
        state.members.retain(|member| member.node != node);
    }

    /// A drained section of a node begins or ends. At its beginning everything that waits goes on.
    pub(crate) fn set_drained(&self, node: NodeId, drained: bool) {
        let mut wakers = Vec::new();
        {
            let mut state = self.state.borrow_mut();
            let member = state.member(node);
            member.drained = drained;
            if drained {
                let waiting = member.waiting.iter_mut().flatten();
                wakers.extend(waiting.filter_map(|waiting| waiting.waker.take()));
            }
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Waits until the limits let a request through, and counts it.
    pub(crate) async fn admit(&self, layer: &Layer, node: NodeId, direction: Direction, bytes: u64) {
        let now = || layer.env().now();
        if self.state.borrow_mut().is_to_wait(node, direction, now()) {
            let ticket = self.state.borrow_mut().enqueue(node, direction);
            layer.emit(|| Event::ThrottleQueued {
                node,
                group: Rc::clone(&self.name),
            });
            let mut alarm = None;
            poll_fn(|cx| self.poll_turn(layer, (node, direction, ticket), &mut alarm, cx)).await;
            let drained = {
                let mut state = self.state.borrow_mut();
                state.leave(node, direction, ticket);
                state.member(node).drained
            };
            layer.emit(|| Event::ThrottleResumed { node, drained });
        }
        let next = {
            let mut state = self.state.borrow_mut();
            state.buckets.charge(direction, bytes, now());
            state.first_waker(direction)
        };
        if let Some(next) = next {
            next.wake();
        }
    }

    fn poll_turn(
        &self,
        layer: &Layer,
        (node, direction, ticket): (NodeId, Direction, u64),
        alarm: &mut Alarm,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        loop {
            let now = layer.env().now();
            let mut state = self.state.borrow_mut();
            let wait = state.still_waits(node, direction, ticket, now);
            if wait == Some(0) {
                return Poll::Ready(());
            }
            let waiting = &mut state.member(node).waiting[direction as usize];
            let own = waiting.iter_mut().find(|waiting| waiting.ticket == ticket);
            own.expect("it waits").waker = Some(cx.waker().clone());
            drop(state);
            let Some(wait) = wait else {
                *alarm = None;
                return Poll::Pending;
            };
            let deadline = now.saturating_add(wait);
            if alarm.as_ref().is_none_or(|(at, _)| *at != deadline) {
                *alarm = Some((deadline, layer.env().sleep_until(deadline)));
            }
            let (_, timer) = alarm.as_mut().expect("just set");
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // It rang: the clock decides, not the bell.
            *alarm = None;
        }
    }
}
