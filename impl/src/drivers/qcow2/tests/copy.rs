//! Copy offload from one image to another, against what a read of the source says; no range of either image leaks.

use super::*;
use crate::io::copy_range::CopyTarget;

/// Clusters of either image; the backing file of the source ends in the middle.
const CLUSTERS: u64 = 24;

struct Pair {
    env: MemoryEnv,
    layer: Layer,
    source: Backend,
    target: Backend,
}

fn ok(env: &MemoryEnv, layer: &Layer, command: &str, arguments: &Value) {
    env.block_on(layer.execute(command, arguments))
        .unwrap_or_else(|e| panic!("{command} {arguments}: {}", e.desc));
}

fn pair(source_cluster: u64, target_cluster: u64, size: u64) -> Pair {
    let env = MemoryEnv::new();
    for (name, cluster_size, size) in [
        ("base", source_cluster, size / 2 / 512 * 512),
        ("source", source_cluster, size),
        ("target", target_cluster, size),
    ] {
        let options = CreateOptions {
            size,
            cluster_size,
            ..CreateOptions::default()
        };
        make(&env, name, &options);
    }
    let base = open(&env, "base");
    base.write(0, &vec![0xb1; usize::try_from(size / 2 / 512 * 512).unwrap()]);
    base.close();
    let layer = Layer::new(Rc::new(env.clone()), None);
    for (name, backing) in [
        ("base", Value::Null),
        ("source", json!("base")),
        ("target", Value::Null),
    ] {
        let options = json!({"driver": "qcow2", "node-name": name, "backing": backing,
                             "file": {"driver": "file", "filename": name}});
        ok(&env, &layer, "blockdev-add", &options);
    }
    let guest = |name: &str| {
        let node = layer.find_node(name).unwrap();
        let perm = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        Backend::new(&layer, node, None, perm, Perm::all(), true).unwrap()
    };
    let (source, target) = (guest("source"), guest("target"));
    Pair {
        env,
        layer,
        source,
        target,
    }
}

impl Pair {
    fn copy(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        let to = CopyTarget {
            edge: self.target.root_edge().unwrap(),
            offset,
            flags: ReqFlags::empty(),
        };
        let source = self.source.root_edge().unwrap();
        self.env
            .block_on(self.layer.copy_range(source, offset, bytes, to))
    }

    fn write(&self, guest: &Backend, at: u64, data: &[u8]) {
        let written = guest.write(at, data, ReqFlags::empty());
        self.env.block_on(written).unwrap();
    }

    fn bytes(&self, guest: &Backend, at: u64, bytes: u64) -> Vec<u8> {
        let mut buf = vec![0xee; usize::try_from(bytes).unwrap()];
        self.env.block_on(guest.read(at, &mut buf)).unwrap();
        buf
    }

    /// Closes both and has `qemu-img check` look at them.
    fn close(self) {
        let Pair {
            env,
            layer,
            source,
            target,
        } = self;
        env.block_on(async {
            let main = layer.main("test").await;
            source.remove().await;
            target.remove().await;
            drop(main);
            layer.shutdown().await;
        });
        let dir = tempfile::tempdir().unwrap();
        for name in ["base", "source", "target"] {
            export(&env, &dir, name);
            qemu_ok(&dir, "qemu-img", &["check", "-q", "-f", "qcow2", name]);
        }
    }
}

#[test]
fn a_copy_is_what_a_read_would_have_seen() {
    for (seed, source_cluster, target_cluster) in
        [(1, 512, 512), (2, 4096, 512), (3, 512, 4096), (4, 65536, 65536)]
    {
        // Of clusters that differ in size pieces are copied.
        let unit = source_cluster.max(target_cluster);
        let size = CLUSTERS * unit - 512 * u64::from(unit > 512);
        let pair = pair(source_cluster, target_cluster, size);
        let mut rng = Rng(seed);
        let mut expected = vec![0; usize::try_from(size).unwrap()];
        for step in 0..300_u64 {
            let at = rng.below(CLUSTERS) * unit;
            let end = (at + (1 + rng.below(4)) * unit).min(size);
            let range = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
            match rng.below(6) {
                0 => {
                    let byte = u8::try_from(1 + step % 255).unwrap();
                    pair.write(&pair.source, at + 13, &vec![byte; range.len() - 100]);
                }
                1 => {
                    let zeroes = pair.source.write_zeroes(at, end - at, ReqFlags::MAY_UNMAP);
                    pair.env.block_on(zeroes).unwrap();
                }
                2 => {
                    pair.write(&pair.target, at + 7, &[9; 50]);
                    expected[range.start + 7..range.start + 57].fill(9);
                }
                _ => {
                    pair.copy(at, end - at).unwrap();
                    expected[range].copy_from_slice(&pair.bytes(&pair.source, at, end - at));
                }
            }
        }
        assert!(pair.bytes(&pair.target, 0, size) == expected);
        pair.close();
    }
}

#[test]
fn the_base_shows_through_up_to_its_end() {
    let (unit, size) = (4096, CLUSTERS * 4096);
    let pair = pair(unit, unit, size);
    pair.write(&pair.target, 0, &vec![1; usize::try_from(size).unwrap()]);
    pair.copy(0, size).unwrap();
    let seen = pair.bytes(&pair.target, 0, size);
    let (base, past) = seen.split_at(seen.len() / 2);
    assert!(base.iter().all(|b| *b == 0xb1) && past.iter().all(|b| *b == 0));
    pair.close();
}

#[test]
fn compressed_clusters_are_not_copied_and_parts_are() {
    let unit = 4096;
    let pair = pair(unit, unit, CLUSTERS * unit);
    pair.write(&pair.source, 0, &[3; 8192]);
    // Compressed data has no place in the file.
    let packed = pair
        .source
        .write(2 * unit, &[4; 4096], ReqFlags::WRITE_COMPRESSED);
    pair.env.block_on(packed).unwrap();
    assert_eq!(pair.copy(0, 3 * unit), Err(Errno::ENOTSUP));
    assert_eq!(pair.copy(0, 2 * unit), Ok(()));
    // Parts of clusters.
    assert_eq!(pair.copy(unit + 512, 512), Ok(()), "in place");
    pair.write(&pair.target, 6 * unit, &[7; 4096]);
    let packed = pair
        .target
        .write(5 * unit, &[4; 4096], ReqFlags::WRITE_COMPRESSED);
    pair.env.block_on(packed).unwrap();
    pair.write(&pair.source, 5 * unit, &[5; 4096]);
    assert_eq!(
        pair.copy(5 * unit + 512, 512),
        Ok(()),
        "around it, what was there"
    );
    let seen = pair.bytes(&pair.target, 5 * unit, unit);
    assert!(seen[..512] == [4; 512] && seen[512..1024] == [5; 512] && seen[1024..] == [4; 3072]);
    pair.close();
}
