//! From the text of a JSON file to objects. Pure.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::documents::{Flaw, LIST_DEPTH, Parsed};
use crate::source::problem::ProblemKind;

/// Reads the text of a JSON file: one value, or several one after the other.
pub(super) fn parse(text: &str, node_name: &str) -> Parsed {
    let mut parsed = Parsed::default();
    let mut json = serde_json::Deserializer::from_str(text);
    // Values are counted: their lines are known to the deserializer only when it stumbles.
    for number in 1.. {
        let place = if number == 1 { String::new() } else { format!("value {number}: ") };
        match json.end() {
            Ok(()) => break,
            Err(error) if error.is_eof() => break,
            Err(_) => {}
        }
        let value = Streamed { parsed: &mut parsed, place: &place, node_name };
        if let Err(error) = value.deserialize(&mut json) {
            let (kind, trouble) = match error.is_data() {
                true => (ProblemKind::InvalidObject, "this is no Kubernetes object"),
                false => (ProblemKind::Syntax, "broken JSON"),
            };
            parsed.flaws.push(Flaw {
                kind,
                what: format!("{place}{trouble}: {error}"),
                mend: "correct it there; what stands before it is read".to_owned(),
            });
            break;
        }
    }
    parsed
}

/// A JSON object that may be a list: its items are taken one by one, so that there is never a tree of all of
/// them, which would be thirty times as big as the text.
struct Streamed<'a> {
    parsed: &'a mut Parsed,
    place: &'a str,
    node_name: &'a str,
}

impl<'de> DeserializeSeed<'de> for Streamed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Streamed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Streamed { parsed, place, node_name } = self;
        let mut rest = serde_json::Map::new();
        let mut items = Parsed::default();
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                let untyped = map.next_value_seed(Items { parsed: &mut items, place, node_name })?;
                rest.insert(key, Value::Array(untyped));
            } else {
                rest.insert(key, map.next_value()?);
            }
        }
        let is_list = rest.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
        if is_list {
            parsed.objects.append(&mut items.objects);
            parsed.flaws.append(&mut items.flaws);
        }
        parsed.add_value(Value::Object(rest), place, None, LIST_DEPTH, node_name);
        Ok(())
    }
}

/// The items of a list: those that say what they are become objects at once, the others are returned.
struct Items<'a> {
    parsed: &'a mut Parsed,
    place: &'a str,
    node_name: &'a str,
}

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = Vec<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Value>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = Vec<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_unit<E>(self) -> Result<Vec<Value>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Value>, A::Error> {
        let mut untyped = Vec::new();
        let mut index = 0;
        while let Some(item) = seq.next_element::<Value>()? {
            if item.get("kind").is_some() {
                let place = format!("{}items[{index}]: ", self.place);
                self.parsed.add_value(item, &place, None, LIST_DEPTH - 1, self.node_name);
            } else {
                untyped.push(item);
            }
            index += 1;
        }
        Ok(untyped)
    }
}
