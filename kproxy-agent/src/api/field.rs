//! One field of an object, which may hold anything.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};

use super::Text;

/// What stands in a field. Reading one fails only where the text is no JSON or YAML: a value of another type
/// costs the field, and nothing around it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Field<T> {
    /// It is not there, or null, which is the same to Kubernetes.
    #[default]
    Absent,
    /// A value of its type.
    Is(T),
    /// Something else.
    Mistyped(Found),
}

/// What stands where something else belongs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Found {
    /// `true` or `false`.
    Boolean,
    /// A whole number that fits 64 bits.
    Integer,
    /// Another number.
    Number,
    /// Text.
    Text,
    /// Bytes, as YAML can have them.
    Bytes,
    /// A list.
    List,
    /// An object.
    Object,
}

/// A type that a field can have. Of the ways to make one, those of its own type are written, the others say that
/// it is none.
pub trait Value: Sized {
    /// What it is, in a sentence.
    const NAME: &'static str;

    /// Of text.
    fn text(_: &str) -> Option<Self> {
        None
    }

    /// Of a whole number.
    fn integer(_: i64) -> Option<Self> {
        None
    }

    /// Of `true` or `false`.
    fn boolean(_: bool) -> Option<Self> {
        None
    }

    /// Of a list; what is in it is taken out in any case.
    fn list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Option<Self>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    /// Of an object; what is in it is taken out in any case.
    fn object<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Self>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

impl<T> Field<T> {
    /// The value, where it is one of the type.
    pub fn get(&self) -> Option<&T> {
        match self {
            Field::Is(value) => Some(value),
            Field::Absent | Field::Mistyped(_) => None,
        }
    }

    /// Whether there is something, of whatever type.
    pub fn is_there(&self) -> bool {
        !matches!(self, Field::Absent)
    }
}

impl Field<Text> {
    /// The text, where it is text.
    pub fn text(&self) -> Option<&str> {
        self.get().map(|text| &**text)
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Found::Boolean => "true or false",
            Found::Integer => "a number",
            Found::Number => "a number that is not whole, or too large,",
            Found::Text => "text",
            Found::Bytes => "binary data",
            Found::List => "a list",
            Found::Object => "an object",
        })
    }
}

impl Value for Text {
    const NAME: &'static str = "text";

    fn text(text: &str) -> Option<Self> {
        Some(text.into())
    }
}

impl Value for i64 {
    const NAME: &'static str = "a whole number";

    fn integer(number: i64) -> Option<Self> {
        Some(number)
    }
}

impl Value for bool {
    const NAME: &'static str = "true or false";

    fn boolean(value: bool) -> Option<Self> {
        Some(value)
    }
}

impl<T: Value> Value for Vec<Field<T>> {
    const NAME: &'static str = "a list";

    fn list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Option<Self>, A::Error> {
        let mut read = Vec::new();
        while let Some(entry) = list.next_element()? {
            read.push(entry);
        }
        Ok(Some(read))
    }
}

impl<'de, T: Value> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyOf(PhantomData))
    }
}

/// Reads an object that is no field of another: there anything else is an error.
pub(super) fn root<'de, T: Value, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    match Field::<T>::deserialize(deserializer)? {
        Field::Is(value) => Ok(value),
        Field::Absent => Err(D::Error::invalid_type(Unexpected::Unit, &T::NAME)),
        Field::Mistyped(found) => {
            Err(D::Error::invalid_type(Unexpected::Other(&found.to_string()), &T::NAME))
        }
    }
}

struct AnyOf<T>(PhantomData<fn() -> T>);

impl<T: Value> AnyOf<T> {
    fn or(value: Option<T>, found: Found) -> Field<T> {
        value.map_or(Field::Mistyped(found), Field::Is)
    }
}

impl<'de, T: Value> Visitor<'de> for AnyOf<T> {
    type Value = Field<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::NAME)
    }

    fn visit_unit<E>(self) -> Result<Field<T>, E> {
        Ok(Field::Absent)
    }

    fn visit_none<E>(self) -> Result<Field<T>, E> {
        Ok(Field::Absent)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Field<T>, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Field<T>, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Field<T>, E> {
        Ok(Self::or(T::boolean(value), Found::Boolean))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Field<T>, E> {
        Ok(Self::or(T::integer(number), Found::Integer))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Field<T>, E> {
        match i64::try_from(number) {
            Ok(number) => Ok(Self::or(T::integer(number), Found::Integer)),
            Err(_) => Ok(Field::Mistyped(Found::Number)),
        }
    }

    fn visit_i128<E>(self, _: i128) -> Result<Field<T>, E> {
        Ok(Field::Mistyped(Found::Number))
    }

    fn visit_u128<E>(self, _: u128) -> Result<Field<T>, E> {
        Ok(Field::Mistyped(Found::Number))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Field<T>, E> {
        Ok(Field::Mistyped(Found::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Field<T>, E> {
        Ok(Self::or(T::text(text), Found::Text))
    }

    fn visit_bytes<E>(self, _: &[u8]) -> Result<Field<T>, E> {
        Ok(Field::Mistyped(Found::Bytes))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Field<T>, A::Error> {
        Ok(Self::or(T::list(&mut list)?, Found::List))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field<T>, A::Error> {
        Ok(Self::or(T::object(&mut map)?, Found::Object))
    }
}

/// A key of an object. YAML has keys that are no text; none of them is read, so they are as good as empty.
pub(super) struct Key<'a>(pub(super) Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KeyVisitor)
    }
}

struct KeyVisitor;

impl<'de> Visitor<'de> for KeyVisitor {
    type Value = Key<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Key<'de>, E> {
        Ok(Key(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Key<'de>, E> {
        Ok(Key(Cow::Owned(text.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<Key<'de>, E> {
        Ok(Key(Cow::Borrowed("")))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Key<'de>, E> {
        Ok(Key(Cow::Borrowed("")))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Key<'de>, E> {
        Ok(Key(Cow::Borrowed("")))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Key<'de>, E> {
        Ok(Key(Cow::Borrowed("")))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Key<'de>, E> {
        Ok(Key(Cow::Borrowed("")))
    }
}
