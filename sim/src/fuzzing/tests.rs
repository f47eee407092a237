//! The targets themselves: seeds reach what they are for, and inputs that once showed a bug pass.

use std::path::{Path, PathBuf};

use arbitrary::{Arbitrary, Unstructured};

use super::{ImageInput, ScenarioInput, open_image, run, seeds};

fn image_input(bytes: &[u8]) -> ImageInput {
    ImageInput::arbitrary(&mut Unstructured::new(bytes)).expect("any bytes will do")
}

fn scenario_input(bytes: &[u8]) -> ScenarioInput {
    ScenarioInput::arbitrary(&mut Unstructured::new(bytes)).expect("any bytes will do")
}

/// The files of a folder of the fuzz crate.
fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz").join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.map(|e| e.expect("readable").path()).collect())
        .unwrap_or_default();
    files.sort();
    files
}

#[test]
fn seeds_are_sound_images_that_open_and_serve() {
    for (name, bytes) in seeds::qcow2_open() {
        let depth = open_image(&image_input(&bytes));
        assert!(depth.sound && depth.opened, "{name}: {depth:?}");
        let wanted = if name.contains("read-only") { 6 } else { 17 };
        assert!(depth.done >= wanted, "{name}: {depth:?}");
        assert_eq!(depth.snapshot, name.contains("snapshot"), "{name}");
    }
}

#[test]
fn seeds_in_the_tree_are_those_of_the_code() {
    for (folder, seeds) in [
        ("seeds/qcow2_open", seeds::qcow2_open()),
        ("seeds/scenario", seeds::scenario()),
    ] {
        let names: Vec<String> = files(folder)
            .iter()
            .map(|f| f.file_name().expect("a file").to_string_lossy().into_owned())
            .collect();
        let mut wanted: Vec<&str> = seeds.iter().map(|(name, _)| name.as_str()).collect();
        wanted.sort_unstable();
        assert_eq!(names, wanted, "{folder}: see fuzz/README.md");
        for (name, bytes) in &seeds {
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../fuzz")
                .join(folder)
                .join(name);
            assert_eq!(
                &std::fs::read(path).expect("listed above"),
                bytes,
                "{folder}/{name}"
            );
        }
    }
}

#[test]
fn images_that_once_showed_a_bug_pass() {
    let inputs = files("regressions/qcow2_open");
    assert!(!inputs.is_empty(), "no regression to check");
    for path in inputs {
        eprintln!("{}", path.display());
        open_image(&image_input(&std::fs::read(&path).expect("readable")));
    }
}

#[test]
fn scenarios_of_any_bytes_run() {
    let mut operations = 0;
    for (name, bytes) in seeds::scenario() {
        let input = scenario_input(&bytes);
        operations += input.scenario().steps.len();
        assert_eq!(run(&input), Ok(()), "{name}");
    }
    assert!(operations > 28 * 20, "{operations} steps in 28 scenarios");
}
