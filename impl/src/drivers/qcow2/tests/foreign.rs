//! Images that this driver did not make: what QEMU writes and this driver does not, and what nobody should have written.

use super::*;

#[test]
fn compressed_clusters_of_qemu_are_read_and_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let mut content: Vec<u8> = (0..1u32 << 20)
        .map(|i| u8::try_from(i / 300 % 256).unwrap())
        .collect();
    std::fs::write(dir.path().join("raw"), &content).unwrap();
    for cluster in [512, 4096, 65536, 2 << 20] {
        let options = format!("cluster_size={cluster}");
        let args = [
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, "raw", "a",
        ];
        if !qemu_ok(&dir, "qemu-img", &args) {
            return;
        }
        let env = MemoryEnv::new();
        import(&env, &dir, "a");
        let disk = open(&env, "a");
        assert!(disk.read(0, content.len()) == content, "cluster size {cluster}");
        let before = content.clone();
        for at in [1000, 70_000, 500_000, 500_400, 1_048_000] {
            disk.write(at as u64, &[0xa5; 500]);
            content[at..at + 500].fill(0xa5);
        }
        assert!(disk.read(0, content.len()) == content, "cluster size {cluster}");
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
        content = before;
    }
}

#[test]
fn snapshots_of_qemu_keep_their_content() {
    let dir = tempfile::tempdir().unwrap();
    for (cluster, bits) in [(512, 16), (4096, 2), (65536, 64)] {
        let options = format!("cluster_size={cluster},refcount_bits={bits}");
        if !qemu_ok(
            &dir,
            "qemu-img",
            &["create", "-f", "qcow2", "-o", &options, "a", "1M"],
        ) {
            return;
        }
        qemu_ok(&dir, "qemu-io", &["-c", "write -P 17 0 700k", "a"]);
        qemu_ok(&dir, "qemu-img", &["snapshot", "-c", "one", "a"]);
        let env = MemoryEnv::new();
        import(&env, &dir, "a");
        let disk = open(&env, "a");
        let mut content = vec![0; 1 << 20];
        content[..700 << 10].fill(17);
        let mut rng = Rng(3);
        for step in 0..150 {
            random_step(&disk, &mut rng, &mut content, step);
        }
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
        export(&env, &dir, "a");
        let args = ["convert", "-f", "qcow2", "-l", "one", "-O", "raw", "a", "one.raw"];
        qemu_ok(&dir, "qemu-img", &args);
        let one = std::fs::read(dir.path().join("one.raw")).unwrap();
        assert!(
            one.len() == 1 << 20 && one[..700 << 10].iter().all(|b| *b == 17),
            "the snapshot changed"
        );
        assert!(one[700 << 10..].iter().all(|b| *b == 0), "the snapshot changed");
        let disk = open(&env, "a");
        disk.truncate(1 << 19);
        content.truncate(1 << 19);
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
    }
}

#[test]
fn persistent_bitmaps_are_kept_by_a_writer() {
    let dir = tempfile::tempdir().unwrap();
    if !qemu_ok(&dir, "qemu-img", &["create", "-f", "qcow2", "a", "1M"]) {
        return;
    }
    qemu_ok(&dir, "qemu-img", &["bitmap", "--add", "a", "b0"]);
    let env = MemoryEnv::new();
    import(&env, &dir, "a");
    let before = env.content("a");
    try_open(&env, "a", &json!({"read-only": true})).unwrap().close();
    assert!(env.content("a") == before, "a reader changes nothing");
    open(&env, "a").close();
    export(&env, &dir, "a");
    let (_, text) = qemu(&dir, "qemu-img", &["info", "a"]).unwrap();
    assert!(text.contains("b0") && !text.contains("in-use"), "{text}");
    let (code, text) = qemu(&dir, "qemu-img", &["check", "a"]).unwrap();
    assert_eq!(code, 0, "{text}");
}

#[test]
fn dirty_corrupt_and_truncated_images() {
    let env = MemoryEnv::new();
    make(&env, "a", &options(12, 4, 3, 1 << 20));
    let disk = open(&env, "a");
    disk.write(0, &[1; 100_000]);
    disk.close();
    let good = env.content("a").unwrap();
    for (bit, text) in [
        (1, "Image is dirty"),
        (2, "qcow2: Image is corrupt; cannot be opened read/write"),
    ] {
        let mut bad = good.clone();
        bad[79] |= bit;
        env.create_with("a", &bad);
        let refusal = try_open(&env, "a", &json!({})).err().unwrap();
        assert!(refusal.contains(text), "{refusal}");
        let disk = try_open(&env, "a", &json!({"read-only": true})).unwrap();
        assert_eq!(disk.read(0, 100_000), [1; 100_000]);
        disk.close();
    }
    for keep in [100, 4096, 8192, 12288, 16384, 16896] {
        env.create_with("a", &good[..keep]);
        let opened = try_open(&env, "a", &json!({"read-only": true}));
        assert!(opened.is_err(), "cut at {keep}");
    }
}

