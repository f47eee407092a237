//! Reads scenario files, and says precisely what is wrong with those that are not.
//!
//! Rules: an error names file, line, column, the place in the document and what was expected. Nothing in a file makes
//! this panic or use memory out of proportion.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

use super::validate::{Invalid, Seg, validate};
use super::{GuestOp, Image, Scenario, Step, WaitJob};

/// Largest file read, bytes.
pub const MAX_FILE: usize = 64 << 20;

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// File name.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1, in bytes.
    pub column: usize,
    /// Place in the document, like `steps[3].do`; empty for the document itself.
    pub place: String,
    /// What was expected, what is there.
    pub message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ParseError {}

/// Reads a scenario. `file`: its name, for errors.
///
/// # Errors
/// On anything that is not a valid scenario.
pub fn parse(file: &str, text: &[u8]) -> Result<Scenario, ParseError> {
    let syntax = |line: usize, column: usize, message: String| ParseError {
        file: file.to_owned(),
        line,
        column,
        place: String::new(),
        message,
    };
    if text.len() > MAX_FILE {
        return Err(syntax(
            1,
            1,
            format!("the file has {} bytes, at most {MAX_FILE} are read", text.len()),
        ));
    }
    let value: Value = serde_json::from_slice(text).map_err(|e| {
        let message = e.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        syntax(e.line().max(1), e.column().max(1), format!("not JSON: {message}"))
    })?;
    let scenario = convert(&value).and_then(|scenario| validate(&scenario).map(|()| scenario));
    scenario.map_err(|invalid| {
        let (line, column) = locate(text, &invalid.path);
        let place = place(&invalid.path);
        ParseError {
            file: file.to_owned(),
            line,
            column,
            place,
            message: invalid.message,
        }
    })
}

fn place(path: &[Seg]) -> String {
    let mut place = String::new();
    for seg in path {
        match seg {
            Seg::Key(key) if place.is_empty() => place.push_str(key),
            Seg::Key(key) => {
                place.push('.');
                place.push_str(key);
            }
            Seg::Index(i) => place.push_str(&format!("[{i}]")),
        }
    }
    place
}

fn invalid(path: Vec<Seg>, message: impl fmt::Display) -> Invalid {
    Invalid {
        path,
        message: message.to_string(),
    }
}

/// The parts first, so that an error is in the smallest part that has it.
fn convert(value: &Value) -> Result<Scenario, Invalid> {
    let Value::Object(top) = value else {
        return Err(invalid(Vec::new(), "expected an object: a scenario"));
    };
    // A file of another version is not judged by this version's rules.
    match top.get("version") {
        Some(version) if version.as_u64() == Some(u64::from(super::VERSION)) => {}
        Some(version) => {
            let message = format!(
                "this build reads version {}, the file has {version}",
                super::VERSION
            );
            return Err(invalid(vec![Seg::Key("version")], message));
        }
        None => {
            return Err(invalid(
                Vec::new(),
                format!("\"version\": {} is missing", super::VERSION),
            ));
        }
    }
    let list = |key: &'static str| match top.get(key) {
        Some(Value::Array(items)) => Ok(items.as_slice()),
        Some(_) => Err(invalid(vec![Seg::Key(key)], "expected an array")),
        None => Err(invalid(Vec::new(), format!("\"{key}\" is missing"))),
    };
    for (i, image) in list("images")?.iter().enumerate() {
        Image::deserialize(image).map_err(|e| invalid(vec![Seg::Key("images"), Seg::Index(i)], e))?;
    }
    for (i, step) in list("steps")?.iter().enumerate() {
        check_step(step).map_err(|mut e| {
            e.path.splice(0..0, [Seg::Key("steps"), Seg::Index(i)]);
            e
        })?;
    }
    Scenario::deserialize(value).map_err(|e| invalid(Vec::new(), e))
}

/// The keys that say what a step does, and the further ones that go with each.
const ACTIONS: [(&str, &[&str]); 6] = [
    ("execute", &["arguments"]),
    ("export", &["do"]),
    ("drained-begin", &[]),
    ("drained-end", &[]),
    ("wait-job", &[]),
    ("settle", &[]),
];

