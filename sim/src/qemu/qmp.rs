//! The monitor of a daemon: lines of JSON over a socket.
//!
//! Rules: never blocks, except for the greeting. The daemon carries commands out one after the other and answers in order;
//! they are numbered here. It reads what it is sent byte by byte, with several system calls for each, so that nothing
//! is sent that need not be: no blanks, no number, no line ends.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use serde_json::{Map, Value, json};

use super::Broken;
use super::nbd::server::{MUCH, receive, send};

/// Longest line, bytes: no answer to a command comes near it.
const LONGEST_LINE: usize = 16 << 20;
/// Most messages that wait to be taken; whoever sends more does so by itself.
const MOST_MESSAGES: usize = 100_000;
/// Most that is quoted of what nobody understands, characters.
const LONGEST_QUOTE: usize = 200;

/// What the daemon said.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The answer to a command: its number, and the value or (class, description).
    Answer(u64, Result<Value, (String, String)>),
    /// An event: name and data.
    Event(String, Value),
}

/// The monitor.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    messages: VecDeque<Message>,
    /// The greeting, once it came.
    greeting: Option<Value>,
    next: u64,
    answered: u64,
    gone: bool,
    skims: bool,
    scratch: Vec<u8>,
}

impl Monitor {
    /// Over our end of the pair.
    ///
    /// # Errors
    /// When the socket is of no use.
    pub fn new(stream: UnixStream) -> std::io::Result<Monitor> {
        stream.set_nonblocking(true)?;
        Ok(Monitor {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            messages: VecDeque::new(),
            greeting: None,
            next: 0,
            answered: 0,
            gone: false,
            skims: false,
            scratch: vec![0; 1 << 16],
        })
    }

    /// Sends a command; the number that its answer will have.
    pub fn send(&mut self, execute: &str, arguments: &Map<String, Value>) -> u64 {
        self.send_line(&Monitor::line(execute, arguments))
    }

    /// A command as it is sent.
    #[must_use]
    pub fn line(execute: &str, arguments: &Map<String, Value>) -> Vec<u8> {
        let mut message = json!({"execute": execute});
        if !arguments.is_empty() {
            message["arguments"] = Value::Object(arguments.clone());
        }
        message.to_string().into_bytes()
    }

    /// The same, of a command that is written out already.
    pub fn send_line(&mut self, line: &[u8]) -> u64 {
        let id = self.next;
        self.next += 1;
        self.output.extend_from_slice(line);
        self.push();
        id
    }

    /// From now on answers are counted and thrown away, events only thrown away.
    pub fn skim(&mut self, skims: bool) {
        self.skims = skims;
    }

    /// Answers so far: the number of the next one.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// A command was sent and is not answered.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.answered < self.next
    }

    /// The other side hung up.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// The socket, to wait for.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.stream
    }

    /// The greeting.
    #[must_use]
    pub fn greeting(&self) -> Option<&Value> {
        self.greeting.as_ref()
    }

    /// The next message.
    pub fn take(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    fn push(&mut self) -> bool {
        send(&mut self.stream, &mut self.output)
    }

    /// Takes in what there is. Whether the daemon may have something to do now.
    ///
    /// # Errors
    /// When it is not QMP.
    pub fn pump(&mut self) -> Result<bool, Broken> {
        let mut stirred = self.push();
        let (got, gone) = receive(&mut self.stream, &mut self.scratch, &mut self.input);
        stirred |= got >= MUCH;
        self.gone |= gone;
        let mut used = 0;
        let mut nonsense = None;
        while let Some(end) = self.input[used..].iter().position(|b| *b == b'\n') {
            let line = &self.input[used..used + end];
            used += end + 1;
            if self.skims {
                let answers: [&[u8]; 2] = [b"{\"return\"", b"{\"error\""];
                self.answered += u64::from(answers.iter().any(|start| line.starts_with(start)));
                continue;
            }
            match parse(line) {
                Ok(Parsed::Greeting(greeting)) if self.greeting.is_none() => self.greeting = Some(greeting),
                Ok(Parsed::Greeting(_)) => {
                    nonsense = nonsense.or(Some(format!("a second greeting: {}", text_of(line))));
                }
                Ok(Parsed::Event(name, data)) => self.messages.push_back(Message::Event(name, data)),
                Ok(Parsed::Answer(result)) if self.answered < self.next => {
                    self.messages.push_back(Message::Answer(self.answered, result));
                    self.answered += 1;
                }
                Ok(Parsed::Answer(_)) => {
                    nonsense = nonsense.or(Some(format!("an answer to no command: {}", text_of(line))));
                }
                Err(said) => nonsense = nonsense.or(Some(said)),
            }
        }
        self.input.drain(..used);
        if self.messages.len() > MOST_MESSAGES {
            nonsense = nonsense.or(Some("events without an end".to_owned()));
        }
        if self.input.len() > LONGEST_LINE {
            let start = text_of(&self.input[..LONGEST_QUOTE]);
            nonsense = nonsense.or(Some(format!("a line without an end: {start}")));
        }
        nonsense.map_or(Ok(stirred), |said| Err(Broken::Nonsense(said)))
    }
}

