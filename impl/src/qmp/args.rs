//! Reading command arguments the way QAPI's input visitor does.
//!
//! Rules: members are visited in the order of the schema and the first wrong one is the error; members that nobody
//! visited are refused at the end. Paths in texts are dotted (`file.filename`). An explicit null is not absence.
//! This is written by hand, not derived through serde: the texts are part of the interface.

use serde_json::{Map, Value};

use crate::error::QmpError;

/// An object in a list, with the path of its members.
pub(crate) type Placed<'a> = (&'a Map<String, Value>, String);

/// An item of a list of strings and objects.
pub(crate) enum StringOr<'a> {
    String(&'a str),
    Object(Args<'a>),
}

/// One object of arguments being visited.
#[derive(Debug)]
pub(crate) struct Args<'a> {
    /// `None`: no members.
    map: Option<&'a Map<String, Value>>,
    prefix: String,
    seen: Vec<&'static str>,
}

impl<'a> Args<'a> {
    /// The arguments of a command; absent ones are the empty object.
    pub(crate) fn new(arguments: &'a Value) -> Result<Args<'a>, QmpError> {
        match arguments {
            Value::Object(map) => Ok(Args::at(map, String::new())),
            Value::Null => Ok(Args {
                map: None,
                prefix: String::new(),
                seen: Vec::new(),
            }),
            _ => Err(QmpError::generic(
                "QMP input member 'arguments' must be an object",
            )),
        }
    }

    /// A nested object; `prefix` ends with a dot.
    pub(crate) fn at(map: &'a Map<String, Value>, prefix: String) -> Args<'a> {
        Args {
            map: Some(map),
            prefix,
            seen: Vec::new(),
        }
    }

    fn get(&mut self, name: &'static str) -> Option<&'a Value> {
        self.seen.push(name);
        self.map?.get(name)
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// `Invalid parameter type`.
    pub(crate) fn wrong_type(&self, name: &str, expected: &str) -> QmpError {
        QmpError::generic(format!(
            "Invalid parameter type for '{}', expected: {expected}",
            self.path(name)
        ))
    }

    fn missing(&self, name: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{}' is missing", self.path(name)))
    }

    /// An optional member of any type, and the path of its own members.
    pub(crate) fn opt_value(&mut self, name: &'static str) -> Option<(&'a Value, String)> {
        let value = self.get(name)?;
        Some((value, self.path(name)))
    }

    /// An optional string.
    pub(crate) fn opt_str(&mut self, name: &'static str) -> Result<Option<&'a str>, QmpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    /// A string.
    pub(crate) fn str(&mut self, name: &'static str) -> Result<&'a str, QmpError> {
        self.opt_str(name)?.ok_or_else(|| self.missing(name))
    }

    /// An optional string as an own value.
    pub(crate) fn opt_string(&mut self, name: &'static str) -> Result<Option<String>, QmpError> {
        Ok(self.opt_str(name)?.map(str::to_owned))
    }

    /// An optional boolean.
    pub(crate) fn opt_bool(&mut self, name: &'static str) -> Result<Option<bool>, QmpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wrong_type(name, "boolean")),
        }
    }

    /// An optional signed integer.
    pub(crate) fn opt_int(&mut self, name: &'static str) -> Result<Option<i64>, QmpError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_i64()
                .map(Some)
                .ok_or_else(|| self.wrong_type(name, "integer")),
        }
    }

    /// A signed integer.
    pub(crate) fn int(&mut self, name: &'static str) -> Result<i64, QmpError> {
        self.opt_int(name)?.ok_or_else(|| self.missing(name))
    }

    /// An optional unsigned integer of 32 bits.
    pub(crate) fn opt_u32(&mut self, name: &'static str) -> Result<Option<u32>, QmpError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        if !value.is_u64() && !value.is_i64() {
            let name = self.path(name);
            return Err(QmpError::generic(format!("Parameter '{name}' expects uint64")));
        }
        // QEMU says no path here.
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        let refusal = || QmpError::generic(format!("Parameter '{name}' expects uint32_t"));
        number.map(Some).ok_or_else(refusal)
    }

    /// An optional unsigned integer of 64 bits; as QEMU's visitor does, negative numbers wrap around.
    pub(crate) fn opt_u64(&mut self, name: &'static str) -> Result<Option<u64>, QmpError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let number = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        let path = self.path(name);
        let refusal = || QmpError::generic(format!("Parameter '{path}' expects uint64"));
        number.map(Some).ok_or_else(refusal)
    }

    /// An optional list of strings and objects; `kind`: the schema's name for an item. Each is checked when it comes to it.
    pub(crate) fn strings_or_objects(
        &mut self,
        name: &'static str,
        kind: &'static str,
    ) -> Result<impl Iterator<Item = Result<StringOr<'a>, QmpError>> + use<'_, 'a>, QmpError> {
        let list = match self.get(name) {
            None => &[][..],
            Some(Value::Array(list)) => list,
            Some(_) => return Err(self.wrong_type(name, "array")),
        };
        let args = &*self;
        let item = move |(i, value): (usize, &'a Value)| match value {
            Value::String(text) => Ok(StringOr::String(text)),
            Value::Object(map) => {
                let path = format!("{}[{i}].", args.path(name));
                Ok(StringOr::Object(Args::at(map, path)))
            }
            // An item has no name of its own.
            _ => Err(QmpError::generic(format!(
                "Invalid parameter type for 'null', expected: {kind}"
            ))),
        };
        Ok(list.iter().enumerate().map(item))
    }

    /// An optional word out of a list.
    pub(crate) fn opt_enum<T: Copy>(
        &mut self,
        name: &'static str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, QmpError> {
        let Some(word) = self.opt_str(name)? else {
            return Ok(None);
        };
        match words.iter().find(|(known, _)| *known == word) {
            Some((_, value)) => Ok(Some(*value)),
            None => Err(self.not_accepted(name, word)),
        }
    }

    /// `does not accept value`; QEMU says no path here.
    pub(crate) fn not_accepted(&self, name: &str, word: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{name}' does not accept value '{word}'"))
    }

    /// A list of objects, each with the path of its members. Each is checked when it comes to it, so that what is wrong with
    /// those before it is told first.
    pub(crate) fn objects(
        &mut self,
        name: &'static str,
    ) -> Result<impl Iterator<Item = Result<Placed<'a>, QmpError>> + use<'_, 'a>, QmpError> {
        let list = match self.get(name) {
            None => return Err(self.missing(name)),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(self.wrong_type(name, "array")),
        };
        let args = &*self;
        let object = move |(i, value): (usize, &'a Value)| match value {
            Value::Object(map) => Ok((map, format!("{}[{i}].", args.path(name)))),
            _ => Err(args.wrong_type(&format!("{name}[{i}]"), "object")),
        };
        Ok(list.iter().enumerate().map(object))
    }

    /// An optional nested object.
    pub(crate) fn opt_object(&mut self, name: &'static str) -> Result<Option<Args<'a>>, QmpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Args::at(map, format!("{}.", self.path(name))))),
            Some(_) => Err(self.wrong_type(name, "object")),
        }
    }

    /// Refuses a mandatory member that is absent.
    pub(crate) fn require(&self, name: &'static str) -> Result<(), QmpError> {
        if self.map.is_some_and(|map| map.contains_key(name)) {
            Ok(())
        } else {
            Err(self.missing(name))
        }
    }

    /// Refuses members that nobody asked for.
    pub(crate) fn finish(self) -> Result<(), QmpError> {
        match self
            .map
            .into_iter()
            .flat_map(Map::keys)
            .find(|key| !self.seen.contains(&key.as_str()))
        {
            None => Ok(()),
            Some(key) => Err(QmpError::generic(format!(
                "Parameter '{}' is unexpected",
                self.path(key)
            ))),
        }
    }
}
