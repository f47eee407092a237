//! Runs one input of the `qcow2_open` target: `cargo run -p blkcheck-sim --example fuzz_show -- FILE`.
fn main() {
    use arbitrary::{Arbitrary, Unstructured};
    for path in std::env::args().skip(1) {
        let bytes = std::fs::read(&path).expect("readable");
        let input =
            blkcheck_sim::fuzzing::ImageInput::arbitrary(&mut Unstructured::new(&bytes)).expect("any bytes");
        println!("{path}: {input}");
        let image = input.image();
        println!(
            "{} bytes, before: {:#?}",
            image.len(),
            blkcheck_sim::image::check::check_with_snapshots(&image)
        );
        println!("{:?}", blkcheck_sim::fuzzing::open_image(&input));
    }
}
