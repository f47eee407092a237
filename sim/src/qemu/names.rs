//! A scenario's words and the daemon's.
//!
//! A scenario names files; the daemon has each as an export of our server, `nbd+unix:///NAME?socket=PATH`. Names of
//! nodes are the same on both sides, but for those that the daemon makes up: `#block`, a number that counts over its
//! whole life, and two random digits. Scenarios count from 0 in every run and have 00 for the digits.
//! Rules: whatever goes to the daemon passes [`Names::to_daemon`], whatever comes from it [`Names::from_daemon`].
//! A file that no scenario has is an export that our server does not have.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// Driver of a file, and what stands for it here.
const FILE: &str = "file";
const NBD: &str = "nbd";
/// Begins the name of an export of ours.
const URL: &str = "nbd+unix:///";
/// Options of `file` that `nbd` has not.
const FILE_ONLY: [&str; 6] = [
    "filename",
    "locking",
    "aio",
    "pr-manager",
    "drop-cache",
    "x-check-cache-dropped",
];

/// The dictionary of one run.
#[derive(Debug, Default)]
pub struct Names {
    socket: String,
    /// Names that the daemon had made up before this run.
    before: u64,
    /// Made-up names that are in use: ours to the daemon's.
    made_up: BTreeMap<String, String>,
}

impl Names {
    /// For a run, over our server at `socket`.
    pub fn reset(&mut self, socket: &str, before: u64) {
        socket.clone_into(&mut self.socket);
        self.before = before;
        self.made_up.clear();
    }

    /// What the daemon calls a file.
    #[must_use]
    pub fn url(&self, file: &str) -> String {
        format!("{URL}{file}?socket={}", self.socket)
    }

    /// A file name on record in an image. One that is not plain stays as it is.
    #[must_use]
    pub fn on_record(&self, name: &str) -> String {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if !name.is_empty() && name.bytes().all(plain) {
            self.url(name)
        } else {
            name.to_owned()
        }
    }

    /// Arguments of a command.
    #[must_use]
    pub fn to_daemon(&self, execute: &str, arguments: &Map<String, Value>) -> Map<String, Value> {
        let mut out = self.object(arguments);
        match execute {
            "block-stream" | "block-commit" | "change-backing-file" => {
                for key in ["base", "top", "backing-file"] {
                    if let Some(Value::String(name)) = out.get_mut(key) {
                        *name = self.on_record(name);
                    }
                }
            }
            // Guests ask for depth as well.
            "block-export-add" if text(&out, "type") == Some(NBD) => {
                out.entry("allocation-depth").or_insert(Value::Bool(true));
            }
            _ => {}
        }
        out
    }

    fn object(&self, options: &Map<String, Value>) -> Map<String, Value> {
        let mut out: Map<String, Value> = options
            .iter()
            .map(|(key, value)| (key.clone(), self.value(value)))
            .collect();
        if text(&out, "driver") == Some(FILE)
            && let Some(file) = text(options, "filename").map(str::to_owned)
        {
            for key in FILE_ONLY {
                out.shift_remove(key);
            }
            out.insert("driver".to_owned(), json!(NBD));
            out.insert("server".to_owned(), json!({"type": "unix", "path": self.socket}));
            out.insert("export".to_owned(), Value::String(file));
        }
        out
    }

    fn value(&self, value: &Value) -> Value {
        match value {
            Value::Object(inner) => Value::Object(self.object(inner)),
            Value::Array(items) => Value::Array(items.iter().map(|v| self.value(v)).collect()),
            Value::String(s) => Value::String(self.made_up.get(s).cloned().unwrap_or_else(|| s.clone())),
            other => other.clone(),
        }
    }

