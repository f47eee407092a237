//! Python text: literals, JSON that is broken into lines, runs of content.

use serde_json::Value;

use crate::stamp::{self, Content, Source};

/// Widest line.
pub(super) const WIDTH: usize = 110;

/// A string literal.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// JSON as a literal; broken into lines where it is long, further lines indented by `indent`.
pub(super) fn json(value: &Value, indent: usize) -> String {
    let mut text = String::new();
    pack(&mut text, value, indent, indent + 12);
    // Only what JSON itself escapes has backslashes.
    let raw = if text.contains('\\') { "r" } else { "" };
    format!("{raw}'''{text}'''")
}

/// Appends a value whose further lines are indented by `indent`; `first`: where the first line begins.
fn pack(out: &mut String, value: &Value, indent: usize, first: usize) {
    let column = |out: &str| match out.rfind('\n') {
        Some(at) => out.len() - at - 1,
        None => first + out.len(),
    };
    let line = one_line(value);
    let fits = |out: &str, n: usize| column(out) + n + 4 <= WIDTH;
    let (open, close, items): (char, char, Vec<(String, &Value)>) = match value {
        Value::Object(o) => {
            let key = |k: &str| format!("{}: ", one_line(&Value::from(k)));
            ('{', '}', o.iter().map(|(k, v)| (key(k), v)).collect())
        }
        Value::Array(a) => ('[', ']', a.iter().map(|v| (String::new(), v)).collect()),
        _ => return out.push_str(&line),
    };
    if fits(out, line.len()) {
        return out.push_str(&line);
    }
    out.push(open);
    for (n, (key, item)) in items.iter().enumerate() {
        let line = one_line(item);
        if n > 0 {
            out.push(',');
            let here = fits(out, key.len() + line.len() + 1);
            if here || key == "\"arguments\": " {
                out.push(' ');
            } else {
                out.push('\n');
                out.push_str(&" ".repeat(indent));
            }
        }
        out.push_str(key);
        pack(out, item, indent + 4, first);
    }
    out.push(close);
}

fn one_line(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let members: Vec<String> = object
                .iter()
                .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), one_line(value)))
                .collect();
            format!("{{{}}}", members.join(", "))
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(one_line).collect();
            format!("[{}]", items.join(", "))
        }
        // A quote of Python's would end the literal.
        other => other.to_string().replace('\'', "\\u0027"),
    }
}

/// Text in lines of a comment or docstring.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}

/// What a run of bytes is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum What {
    Zero,
    Written(Source),
    /// Cannot be said.
    Unknown,
}

/// Content as runs of (bytes, what). `offset`: where it begins, a multiple of 16. A unit that is cut off somewhere within does
/// not tell what it is.
pub(super) fn runs(bytes: &[u8], offset: u64, grain: u32, cuts: &[u64]) -> Vec<(u64, What)> {
    let mut runs: Vec<(u64, What)> = Vec::new();
    for (n, unit) in (0u64..).zip(bytes.chunks(16)) {
        // A stamp names the start of its grain.
        let at = (offset + n * 16) & !(u64::from(grain) - 1);
        let start = offset + n * 16;
        let cut = cuts.iter().any(|cut| start < *cut && *cut < start + 16);
        let value = match stamp::read(unit, at) {
            _ if cut => What::Unknown,
            Content::Zero => What::Zero,
            Content::Stamp(source) => What::Written(source),
            Content::Misplaced(..) | Content::Torn => What::Unknown,
        };
        let length = unit.len() as u64;
        match runs.last_mut() {
            Some((last, same)) if *same == value => *last += length,
            _ => runs.push((length, value)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::history::StepId;

    #[test]
    fn long_json_is_broken_and_stays_what_it_is() {
        let value = json!({"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "it's \\",
            "file": {"driver": "file", "filename": "a-name-that-is-long-enough-to-break-the-line.img"}}});
        let text = json(&value, 4);
        assert!(
            text.starts_with("r'''{\"execute\"") && text.contains('\n'),
            "{text}"
        );
        let inside = text.trim_start_matches('r').trim_matches('\'');
        assert_eq!(serde_json::from_str::<Value>(inside).expect("JSON"), value);
        assert!(text.lines().all(|l| l.len() <= WIDTH), "{text}");
    }

    #[test]
    fn content_is_told_in_runs() {
        let mut bytes = vec![0; 200];
        stamp::fill(&mut bytes[64..128], 576, 64, Source::Step(StepId(3)));
        let cut = runs(&bytes, 512, 64, &[512 + 1]);
        assert_eq!(cut[0], (16, What::Unknown), "it ends within");
        let runs = runs(&bytes, 512, 64, &[512, 512 + 16]);
        let written = What::Written(Source::Step(StepId(3)));
        assert_eq!(runs, [(64, What::Zero), (64, written), (72, What::Zero)]);
    }
}
