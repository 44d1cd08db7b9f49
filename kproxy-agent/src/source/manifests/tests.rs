use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::super::problem::{PresentProblems, ProblemKind};
use super::*;

/// A folder for one test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kproxy-manifests-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder can be made");
        Folder(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("the file can be written");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn service(name: &str, cluster_ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {cluster_ip}}}\n---\n"
    )
}

/// What a receiver of the events has: Services with their ClusterIP, and the problems.
#[derive(Default)]
struct Received {
    services: BTreeMap<String, String>,
    problems: PresentProblems,
    changes: usize,
    flushes: usize,
    synced: bool,
}

impl Received {
    fn take(&mut self, event: Event) {
        match event {
            Event::Change(Change::Service(key, service)) => {
                self.changes += 1;
                match service {
                    Some(service) => {
                        let spec = service.spec.get().cloned().unwrap_or_default();
                        let address = spec.cluster_ip.text().unwrap_or_default().to_owned();
                        self.services.insert(key.name, address);
                    }
                    None => assert!(self.services.remove(&key.name).is_some(), "{key} was never there"),
                }
            }
            Event::Change(Change::AllPods) => assert!(!self.synced, "said of the first full list"),
            Event::Change(other) => panic!("the tests write Services: {other:?}"),
            Event::Problem(problem) => self.problems.note(problem),
            Event::Synced => self.synced = true,
            Event::Flush => self.flushes += 1,
            Event::Watch(watch) => panic!("files are not watched at an API server: {watch:?}"),
        }
    }

    fn kinds(&self) -> Vec<(ProblemKind, usize)> {
        self.problems.count_by_kind().into_iter().collect()
    }

    fn names(&self) -> Vec<&str> {
        self.services.keys().map(String::as_str).collect()
    }
}

/// A reader that is stepped by hand: no clock, no inotify.
struct Stepped {
    reader: Reader,
    received: Received,
}

impl Stepped {
    fn new(paths: &[PathBuf]) -> Self {
        let mut stepped =
            Stepped { reader: Reader::new(paths.to_vec(), "node-a".into()), received: Received::default() };
        stepped.scan();
        stepped
    }

    fn scan(&mut self) {
        self.step(Work { scan: true, ..Work::default() });
    }

    fn step(&mut self, work: Work) {
        let flushes = self.received.flushes;
        self.reader.step(work, &mut |_| {}, &mut |event| self.received.take(event));
        assert!(self.received.flushes <= flushes + 1, "one flush a step");
    }
}

#[test]
fn the_difference_by_object_is_sent() {
    let folder = Folder::new();
    folder.write("a.yaml", &(service("one", "10.96.0.1") + &service("two", "10.96.0.2")));
    folder.write("b.yaml", &service("three", "10.96.0.3"));
    folder.write("notes.txt", "no manifest");
    let mut stepped = Stepped::new(std::slice::from_ref(&folder.0));
    assert_eq!(stepped.received.names(), ["one", "three", "two"]);
    assert!(stepped.received.synced);

    folder.write("a.yaml", &(service("one", "10.96.0.1") + &service("two", "10.96.0.22")));
    stepped.scan();
    assert_eq!(stepped.received.changes, 4, "only the one that changed");
    assert_eq!(stepped.received.services["two"], "10.96.0.22");

    folder.write("a.yaml", &service("two", "10.96.0.22"));
    fs::remove_file(folder.path("b.yaml")).expect("b.yaml can be removed");
    stepped.scan();
    assert_eq!((stepped.received.changes, stepped.received.names()), (6, vec!["two"]));
    let flushes = stepped.received.flushes;
    stepped.scan();
    assert_eq!(stepped.received.flushes, flushes, "nothing changed, nothing is said");
}

