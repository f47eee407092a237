//! Block status: one layer, chain walk, derived queries, the one-entry cache.
//!
//! Rules: answers make progress (`pnum` > 0) except at the end of the *first* node asked, where `pnum` is 0; a
//! lower layer that is too short answers "zeroes, allocated there" instead. A range may be split anywhere, so only
//! the union of answers means something. Depth counts filter nodes too. `want_zero` asks for exact zeroes and
//! offsets; without it longer answers are preferred and zeroes may be called data.
//! A zero is never cached: data called zero loses data, zero called data only costs time.

use std::rc::Rc;

use crate::Layer;
use crate::env::Fut;
use crate::error::Errno;
use crate::graph::node::Node;
use crate::io::tracked::InFlightGuard;
use crate::io::{align_down, align_up};
use crate::types::{NodeId, StatusFlags};

/// An answer of the generic layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockStatus {
    /// DATA, ZERO, OFFSET_VALID, ALLOCATED, EOF, COMPRESSED.
    pub flags: StatusFlags,
    /// Bytes that share this answer; 0 only at the end of the (first) layer.
    pub pnum: u64,
    /// Where the bytes are, with OFFSET_VALID.
    pub map: u64,
    /// In which node, with OFFSET_VALID; the short node where zeroes were synthesised past its end.
    pub file: Option<NodeId>,
    /// How many nodes (filters count) were asked.
    pub depth: u32,
}

impl BlockStatus {
    const NOTHING: BlockStatus = BlockStatus {
        flags: StatusFlags::empty(),
        pnum: 0,
        map: 0,
        file: None,
        depth: 0,
    };

    /// Whether a layer that was asked decides the content.
    #[must_use]
    pub fn is_allocated(&self) -> bool {
        self.flags.contains(StatusFlags::ALLOCATED)
    }
}

/// Which chain a query walks.
#[derive(Clone, Copy)]
struct Walk {
    base: Option<NodeId>,
    include_base: bool,
    want_zero: bool,
}

impl Layer {
    /// Status of the chain from `node` down to, and not including, `base` (`None`: the whole chain), exact.
    ///
    /// # Errors
    /// What a driver of the chain says.
    pub async fn block_status_above(
        &self,
        node: NodeId,
        base: Option<NodeId>,
        offset: u64,
        bytes: u64,
    ) -> Result<BlockStatus, Errno> {
        self.walk_status(
            node,
            Walk {
                base,
                include_base: false,
                want_zero: true,
            },
            offset,
            bytes,
        )
        .await
    }

    /// Status of this layer alone.
    ///
    /// # Errors
    /// What the driver says.
    pub async fn block_status(&self, node: NodeId, offset: u64, bytes: u64) -> Result<BlockStatus, Errno> {
        let base = self.filter_or_cow(node);
        self.block_status_above(node, base, offset, bytes).await
    }

    /// Whether this layer decides the content, and for how many bytes; 0 bytes only at its end.
    ///
    /// # Errors
    /// What the driver says.
    pub async fn is_allocated(&self, node: NodeId, offset: u64, bytes: u64) -> Result<(bool, u64), Errno> {
        let node = self.node(node);
        let status = self.one_layer(&node, false, offset, bytes).await?;
        Ok((status.is_allocated(), status.pnum))
    }

