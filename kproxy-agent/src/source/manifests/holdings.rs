//! Which file holds which object, and what of it was passed on. Pure: the difference between files.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::documents::Item;
use crate::model::Change;
use crate::source::object::ObjectKey;

/// All objects of all files. Objects themselves are not kept, only what tells one version from another.
#[derive(Default, Debug)]
pub(super) struct Holdings {
    objects: HashMap<Arc<ObjectKey>, Held>,
}

#[derive(Default, Debug)]
struct Held {
    /// The version that was passed on last.
    sent: Option<u64>,
    /// The files that have it, in path order: the last one counts.
    holders: Vec<Holder>,
}

#[derive(Debug)]
struct Holder {
    file: Arc<Path>,
    hash: u64,
}

impl Holdings {
    /// How many objects there are.
    pub(super) fn len(&self) -> usize {
        self.objects.len()
    }

    /// `file` has this object. Returns its key, and the change, if this is the version that counts and another
    /// than the one passed on.
    pub(super) fn put(&mut self, file: &Arc<Path>, item: Item) -> (Arc<ObjectKey>, Option<Change>) {
        let key = match self.objects.get_key_value(&item.key) {
            Some((key, _)) => key.clone(),
            None => Arc::new(item.key),
        };
        let held = self.objects.entry(key.clone()).or_default();
        let counts = held.hold(file, item.hash);
        if !counts || held.sent == Some(item.hash) {
            return (key, None);
        }
        held.sent = Some(item.hash);
        let change = item.object.change(&key);
        (key, Some(change))
    }

    /// `file` still has this version of the object, which was read before. Returns whether that is news, as
    /// when two documents of the file have the object and their order changed.
    pub(super) fn keep(&mut self, file: &Arc<Path>, key: &Arc<ObjectKey>, hash: u64) -> bool {
        let held = self.objects.entry(key.clone()).or_default();
        let same = held.holders.iter().any(|holder| holder.file == *file && holder.hash == hash);
        held.hold(file, hash);
        !same
    }

    /// `file` has the object no more. Nothing is passed on: another file may have it, or will have it when it
    /// has been read too. See [`Holdings::is_orphan`] and [`Holdings::stale`].
    pub(super) fn release(&mut self, file: &Path, key: &ObjectKey) {
        if let Some(held) = self.objects.get_mut(key) {
            held.holders.retain(|holder| *holder.file != *file);
        }
    }

    /// Whether no file has the object any more.
    pub(super) fn is_orphan(&self, key: &ObjectKey) -> bool {
        self.objects.get(key).is_some_and(|held| held.holders.is_empty())
    }

    /// Forgets an object that no file has. The change says so, if it was ever passed on.
    pub(super) fn forget(&mut self, key: &ObjectKey) -> Option<Change> {
        self.objects.remove(key)?.sent.map(|_| key.gone())
    }

    /// The file that must be read again, since it has the version that counts and another was passed on: it
    /// happens when the file that counted before lost the object.
    pub(super) fn stale(&self, key: &ObjectKey) -> Option<&Arc<Path>> {
        let held = self.objects.get(key)?;
        let last = held.holders.last()?;
        (held.sent != Some(last.hash)).then_some(&last.file)
    }

    /// The files that have the object, in path order.
    pub(super) fn files(&self, key: &ObjectKey) -> impl Iterator<Item = &Path> {
        self.objects.get(key).into_iter().flat_map(|held| held.holders.iter().map(|holder| &*holder.file))
    }
}

impl Held {
    /// Notes the version that `file` has; returns whether this file is the one that counts.
    fn hold(&mut self, file: &Arc<Path>, hash: u64) -> bool {
        let at = match self.holders.binary_search_by(|holder| holder.file.cmp(file)) {
            Ok(at) => {
                self.holders[at].hash = hash;
                at
            }
            Err(at) => {
                self.holders.insert(at, Holder { file: file.clone(), hash });
                at
            }
        };
        at + 1 == self.holders.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::object::{Kind, Object};

    fn item(name: &str, hash: u64) -> Item {
        let text = format!(r#"{{"metadata": {{"name": "{name}"}}}}"#);
        let (key, object) = Object::from_json(Kind::Service, &text).expect("it has a name");
        Item { key, hash, object }
    }

    #[test]
    fn the_last_file_in_path_order_counts_and_the_other_takes_over_when_it_goes() {
        let (a, b): (Arc<Path>, Arc<Path>) = (Path::new("/m/a").into(), Path::new("/m/b").into());
        let mut holdings = Holdings::default();
        assert!(holdings.put(&b, item("web", 2)).1.is_some());
        let (key, change) = holdings.put(&a, item("web", 1));
        assert!(change.is_none(), "b counts");
        assert_eq!(holdings.files(&key).collect::<Vec<_>>(), [&*a, &*b]);
        assert_eq!(holdings.stale(&key), None);

        holdings.release(&b, &key);
        assert_eq!(holdings.stale(&key), Some(&a));
        assert!(holdings.put(&a, item("web", 1)).1.is_some());
        assert_eq!(holdings.stale(&key), None);

        holdings.release(&a, &key);
        assert!(holdings.is_orphan(&key));
        assert!(matches!(holdings.forget(&key), Some(Change::Service(_, None))));
        assert_eq!(holdings.len(), 0);
    }

    #[test]
    fn an_object_that_moves_is_neither_deleted_nor_sent_again() {
        let (a, b): (Arc<Path>, Arc<Path>) = (Path::new("/m/a").into(), Path::new("/m/b").into());
        let mut holdings = Holdings::default();
        let (key, _) = holdings.put(&b, item("web", 1));
        holdings.release(&b, &key);
        assert!(holdings.put(&a, item("web", 1)).1.is_none());
        assert!(!holdings.is_orphan(&key));
    }
}
