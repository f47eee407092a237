//! The images of a script: made by qemu-img and qemu-io where these can make them, else embedded as bytes.
//!
//! Rules: what the tools make holds what [`crate::image::build`] lays out, cluster by cluster (data, zero, compressed,
//! unallocated); where in the file a cluster lies is the tools' affair. Backing files are named at the end, so that
//! no fill is copied from one.

use std::fmt::Write;
use std::io::Write as _;

use super::text::quoted;
use super::values::Values;
use crate::image::build::build;
use crate::qemu::names::Names;
use crate::scenario::{Fill, Format, Image, Scenario, Stored};

/// Whether qemu-img and qemu-io can make this image.
pub(super) fn by_tools(image: &Image) -> bool {
    let cluster = u64::from(image.cluster_size);
    let whole = |f: &Fill| {
        let end = f.offset + f.length;
        f.offset.is_multiple_of(cluster) && (end.is_multiple_of(cluster) || end == image.size)
    };
    match image.format {
        Format::Raw => image.size.is_multiple_of(512),
        Format::Qcow2 => image.fill.iter().all(|f| whole(f) || f.stored == Stored::Data),
    }
}

/// The body of `make_images`.
pub(super) fn commands(scenario: &Scenario, values: &Values) -> String {
    let mut out = String::new();
    for (index, image) in (0u16..).zip(&scenario.images) {
        create(&mut out, image);
        fills(&mut out, image, index, values);
    }
    for image in &scenario.images {
        let Some(backing) = &image.backing_file else {
            continue;
        };
        let format = image.backing_format.as_ref();
        let format = format.map_or_else(String::new, |f| format!("\"-F\", {}, ", quoted(f)));
        let _ = writeln!(
            out,
            "    make(\"qemu-img\", \"rebase\", \"-q\", \"-u\", \"-f\", \"qcow2\", \"-b\", {}, {format}{})",
            quoted(backing),
            quoted(&image.file)
        );
    }
    if out.is_empty() {
        out.push_str("    pass  # there are none\n");
    }
    out
}

fn create(out: &mut String, image: &Image) {
    let (format, options) = match image.format {
        Format::Raw => ("raw", String::new()),
        Format::Qcow2 => {
            let mut options = format!("cluster_size={}", image.cluster_size);
            if image.compat == 2 {
                options.push_str(",compat=0.10");
            }
            if image.refcount_bits != 16 {
                let _ = write!(options, ",refcount_bits={}", image.refcount_bits);
            }
            ("qcow2", format!("\"-o\", \"{options}\", "))
        }
    };
    let _ = writeln!(
        out,
        "    make(\"qemu-img\", \"create\", \"-q\", \"-f\", \"{format}\", {options}{}, \"{}\")",
        quoted(&image.file),
        image.size
    );
}

fn fills(out: &mut String, image: &Image, index: u16, values: &Values) {
    let format = if image.format == Format::Raw {
        "raw"
    } else {
        "qcow2"
    };
    let mut commands = Vec::new();
    for (number, fill) in (0u16..).zip(&image.fill).filter(|(_, f)| f.length > 0) {
        let range = format!("{:#x} {:#x}", fill.offset, fill.length);
        let value = values.of_fill(index, number);
        match fill.stored {
            Stored::Data => commands.push(format!("write -P {value} {range}")),
            Stored::Compressed => commands.push(format!("write -c -P {value} {range}")),
            Stored::Zero if image.format == Format::Raw => commands.push(format!("write -P 0 {range}")),
            Stored::Zero => commands.push(format!("write -z -u {range}")),
            // What is below the zeroes is never to be seen.
            Stored::ZeroAllocated => {
                commands.push(format!("write -P 0xa5 {range}"));
                commands.push(format!("write -z {range}"));
            }
        }
    }
    if !commands.is_empty() {
        let commands: Vec<String> = commands.iter().map(|c| quoted(c)).collect();
        let _ = writeln!(
            out,
            "    fill(\"{format}\", {}, {})",
            quoted(&image.file),
            commands.join(", ")
        );
    }
}

/// Room behind an image for whatever a format may append; as the target has it.
fn room(image: &Image) -> u64 {
    match image.format {
        Format::Raw => 0,
        Format::Qcow2 => 3 * image.size + 32 * u64::from(image.cluster_size) + 65536,
    }
}

/// Tables of bytes: a function that returns (name, room, bytes) of each. `names`: for backing files on record.
pub(super) fn embedded(scenario: &Scenario, names: Option<&Names>) -> String {
    let mut out = String::from(
        "def images():\n    \"\"\"(name, room behind it, bytes) of every image.\"\"\"\n    return [\n",
    );
    for (index, image) in (0u16..).zip(&scenario.images) {
        let mut image = image.clone();
        if let Some(names) = names {
            image.backing_file = image.backing_file.map(|name| names.on_record(&name));
        }
        let mut bytes = Vec::new();
        build(&image, index, scenario.grain, &mut bytes);
        let _ = writeln!(
            out,
            "        ({}, {:#x}, unpacked(\"\"\"",
            quoted(&image.file),
            room(&image)
        );
        let packed = base85(&miniz_oxide::deflate::compress_to_vec_zlib(&bytes, 9));
        for line in packed.as_bytes().chunks(108) {
            let _ = out.write_str(std::str::from_utf8(line).expect("ASCII"));
            out.push('\n');
        }
        out.push_str("        \"\"\")),\n");
    }
    out.push_str("    ]\n");
    out
}

/// As Python's `base64.b85encode`.
fn base85(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 85] =
        b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~";
    let mut out = Vec::with_capacity(bytes.len() / 4 * 5 + 5);
    for chunk in bytes.chunks(4) {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        let mut word = u32::from_be_bytes(word);
        let mut digits = [0; 5];
        for digit in digits.iter_mut().rev() {
            *digit = DIGITS[(word % 85) as usize];
            word /= 85;
        }
        let _ = out.write_all(&digits[..=chunk.len()]);
    }
    String::from_utf8(out).expect("ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base85_is_pythons() {
        assert_eq!(base85(b"hello world"), "Xk~0{Zy<MXa%^M");
        assert_eq!(base85(&[0, 0, 0, 0, 255]), "00000{{");
        assert_eq!(base85(b""), "");
    }
}
