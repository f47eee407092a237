//! Images as the daemon gets them and leaves them.

use crate::qemu::names::{Names, plain};
use crate::scenario::{Format, Image};

/// Room behind an image for whatever a format may append.
pub(super) fn room(image: &Image) -> u64 {
    match image.format {
        Format::Raw => 0,
        Format::Qcow2 => 3 * image.size + 32 * u64::from(image.cluster_size) + 65536,
    }
}

/// Puts the backing file's name in a scenario's words. The name never gets longer.
pub(super) fn name_backing(bytes: &mut [u8], names: &mut Names) {
    let field = |bytes: &[u8], at: usize, n: usize| {
        bytes
            .get(at..at + n)
            .map_or(0, |b| b.iter().fold(0u64, |v, b| v << 8 | u64::from(*b)))
    };
    let (Ok(at), Ok(length)) = (
        usize::try_from(field(bytes, 8, 8)),
        usize::try_from(field(bytes, 16, 4)),
    ) else {
        return;
    };
    let Some(range) = at.checked_add(length).and_then(|end| bytes.get(at..end)) else {
        return;
    };
    let Some(ours) = std::str::from_utf8(range)
        .ok()
        .and_then(|name| names.text(name))
        .map(|n| plain(&n))
    else {
        return;
    };
    if at == 0 || ours.len() > length {
        return;
    }
    bytes[at..at + length].fill(0);
    bytes[at..at + ours.len()].copy_from_slice(ours.as_bytes());
    let length = u32::try_from(ours.len()).expect("shorter than before");
    bytes[16..20].copy_from_slice(&length.to_be_bytes());
}
