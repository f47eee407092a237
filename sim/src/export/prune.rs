//! A script carries no machinery that it does not use: definitions that nobody mentions are left out, until all are
//! mentioned.
//!
//! Rules: a part is cut where functions, classes and methods begin; a comment goes with what follows it. A method counts
//! as mentioned when it is named behind one of the objects of the machinery. Doubt keeps a definition.

/// What methods are called on, as the machinery writes it.
const OBJECTS: [&str; 15] = [
    "run",
    "self",
    "super()",
    "daemon",
    "peer",
    "guest",
    "monitor",
    "history",
    "held",
    "what",
    "pop(0)",
    "pop(export)",
    "guest(export)",
    "image",
    "process",
];

/// A definition, or what lies between.
#[derive(Debug)]
struct Chunk<'a> {
    text: Vec<&'a str>,
    /// Empty: always kept.
    name: &'a str,
    /// The chunk with the class that it is a method of.
    class: Option<usize>,
    kept: bool,
}

fn begins(line: &str, indent: &str) -> bool {
    line.strip_prefix(indent).is_some_and(|l| {
        ["def ", "class ", "@", "# --", "if __name__"]
            .iter()
            .any(|w| l.starts_with(w))
    })
}

fn defined<'a>(line: &'a str, indent: &str) -> Option<&'a str> {
    let rest = line.strip_prefix(indent)?;
    let rest = rest
        .strip_prefix("def ")
        .or_else(|| rest.strip_prefix("class "))?;
    rest.split(|c: char| !is_word(c)).next()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn chunks(text: &str) -> Vec<Chunk<'_>> {
    let mut chunks: Vec<Chunk<'_>> = Vec::new();
    let mut class = None;
    // A comment or decorator waits for its definition.
    let mut open = false;
    for line in text.lines() {
        for indent in ["", "    "] {
            let inside = indent.is_empty() || class.is_some();
            if begins(line, indent) && inside {
                if indent.is_empty() {
                    class = None;
                }
                if !open {
                    chunks.push(Chunk {
                        text: Vec::new(),
                        name: "",
                        class,
                        kept: true,
                    });
                }
                let name = defined(line, indent);
                open = name.is_none() && !line.starts_with("if ");
                if let Some(name) = name {
                    let last = chunks.len() - 1;
                    chunks[last].name = if name.starts_with("__") { "" } else { name };
                    if line.starts_with("class ") {
                        class = Some(last);
                    }
                }
            }
        }
        if chunks.is_empty() {
            chunks.push(Chunk {
                text: Vec::new(),
                name: "",
                class: None,
                kept: true,
            });
        }
        chunks.last_mut().expect("one was pushed").text.push(line);
    }
    chunks
}

/// Whether a line uses this name: of a method, or of a function or class.
fn uses(line: &str, name: &str, is_method: bool) -> bool {
    line.match_indices(name).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + name.len()..]);
        let ends = !after.starts_with(is_word);
        let begins = if is_method {
            before
                .strip_suffix('.')
                .is_some_and(|b| OBJECTS.iter().any(|object| b.ends_with(object)))
        } else {
            !before.ends_with(|c: char| is_word(c) || matches!(c, '.' | '"' | '`'))
        };
        ends && begins
    })
}

/// The part of `machinery` that `own` needs, directly or not.
pub(super) fn pruned(own: &str, machinery: &str) -> String {
    let mut chunks = chunks(machinery);
    loop {
        let unused = (0..chunks.len()).find(|&at| {
            let chunk = &chunks[at];
            if !chunk.kept || chunk.name.is_empty() {
                return false;
            }
            let is_method = chunk.class.is_some();
            let mentioned = own.lines().any(|l| uses(l, chunk.name, is_method))
                || chunks.iter().enumerate().any(|(other, c)| {
                    let apart = other != at && c.class != Some(at);
                    c.kept && apart && c.text.iter().any(|l| uses(l, chunk.name, is_method))
                });
            !mentioned
        });
        let Some(unused) = unused else { break };
        for (at, chunk) in chunks.iter_mut().enumerate() {
            chunk.kept &= at != unused && chunk.class != Some(unused);
        }
    }
    let mut out = String::new();
    for chunk in chunks.iter().filter(|c| c.kept) {
        for line in &chunk.text {
            out.push_str(line);
            out.push('\n');
        }
    }
    spaced(&out)
}

/// Two blank lines before what stands at the left, never more.
fn spaced(text: &str) -> String {
    let mut out = String::new();
    let mut blank = 0;
    let mut comment = true;
    for line in text.lines() {
        if line.is_empty() {
            blank += 1;
            continue;
        }
        let top = begins(line, "") && !out.is_empty();
        let lines = match (top, comment) {
            (true, false) => 2,
            (true, true) => 1,
            (false, _) => blank.min(2),
        };
        out.push_str(&"\n".repeat(lines));
        out.push_str(line);
        out.push('\n');
        blank = 0;
        comment = line.starts_with("# --");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINERY: &str = "\
# ---- things

class Thing:
    \"\"\"A thing.\"\"\"

    def __init__(self):
        self.used()

    def used(self):
        pass

    # -- not used

    @staticmethod
    def unused():
        helper()


def helper():
    pass


class Alone:
    def me(self):
        Alone()


if __name__ == \"__main__\":
    main()
";

    #[test]
    fn what_nobody_mentions_goes_and_what_only_that_mentioned() {
        let kept = pruned("    run = Thing()\n", MACHINERY);
        assert!(kept.contains("def used") && kept.contains("__main__"), "{kept}");
        for gone in ["unused", "staticmethod", "helper", "Alone", "-- not used"] {
            assert!(!kept.contains(gone), "{gone}: {kept}");
        }
        assert!(pruned("    run = Thing()\n    run.unused()\n", MACHINERY).contains("def helper"));
        assert!(!pruned("", MACHINERY).contains("Thing"));
    }
}
