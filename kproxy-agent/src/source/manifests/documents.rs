//! From the text of a file to objects: YAML in several documents, JSON, and lists of objects. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::plain;
use crate::api::{Field, Text};
use crate::source::object::{Kind, Object, ObjectKey, Read, Unreadable};
use crate::source::problem::ProblemKind;

/// How deep `kind: List` may hold lists.
pub(super) const LIST_DEPTH: usize = 4;

/// A part of a file that is read by itself: what stands between two `---` of YAML, an item of a list in YAML, or
/// all of a JSON file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Document<'a> {
    /// The line of the file that it begins on, from 1.
    pub(super) line: usize,
    /// Its text; the `---` or `-` that it begins with is part of it.
    pub(super) text: &'a str,
    /// Whether it is an item of a list.
    pub(super) is_item: bool,
}

impl Document<'_> {
    /// For an item of a list its text with a space for the dash: a mapping, whose columns are still the file's.
    fn as_item(&self) -> Option<String> {
        if !self.is_item {
            return None;
        }
        let content = self.text.trim_start_matches(' ');
        let rest = content.strip_prefix("- ")?;
        Some(format!("{}  {rest}", &self.text[..self.text.len() - content.len()]))
    }

    /// The same text has the same number, wherever it stands.
    pub(super) fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let text = if is_marker(self.text, "---") { &self.text[3..] } else { self.text };
        text.trim_start_matches(['\r', '\n']).trim_end().hash(&mut hasher);
        hasher.finish()
    }
}

/// What one document held.
#[derive(Default, PartialEq, Debug)]
pub(super) struct Parsed {
    pub(super) objects: Vec<Item>,
    pub(super) flaws: Vec<Flaw>,
}

/// An object and what to compare it by.
#[derive(PartialEq, Debug)]
pub(super) struct Item {
    pub(super) key: ObjectKey,
    /// Equal where what is read of it is equal. Only numbers of the same key are compared.
    pub(super) hash: u64,
    pub(super) object: Object,
}

/// What is wrong with a document, apart from the file that it is in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Flaw {
    pub(super) kind: ProblemKind,
    pub(super) what: String,
    pub(super) mend: String,
}

/// Splits YAML into documents at `---` and `...`, which at the begin of a line mean nothing else, wherever they
/// stand (YAML 1.2.2, 9.1.2). Parts with nothing but comments and directives are left out. Of a `kind: List` the
/// items are the documents.
pub(super) fn split_yaml(text: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let mut add = |line, text| {
        let document = Document { line, text, is_item: false };
        match split_list(document) {
            Some(items) => documents.extend(items),
            None => documents.push(document),
        }
    };
    let (mut begin, mut begin_line, mut has_content) = (0, 1, false);
    for (number, at, line) in lines(text) {
        let starts = is_marker(line, "---");
        if starts || is_marker(line, "...") {
            if has_content {
                add(begin_line, &text[begin..at]);
            }
            begin = if starts { at } else { at + line.len() };
            begin_line = if starts { number } else { number + 1 };
            has_content = starts && !is_blank(&line[3..]);
        } else {
            has_content = has_content || (!is_blank(line) && !line.starts_with('%'));
        }
    }
    if has_content {
        add(begin_line, &text[begin..]);
    }
    documents
}

/// The items of a `kind: List`, each with the `- ` that it begins with, where they can be told apart without
/// parsing: in block style nothing that belongs to an item stands as far left as the `- ` does. So a list of
/// ten thousand objects is never a single tree in memory, and its items are read in parallel.
fn split_list(document: Document<'_>) -> Option<Vec<Document<'_>>> {
    let text = document.text;
    // An alias may refer to an anchor in another item.
    if top_level_type(text) != Some(("v1", "List")) || text.contains(" &") {
        return None;
    }
    let mut items = Vec::new();
    // Where the current item begins; how far the items are indented.
    let mut begin: Option<(usize, usize)> = None;
    let mut indent = None;
    let mut in_items = false;
    for (number, at, line) in lines(text) {
        let content = line.trim_start_matches(' ');
        let line_indent = line.len() - content.len();
        if is_blank(line) || (begin.is_some() && indent.is_some_and(|indent| line_indent > indent)) {
            continue;
        }
        if let Some((line, from)) = begin.take() {
            items.push(Document { line: document.line + line - 1, text: &text[from..at], is_item: true });
        }
        if in_items && content.starts_with("- ") && *indent.get_or_insert(line_indent) == line_indent {
            begin = Some((number, at));
        } else if line_indent > 0 {
            if in_items {
                return None;
            }
        } else {
            let key = content.trim_end();
            // A second `items` is an error that is for the parser to find, as is whatever else is odd here.
            in_items = key == "items:" && indent.is_none();
            if key.starts_with("items:") && !in_items {
                return None;
            }
        }
    }
    if let Some((line, from)) = begin {
        items.push(Document { line: document.line + line - 1, text: &text[from..], is_item: true });
    }
    (!items.is_empty()).then_some(items)
}

/// Reads one document of YAML. Of Nodes only the one called `node_name` is taken.
pub(super) fn parse_yaml(document: Document<'_>, node_name: &str) -> Parsed {
    let item = document.as_item();
    let document = item.as_deref().map_or(document, |text| Document { text, ..document });
    let mut parsed = Parsed::default();
    // Nearly all documents say what they are on lines of their own: these are read straight into their type,
    // which is faster than by way of a tree, takes less memory, and lets errors name the line.
    match top_level_type(document.text) {
        Some((api_version, kind)) if !kind.ends_with("List") => match Kind::from_type(api_version, kind) {
            Some(kind) => match Object::read_by(kind, document) {
                Ok(object) => {
                    let place = || format!("the {} on line {}", kind.name(), document.line);
                    parsed.add(object, node_name, place);
                }
                Err(flaw) => parsed.flaws.push(flaw),
            },
            None => parsed.flaws.push(unknown_kind(api_version, kind)),
        },
        _ => match yaml::<serde_json::Value>(document) {
            Ok(value) => {
                let place = format!("line {}: ", document.line);
                parsed.add_json(&value.to_string(), &place, None, LIST_DEPTH, node_name);
            }
            Err(flaw) => parsed.flaws.push(flaw),
        },
    }
    parsed
}

impl Read for Document<'_> {
    type Error = Flaw;

    fn read<T: DeserializeOwned>(self) -> Result<T, Flaw> {
        yaml(self)
    }
}

