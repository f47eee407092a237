//! The permission vectors of the specification, conflict texts, and rule T.

use super::testing::*;
use crate::Layer;
use crate::driver::DriverFacts;
use crate::event::Event;
use crate::types::{Perm, Role};

static COPY_ON_READ: DriverFacts = DriverFacts {
    child_perm: |_, _, perm, shared| {
        let mask = R.union(W).union(Z);
        ((perm & mask) | U, (shared & mask) | U)
    },
    ..DriverFacts {
        name: "copy-on-read",
        is_filter: true,
        is_format: false,
        supports_backing: false,
        is_protocol: false,
        has_block_status: false,
        has_write_zeroes: false,
        has_discard: false,
        supported_read_flags: crate::types::ReqFlags::empty(),
        can_reopen: false,
        mutable_options: &[],
        child_perm: super::perm::default_perms,
        open: |_, _| {
            Box::pin(std::future::ready(Err(crate::error::QmpError::generic(
                "fixture",
            ))))
        },
    }
};

/// Masks on the edge of a fresh parent with the given user.
fn masks(
    facts: &'static DriverFacts,
    role: Role,
    writable: bool,
    child_writable: bool,
    user: Option<(Perm, Perm)>,
) -> (Perm, Perm) {
    let layer = layer();
    let child = open(&layer, &PROTO, "child", child_writable);
    let parent = open(&layer, facts, "parent", writable);
    let edge = attach(&layer, &parent, &child, "file", role);
    if let Some((perm, shared)) = user {
        backend(&layer, &parent, perm, shared);
    }
    assert_eq!(
        with(&child, |f| f.told.get()),
        Some(layer.cumulative(child.id)),
        "the driver is told at commit"
    );
    layer.edge(edge).masks()
}

#[test]
fn vectors_of_the_default_masks() {
    let (rw, ro) = ((R | W, R | U), (R, R | U));
    let share_rw = (R | W, R | W | U);
    let nbd_ro = (R, R | W | U);
    type Column = (
        &'static str,
        &'static DriverFacts,
        Role,
        bool,
        [Option<(Perm, Perm)>; 5],
    );
    let full = (R | W | Z, R | U);
    let columns: [Column; 6] = [
        (
            "qcow2 rw file",
            &TEST,
            Role::IMAGE,
            true,
            [Some(full), Some(full), Some(full), Some(full), Some(full)],
        ),
        (
            "qcow2 ro file",
            &TEST,
            Role::IMAGE,
            false,
            [Some((R, R | U)), None, Some((R, R | U)), None, Some((R, R | U))],
        ),
        (
            "data-file",
            &TEST,
            Role::DATA,
            true,
            [
                Some((NONE, R | W | U)),
                Some(full),
                Some((R, R | U)),
                Some((R | W | Z, R | W | U)),
                Some((R, R | W | U)),
            ],
        ),
        (
            "backing",
            &TEST,
            Role::COW,
            true,
            [
                Some((NONE, ALL)),
                Some((R, R | U)),
                Some((R, R | U)),
                Some((R, ALL)),
                Some((R, ALL)),
            ],
        ),
        (
            "raw file",
            &TEST,
            FILTERED,
            true,
            [
                Some((NONE, ALL)),
                Some(rw),
                Some(ro),
                Some(share_rw),
                Some(nbd_ro),
            ],
        ),
        (
            "copy-on-read file",
            &COPY_ON_READ,
            FILTERED,
            true,
            [
                Some((U, ALL)),
                Some((R | W | U, R | U)),
                Some((R | U, R | U)),
                Some((R | W | U, R | W | U)),
                Some((R | U, R | W | U)),
            ],
        ),
    ];
    let users = [None, Some(rw), Some(ro), Some(share_rw), Some(nbd_ro)];
    for (what, facts, role, writable, expected) in columns {
        for (user, expected) in users.into_iter().zip(expected) {
            let Some(expected) = expected else { continue };
            assert_eq!(
                masks(facts, role, writable, true, user),
                expected,
                "{what}, user {user:?}"
            );
        }
    }
    // Non-active commit, node above base.
    assert_eq!(
        masks(&TEST, Role::COW, true, true, Some((NONE, W | U))),
        (NONE, ALL)
    );
}

#[test]
fn force_share_shares_all() {
    let layer = layer();
    let child = open(&layer, &PROTO, "child", false);
    child.force_share.set(true);
    let parent = open(&layer, &TEST, "parent", false);
    let edge = attach(&layer, &parent, &child, "file", Role::IMAGE);
    assert_eq!(layer.edge(edge).masks(), (R, ALL));
}

#[test]
fn conflict_names_both_sides_and_changes_nothing() {
    let layer = layer();
    let file = open(&layer, &PROTO, "file", true);
    let a = open(&layer, &TEST, "a", true);
    let b = open(&layer, &TEST, "b", true);
    attach(&layer, &a, &file, "file", Role::IMAGE);
    let before = layer.inspect();
    let error = layer.attach_child(&b, file.id, "file", Role::IMAGE).unwrap_err();
    assert_eq!(
        error.desc,
        "Permission conflict on node 'file': permissions 'write, resize' are both required by node 'a' (uses node \
         'file' as 'file' child) and unshared by node 'b' (uses node 'file' as 'file' child)."
    );
    assert_eq!(layer.inspect(), before);
}

