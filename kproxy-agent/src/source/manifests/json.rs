//! From the text of a JSON file to objects. Pure.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::documents::{Flaw, LIST_DEPTH, Parsed};
use crate::source::problem::ProblemKind;

/// Reads the text of a JSON file: one value, or several one after the other.
pub(super) fn parse(text: &str, node_name: &str) -> Parsed {
    let mut parsed = Parsed::default();
    // Cut into values first, without a look at what is in them: there is never a tree of it in memory.
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    for number in 1.. {
        let place = if number == 1 { String::new() } else { format!("value {number}: ") };
        let begin = values.byte_offset();
        match values.next() {
            None => break,
            Some(Ok(value)) => parsed.add_json(value.get(), &place, None, LIST_DEPTH, node_name),
            Some(Err(error)) => {
                let mut items = Vec::new();
                let mut json = serde_json::Deserializer::from_str(&text[begin..]);
                // It fails, as it did before; what is wanted is what comes before that.
                let _ = json.deserialize_map(ItemsBefore(&mut items));
                for (index, item) in items.into_iter().enumerate() {
                    let place = format!("{place}items[{index}]: ");
                    parsed.add_json(item.get(), &place, None, LIST_DEPTH - 1, node_name);
                }
                parsed.flaws.push(Flaw {
                    kind: ProblemKind::Syntax,
                    what: format!("{place}broken JSON: {error}"),
                    mend: "correct it there; what stands before it is read".to_owned(),
                });
                break;
            }
        }
    }
    parsed
}

/// Gathers the items of a list that is broken somewhere, as far as they are whole.
struct ItemsBefore<'a, 'de>(&'a mut Vec<&'de RawValue>);

impl<'de> DeserializeSeed<'de> for ItemsBefore<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ItemsBefore<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                map.next_value_seed(ItemsBefore(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while let Some(item) = items.next_element()? {
            self.0.push(item);
        }
        Ok(())
    }
}