    /// Depth (1: `top`) of the layer that decides the content among `top` … `base` (`include_base`), 0 when none
    /// does, and for how many bytes; 0 bytes only at the end of `top`.
    ///
    /// # Errors
    /// What a driver of the chain says.
    pub async fn is_allocated_above(
        &self,
        top: NodeId,
        base: Option<NodeId>,
        include_base: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<(u32, u64), Errno> {
        let walk = Walk {
            base,
            include_base,
            want_zero: false,
        };
        let status = self.walk_status(top, walk, offset, bytes).await?;
        Ok((if status.is_allocated() { status.depth } else { 0 }, status.pnum))
    }

    /// Whether the whole range is known to read as zeroes without looking closely; false negatives are allowed.
    ///
    /// # Errors
    /// What a driver of the chain says.
    pub async fn is_zero_fast(&self, node: NodeId, offset: u64, bytes: u64) -> Result<bool, Errno> {
        if bytes == 0 {
            return Ok(true);
        }
        let walk = Walk {
            base: None,
            include_base: false,
            want_zero: false,
        };
        let status = self.walk_status(node, walk, offset, bytes).await?;
        Ok(status.pnum == bytes && status.flags.contains(StatusFlags::ZERO))
    }

    async fn walk_status(
        &self,
        top: NodeId,
        walk: Walk,
        offset: u64,
        mut bytes: u64,
    ) -> Result<BlockStatus, Errno> {
        assert!(
            walk.base.is_some() || !walk.include_base,
            "including the base needs a base"
        );
        if walk.base == Some(top) && !walk.include_base {
            return Ok(BlockStatus {
                pnum: bytes,
                ..BlockStatus::NOTHING
            });
        }
        let mut status = self
            .one_layer(&self.node(top), walk.want_zero, offset, bytes)
            .await?;
        status.depth = 1;
        if status.pnum == 0 || status.is_allocated() || walk.base == Some(top) {
            return Ok(status);
        }
        let eof = status
            .flags
            .contains(StatusFlags::EOF)
            .then_some(offset + status.pnum);
        bytes = status.pnum;
        let mut next = self.filter_or_cow(top);
        while let Some(id) = next {
            let at_base = walk.base == Some(id);
            if at_base && !walk.include_base {
                break;
            }
            let depth = status.depth + 1;
            let below = self
                .one_layer(&self.node(id), walk.want_zero, offset, bytes)
                .await?;
            status = BlockStatus { depth, ..below };
            if status.pnum == 0 {
                // Shorter than the layers above: reads zero from here on, whatever lies deeper.
                let flags = StatusFlags::ZERO | StatusFlags::ALLOCATED;
                status = BlockStatus {
                    flags,
                    pnum: bytes,
                    file: Some(id),
                    ..status
                };
                break;
            }
            if status.is_allocated() {
                status.flags -= StatusFlags::EOF; // its end is not the end of the top
                break;
            }
            if at_base {
                break;
            }
            bytes = status.pnum;
            next = self.filter_or_cow(id);
        }
        if eof == Some(offset + status.pnum) {
            status.flags |= StatusFlags::EOF;
        }
        Ok(status)
    }

    /// One node's answer, clamped to `[offset, offset + bytes)` and its end; `depth` is not set.
    async fn one_layer(
        &self,
        node: &Rc<Node>,
        want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<BlockStatus, Errno> {
        let length = self.node_length(node)?;
        if offset >= length {
            return Ok(BlockStatus {
                flags: StatusFlags::EOF,
                ..BlockStatus::NOTHING
            });
        }
        if bytes == 0 {
            return Ok(BlockStatus::NOTHING);
        }
        let _in_flight = InFlightGuard::new(self, node);
        let bytes = bytes.min(length - offset);
        let mut status = if node.facts.has_block_status || node.facts.is_filter {
            self.asked(node, want_zero, offset, bytes).await?
        } else {
            all_data(node, offset, bytes)
        };
        if status.flags.contains(StatusFlags::RAW) {
            // The answer is the child's, at the place named.
            assert!(
                status.flags.contains(StatusFlags::OFFSET_VALID),
                "RAW names a place"
            );
            let file = self.node(status.file.expect("RAW names a node"));
            let (at, bytes) = (status.map, status.pnum);
            status = self.boxed_layer(&file, want_zero, at, bytes).await?;
            if !node.facts.is_filter && !status.is_allocated() {
                status = self.whole_chain(&file, at, status.pnum).await?;
            }
        } else {
            self.conclude(node, &mut status, want_zero, offset).await?;
        }
        status.flags -= StatusFlags::EOF;
        if offset + status.pnum == length {
            status.flags |= StatusFlags::EOF;
        }
        Ok(status)
    }

    /// What a node that is no filter shows of the chain below its file: for whoever is above, that is its own. QEMU says that
    /// nobody holds it, and a stream then loses it.
    fn whole_chain<'a>(
        &'a self,
        file: &'a Rc<Node>,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<BlockStatus, Errno>> {
        Box::pin(async move {
            let below = self.block_status_above(file.id, None, offset, bytes).await?;
            Ok(BlockStatus {
                flags: below.flags | StatusFlags::ALLOCATED,
                depth: 0,
                ..below
            })
        })
    }

    /// `one_layer` once more, for the recursion into the node that an answer names.
    fn boxed_layer<'a>(
        &'a self,
        node: &'a Rc<Node>,
        want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<BlockStatus, Errno>> {
        Box::pin(self.one_layer(node, want_zero, offset, bytes))
    }

    /// The driver's answer (or the cache's, or the default of a filter), clamped to the request.
    async fn asked(
        &self,
        node: &Rc<Node>,
        want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<BlockStatus, Errno> {
        let align = node.io.limits.get().request_alignment;
        let start = align_down(offset, align);
        let aligned = align_up(offset + bytes, align) - start;
        let childless = node.children.borrow().is_empty();
        let cached = node
            .io
            .status_cache
            .get()
            .filter(|(from, to)| childless && (*from..*to).contains(&start));
        let data_here = StatusFlags::DATA | StatusFlags::OFFSET_VALID;
        let (flags, pnum, map, file) = if let Some((_, to)) = cached {
            (data_here, to - start, start, Some(node.id))
        } else if node.facts.has_block_status {
            let driver = node.driver_opt().ok_or(Errno::ENOMEDIUM)?;
            let answer = driver
                .block_status(&self.cx(node), want_zero, start, aligned)
                .await?;
            assert!(
                answer.pnum > 0 && answer.pnum % align == 0,
                "{node:?} answers {answer:?}"
            );
            if want_zero && childless && answer.flags == data_here {
                node.io.status_cache.set(Some((start, start + answer.pnum))); // all of it, not only the request
            }
            (answer.flags, answer.pnum, answer.map, answer.file)
        } else {
            let child = self.filter_or_cow(node.id).ok_or(Errno::ENOMEDIUM)?;
            (
                StatusFlags::RAW | StatusFlags::OFFSET_VALID,
                aligned,
                start,
                Some(child),
            )
        };
        let skipped = offset - start;
        assert!(pnum > skipped, "an answer in blocks covers the byte asked for");
        let map = if flags.contains(StatusFlags::OFFSET_VALID) {
            map + skipped
        } else {
            0
        };
        Ok(BlockStatus {
            flags,
            pnum: (pnum - skipped).min(bytes),
            map,
            file,
            depth: 0,
        })
    }

    /// Adds what follows from a layer's own answer: ALLOCATED, zeroes without or past the backing file, zeroes in
    /// the node that holds the data.
    async fn conclude(
        &self,
        node: &Rc<Node>,
        status: &mut BlockStatus,
        want_zero: bool,
        offset: u64,
    ) -> Result<(), Errno> {
        use StatusFlags as S;
        if status.flags.intersects(S::DATA | S::ZERO) {
            status.flags |= S::ALLOCATED;
        } else if node.facts.supports_backing {
            match self.cow(node.id).map(|id| self.node(id)) {
                None => status.flags |= S::ZERO,
                Some(backing) if want_zero => {
                    // A length that cannot be had proves nothing.
                    if self.node_length(&backing).is_ok_and(|length| offset >= length) {
                        status.flags |= S::ZERO;
                    }
                }
                Some(_) => {}
            }
        }
        let recurse = status.flags.contains(S::RECURSE | S::DATA | S::OFFSET_VALID);
        if want_zero && recurse && !status.flags.contains(S::ZERO) && status.file != Some(node.id) {
            let file = self.node(status.file.expect("OFFSET_VALID names a node"));
            // Errors are ignored: without an inner answer it is simply data.
            if let Ok(inner) = self.boxed_layer(&file, true, status.map, status.pnum).await {
                let zero = inner.flags.contains(S::ZERO);
                if inner.flags.contains(S::EOF) && (inner.pnum == 0 || zero) {
                    status.flags |= S::ZERO; // past the end of the file everything is zero
                } else {
                    status.pnum = inner.pnum;
                    status.flags |= inner.flags & S::ZERO;
                }
            }
        }
        status.flags -= S::RECURSE;
        Ok(())
    }
}

/// The answer of a format or protocol that cannot tell.
fn all_data(node: &Node, offset: u64, bytes: u64) -> BlockStatus {
    let flags = StatusFlags::DATA | StatusFlags::ALLOCATED;
    if node.facts.is_protocol {
        let flags = flags | StatusFlags::OFFSET_VALID;
        return BlockStatus {
            flags,
            pnum: bytes,
            map: offset,
            file: Some(node.id),
            depth: 0,
        };
    }
    BlockStatus {
        flags,
        pnum: bytes,
        map: 0,
        file: None,
        depth: 0,
    }
}

/// Drops the cached range if it overlaps one that is about to become zero.
pub(crate) fn forget_cached(node: &Node, offset: u64, bytes: u64) {
    if let Some((from, to)) = node.io.status_cache.get()
        && offset < to
        && from < offset + bytes
    {
        node.io.status_cache.set(None);
    }
}
