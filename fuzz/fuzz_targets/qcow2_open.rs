//! An image, hostile or sound, then requests: an error or an answer, never a panic, a hang or a huge allocation, and a
//! sound image stays sound.
#![no_main]

use blkcheck_sim::fuzzing::{self, ImageInput};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ImageInput| {
    fuzzing::open_image(&input);
});
