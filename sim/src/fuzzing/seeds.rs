//! Inputs to start from: sound images of every kind that the reader knows, and requests that use them.

use super::image::{
    ALIGNED, BACKED, DISCARD, FLUSH, PASS_DISCARD, READ, READ_ONLY, REBASE, Request, STATUS, TINY_CACHES,
    TOGETHER, UNMAP, VERBATIM, WRITE, ZERO, ZERO_UNMAP,
};
use super::recipe::{
    BACKING, BITMAPS, FEATURE_TABLE, LAZY, LONG_HEADER, ORDER, Recipe, SNAPSHOT, UNKNOWN_AUTOCLEAR,
    UNKNOWN_EXTENSION, V2,
};

/// Requests of every kind, in the middle of clusters and over their edges.
fn requests() -> Vec<Request> {
    let kinds = [
        READ,
        STATUS,
        WRITE,
        READ,
        FLUSH,
        ZERO | ALIGNED,
        DISCARD | ALIGNED,
        WRITE | ALIGNED,
        ZERO_UNMAP,
        READ,
        STATUS | ALIGNED,
        REBASE,
        ZERO_UNMAP | ALIGNED,
        WRITE,
        DISCARD,
        WRITE,
        FLUSH,
        WRITE | ALIGNED,
        READ | ALIGNED,
    ];
    let request = |(i, &kind): (usize, &u8)| {
        let i = u16::try_from(i).expect("few");
        Request {
            kind,
            length: 100 + i * 331,
            at: u32::from(i) * 157,
        }
    };
    kinds.iter().enumerate().map(request).collect()
}

fn input(mode: u8, requests: &[Request], image: &[u8]) -> Vec<u8> {
    let mut out = vec![mode, u8::try_from(requests.len()).expect("few")];
    for request in requests {
        out.push(request.kind);
        out.extend(request.length.to_le_bytes());
        out.extend(request.at.to_le_bytes());
    }
    out.extend(image);
    out
}

/// Name and bytes of every seed of the `qcow2_open` target. All of them are sound images.
#[must_use]
pub fn qcow2_open() -> Vec<(String, Vec<u8>)> {
    let fills = vec![(0, 0, 20), (1, 24, 30), (2, 60, 9), (3, 75, 12), (0, 100, 3)];
    let mut out = Vec::new();
    for bits in 0..8 {
        for (version, flags) in [("v2", V2), ("v3", 4 * ORDER)] {
            let recipe = Recipe {
                bits,
                sectors: 200 << (bits / 3),
                flags,
                fills: fills.clone(),
                ..Recipe::default()
            };
            let name = format!("{version}-{}", 512 << bits);
            out.push((name, input(UNMAP, &requests(), &recipe.to_bytes())));
        }
    }
    for order in 0..7 {
        let recipe = Recipe {
            sectors: 250,
            flags: order * ORDER,
            fills: fills.clone(),
            ..Recipe::default()
        };
        let name = format!("refcounts-of-{}", 1 << order);
        out.push((name, input(UNMAP | PASS_DISCARD, &requests(), &recipe.to_bytes())));
    }
    let special = [
        ("snapshot", 0, 4 * ORDER, SNAPSHOT),
        ("snapshot-v2", TINY_CACHES, V2, SNAPSHOT),
        ("bitmaps", 0, 4 * ORDER, BITMAPS),
        (
            "bitmaps-snapshot-backing",
            BACKED,
            (4 * ORDER) | BACKING,
            BITMAPS | SNAPSHOT,
        ),
        ("feature-table", 0, 4 * ORDER, FEATURE_TABLE),
        (
            "unknown-parts",
            0,
            4 * ORDER,
            UNKNOWN_EXTENSION | LONG_HEADER | UNKNOWN_AUTOCLEAR | LAZY,
        ),
        ("backing", BACKED, (4 * ORDER) | BACKING, UNKNOWN_EXTENSION),
        ("backing-v2", BACKED | UNMAP, V2 | BACKING, FEATURE_TABLE),
        ("read-only", READ_ONLY, 4 * ORDER, BITMAPS),
        ("together", TOGETHER | UNMAP, 4 * ORDER, 0),
        ("together-snapshot", TOGETHER | TINY_CACHES, 4 * ORDER, SNAPSHOT),
        ("tiny-caches", TINY_CACHES | UNMAP, 6 * ORDER, 0),
    ];
    for (name, mode, flags, extras) in special {
        for bits in [1, 3] {
            let recipe = Recipe {
                bits,
                sectors: 150,
                flags,
                extras,
                fills: fills.clone(),
                ..Recipe::default()
            };
            let name = format!("{name}-{}", 512 << bits);
            out.push((name, input(mode, &requests(), &recipe.to_bytes())));
        }
        if ["snapshot", "bitmaps", "unknown-parts", "backing", "snapshot-v2"].contains(&name) {
            let recipe = Recipe {
                sectors: 12,
                flags,
                extras,
                fills: vec![(0, 0, 1), (1, 3, 1), (2, 5, 1), (3, 7, 0)],
                ..Recipe::default()
            };
            let whole = input(mode | VERBATIM, &requests(), &recipe.build());
            out.push((format!("{name}-verbatim"), whole));
        }
    }
    out
}

/// Name and bytes of every seed of the `scenario` target: each profile, without and with choices.
#[must_use]
pub fn scenario() -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    for profile in 0..7u8 {
        for seed in 0..4u8 {
            let mut bytes = vec![profile, seed, 0, 0, 0, 0, 0];
            if seed % 2 == 1 {
                bytes.resize(64, seed);
                bytes[5] = 20;
            }
            out.push((format!("profile-{profile}-{seed}"), bytes));
        }
    }
    out
}
