//! From a JSON tree to a typed object, saying which fields the type does not know and where a value does not fit.
//!
//! One layer that does all three: layers of wrappers around a deserializer would be compiled once more for every field
//! of every Kubernetes type, and took most of the build time of this crate.
//!
//! Invariants: total; a path names the field as users write it, `spec.containers[0].image`; numbers, texts and lists are taken
//! as what they are and never converted.

use std::cell::RefCell;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, Expected, MapAccess,
    SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde_json::{Map, Value};

/// What came of reading a tree.
#[derive(Debug)]
pub(crate) struct Reading<T> {
    pub(crate) value: Result<T, Misfit>,
    /// Paths of the fields that the type does not have.
    pub(crate) unknown: Vec<String>,
}

/// A value that is not what its field takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Misfit {
    /// Empty: the object itself.
    pub(crate) field: String,
    pub(crate) message: String,
}

/// Reads a whole tree.
pub(crate) fn typed<T: DeserializeOwned>(tree: &Value) -> Reading<T> {
    let log = RefCell::new(Log::default());
    let result = T::deserialize(Reader { node: tree, at: At::Root, log: &log });
    let log = log.into_inner();
    let value =
        result.map_err(|error| Misfit { field: log.failed.unwrap_or_default(), message: error.0 });
    Reading { value, unknown: log.unknown }
}

#[derive(Default)]
struct Log {
    unknown: Vec<String>,
    /// The innermost field that an error passed.
    failed: Option<String>,
}

/// Where in the tree, as a list towards the root on the stack: nothing is allocated until somebody asks.
#[derive(Clone, Copy)]
enum At<'a> {
    Root,
    Field(&'a At<'a>, &'a str),
    Item(&'a At<'a>, usize),
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            At::Root => Ok(()),
            At::Field(At::Root, name) => f.write_str(name),
            At::Field(parent, name) => write!(f, "{parent}.{name}"),
            At::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

#[derive(Clone, Copy)]
struct Reader<'de, 'a> {
    node: &'de Value,
    at: At<'a>,
    log: &'a RefCell<Log>,
}

/// Words of serde or of a type.
#[derive(Debug)]
struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

impl<'de> Reader<'de, '_> {
    /// What the node is, in serde's words.
    fn unexpected(&self) -> Unexpected<'de> {
        match self.node {
            Value::Null => Unexpected::Unit,
            Value::Bool(b) => Unexpected::Bool(*b),
            Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
                (Some(n), ..) => Unexpected::Unsigned(n),
                (_, Some(n), _) => Unexpected::Signed(n),
                (.., n) => Unexpected::Float(n.unwrap_or_default()),
            },
            Value::String(s) => Unexpected::Str(s),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        }
    }

    /// Not generic, as `note` is not: what stands in a generic function here is compiled some five hundred times.
    #[cold]
    fn misfit(&self, expected: &dyn Expected) -> Error {
        Error::invalid_type(self.unexpected(), expected)
    }

    /// Remembers the innermost place of an error.
    #[cold]
    fn note(&self) {
        let mut log = self.log.borrow_mut();
        if log.failed.is_none() {
            log.failed = Some(self.at.to_string());
        }
    }

    /// What a type says of the value it was given comes up here.
    fn read<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        let result = seed.deserialize(self);
        if result.is_err() {
            self.note();
        }
        result
    }

    fn text<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node {
            Value::String(s) => visitor.visit_borrowed_str(s),
            _ => Err(self.misfit(&visitor)),
        }
    }

    fn number<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let Value::Number(n) = self.node else { return Err(self.misfit(&visitor)) };
        match (n.as_u64(), n.as_i64(), n.as_f64()) {
            (Some(n), ..) => visitor.visit_u64(n),
            (_, Some(n), _) => visitor.visit_i64(n),
            (.., n) => visitor.visit_f64(n.unwrap_or_default()),
        }
    }

    fn list<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node {
            Value::Array(items) => visitor.visit_seq(Items { of: self, left: items, next: 0 }),
            _ => Err(self.misfit(&visitor)),
        }
    }

    /// Types that serde derives would take a list as their fields in order; no object of Kubernetes is written so.
    fn object<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node {
            Value::Object(map) => visitor.visit_map(Fields::new(self, map)),
            _ => Err(self.misfit(&visitor)),
        }
    }
}