enum Parsed {
    Greeting(Value),
    Answer(Result<Value, (String, String)>),
    Event(String, Value),
}

fn text_of(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .trim_end()
        .chars()
        .take(LONGEST_QUOTE)
        .collect()
}

fn parse(line: &[u8]) -> Result<Parsed, String> {
    let nonsense = || format!("not QMP: {}", text_of(line));
    let mut value: Value = serde_json::from_slice(line).map_err(|_| nonsense())?;
    if let Some(greeting) = value.get_mut("QMP") {
        return Ok(Parsed::Greeting(greeting.take()));
    }
    if let Some(name) = value.get("event").and_then(Value::as_str) {
        let name = name.to_owned();
        let data = value.get_mut("data").map_or(Value::Null, Value::take);
        return Ok(Parsed::Event(name, data));
    }
    if let Some(error) = value.get("error") {
        let text = |key: &str| error.get(key).and_then(Value::as_str).map(str::to_owned);
        let class = text("class").ok_or_else(nonsense)?;
        let desc = text("desc").ok_or_else(nonsense)?;
        return Ok(Parsed::Answer(Err((class, desc))));
    }
    let value = value.get_mut("return").ok_or_else(nonsense)?.take();
    Ok(Parsed::Answer(Ok(value)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn answers_refusals_and_events_in_pieces_and_nonsense() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let mut monitor = Monitor::new(ours).expect("a monitor");
        assert_eq!(monitor.send("x", &Map::new()), 0);
        assert_eq!(monitor.send("y", &Map::new()), 1);
        assert!(monitor.is_busy());
        theirs
            .write_all(b"{\"QMP\": {\"version\": 1}}\n{\"retu")
            .expect("sent");
        assert_eq!(monitor.pump(), Ok(false));
        assert!(monitor.greeting().is_some());
        assert_eq!(monitor.take(), None);
        theirs
            .write_all(
                b"rn\": {}}\n{\"event\": \"E\", \"data\": {\"a\": 1}, \"timestamp\": {}}\n\
                {\"error\": {\"class\": \"C\", \"desc\": \"D\"}}\n",
            )
            .expect("sent");
        assert_eq!(monitor.pump(), Ok(false));
        assert_eq!(monitor.take(), Some(Message::Answer(0, Ok(json!({})))));
        assert_eq!(monitor.take(), Some(Message::Event("E".into(), json!({"a": 1}))));
        let refusal = Err(("C".to_owned(), "D".to_owned()));
        assert_eq!(monitor.take(), Some(Message::Answer(1, refusal)));
        assert_eq!(monitor.pump(), Ok(false));
        assert!(!monitor.is_busy());
        theirs.write_all(b"{\"return\": {}}\n").expect("sent");
        assert!(matches!(monitor.pump(), Err(Broken::Nonsense(_))), "nobody asked");
        theirs.write_all(b"Segmentation fault\n").expect("sent");
        assert!(matches!(monitor.pump(), Err(Broken::Nonsense(_))));
        drop(theirs);
        assert_eq!(monitor.pump(), Ok(false));
        assert!(monitor.is_gone());
    }

    /// What is said of somebody who says this again and again.
    fn flooded(by: &'static [u8]) -> String {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let mut monitor = Monitor::new(ours).expect("a monitor");
        let flood = std::thread::spawn(move || while theirs.write_all(&by.repeat(1000)).is_ok() {});
        let broken = loop {
            if let Err(broken) = monitor.pump() {
                break broken;
            }
        };
        drop(monitor);
        flood.join().expect("it ends with the socket");
        broken.to_string()
    }

    #[test]
    fn who_talks_without_end_is_heard_no_longer() {
        let said = flooded(b"xxxx");
        assert!(
            said.starts_with("a line without an end: xxx") && said.len() < 300,
            "{said}"
        );
        assert_eq!(flooded(b"{\"event\": \"E\"}\n"), "events without an end");
        assert!(flooded(b"{\"QMP\": {}}\n").starts_with("a second greeting"));
    }
}
