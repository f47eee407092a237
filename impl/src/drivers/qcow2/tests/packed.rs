//! Compressed writes beside others, judged by qemu-img: no leak, no error, the content.

use super::*;

impl Disk {
    fn pack(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let flags = ReqFlags::WRITE_COMPRESSED;
        self.env.block_on(self.guest.write(offset, data, flags))
    }
}

/// Data of which some deflates well, some hardly, and some not at all.
fn data(rng: &mut Rng, bytes: usize) -> Vec<u8> {
    let noise = *[1, 3, 256].get(usize::try_from(rng.below(3)).unwrap()).unwrap();
    let base = rng.below(200);
    (0..bytes)
        .map(|_| u8::try_from((base + rng.below(noise)) % 256).unwrap())
        .collect()
}

#[test]
fn compressed_writes_and_others_leave_a_sound_image() {
    for (seed, cluster_size, refcount_bits, version) in [
        (1, 512, 16, 3),
        (2, 4096, 1, 3),
        (3, 4096, 2, 3),
        (4, 65536, 16, 2),
        (5, 512, 64, 3),
    ] {
        let env = MemoryEnv::new();
        // The last cluster ends with the disk.
        let size = 40 * cluster_size - 512 * u64::from(cluster_size > 512);
        let options = CreateOptions {
            size,
            version,
            cluster_size,
            refcount_bits,
            ..CreateOptions::default()
        };
        make(&env, "a", &options);
        let mut content = vec![0; usize::try_from(size).unwrap()];
        let mut rng = Rng(seed);
        let mut disk = open(&env, "a");
        for _ in 0..400 {
            let at = rng.below(40) * cluster_size;
            let end = (at + (1 + rng.below(4)) * cluster_size).min(size);
            let range = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
            match rng.below(12) {
                0..6 => {
                    let data = data(&mut rng, range.len());
                    disk.pack(at, &data).unwrap();
                    content[range].copy_from_slice(&data);
                }
                6..8 => {
                    let data = data(&mut rng, 100);
                    disk.write(at + 17, &data);
                    content[range.start + 17..range.start + 117].copy_from_slice(&data);
                }
                8..10 => {
                    let zeroes = disk.guest.write_zeroes(at, end - at, ReqFlags::MAY_UNMAP);
                    env.block_on(zeroes).unwrap();
                    content[range].fill(0);
                }
                10 => disk.flush(),
                _ => {
                    disk.close();
                    disk = open(&env, "a");
                }
            }
        }
        assert!(disk.read(0, content.len()) == content, "seed {seed}");
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
    }
}

#[test]
fn compressed_clusters_share_a_host_cluster() {
    let env = MemoryEnv::new();
    let options = CreateOptions {
        size: 1 << 20,
        ..CreateOptions::default()
    };
    make(&env, "a", &options);
    let disk = open(&env, "a");
    let before = env.content("a").unwrap().len();
    disk.pack(0, &vec![7; 1 << 20]).unwrap();
    disk.flush();
    let grown = env.content("a").unwrap().len() - before;
    assert!(grown <= 2 * 65536, "a table and one cluster for 16: {grown}");
    assert!(disk.read(0, 1 << 20) == vec![7; 1 << 20]);
    disk.close();
    judged_by_qemu(&env, "a", &[], &vec![7; 1 << 20]);
}

#[test]
fn only_whole_clusters_are_compressed() {
    let env = MemoryEnv::new();
    let options = CreateOptions {
        size: 65536 + 512,
        ..CreateOptions::default()
    };
    make(&env, "a", &options);
    let disk = open(&env, "a");
    assert_eq!(disk.pack(512, &[1; 65536]), Err(Errno::EINVAL));
    assert_eq!(disk.pack(0, &[1; 512]), Err(Errno::EINVAL));
    assert_eq!(disk.pack(65536, &[1; 512]), Ok(()), "the disk ends here");
    disk.close();
}

/// A small image with one cluster of sevens, compressed, which was read and then discarded, for good.
fn packed_and_discarded() -> (MemoryEnv, Disk) {
    let env = MemoryEnv::new();
    let options = CreateOptions {
        size: 4 * 65536,
        ..CreateOptions::default()
    };
    make(&env, "a", &options);
    let disk = open(&env, "a");
    disk.pack(0, &[7; 65536]).unwrap();
    assert!(disk.read(0, 65536) == [7; 65536]);
    env.block_on(disk.guest.discard(0, 65536)).unwrap();
    disk.flush();
    (env, disk)
}

#[test]
fn a_host_cluster_that_went_is_not_shared() {
    let (env, disk) = packed_and_discarded();
    let before = env.content("a").unwrap().len();
    disk.write(65536, &[1; 65536]);
    disk.flush();
    assert!(
        env.content("a").unwrap().len() < before + 65536,
        "it takes the place of the other"
    );
    disk.pack(2 * 65536, &[9; 65536]).unwrap();
    assert!(disk.read(65536, 65536) == [1; 65536]);
    disk.close();
    let content = [0_u8, 1, 9, 0].map(|byte| [byte; 65536]).concat();
    judged_by_qemu(&env, "a", &[], &content);
}

#[test]
fn what_was_inflated_from_the_same_place_is_forgotten() {
    let (env, disk) = packed_and_discarded();
    disk.pack(0, &[9; 65536]).unwrap();
    assert!(disk.read(0, 65536) == [9; 65536]);
    disk.close();
    let content = [9_u8, 0, 0, 0].map(|byte| [byte; 65536]).concat();
    judged_by_qemu(&env, "a", &[], &content);
}