#[test]
fn an_object_that_moves_to_another_file_stays() {
    let folder = Folder::new();
    folder.write("a.yaml", &(service("one", "10.96.0.1") + &service("two", "10.96.0.2")));
    let mut stepped = Stepped::new(std::slice::from_ref(&folder.0));
    folder.write("a.yaml", &service("one", "10.96.0.1"));
    folder.write("b.yaml", &service("two", "10.96.0.2"));
    stepped.scan();
    fs::rename(folder.path("a.yaml"), folder.path("z.yaml")).expect("a.yaml can be renamed");
    stepped.scan();
    assert_eq!((stepped.received.changes, stepped.received.names()), (2, vec!["one", "two"]));
}

#[test]
fn of_an_object_in_two_files_the_last_counts_and_both_are_named() {
    let folder = Folder::new();
    folder.write("a.yaml", &service("web", "10.96.0.1"));
    folder.write("b.yaml", &service("web", "10.96.0.2"));
    let mut stepped = Stepped::new(std::slice::from_ref(&folder.0));
    assert_eq!(stepped.received.services["web"], "10.96.0.2");
    let problem = stepped.received.problems.iter().next().expect("it is said").clone();
    assert!(problem.place.ends_with("b.yaml") && problem.what.contains("a.yaml"), "{problem:?}");

    fs::remove_file(folder.path("b.yaml")).expect("b.yaml can be removed");
    stepped.scan();
    assert_eq!(stepped.received.services["web"], "10.96.0.1", "the other one takes over");
    assert_eq!(stepped.received.kinds(), []);

    folder.write("a.yaml", &(service("web", "10.96.0.1") + &service("web", "10.96.0.3")));
    stepped.scan();
    assert_eq!(stepped.received.services["web"], "10.96.0.3");
    assert_eq!(stepped.received.kinds(), [(ProblemKind::Duplicate, 1)]);
    folder.write("a.yaml", &service("web", "10.96.0.1"));
    stepped.scan();
    assert_eq!(stepped.received.services["web"], "10.96.0.1", "also where the document was known");
    assert_eq!(stepped.received.kinds(), []);
}

#[test]
fn a_file_that_breaks_keeps_what_it_had() {
    let folder = Folder::new();
    folder.write("a.yaml", &(service("one", "10.96.0.1") + &service("two", "10.96.0.2")));
    let mut stepped = Stepped::new(std::slice::from_ref(&folder.0));
    let broken = "apiVersion: v1\nkind: Service\nmetadata: {name: two\n---\n".to_owned();
    folder.write("a.yaml", &(broken + &service("three", "10.96.0.3")));
    stepped.scan();
    assert_eq!(stepped.received.names(), ["one", "three", "two"]);
    let problem = stepped.received.problems.iter().next().expect("it is said").clone();
    assert_eq!(problem.kind, ProblemKind::Syntax);
    assert!(problem.what.contains("still served as it was before: Service default/one, Service default/two"));

    // What it had stays also over a state that is no text at all, and goes when the file is whole without it.
    fs::write(folder.path("a.yaml"), [0xff, 0, 1]).expect("a.yaml can be written");
    stepped.scan();
    assert_eq!(stepped.received.names(), ["one", "three", "two"]);
    assert_eq!(stepped.received.kinds(), [(ProblemKind::UnreadableFile, 1)]);
    folder.write("a.yaml", "");
    stepped.scan();
    assert_eq!(stepped.received.names(), ["one", "three", "two"]);
    assert_eq!(stepped.received.kinds(), [(ProblemKind::EmptyFile, 1)]);
    folder.write("a.yaml", &service("one", "10.96.0.1"));
    stepped.scan();
    assert_eq!((stepped.received.names(), stepped.received.kinds()), (vec!["one"], vec![]));
}

