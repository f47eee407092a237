//! What `qemu-img` says of a finished image.

use std::fs;
use std::process::Command;
use std::sync::Once;

use super::{RealTarget, unusable};
use crate::lack;
use crate::oracle::{OracleName, Violation};
use crate::target::Trouble;

/// What the image should hold, among the images.
pub(super) const EXPECTED: &str = ".expected";

impl RealTarget {
    /// `check` of the image, and `compare` of its guest content with what is expected, written as a raw file.
    pub(super) fn qemu_img_judges(&self, name: &str, expected: &[u8]) -> Result<Option<Violation>, Trouble> {
        let violation = |what: &str, said: Vec<String>| {
            let message =
                format!("qemu-img {what} of image '{name}' after a clean close says otherwise than we do");
            Some(Violation {
                oracle: OracleName::Image,
                message,
                step: None,
                evidence: said,
            })
        };
        // A name may look like another protocol's, or like an option.
        let name = &format!("./{name}");
        if let Err(said) = self.qemu_img(&["check", "-q", "-f", "qcow2", name])? {
            return Ok(violation("check", said));
        }
        let path = self.scratch.path().join(EXPECTED);
        fs::write(&path, expected).map_err(unusable(EXPECTED))?;
        // Not -s, which also wants the same allocation. A longer image whose excess is zero is told in words only.
        let same = self.qemu_img(&["compare", "-f", "qcow2", "-F", "raw", name, EXPECTED])?;
        Ok(match same {
            Err(said) => violation("compare", said),
            Ok(said) if said.contains("size mismatch") => violation("compare", vec![said]),
            Ok(_) => None,
        })
    }

    /// Runs it among the images; what it said, on success as on failure.
    fn qemu_img(&self, arguments: &[&str]) -> Result<Result<String, Vec<String>>, Trouble> {
        let output = Command::new("qemu-img")
            .args(arguments)
            .current_dir(self.scratch.path())
            .output()
            .map_err(unusable("qemu-img"))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        if output.status.success() {
            return Ok(Ok(text));
        }
        if lack::is_told(&text) {
            return Err(Trouble::Unusable(format!("qemu-img: {text}")));
        }
        let first = format!("qemu-img {}: {}", arguments.join(" "), output.status);
        let lines = std::iter::once(first).chain(text.lines().map(str::to_owned));
        Ok(Err(lines.collect()))
    }
}

thread_local! {
    static JUDGE: bool = Command::new("qemu-img").arg("--version").output().is_ok_and(|o| o.status.success());
}

pub(super) fn qemu_img_is_there() -> bool {
    JUDGE.with(|there| *there)
}

pub(super) fn say_whether_judged() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if !qemu_img_is_there() {
            crate::cli::tell(
                "WARNING: qemu-img is not installed: finished images are judged by blkcheck's own reader only",
            );
        }
    });
}