fn check_step(step: &Value) -> Result<(), Invalid> {
    let Value::Object(step_object) = step else {
        return Err(invalid(Vec::new(), "expected an object: a step"));
    };
    let kinds: Vec<_> = ACTIONS
        .iter()
        .filter(|(key, _)| step_object.contains_key(*key))
        .collect();
    let [(kind, with)] = kinds[..] else {
        let message = "expected exactly one of \"execute\", \"export\", \"drained-begin\", \"drained-end\", \
                       \"wait-job\", \"settle\"";
        return Err(invalid(Vec::new(), message));
    };
    for key in step_object.keys() {
        let known = [*kind, "actor", "wait"].contains(&key.as_str()) || with.contains(&key.as_str());
        if !known {
            return Err(invalid(
                Vec::new(),
                format!("\"{key}\" means nothing in a step with \"{kind}\""),
            ));
        }
    }
    if *kind == "export" {
        let Some(op) = step_object.get("do") else {
            return Err(invalid(
                Vec::new(),
                "\"do\" is missing: what to ask the export for",
            ));
        };
        GuestOp::deserialize(op).map_err(|e| invalid(vec![Seg::Key("do")], e))?;
    }
    if *kind == "wait-job" {
        WaitJob::deserialize(&step_object["wait-job"]).map_err(|e| invalid(vec![Seg::Key("wait-job")], e))?;
    }
    let strings: &[&'static str] = &["actor", "execute", "export", "drained-begin", "drained-end"];
    for key in strings {
        match step_object.get(*key) {
            Some(Value::String(_)) => {}
            Some(_) => return Err(invalid(vec![Seg::Key(key)], "expected a string")),
            None if *key == "actor" => return Err(invalid(Vec::new(), "\"actor\" is missing")),
            None => {}
        }
    }
    for key in ["arguments", "settle"] {
        if step_object.get(key).is_some_and(|v| !v.is_object()) {
            return Err(invalid(vec![Seg::Key(key)], "expected an object"));
        }
    }
    if step_object.get("wait").is_some_and(|v| !v.is_boolean()) {
        return Err(invalid(vec![Seg::Key("wait")], "expected true or false"));
    }
    Step::deserialize(step)
        .map(drop)
        .map_err(|e| invalid(Vec::new(), e))
}

/// Line and column of a place in a document that is known to be JSON; of the nearest enclosing place that exists.
fn locate(text: &[u8], path: &[Seg]) -> (usize, usize) {
    let mut at = skip_space(text, 0);
    for seg in path {
        match descend(text, at, seg) {
            Some(inner) => at = inner,
            None => break,
        }
    }
    let before = &text[..at.min(text.len())];
    let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
    let column = at - before.iter().rposition(|&b| b == b'\n').map_or(0, |n| n + 1) + 1;
    (line, column)
}

fn skip_space(text: &[u8], mut at: usize) -> usize {
    while text.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}

/// The place of one member of the array or object that begins at `at`. The last one of equal keys, as serde has it.
fn descend(text: &[u8], at: usize, seg: &Seg) -> Option<usize> {
    let object = match (text.get(at)?, seg) {
        (b'{', Seg::Key(_)) => true,
        (b'[', Seg::Index(_)) => false,
        _ => return None,
    };
    let mut found = None;
    let mut at = skip_space(text, at + 1);
    let mut index = 0;
    while !matches!(text.get(at)?, b'}' | b']') {
        let mut matches = matches!(seg, Seg::Index(i) if *i == index);
        if object {
            let end = skip_value(text, at)?;
            let key: Option<String> = serde_json::from_slice(&text[at..end]).ok();
            matches = matches!(seg, Seg::Key(k) if key.as_deref() == Some(k));
            // The colon.
            at = skip_space(text, skip_space(text, end) + 1);
        }
        if matches {
            found = Some(at);
        }
        at = skip_space(text, skip_value(text, at)?);
        if text.get(at)? == &b',' {
            at = skip_space(text, at + 1);
        }
        index += 1;
    }
    found
}

/// The end of the value that begins at `at`.
fn skip_value(text: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 0u32;
    loop {
        match text.get(at)? {
            b'"' => {
                at += 1;
                while *text.get(at)? != b'"' {
                    at += if text[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.checked_sub(1)?,
            b',' | b':' | b' ' | b'\n' | b'\r' | b'\t' => {}
            _ => {
                // A number or a word.
                while text.get(at + 1).is_some_and(|b| !b",:]}\"[{ \n\r\t".contains(b)) {
                    at += 1;
                }
            }
        }
        at += 1;
        if depth == 0 {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{
  "version": 1,
  "grain": 64,
  "images": [
    {"file": "a", "format": "qcow2", "size": 65536, "fill": [{"offset": 0, "length": 64, "stored": "data"}]}
  ],
  "steps": [
    {"actor": "monitor", "execute": "query-jobs"},
    {"actor": "guest0", "export": "top", "do": {"write": {"offset": 64, "length": 128}}, "wait": false},
    {"actor": "guest0", "export": "top", "do": "flush"},
    {"actor": "guest0", "settle": {}},
    {"actor": "monitor", "wait-job": {"id": "j", "status": "concluded"}},
    {"actor": "drain0", "drained-begin": "top"}
  ]
}"#;

    fn error(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "{from}");
        parse("x.json", GOOD.replacen(from, to, 1).as_bytes())
            .expect_err(to)
            .to_string()
    }

    #[test]
    fn a_good_file_survives_the_way_out_and_back() {
        let scenario = parse("x.json", GOOD.as_bytes()).expect("good");
        let text = serde_json::to_string(&scenario).expect("JSON");
        assert_eq!(parse("y.json", text.as_bytes()).expect("good"), scenario);
    }

    #[test]
    fn errors_name_line_column_place_and_expectation() {
        let cases = [
            (
                r#""version": 1"#,
                r#""version": 2"#,
                "x.json:2:14: version: this build reads version 1, the file has 2",
            ),
            (r#""grain": 64"#, r#""grain": 48"#, "x.json:3:12: grain: "),
            (
                r#""grain": 64,"#,
                r#""grain": 64"#,
                "x.json:4:3: not JSON: expected `,` or `}`",
            ),
            (
                r#""offset": 0"#,
                r#""offset": 3"#,
                "x.json:5:73: images[0].fill[0].offset: ",
            ),
            (
                r#""qcow2""#,
                r#""vmdk""#,
                "x.json:5:5: images[0]: unknown variant `vmdk`, expected `raw` or `qcow2`",
            ),
            (
                r#""offset": 64"#,
                r#""offset": 65"#,
                "x.json:9:69: steps[1].do.write.offset: ",
            ),
            (
                r#""flush""#,
                r#""flash""#,
                "x.json:10:48: steps[2].do: unknown variant `flash`",
            ),
            (
                r#""do": "flush""#,
                r#""dont": "flush""#,
                "x.json:10:5: steps[2]: \"dont\" means nothing",
            ),
            (
                r#""settle": {}"#,
                r#""settel": {}"#,
                "x.json:11:5: steps[3]: expected exactly one of \"execute\"",
            ),
            (
                r#""concluded""#,
                r#""conclude""#,
                "x.json:12:60: steps[4].wait-job.status: ",
            ),
            (
                r#""steps": ["#,
                r#""stops": ["#,
                "x.json:1:1: \"steps\" is missing",
            ),
        ];
        for (from, to, expected) in cases {
            let error = error(from, to);
            assert!(
                error.starts_with(expected),
                "\n  {error}\ndoes not begin with\n  {expected}"
            );
        }
    }

    #[test]
    fn hostile_files_are_errors() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(
            parse("x", deep.as_bytes())
                .expect_err("deep")
                .message
                .contains("recursion limit")
        );
        for text in [
            "",
            "null",
            "[]",
            "{}",
            "\"",
            "\u{feff}{}",
            r#"{"version":1,"grain":64,"images":{},"steps":[]}"#,
        ] {
            parse("x", text.as_bytes()).expect_err(text);
        }
        parse("x", &[0xff, 0xfe]).expect_err("not UTF-8");
        let image = r#"{"file":"a","format":"raw","size":18446744073709551615}"#;
        let huge = format!(r#"{{"version":1,"grain":64,"images":[{image}],"steps":[]}}"#);
        assert!(
            parse("x", huge.as_bytes())
                .expect_err("huge")
                .to_string()
                .contains("images[0].size")
        );
        let step = r#"{"actor":"g","export":"e","do":{"read":{"offset":18446744073709551552,"length":64}}}"#;
        let wraps = format!(r#"{{"version":1,"grain":64,"images":[],"steps":[{step}]}}"#);
        assert!(
            parse("x", wraps.as_bytes())
                .expect_err("wraps")
                .to_string()
                .contains("steps[0].do.read")
        );
    }

    /// Any single-byte damage gives a scenario or an error with a position inside the file.
    #[test]
    fn damaged_files_never_panic() {
        for at in 0..GOOD.len() {
            for byte in [b'"', b'{', b'}', b'0', b'\\', b',', b' ', 0xff] {
                let mut text = GOOD.as_bytes().to_vec();
                text[at] = byte;
                if let Err(e) = parse("x", &text) {
                    assert!(e.line <= 16 && e.column <= 130, "{e}");
                }
            }
        }
    }
}