#[test]
fn bad_files_are_named_and_the_rest_is_served() {
    let folder = Folder::new();
    folder.write("a-good.yaml", &service("one", "10.96.0.1"));
    folder.write("b-empty.yaml", "");
    folder.write("c-zero.yaml", "a: \0\n");
    folder.write("d-deployments.yaml", &"apiVersion: apps/v1\nkind: Deployment\n---\n".repeat(3));
    folder.write("e-nameless.yaml", "apiVersion: v1\nkind: Service\n");
    folder.write("f-comment.yaml", "# nothing yet\n");
    folder.write("g-locked.yaml", &service("locked", "10.96.0.4"));
    fs::File::create(folder.path("h-huge.yaml"))
        .and_then(|file| file.set_len(200 << 20))
        .expect("a sparse file");
    nix::unistd::mkfifo(&folder.path("i-fifo.yaml"), nix::sys::stat::Mode::S_IRWXU)
        .expect("a FIFO can be made");
    symlink("nowhere.yaml", folder.path("j-dangling.yaml")).expect("a link can be made");
    fs::set_permissions(folder.path("g-locked.yaml"), fs::Permissions::from_mode(0o0)).expect("chmod");
    // The superuser reads it all the same.
    let locked = fs::read(folder.path("g-locked.yaml")).is_err();

    let stepped = Stepped::new(std::slice::from_ref(&folder.0));
    assert!(stepped.received.synced && stepped.received.services.contains_key("one"));
    let expected = [
        (ProblemKind::UnknownKind, 1),
        (ProblemKind::InvalidObject, 1),
        (ProblemKind::UnreadableFile, 3 + usize::from(locked)),
        (ProblemKind::EmptyFile, 1),
    ];
    assert_eq!(stepped.received.kinds(), expected);
    let deployments =
        stepped.received.problems.iter().find(|problem| problem.kind == ProblemKind::UnknownKind);
    assert_eq!(
        deployments.map(|problem| &*problem.what),
        Some("kind Deployment (apps/v1) is skipped (3 times)")
    );
}

#[test]
fn nothing_is_complete_before_all_paths_exist() {
    let folder = Folder::new();
    folder.write("a.yaml", &service("one", "10.96.0.1"));
    let later = folder.path("later");
    let mut stepped = Stepped::new(&[folder.path("a.yaml"), later.clone()]);
    assert!(!stepped.received.synced);
    assert_eq!(stepped.received.kinds(), [(ProblemKind::MissingPath, 1)]);
    fs::create_dir(&later).expect("the folder can be made");
    stepped.scan();
    assert!(stepped.received.synced);
    assert_eq!(stepped.received.kinds(), []);
}

#[test]
fn most_objects_are_only_deleted_after_a_second_look() {
    let folder = Folder::new();
    let all: String = (0..30).map(|n| service(&format!("s{n:02}"), "10.96.0.1")).collect();
    folder.write("a.yaml", &all);
    folder.write("b.yaml", &service("other", "10.96.0.2"));
    let mut stepped = Stepped::new(std::slice::from_ref(&folder.0));
    fs::remove_file(folder.path("a.yaml")).expect("a.yaml can be removed");
    stepped.scan();
    assert!(stepped.reader.doubts());
    assert_eq!(
        (stepped.received.services.len(), stepped.received.kinds()),
        (31, vec![(ProblemKind::ShortList, 1)])
    );
    // It was a glitch.
    folder.write("a.yaml", &all);
    stepped.scan();
    assert!(!stepped.reader.doubts());
    assert_eq!((stepped.received.changes, stepped.received.kinds()), (31, vec![]));
    // It was meant.
    fs::remove_file(folder.path("a.yaml")).expect("a.yaml can be removed");
    stepped.scan();
    stepped.step(Work { scan: true, confirm: true, ..Work::default() });
    assert_eq!((stepped.received.names(), stepped.received.kinds()), (vec!["other"], vec![]));
}

#[test]
fn links_are_followed_and_circles_are_not() {
    let folder = Folder::new();
    let elsewhere = Folder::new();
    fs::create_dir(folder.path("sub")).expect("a folder can be made");
    folder.write("sub/a.yaml", &service("one", "10.96.0.1"));
    elsewhere.write("target", &service("two", "10.96.0.2"));
    symlink("..", folder.path("sub/up")).expect("a link can be made");
    symlink(elsewhere.path("target"), folder.path("b.yaml")).expect("a link can be made");
    let stepped = Stepped::new(std::slice::from_ref(&folder.0));
    assert_eq!(stepped.received.names(), ["one", "two"]);
    let target = elsewhere.path("target").canonicalize().expect("it is there");
    assert_eq!(stepped.reader.links(), &BTreeSet::from([target]));
}