/// Functions that hand on to one way of reading.
macro_rules! hand_on {
    ($($deserialize:ident($($ignored:ty),*) => $way:ident,)*) => {$(
        fn $deserialize<V: Visitor<'de>>(self, $(_: $ignored,)* visitor: V) -> Result<V::Value, Error> {
            self.$way(visitor)
        }
    )*};
}

type Name = &'static str;
type Names = &'static [&'static str];

/// Each way of asking leads to the one kind of value that fits it, so that only that part of a type's visitor is compiled.
impl<'de> Deserializer<'de> for Reader<'de, '_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(*b),
            Value::Number(_) => self.number(visitor),
            Value::String(_) => self.text(visitor),
            Value::Array(_) => self.list(visitor),
            Value::Object(_) => self.object(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node {
            Value::Bool(b) => visitor.visit_bool(*b),
            _ => Err(self.misfit(&visitor)),
        }
    }

    hand_on! {
        deserialize_i8() => number,
        deserialize_i16() => number,
        deserialize_i32() => number,
        deserialize_i64() => number,
        deserialize_u8() => number,
        deserialize_u16() => number,
        deserialize_u32() => number,
        deserialize_u64() => number,
        deserialize_f32() => number,
        deserialize_f64() => number,
        deserialize_str() => text,
        deserialize_string() => text,
        deserialize_identifier() => text,
        deserialize_seq() => list,
        deserialize_tuple(usize) => list,
        deserialize_tuple_struct(Name, usize) => list,
        deserialize_map() => object,
        deserialize_struct(Name, Names) => object,
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let variant = match self.node {
            Value::String(name) => Ok((name, None)),
            Value::Object(map) if map.len() == 1 => map
                .iter()
                .next()
                .map(|(name, value)| (name, Some(value)))
                .ok_or_else(|| self.misfit(&visitor)),
            _ => Err(self.misfit(&visitor)),
        };
        let (name, content) = variant?;
        visitor.visit_enum(Variant { of: self, name, content })
    }

    /// A field that the type does not have.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.log.borrow_mut().unknown.push(self.at.to_string());
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct
    }
}

struct Fields<'de, 'a> {
    of: Reader<'de, 'a>,
    left: serde_json::map::Iter<'de>,
    now: Option<(&'de str, &'de Value)>,
}

impl<'de, 'a> Fields<'de, 'a> {
    fn new(of: Reader<'de, 'a>, map: &'de Map<String, Value>) -> Self {
        Self { of, left: map.iter(), now: None }
    }
}

impl<'de> MapAccess<'de> for Fields<'de, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((name, value)) = self.left.next() else { return Ok(None) };
        self.now = Some((name, value));
        seed.deserialize(StrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let Some((name, node)) = self.now.take() else {
            return Err(Error("a value was asked for before its key".to_owned()));
        };
        let reader = Reader { node, at: At::Field(&self.of.at, name), log: self.of.log };
        reader.read(seed)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.len())
    }
}

struct Items<'de, 'a> {
    of: Reader<'de, 'a>,
    left: &'de [Value],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'de, '_> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        let Some((node, left)) = self.left.split_first() else { return Ok(None) };
        let reader = Reader { node, at: At::Item(&self.of.at, self.next), log: self.of.log };
        self.left = left;
        self.next += 1;
        reader.read(seed).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.len())
    }
}

struct Variant<'de, 'a> {
    of: Reader<'de, 'a>,
    name: &'de str,
    content: Option<&'de Value>,
}