    /// A value that the daemon sent.
    pub fn from_daemon(&mut self, value: &mut Value) {
        match value {
            Value::Object(inner) => inner.values_mut().for_each(|v| self.from_daemon(v)),
            Value::Array(items) => items.iter_mut().for_each(|v| self.from_daemon(v)),
            Value::String(s) => {
                if let Some(ours) = self.text(s) {
                    *s = ours;
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// The same for a text; `None` when nothing is to be replaced.
    pub fn text(&mut self, text: &str) -> Option<String> {
        if !text.contains("nbd") && !text.contains("#block") && !text.contains(&self.socket) {
            return None;
        }
        let mut out = text.to_owned();
        let end = format!("?socket={}", self.socket);
        while let Some(at) = out.find(URL) {
            let name = &out[at + URL.len()..];
            let Some(length) = name.find(&end) else { break };
            let name = name[..length].to_owned();
            out.replace_range(at..at + URL.len() + length + end.len(), &name);
        }
        if let Some(ours) = json_name(&out) {
            out = ours;
        }
        if out.contains(&self.socket) {
            out = out.replace(&self.socket, "");
        }
        Some(self.made_up_names(&out))
    }

    /// Replaces `#blockNNN` by what it is called in a scenario.
    fn made_up_names(&mut self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find("#block") {
            let (head, tail) = rest.split_at(at + "#block".len());
            out.push_str(head);
            let digits = tail.bytes().take_while(u8::is_ascii_digit).count();
            let (number, after) = tail.split_at(digits);
            match number
                .get(..digits.saturating_sub(2))
                .and_then(|n| n.parse::<u64>().ok())
            {
                Some(count) if count >= self.before => {
                    let ours = format!("{}00", count - self.before);
                    self.made_up
                        .insert(format!("#block{ours}"), format!("#block{number}"));
                    out.push_str(&ours);
                }
                _ => out.push_str(number),
            }
            rest = after;
        }
        out.push_str(rest);
        out
    }
}

/// The file name in `json:{…}` that the daemon made of a driver with options, with files as files.
fn json_name(text: &str) -> Option<String> {
    let mut value: Value = serde_json::from_str(text.strip_prefix("json:")?).ok()?;
    fn files(value: &mut Value) {
        let Value::Object(options) = value else { return };
        options.values_mut().for_each(files);
        if text_of(options, "driver") == Some(NBD) {
            let export = options.shift_remove("export").unwrap_or(Value::Null);
            for key in ["server.path", "server.type", "server", "path"] {
                options.shift_remove(key);
            }
            options.insert("driver".to_owned(), json!(FILE));
            options.insert("filename".to_owned(), export);
        }
    }
    files(&mut value);
    Some(format!("json:{value}"))
}

fn text_of<'a>(options: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    options.get(key).and_then(Value::as_str)
}

use text_of as text;

/// A refusal that is about an option of `nbd`, as one about the option of `file` that it stands for. Where QEMU looks at
/// several in the order of its hash, that order is kept: a description of a backing file always has a driver, and the
/// driver comes before the file's name.
#[must_use]
pub fn option_of_file(desc: &str) -> Option<String> {
    const OF_FILE: [&str; 3] = ["server.type", "server.path", "export"];
    if !desc.contains("ption '") {
        return None;
    }
    let option = desc.split('\'').nth(1)?;
    let path = OF_FILE.iter().find_map(|own| option.strip_suffix(own))?;
    let ours = match path {
        // What had no server is no file.
        "" if option == "server.path" && desc.starts_with("Cannot change") => "driver".to_owned(),
        "" | "file." => format!("{path}filename"),
        "backing.file." => "backing.driver".to_owned(),
        _ => return None,
    };
    Some(desc.replacen(option, &ours, 1))
}

/// A refusal to open an export that is not there, as one to open that file.
#[must_use]
pub fn no_such_file(desc: &str, file: &str) -> String {
    let ours = format!("Could not open '{file}': No such file or directory");
    desc.replace("Requested export not available", &ours)
}

/// The file name in a description of a node (`json:{…}`, in a scenario's words), which the daemon records where a plain name
/// would open something else; any other name as it is.
#[must_use]
pub fn plain(name: &str) -> String {
    let described = name.strip_prefix("json:").and_then(|json| {
        let mut node: Value = serde_json::from_str(json).ok()?;
        while let Some(file) = node.get_mut("file") {
            node = file.take();
        }
        Some(node.get("filename")?.as_str()?.to_owned())
    });
    described.unwrap_or_else(|| name.to_owned())
}

/// The number in a name that a daemon made up.
#[must_use]
pub fn made_up_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("#block")?;
    digits.get(..digits.len().checked_sub(2)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let mut names = Names::default();
        names.reset("/tmp/d/s", 7);
        names
    }

    fn translated(execute: &str, arguments: Value) -> Value {
        let Value::Object(arguments) = arguments else {
            panic!("an object")
        };
        Value::Object(names().to_daemon(execute, &arguments))
    }

    #[test]
    fn files_become_exports_at_any_depth_and_nothing_else_changes() {
        let add = json!({"driver": "qcow2", "node-name": "n", "backing": null,
            "file": {"driver": "file", "filename": "i0.img", "locking": "off", "discard": "unmap"}});
        assert_eq!(
            translated("blockdev-add", add),
            json!({"driver": "qcow2", "node-name": "n", "backing": null, "file": {"driver": "nbd",
                "discard": "unmap", "server": {"type": "unix", "path": "/tmp/d/s"}, "export": "i0.img"}})
        );
        let stream = json!({"device": "i0.img", "base": "i0.img", "backing-file": "a b"});
        assert_eq!(
            translated("block-stream", stream),
            json!({"device": "i0.img", "base": "nbd+unix:///i0.img?socket=/tmp/d/s", "backing-file": "a b"})
        );
    }

    #[test]
    fn options_of_nbd_are_told_as_those_of_a_file() {
        assert_eq!(
            option_of_file("Cannot change the option 'export'").as_deref(),
            Some("Cannot change the option 'filename'")
        );
        assert_eq!(
            option_of_file("Cannot change the option 'backing.file.export'").as_deref(),
            Some("Cannot change the option 'backing.driver'")
        );
        assert_eq!(option_of_file("Cannot change the option 'file.driver'"), None);
        assert_eq!(option_of_file("Node 'export' is busy"), None);
    }

    #[test]
    fn urls_and_made_up_names_come_back_and_are_remembered() {
        let mut names = names();
        let mut value =
            json!({"a": ["Node '#block965' is 'nbd+unix:///i1.img?socket=/tmp/d/s'", "#block165"]});
        names.from_daemon(&mut value);
        assert_eq!(value, json!({"a": ["Node '#block200' is 'i1.img'", "#block165"]}));
        let mut arguments = Map::new();
        arguments.insert("node-name".to_owned(), json!("#block200"));
        assert_eq!(
            names.to_daemon("blockdev-del", &arguments)["node-name"],
            "#block965"
        );
        let json = "json:{\"driver\": \"qcow2\", \"file\": {\"driver\": \"nbd\", \"server.path\": \"/tmp/d/s\", \
            \"server.type\": \"unix\", \"export\": \"i0.img\"}}";
        assert_eq!(
            names.text(json).as_deref(),
            Some("json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"i0.img\"}}")
        );
    }
}