#[test]
fn a_long_file_is_read_in_pieces_with_the_same_result() {
    let folder = Folder::new();
    let padding = format!("# {}\n", "x".repeat(1000));
    let all: String =
        (0..2000).map(|n| padding.clone() + &service(&format!("s{n:04}"), "10.96.0.1")).collect();
    assert!(all.len() > 2 << 20);
    folder.write("a.yaml", &all);
    let mut stepped = Stepped::new(&[folder.path("a.yaml")]);
    assert_eq!((stepped.received.services.len(), stepped.received.kinds()), (2000, vec![]));
    folder.write("a.yaml", &all.replace("name: s0777}\nspec: {clusterIP: 10.96.0.1}", "name: s0777}"));
    stepped.scan();
    assert_eq!((stepped.received.changes, &*stepped.received.services["s0777"]), (2001, ""));
}

/// What happens to a folder.
#[derive(Clone, Debug)]
enum Step {
    Write(u8, Vec<(u8, u8)>),
    Break(u8),
    Remove(u8),
    Rename(u8, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let file = 0..4_u8;
    let step = prop_oneof![
        4 => (file.clone(), prop::collection::vec((0..20_u8, 0..3_u8), 0..16)).prop_map(|(f, objects)| Step::Write(f, objects)),
        1 => file.clone().prop_map(Step::Break),
        1 => file.clone().prop_map(Step::Remove),
        1 => (file.clone(), file).prop_map(|(from, to)| Step::Rename(from, to)),
    ];
    prop::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever happened to the files, and whether each step was seen or only some: in the end the receiver has
    /// what the files hold.
    #[test]
    fn any_history_ends_in_what_the_files_hold(history in prop::collection::vec((steps(), any::<bool>()), 1..6)) {
        let folder = Folder::new();
        let name = |file: u8| format!("{file}.yaml");
        let mut stepped = Stepped::new(std::slice::from_ref(&folder.0));
        for (steps, seen_each) in history {
            for step in steps {
                match step {
                    Step::Write(file, objects) => {
                        let text: String = objects
                            .iter()
                            .map(|(object, version)| service(&format!("s{object}"), &format!("10.96.0.{version}")))
                            .collect();
                        folder.write(&name(file), &("# begin\n".to_owned() + &text));
                    }
                    Step::Break(file) => folder.write(&name(file), "a: [\n"),
                    Step::Remove(file) => drop(fs::remove_file(folder.path(&name(file)))),
                    Step::Rename(from, to) => drop(fs::rename(folder.path(&name(from)), folder.path(&name(to)))),
                }
                if seen_each {
                    stepped.scan();
                }
            }
            stepped.scan();
        }
        // A broken file rightly keeps what it had: mend it.
        for file in 0..4 {
            if fs::read(folder.path(&name(file))).is_ok_and(|text| text == b"a: [\n") {
                folder.write(&name(file), "# nothing\n");
            }
        }
        stepped.step(Work { scan: true, confirm: true, ..Work::default() });
        let mut fresh = Received::default();
        for change in load(std::slice::from_ref(&folder.0), "node-a").changes {
            fresh.take(Event::Change(change));
        }
        prop_assert_eq!(&stepped.received.services, &fresh.services);
        let fresh = Stepped::new(std::slice::from_ref(&folder.0));
        prop_assert_eq!(stepped.received.kinds(), fresh.received.kinds());
    }
}

/// Takes events until the condition holds.
async fn until(source: &mut Source, received: &mut Received, what: &str, holds: impl Fn(&Received) -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !holds(received) {
        match tokio::time::timeout_at(deadline, source.next()).await {
            Ok(Some(event)) => received.take(event),
            Ok(None) => panic!("the source ended while waiting for: {what}"),
            Err(_) => panic!("not seen in 20 s: {what}; there is {:?}", received.services),
        }
    }
}

#[tokio::test]
async fn changes_are_followed_as_tools_make_them() {
    let folder = Folder::new();
    let path = folder.path("manifests");
    let mut source = follow(std::slice::from_ref(&path), "node-a");
    let mut got = Received::default();
    until(&mut source, &mut got, "the missing folder", |got| got.kinds() == [(ProblemKind::MissingPath, 1)])
        .await;

    fs::create_dir(&path).expect("the folder can be made");
    folder.write("manifests/a.yaml", &service("one", "10.96.0.1"));
    until(&mut source, &mut got, "the folder that came later", |got| got.synced && got.names() == ["one"])
        .await;

    // As most editors: write beside it, rename over it.
    folder.write("manifests/.a.yaml.new", &service("one", "10.96.0.11"));
    fs::rename(folder.path("manifests/.a.yaml.new"), path.join("a.yaml")).expect("rename");
    until(&mut source, &mut got, "a rename over", |got| got.services["one"] == "10.96.0.11").await;

    // As vim: rename it away, write it anew. The object is never gone: `take` would need it to come back.
    let changes = got.changes;
    fs::rename(path.join("a.yaml"), path.join("a.yaml~")).expect("rename");
    folder.write("manifests/a.yaml", &service("one", "10.96.0.12"));
    fs::remove_file(path.join("a.yaml~")).expect("remove");
    until(&mut source, &mut got, "a rename away", |got| {
        got.services.get("one").is_some_and(|ip| ip == "10.96.0.12")
    })
    .await;
    assert_eq!(got.changes, changes + 1);

    // As the kubelet: a mounted ConfigMap is a link that is swapped.
    for (version, address) in [("..1", "10.96.0.21"), ("..2", "10.96.0.22")] {
        fs::create_dir(path.join(version)).expect("mkdir");
        folder.write(&format!("manifests/{version}/c.yaml"), &service("config", address));
        symlink(version, path.join("..data_tmp")).expect("link");
        fs::rename(path.join("..data_tmp"), path.join("..data")).expect("rename");
        if version == "..1" {
            symlink("..data/c.yaml", path.join("c.yaml")).expect("link");
        } else {
            fs::remove_dir_all(path.join("..1")).expect("rm -r");
        }
        until(&mut source, &mut got, version, |got| {
            got.services.get("config").is_some_and(|ip| ip == address)
        })
        .await;
    }

    fs::create_dir_all(path.join("sub/sub")).expect("mkdir");
    folder.write("manifests/sub/sub/d.yaml", &service("deep", "10.96.0.31"));
    until(&mut source, &mut got, "a folder below", |got| got.services.contains_key("deep")).await;
    fs::remove_dir_all(path.join("sub")).expect("rm -r");
    until(&mut source, &mut got, "the folder below gone", |got| !got.services.contains_key("deep")).await;
    fs::create_dir_all(path.join("sub/sub")).expect("mkdir");
    folder.write("manifests/sub/sub/d.yaml", &service("again", "10.96.0.32"));
    until(&mut source, &mut got, "the folder below again", |got| got.services.contains_key("again")).await;

    fs::remove_file(path.join("a.yaml")).expect("rm");
    until(&mut source, &mut got, "a file gone", |got| !got.services.contains_key("one")).await;
    assert_eq!(got.kinds(), []);
    assert_eq!(got.names(), ["again", "config"]);
}

#[tokio::test]
async fn when_most_of_it_goes_it_goes_after_the_second_look() {
    let folder = Folder::new();
    let all: String = (0..30).map(|n| service(&format!("s{n:02}"), "10.96.0.1")).collect();
    folder.write("a.yaml", &all);
    let mut source = follow(std::slice::from_ref(&folder.0), "node-a");
    let mut got = Received::default();
    until(&mut source, &mut got, "the first list", |got| got.synced).await;
    fs::remove_file(folder.path("a.yaml")).expect("rm");
    until(&mut source, &mut got, "the doubt", |got| got.kinds() == [(ProblemKind::ShortList, 1)]).await;
    assert_eq!(got.services.len(), 30);
    until(&mut source, &mut got, "the end of the doubt", |got| {
        got.services.is_empty() && got.kinds().is_empty()
    })
    .await;
}
