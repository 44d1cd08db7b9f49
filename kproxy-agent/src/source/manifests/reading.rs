//! Reads files into objects: what can be done on any thread, since it changes nothing.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::documents::{self, Document, Parsed};
use super::files::{self, ReadError, Stamp};
use super::json;
use crate::source::object::ObjectKey;

/// Files with more text than this are parsed by several threads, in pieces of this size.
const PIECE_BYTES: usize = 512 << 10;

/// The objects of documents, with the version of each, by the number of the document's text.
pub(super) type KnownDocuments = HashMap<u64, Vec<(Arc<ObjectKey>, u64)>>;

/// A file as one thread read it.
pub(super) struct FileRead {
    pub(super) path: Arc<Path>,
    pub(super) content: Result<(Stamp, Content), ReadError>,
}

/// What a file holds.
pub(super) enum Content {
    Documents(Vec<DocumentRead>),
    /// Nothing at all, not even a comment.
    Empty,
    /// Too long for one thread.
    Long(String),
}

/// One document: its text's number and what it holds; `None` if that is known.
pub(super) struct DocumentRead {
    pub(super) hash: u64,
    pub(super) parsed: Option<Parsed>,
}

/// Reads a file, on any thread.
pub(super) fn file(path: Arc<Path>, known: &KnownDocuments, node_name: &str) -> FileRead {
    let language = Language::of(&path);
    let content = files::read(&path).map(|(stamp, text)| {
        let content = if text.len() > PIECE_BYTES {
            Content::Long(text)
        } else if text.trim().is_empty() {
            Content::Empty
        } else {
            Content::Documents(documents(language, language.split(&text), known, node_name))
        };
        (stamp, content)
    });
    FileRead { path, content }
}

/// How the text of a file is to be read.
#[derive(Clone, Copy)]
pub(super) enum Language {
    Json,
    Yaml,
}

impl Language {
    pub(super) fn of(path: &Path) -> Self {
        if files::is_json(path) { Language::Json } else { Language::Yaml }
    }

    pub(super) fn split(self, text: &str) -> Vec<Document<'_>> {
        match self {
            Language::Json => vec![Document { line: 1, text, is_item: false }],
            Language::Yaml => documents::split_yaml(text),
        }
    }
}

/// Reads documents, but for those that are known.
pub(super) fn documents(
    language: Language,
    documents: Vec<Document<'_>>,
    known: &KnownDocuments,
    node_name: &str,
) -> Vec<DocumentRead> {
    let read = |document: Document<'_>| {
        let hash = document.hash();
        let parsed = (!known.contains_key(&hash)).then(|| match language {
            Language::Json => json::parse(document.text, node_name),
            Language::Yaml => documents::parse_yaml(document, node_name),
        });
        DocumentRead { hash, parsed }
    };
    documents.into_iter().map(read).collect()
}

/// Groups documents into pieces of about the same size.
pub(super) fn pieces(documents: Vec<Document<'_>>) -> Vec<Vec<Document<'_>>> {
    let mut pieces = vec![Vec::new()];
    let mut size = 0;
    for document in documents {
        if size > PIECE_BYTES {
            pieces.push(Vec::new());
            size = 0;
        }
        size += document.text.len();
        if let Some(piece) = pieces.last_mut() {
            piece.push(document);
        }
    }
    pieces
}