/// What decides how a value of JSON is read.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Head<'a> {
    api_version: Field<Text>,
    kind: Field<Text>,
    #[serde(borrow)]
    items: Option<&'a RawValue>,
}

impl Parsed {
    fn add(&mut self, object: Object, node_name: &str, place: impl Fn() -> String) {
        match object.key() {
            Some(key) => self.add_item(key, object, node_name),
            None => self.flaws.push(Flaw {
                kind: ProblemKind::InvalidObject,
                what: format!("{} has no metadata.name", place()),
                mend: "give it a name".to_owned(),
            }),
        }
    }

    fn add_item(&mut self, key: ObjectKey, object: Object, node_name: &str) {
        if key.kind == Kind::Node && key.name != node_name {
            return;
        }
        let mut hasher = DefaultHasher::new();
        object.hash(&mut hasher);
        self.objects.push(Item { key, hash: hasher.finish(), object });
    }

    /// Adds what a value of JSON holds: an object, or a list of them. `inherited` is the type of the items of a
    /// typed list, which need not repeat it.
    pub(super) fn add_json(
        &mut self,
        text: &str,
        place: &str,
        inherited: Option<(&str, &str)>,
        depth: usize,
        node_name: &str,
    ) {
        if text == "null" {
            return;
        }
        let Head { api_version, kind, items } = serde_json::from_str(text).unwrap_or_default();
        let text_of = |field: &Field<Text>| field.text().filter(|text| !text.is_empty()).map(str::to_owned);
        let (api_version, kind) = match (text_of(&api_version), text_of(&kind), inherited) {
            (Some(api_version), Some(kind), _) => (api_version, kind),
            (None, None, Some((api_version, kind))) => (api_version.to_owned(), kind.to_owned()),
            _ => {
                self.flaws.push(Flaw {
                    kind: ProblemKind::InvalidObject,
                    what: format!("{place}this is no Kubernetes object: apiVersion or kind is missing"),
                    mend: "add them, or take it out of the folder".to_owned(),
                });
                return;
            }
        };
        if let Some(kind) = Kind::from_type(&api_version, &kind) {
            match Object::from_json(kind, text) {
                Ok((key, object)) => self.add_item(key, object, node_name),
                Err(Unreadable { key, version: _, why }) => {
                    let name = key.map_or_else(|| "without a name".to_owned(), |key| key.name);
                    self.flaws.push(Flaw {
                        kind: ProblemKind::InvalidObject,
                        what: format!("{place}the {} {name}: {why}", kind.name()),
                        mend: "correct it; the object is skipped until then".to_owned(),
                    });
                }
            }
            return;
        }
        let items = items.and_then(|items| serde_json::from_str::<Vec<&RawValue>>(items.get()).ok());
        let (Some(item_kind), Some(items)) = (kind.strip_suffix("List"), items) else {
            return self.flaws.push(unknown_kind(&api_version, &kind));
        };
        if depth == 0 {
            return self.flaws.push(Flaw {
                kind: ProblemKind::InvalidObject,
                what: format!("{place}lists within lists, more than {LIST_DEPTH} deep"),
                mend: "write the objects themselves into the list".to_owned(),
            });
        }
        let inherited = (!item_kind.is_empty()).then_some((api_version.as_str(), item_kind));
        for (index, item) in items.into_iter().enumerate() {
            let place = format!("{place}items[{index}]: ");
            self.add_json(item.get(), &place, inherited, depth - 1, node_name);
        }
    }
}