impl<'de, 'a> Variant<'de, 'a> {
    fn content<V: Visitor<'de>>(&self, visitor: &V) -> Result<Reader<'de, '_>, Error> {
        let node =
            self.content.ok_or_else(|| Error::invalid_type(Unexpected::UnitVariant, visitor))?;
        Ok(Reader { node, at: At::Field(&self.of.at, self.name), log: self.of.log })
    }
}

impl<'de, 'a> EnumAccess<'de> for Variant<'de, 'a> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        seed.deserialize(StrDeserializer::new(self.name)).map(|name| (name, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'de, '_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.content {
            None | Some(Value::Null) => Ok(()),
            Some(_) => Err(Error(format!("{:?} takes no value", self.name))),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        let Some(node) = self.content else {
            return Err(Error(format!("{:?} needs a value", self.name)));
        };
        let reader = Reader { node, at: At::Field(&self.of.at, self.name), log: self.of.log };
        reader.read(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Error> {
        let content = self.content(&visitor)?;
        content.list(visitor).inspect_err(|_| content.note())
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let content = self.content(&visitor)?;
        content.object(visitor).inspect_err(|_| content.note())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Thing {
        name: String,
        port: Option<u16>,
        parts: Vec<Thing>,
        labels: BTreeMap<String, String>,
        mode: Mode,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    enum Mode {
        #[default]
        Off,
        Level(u8),
        Range {
            low: u8,
        },
    }

    #[test]
    fn reads_what_fits() {
        let tree = json!({
            "name": "a", "port": null, "labels": {"x": "y"}, "mode": {"Level": 3},
            "parts": [{"name": "b", "port": 80, "mode": "Off"}, {"mode": {"Range": {"low": 1}}}],
        });
        let reading = typed::<Thing>(&tree);
        let thing = reading.value.unwrap();
        assert_eq!(thing, serde_json::from_value(tree).unwrap(), "the same as serde_json reads");
        assert_eq!(reading.unknown, [""; 0]);
        assert_eq!(thing.parts[0].port, Some(80));
    }

    #[test]
    fn names_what_does_not() {
        let check = |tree: Value, field: &str, message: &str| {
            let misfit = typed::<Thing>(&tree).value.unwrap_err();
            assert_eq!(misfit.field, field, "{misfit:?}");
            assert!(misfit.message.contains(message), "{misfit:?}");
        };
        check(json!({"name": 1}), "name", "invalid type: integer `1`, expected a string");
        check(json!({"port": 70_000}), "port", "expected u16");
        check(json!({"parts": [{}, {"port": "x"}]}), "parts[1].port", "string \"x\"");
        check(json!({"parts": {}}), "parts", "expected a sequence");
        check(json!({"labels": {"a.b/c": 1}}), "labels.a.b/c", "expected a string");
        check(json!({"mode": "Away"}), "mode", "unknown variant `Away`");
        check(json!({"mode": {"Off": 1}}), "mode", "takes no value");
        check(json!({"mode": "Level"}), "mode", "needs a value");
        check(json!({"mode": {"Range": {"low": -1}}}), "mode.Range.low", "expected u8");
        check(json!({"mode": {"Range": "low"}}), "mode.Range", "string \"low\", expected struct");
        check(json!({"mode": {"a": 1, "b": 2}}), "mode", "expected");
        check(json!([]), "", "sequence, expected struct Thing");
        check(json!({"parts": [["x"]]}), "parts[0]", "expected struct Thing");
    }

    #[test]
    fn names_what_is_not_known() {
        let tree = json!({"nam": 1, "parts": [{"x": {"y": 1}}], "labels": {"any": "thing"}});
        let reading = typed::<Thing>(&tree);
        assert!(reading.value.is_ok());
        assert_eq!(reading.unknown, ["nam", "parts[0].x"]);
    }
}
