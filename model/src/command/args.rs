//! Arguments of a command against their schema.
//!
//! Rules: members are asked for in the order of the schema, so that the first error is the one a client sees; what
//! nobody asked for is unexpected ([`Args::finish`]). Names in error texts carry the path (`file.filename`).

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::options::NodeOptions;
use crate::refusal::Refusal;

/// An object of arguments.
#[derive(Debug)]
pub struct Args<'a> {
    object: Option<&'a Map<String, Value>>,
    prefix: String,
    seen: RefCell<Vec<&'static str>>,
}

/// An item of [`Args::strings_or_objects`].
#[derive(Debug)]
pub enum StringOr<'a> {
    /// A string.
    String(&'a str),
    /// An object.
    Object(Args<'a>),
}

impl<'a> Args<'a> {
    /// The arguments of a command; null counts as none.
    ///
    /// # Errors
    /// Not an object.
    pub fn new(value: &'a Value) -> Result<Args<'a>, Refusal> {
        match value {
            Value::Null => Ok(Args {
                object: None,
                prefix: String::new(),
                seen: RefCell::default(),
            }),
            Value::Object(object) => Ok(Args::nested(object, String::new())),
            _ => Err(Refusal::new("QMP input member 'arguments' must be an object")),
        }
    }

    /// A nested object; `prefix` is its path with a dot at the end.
    #[must_use]
    pub fn nested(object: &'a Map<String, Value>, prefix: String) -> Args<'a> {
        Args {
            object: Some(object),
            prefix,
            seen: RefCell::default(),
        }
    }

    /// Everything in the object, flat.
    #[must_use]
    pub fn flat(&self) -> NodeOptions {
        self.object
            .map_or_else(NodeOptions::default, NodeOptions::flatten)
    }

    /// An optional nested object.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_object(&self, name: &'static str) -> Result<Option<Args<'a>>, Refusal> {
        let Some(value) = self.optional(name) else {
            return Ok(None);
        };
        let object = value.as_object().ok_or_else(|| self.wrong_type(name, "object"))?;
        Ok(Some(Args::nested(object, format!("{}.", self.full_name(name)))))
    }

    /// A mandatory nested object.
    ///
    /// # Errors
    /// Missing, or another type.
    pub fn object(&self, name: &'static str) -> Result<Args<'a>, Refusal> {
        self.required(name)?;
        self.opt_object(name).map(|object| object.expect("just found"))
    }

    /// A mandatory list of objects. Whether an item is one is found out when it is asked for, after all that is wrong with
    /// those before it.
    ///
    /// # Errors
    /// Missing, or another type.
    pub fn objects(
        &self,
        name: &'static str,
    ) -> Result<impl Iterator<Item = Result<Args<'a>, Refusal>> + use<'_, 'a>, Refusal> {
        let list = self.required(name)?;
        let list = list.as_array().ok_or_else(|| self.wrong_type(name, "array"))?;
        let item = move |(at, item): (usize, &'a Value)| {
            let path = format!("{name}[{at}]");
            let object = item.as_object().ok_or_else(|| self.wrong_type(&path, "object"))?;
            Ok(Args::nested(object, format!("{}.", self.full_name(&path))))
        };
        Ok(list.iter().enumerate().map(item))
    }

    /// The member's name in error texts.
    #[must_use]
    pub fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// An optional member of any type.
    pub fn optional(&self, name: &'static str) -> Option<&'a Value> {
        self.seen.borrow_mut().push(name);
        self.object.and_then(|object| object.get(name))
    }

    /// A mandatory member of any type.
    ///
    /// # Errors
    /// It is missing.
    pub fn required(&self, name: &'static str) -> Result<&'a Value, Refusal> {
        self.optional(name)
            .ok_or_else(|| Refusal::new(format!("Parameter '{}' is missing", self.full_name(name))))
    }

    fn wrong_type(&self, name: &str, expected: &str) -> Refusal {
        let name = self.full_name(name);
        Refusal::new(format!(
            "Invalid parameter type for '{name}', expected: {expected}"
        ))
    }

    /// An optional string.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_str(&self, name: &'static str) -> Result<Option<&'a str>, Refusal> {
        let Some(value) = self.optional(name) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong_type(name, "string"))
    }

    /// An optional string to keep.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_name(&self, name: &'static str) -> Result<Option<Rc<str>>, Refusal> {
        Ok(self.opt_str(name)?.map(Rc::from))
    }

    /// A mandatory string.
    ///
    /// # Errors
    /// Missing, or another type.
    pub fn str(&self, name: &'static str) -> Result<&'a str, Refusal> {
        self.required(name)?;
        self.opt_str(name).map(|value| value.expect("just found"))
    }

    /// An optional boolean.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_bool(&self, name: &'static str) -> Result<Option<bool>, Refusal> {
        let Some(value) = self.optional(name) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong_type(name, "boolean"))
    }

    /// An optional signed number.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_int(&self, name: &'static str) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.optional(name) else {
            return Ok(None);
        };
        value
            .as_i64()
            .map(Some)
            .ok_or_else(|| self.wrong_type(name, "integer"))
    }

    /// A mandatory signed number.
    ///
    /// # Errors
    /// Missing, or another type.
    pub fn int(&self, name: &'static str) -> Result<i64, Refusal> {
        self.required(name)?;
        self.opt_int(name).map(|value| value.expect("just found"))
    }

    /// An optional unsigned number of 32 bits.
    ///
    /// # Errors
    /// Another type, another number.
    pub fn opt_u32(&self, name: &'static str) -> Result<Option<u32>, Refusal> {
        let Some(value) = self.optional(name) else {
            return Ok(None);
        };
        if !value.is_u64() && !value.is_i64() {
            let name = self.full_name(name);
            return Err(Refusal::new(format!("Parameter '{name}' expects uint64")));
        }
        // Here the path is not told.
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        number
            .map(Some)
            .ok_or_else(|| Refusal::new(format!("Parameter '{name}' expects uint32_t")))
    }

    /// An optional unsigned number of 64 bits. A negative one is taken for the large one that has the same bits.
    ///
    /// # Errors
    /// Another type, another number.
    pub fn opt_size(&self, name: &'static str) -> Result<Option<u64>, Refusal> {
        let Some(value) = self.optional(name) else {
            return Ok(None);
        };
        let negative = || value.as_i64().map(i64::cast_unsigned);
        value.as_u64().or_else(negative).map(Some).ok_or_else(|| {
            let name = self.full_name(name);
            Refusal::new(format!("Parameter '{name}' expects uint64"))
        })
    }

    /// An optional list of strings and objects. `kind`: what the schema calls such an item. Items as in [`Args::objects`].
    ///
    /// # Errors
    /// Another type.
    pub fn strings_or_objects(
        &self,
        name: &'static str,
        kind: &'static str,
    ) -> Result<impl Iterator<Item = Result<StringOr<'a>, Refusal>> + use<'_, 'a>, Refusal> {
        let list = match self.optional(name) {
            None => &[][..],
            Some(list) => list.as_array().ok_or_else(|| self.wrong_type(name, "array"))?,
        };
        let item = move |(at, item): (usize, &'a Value)| match item {
            Value::String(text) => Ok(StringOr::String(text.as_str())),
            Value::Object(object) => {
                let path = self.full_name(&format!("{name}[{at}]."));
                Ok(StringOr::Object(Args::nested(object, path)))
            }
            // An item has no name of its own.
            _ => Err(Refusal::new(format!(
                "Invalid parameter type for 'null', expected: {kind}"
            ))),
        };
        Ok(list.iter().enumerate().map(item))
    }

    /// An optional one of a few words.
    ///
    /// # Errors
    /// Another type, another word.
    pub fn opt_enum(&self, name: &'static str, words: &[&str]) -> Result<Option<&'a str>, Refusal> {
        let Some(word) = self.opt_str(name)? else {
            return Ok(None);
        };
        if words.contains(&word) {
            return Ok(Some(word));
        }
        // Here the path is not told.
        Err(Refusal::new(format!(
            "Parameter '{name}' does not accept value '{word}'"
        )))
    }

    /// A mandatory one of a few words.
    ///
    /// # Errors
    /// Missing, another type, another word.
    pub fn one_of(&self, name: &'static str, words: &[&str]) -> Result<&'a str, Refusal> {
        self.required(name)?;
        self.opt_enum(name, words).map(|word| word.expect("just found"))
    }

    /// Everything has been asked for.
    ///
    /// # Errors
    /// A member that nobody asked for.
    pub fn finish(self) -> Result<(), Refusal> {
        let seen = self.seen.borrow();
        match self
            .object
            .and_then(|object| object.keys().find(|key| !seen.contains(&key.as_str())))
        {
            Some(key) => Err(Refusal::new(format!(
                "Parameter '{}' is unexpected",
                self.full_name(key)
            ))),
            None => Ok(()),
        }
    }
}