/// Whether the line is the marker, alone or with something after it.
fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Whether the line has nothing but a comment.
fn is_blank(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

/// `apiVersion` and `kind` of a document in block style, without parsing it: keys that begin a line are keys
/// of the outermost mapping. `None` where it is not as plain as that.
fn top_level_type(text: &str) -> Option<(&str, &str)> {
    let (mut api_version, mut kind) = (None, None);
    let mut indent = None;
    for (_, _, line) in lines(text) {
        let content = line.trim_start_matches(' ');
        if is_blank(content) || content.starts_with("---") {
            continue;
        }
        let line_indent = line.len() - content.len();
        if line_indent > *indent.get_or_insert(line_indent) {
            continue;
        }
        if let Some(value) = content.strip_prefix("apiVersion:") {
            api_version = Some(plain_scalar(value)?);
        } else if let Some(value) = content.strip_prefix("kind:") {
            kind = Some(plain_scalar(value)?);
        }
        if let (Some(api_version), Some(kind)) = (api_version, kind) {
            return Some((api_version, kind));
        }
    }
    None
}

/// The lines of a text: number from 1, offset, and the line with its end.
fn lines(text: &str) -> impl Iterator<Item = (usize, usize, &str)> {
    let mut at = 0;
    (1..).zip(text.split_inclusive('\n')).map(move |(number, line)| {
        let begin = at;
        at += line.len();
        (number, begin, line)
    })
}

/// A scalar of letters, digits, `.`, `/`, `-`, quoted or not, with or without a comment after it.
fn plain_scalar(value: &str) -> Option<&str> {
    let value = value.strip_prefix([' ', '\t'])?;
    let value = value.find(" #").map_or(value, |comment| &value[..comment]).trim();
    let unquoted = ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote));
    let value = unquoted.unwrap_or(value);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/' | '-');
    (!value.is_empty() && value.chars().all(plain)).then_some(value)
}

/// Reads a document into a type.
fn yaml<T: DeserializeOwned>(document: Document<'_>) -> Result<T, Flaw> {
    // Nearly always the short way; what goes wrong on it is for the parser to say, which knows the line.
    if let Some(json) = plain::to_json(document.text)
        && let Ok(value) = serde_json::from_str(&json)
    {
        return Ok(value);
    }
    yaml_parser(document.text).map_err(|error| yaml_flaw(&error, document))
}

/// Reads any YAML into a type.
pub(super) fn yaml_parser<T: DeserializeOwned>(text: &str) -> Result<T, serde_saphyr::Error> {
    let limits = serde_saphyr::Budget::default();
    let options = serde_saphyr::options! {
        // As the API server: an annotation `true` or a label `1.0` without quotes is no string.
        no_schema: true,
        with_snippet: false,
        // Every event but a replayed alias takes a byte of text, so that these bound only what aliases blow up.
        budget: serde_saphyr::budget! {
            max_events: limits.max_events.max(text.len()),
            max_nodes: limits.max_nodes.max(text.len()),
            max_total_scalar_bytes: limits.max_total_scalar_bytes.max(text.len()),
            max_total_comment_bytes: limits.max_total_comment_bytes.max(text.len()),
        },
    };
    serde_saphyr::from_str_with_options(text, options)
}

fn yaml_flaw(error: &serde_saphyr::Error, document: Document<'_>) -> Flaw {
    let error = error.without_snippet();
    let message = error.to_string();
    // The location is given from the begin of the document: say it as the editor counts.
    let message = match message.rfind(" at line ") {
        Some(at) => &message[..at],
        None => message.as_str(),
    };
    let place = match error.location() {
        Some(location) => {
            format!(
                "line {}, column {}",
                document.line as u64 + location.line().saturating_sub(1),
                location.column()
            )
        }
        None => format!("the document on line {}", document.line),
    };
    Flaw {
        kind: ProblemKind::Syntax,
        what: format!("{place}: {message}"),
        mend: "correct it there; other documents of the file are read".to_owned(),
    }
}

fn unknown_kind(api_version: &str, kind: &str) -> Flaw {
    let mend = match (api_version, kind) {
        ("v1", "Endpoints" | "EndpointsList") => "write EndpointSlices (discovery.k8s.io/v1) in its place",
        (_, "EndpointSlice") => "its apiVersion must be discovery.k8s.io/v1",
        (_, "ServiceCIDR") => "its apiVersion must be networking.k8s.io/v1",
        _ => "kproxy reads Service, EndpointSlice, Node, ServiceCIDR and Pod; take it out of the folder",
    };
    Flaw {
        kind: ProblemKind::UnknownKind,
        what: format!("kind {kind} ({api_version}) is skipped"),
        mend: mend.to_owned(),
    }
}

#[cfg(test)]
mod tests;