/// Whatever the bytes are: an error or data, no panic, no hang, no giant allocation.
#[test]
fn hostile_images_do_no_harm() {
    let env = MemoryEnv::new();
    make(&env, "a", &options(12, 4, 3, 256 << 10));
    let disk = open(&env, "a");
    for at in [0, 70_000, 200_000] {
        disk.write(at, &[3; 5000]);
    }
    disk.close();
    let good = env.content("a").unwrap();
    // Header, refcount table and block, L1 and L2 table are the first five clusters.
    let meaning: Vec<u64> = (0..5 * 4096)
        .filter(|at| good[usize::try_from(*at).unwrap()] != 0)
        .collect();
    let mut rng = Rng(99);
    let (mut refused, mut failed, mut worked) = (0, 0, 0);
    for _ in 0..1500 {
        let mut bad = good.clone();
        for _ in 0..=rng.below(3) {
            let at = match rng.below(3) {
                0 => rng.below(112),
                1 => rng.below(5 * 4096),
                _ => meaning[usize::try_from(rng.below(meaning.len() as u64)).unwrap()],
            };
            let at = usize::try_from(at).unwrap();
            bad[at] = match rng.below(3) {
                0 => 0xff,
                1 => bad[at] ^ 1 << rng.below(8),
                _ => u8::try_from(rng.below(256)).unwrap(),
            };
        }
        env.create_with("a", &bad);
        let Ok(disk) = try_open(&env, "a", &json!({"backing": null})) else {
            refused += 1;
            continue;
        };
        let size = disk.guest.length().unwrap();
        let mut result = Ok(());
        for _ in 0..12 {
            let at = rng.below(size.clamp(512, 1 << 20) / 512) * 512;
            let bytes = 4096.min(size.saturating_sub(at));
            let mut buf = vec![5; usize::try_from(bytes).unwrap()];
            let empty = ReqFlags::empty();
            let step = env.block_on(async {
                match rng.below(4) {
                    0 => disk.guest.read(at, &mut buf).await,
                    1 => disk.guest.discard(at, bytes).await,
                    2 => disk.guest.flush().await,
                    _ => disk.guest.write(at, &buf, empty).await,
                }
            });
            result = result.and(step);
        }
        let all = vec![6; usize::try_from(size.min(256 << 10)).unwrap()];
        let step = env.block_on(disk.guest.write(0, &all, ReqFlags::empty()));
        result = result.and(step);
        if result.is_ok() {
            worked += 1;
        } else {
            failed += 1;
        }
        disk.close();
    }
    assert!(
        refused > 100 && failed > 20 && worked > 100,
        "{refused} {failed} {worked}"
    );
}

/// Three L1 entries that share one table: each use counts, and the last to leave it may get its cluster back.
#[test]
fn a_table_shared_within_the_image_counts_each_use() {
    const SPAN: u64 = 32 << 10;
    let env = MemoryEnv::new();
    make(&env, "a", &options(9, 4, 3, 3 * SPAN));
    let disk = open(&env, "a");
    disk.write(0, &[7; 512]);
    disk.close();
    let mut image = env.content("a").unwrap();
    let get =
        |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) & !(1 << 63);
    let place = |v: u64| usize::try_from(v).unwrap();
    let (l1, reftable) = (place(get(&image, 40)), place(get(&image, 48)));
    let (refblock, table) = (place(get(&image, reftable)), place(get(&image, l1)));
    let data = place(get(&image, table));
    let shared = get(&image, l1).to_be_bytes();
    for index in 0..3 {
        image[l1 + 8 * index..l1 + 8 * index + 8].copy_from_slice(&shared);
    }
    image[table] &= 0x7f;
    for uses in [2, 3] {
        for cluster in [table / 512, data / 512] {
            image[refblock + 2 * cluster + 1] = uses;
        }
        env.create_with("a", &image);
        if uses == 2 {
            let refusal = try_open(&env, "a", &json!({})).err().unwrap();
            assert!(refusal.ends_with("is used 3 times"), "{refusal}");
        }
    }
    let disk = open(&env, "a");
    for (span, value) in [(0, 1), (1, 2), (2, 3)] {
        disk.write(span * SPAN + 1024, &[value; 512]);
        disk.flush();
    }
    for (span, value) in [(0, 1), (1, 2), (2, 3)] {
        disk.write(span * SPAN + 8192, &[value + 10; 4096]);
        assert_eq!(disk.read(span * SPAN, 512), [7; 512]);
        assert_eq!(disk.read(span * SPAN + 1024, 512), [value; 512]);
    }
    disk.close();
    let disk = open(&env, "a");
    for (span, value) in [(0, 1), (1, 2), (2, 3)] {
        assert_eq!(disk.read(span * SPAN, 512), [7; 512]);
        assert_eq!(disk.read(span * SPAN + 8192, 4096), [value + 10; 4096]);
    }
    disk.close();
}