#[test]
fn export_against_a_streamed_intermediate_node() {
    let layer = layer();
    let base = open(&layer, &TEST, "base", true);
    backend(&layer, &base, R | W, ALL);
    let hooks = std::rc::Rc::<Hooks>::default();
    hooks.who.replace("stream job 'job0'".into());
    let parent = crate::event::Parent::Job(crate::types::JobId(0));
    let error = layer
        .attach_root(parent, base.id, "intermediate node", NONE, R | U, hooks)
        .unwrap_err();
    assert_eq!(
        error.desc,
        "Permission conflict on node 'base': permissions 'write' are both required by an unnamed block device (uses \
         node 'base' as 'root' child) and unshared by stream job 'job0' (uses node 'base' as 'intermediate node' child)."
    );
    assert_eq!(base.refcnt.get(), 2);
}

#[test]
fn writers_need_a_writable_node() {
    let layer = layer();
    let node = open(&layer, &PROTO, "n", false);
    assert_eq!(
        try_backend(&layer, &node, W, ALL).unwrap_err().desc,
        "Block node is read-only"
    );
    assert_eq!(
        try_backend(&layer, &node, U, ALL).unwrap_err().desc,
        "Block node is read-only"
    );
    backend(&layer, &node, R | Z, ALL);
}

#[test]
fn unaligned_protocol_node_needs_resize() {
    let layer = layer();
    let node = open(&layer, &PROTO, "n", true);
    node.io.length.set(512 * 9);
    let mut limits = node.io.limits.get();
    limits.request_alignment = 4096;
    node.io.limits.set(limits);
    assert_eq!(
        try_backend(&layer, &node, W, ALL).unwrap_err().desc,
        "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
    );
    backend(&layer, &node, W | Z, ALL);
}

fn selected_writer(layer: &Layer) -> (std::rc::Rc<crate::graph::node::Node>, crate::types::EdgeId) {
    let base = open(layer, &PROTO, "base", true);
    let top = open(layer, &TEST, "top", true);
    attach(layer, &top, &base, "file", FILTERED);
    (base, backend(layer, &top, R | W, R | W).0)
}

#[test]
fn asking_for_more_is_refused_and_undone() {
    let (layer, recorder) = recorded();
    let (base, root) = selected_writer(&layer);
    backend(&layer, &base, R, ALL - Z);
    let before = layer.inspect();
    recorder.take();
    let error = layer.set_perm(root, R | W | Z, R | W).unwrap_err();
    assert!(
        error
            .desc
            .starts_with("Permission conflict on node 'base': permissions 'resize'"),
        "{error}"
    );
    assert_eq!(layer.inspect(), before);
    let masks: Vec<_> = recorder
        .take()
        .into_iter()
        .filter(|e| matches!(e, Event::EdgePerms { .. }))
        .collect();
    assert_eq!(masks.len(), 4, "two edges there and back: {masks:?}");
}

#[test]
fn pure_loosening_that_fails_keeps_the_stricter_masks() {
    let layer = layer();
    let (base, root) = selected_writer(&layer);
    // The node turned read-only behind the permission system's back: the refresh fails even for the same masks.
    base.flags.set(crate::types::OpenFlags::empty());
    layer.set_perm(root, R | W, ALL).unwrap();
    assert_eq!(layer.edge(root).masks(), (R | W, R | W));
    assert!(layer.set_perm(root, R | W, R).is_err());
}

#[test]
fn parallel_branches_need_topological_order() {
    let layer = layer();
    let top = open(&layer, &TEST, "top", true);
    let ws = open(&layer, &SELECTED, "ws", true);
    let (fl1, fl2) = (open(&layer, &PASS, "fl1", true), open(&layer, &PASS, "fl2", true));
    let base = open(&layer, &PROTO, "base", true);
    with(&ws, |f| f.selected.set(Role::DATA));
    let e1 = attach(&layer, &fl1, &base, "file", FILTERED);
    let e2 = attach(&layer, &fl2, &base, "file", FILTERED);
    attach(&layer, &ws, &fl1, "file", Role::DATA);
    attach(&layer, &ws, &fl2, "file", Role::METADATA);
    let link = attach(&layer, &top, &ws, "file", FILTERED);
    for (selected, writer, other) in [
        (Role::METADATA, e2, e1),
        (Role::DATA, e1, e2),
        (Role::METADATA, e2, e1),
    ] {
        with(&ws, |f| f.selected.set(selected));
        layer.refresh_edge_perms(link).unwrap();
        assert_eq!(layer.edge(writer).masks(), (W, ALL - W));
        assert_eq!(layer.edge(other).masks(), (NONE, ALL));
    }
}
