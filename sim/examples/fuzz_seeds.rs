//! Writes the seeds of the fuzz targets: `cargo run -p blkcheck-sim --example fuzz_seeds -- fuzz/seeds`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "fuzz/seeds".to_owned());
    for (target, seeds) in [
        ("qcow2_open", blkcheck_sim::fuzzing::seeds::qcow2_open()),
        ("scenario", blkcheck_sim::fuzzing::seeds::scenario()),
    ] {
        let folder = Path::new(&folder).join(target);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        for (name, bytes) in seeds {
            std::fs::write(folder.join(name), bytes)?;
        }
    }
    Ok(())
}
