use super::super::json::parse as parse_json;
use super::*;
use crate::api::Found;

const SERVICE: &str =
    "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  clusterIP: 10.96.0.1\n";

fn yaml_file(text: &str) -> Parsed {
    let mut all = Parsed::default();
    for document in split_yaml(text) {
        let parsed = parse_yaml(document, "node-a");
        all.objects.extend(parsed.objects);
        all.flaws.extend(parsed.flaws);
    }
    all
}

fn names(parsed: &Parsed) -> Vec<String> {
    parsed.objects.iter().map(|item| item.key.to_string()).collect()
}

/// The one flaw, as kind and text.
fn flaw(parsed: &Parsed) -> (ProblemKind, &str) {
    match &parsed.flaws[..] {
        [flaw] => (flaw.kind, &flaw.what),
        flaws => panic!("expected one flaw: {flaws:?}"),
    }
}

#[test]
fn documents_are_split_where_yaml_says() {
    for (text, expected) in [
        ("", vec![]),
        ("# only a comment\n\n", vec![]),
        ("---\n---\n# nothing\n...\n", vec![]),
        ("a: 1\n", vec![(1, "a: 1\n")]),
        ("%YAML 1.2\n---\na: 1\n---\nb: 2", vec![(2, "---\na: 1\n"), (4, "---\nb: 2")]),
        ("a: 1\n...\nb: 2\n", vec![(1, "a: 1\n"), (3, "b: 2\n")]),
        ("--- {a: 1}\n", vec![(1, "--- {a: 1}\n")]),
        ("a: 1\r\n---\r\nb: 2\r\n", vec![(1, "a: 1\r\n"), (2, "---\r\nb: 2\r\n")]),
        // Not markers: indented, or the begin of a longer word.
        ("a: |\n  ---\n  b\n", vec![(1, "a: |\n  ---\n  b\n")]),
        ("---a: 1\n", vec![(1, "---a: 1\n")]),
    ] {
        let documents: Vec<_> =
            split_yaml(text).iter().map(|document| (document.line, document.text)).collect();
        assert_eq!(documents, expected, "{text:?}");
    }
}

#[test]
fn all_kinds_are_read_and_other_nodes_are_not() {
    let parsed = yaml_file(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n---\n\
         addressType: IPv4\napiVersion: discovery.k8s.io/v1\nendpoints: []\nkind: EndpointSlice\n\
         metadata:\n  name: web-1\n  namespace: shop\n---\n\
         kind: Node\napiVersion: v1\nmetadata: {name: node-a}\n---\n\
         kind: Node\napiVersion: v1\nmetadata: {name: node-b}\n---\n\
         {apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: kubernetes}}\n---\n\
         {apiVersion: v1, kind: Pod, metadata: {name: mesh}, spec: {nodeName: node-a, containers: []}}\n",
    );
    assert_eq!(parsed.flaws, []);
    let expected = [
        "Service default/web",
        "EndpointSlice shop/web-1",
        "Node node-a",
        "ServiceCIDR kubernetes",
        "Pod default/mesh",
    ];
    assert_eq!(names(&parsed), expected);
}

#[test]
fn a_list_is_its_items_whether_they_say_what_they_are_or_not() {
    let list = "apiVersion: v1\nkind: List\nitems:\n\
                - {apiVersion: v1, kind: Service, metadata: {name: a}}\n\
                - {apiVersion: apps/v1, kind: Deployment, metadata: {name: b}}\n";
    let parsed = yaml_file(list);
    assert_eq!(names(&parsed), ["Service default/a"]);
    assert_eq!(flaw(&parsed), (ProblemKind::UnknownKind, "kind Deployment (apps/v1) is skipped"));

    let typed =
        r#"{"kind":"ServiceList","apiVersion":"v1","items":[{"metadata":{"name":"a","namespace":"n"}}]}"#;
    for parsed in [parse_json(typed, ""), yaml_file(typed)] {
        assert_eq!((names(&parsed), parsed.flaws), (vec!["Service n/a".to_owned()], vec![]));
    }
}

#[test]
fn the_items_of_a_list_are_documents_of_their_own() {
    for indent in ["", "  "] {
        let text = format!(
            "apiVersion: v1\nitems:\n{indent}- apiVersion: v1\n{indent}  kind: Service\n{indent}  metadata:\n\
             {indent}    name: a\n# between\n{indent}- kind: Service\n{indent}  apiVersion: v1\n\
             {indent}  metadata: {{name: b}}\n{indent}  spec:\n{indent}    ports:\n{indent}    - port: @x\nkind: List\n\
             metadata:\n  resourceVersion: \"\"\n"
        );
        let begins: Vec<_> = split_yaml(&text).iter().map(|document| document.line).collect();
        assert_eq!(begins, [3, 8], "{text}");
        let parsed = yaml_file(&text);
        assert_eq!(names(&parsed), ["Service default/a"]);
        assert!(
            flaw(&parsed).1.starts_with(&format!("line 13, column {}", indent.len() + 13)),
            "{:?}",
            parsed.flaws
        );
    }
    for whole in [
        "apiVersion: v1\nkind: List\nitems: []\n",
        "apiVersion: v1\nkind: List\nitems:\n- a: &x 1\n- a: *x\n",
        "apiVersion: v1\nkind: List\nitems:\n- a: 1\n - b: 1\n",
        "apiVersion: v1\nkind: List\nitems:\n- a: 1\nitems:\n- b: 1\n",
        "apiVersion: v1\nkind: Service\nitems:\n- a: 1\n",
    ] {
        assert_eq!(split_yaml(whole).len(), 1, "{whole}");
    }
}

#[test]
fn a_broken_document_is_named_with_its_line_and_the_others_are_read() {
    let parsed =
        yaml_file(&format!("{SERVICE}---\napiVersion: v1\nkind: Service\nmetadata: [\n---\n{SERVICE}"));
    assert_eq!(parsed.objects.len(), 2);
    let (kind, what) = flaw(&parsed);
    assert_eq!(kind, ProblemKind::Syntax);
    assert!(what.starts_with("line 1"), "{what}");
    assert_eq!(what.matches("line ").count(), 1, "one location, counted in the file: {what}");

    let tab = yaml_file("# a comment\napiVersion: v1\nkind: Service\nmetadata:\n\tname: web\n");
    assert!(flaw(&tab).1.starts_with("line 5, column "), "{:?}", tab.flaws);
}

#[test]
fn a_value_that_does_not_fit_its_field_costs_the_field() {
    // As sigs.k8s.io/yaml makes a boolean of it.
    let text = |value: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  annotations:\n    a: {value}\nspec:\n  \
             ports:\n  - port: {value}\n  - port: 80\n  unread: {{? [1] : 2, 3: 4, null: *x}}\n"
        )
    };
    for (value, annotation, port) in [
        ("true", Field::Mistyped(Found::Boolean), Field::Mistyped(Found::Boolean)),
        ("\"true\"", Field::Is("true".into()), Field::Mistyped(Found::Text)),
        ("80", Field::Mistyped(Found::Integer), Field::Is(80)),
        ("'80'", Field::Is("80".into()), Field::Mistyped(Found::Text)),
        ("http", Field::Is("http".into()), Field::Mistyped(Found::Text)),
        ("8.5", Field::Mistyped(Found::Number), Field::Mistyped(Found::Number)),
        ("{a: [b]}", Field::Mistyped(Found::Object), Field::Mistyped(Found::Object)),
        ("~", Field::Absent, Field::Absent),
    ] {
        // Read in the plain way, and by the parser.
        for text in [
            text(value).replace("  unread: {? [1] : 2, 3: 4, null: *x}\n", ""),
            text(value).replace("*x", "5"),
        ] {
            let parsed = yaml_file(&text);
            assert_eq!(parsed.flaws, [], "{text}");
            let [Item { object: Object::Service(service), .. }] = &parsed.objects[..] else {
                panic!("{text}")
            };
            let metadata = service.metadata.get().expect("metadata");
            let annotations = metadata.annotations.get().expect("annotations");
            assert_eq!(annotations.get("a"), Some(&annotation), "{text}");
            let ports = service.spec.get().and_then(|spec| spec.ports.get()).expect("ports");
            let numbers: Vec<_> = ports.iter().filter_map(|port| Some(port.get()?.port)).collect();
            assert_eq!(numbers, [port, Field::Is(80)], "{text}");
        }
    }
}

#[test]
fn what_is_no_object_is_named() {
    for (text, kind, what) in [
        (
            "just words\n",
            ProblemKind::InvalidObject,
            "line 1: this is no Kubernetes object: apiVersion or kind is missing",
        ),
        (
            "kind: Service\n",
            ProblemKind::InvalidObject,
            "line 1: this is no Kubernetes object: apiVersion or kind is missing",
        ),
        (
            "apiVersion: v1\nkind: Service\n",
            ProblemKind::InvalidObject,
            "the Service on line 1 has no metadata.name",
        ),
        ("apiVersion: v1\nkind: Endpoints\n", ProblemKind::UnknownKind, "kind Endpoints (v1) is skipped"),
        (
            // Knative's Service is another kind with the same name.
            "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: web}\n",
            ProblemKind::UnknownKind,
            "kind Service (serving.knative.dev/v1) is skipped",
        ),
    ] {
        let parsed = yaml_file(text);
        assert_eq!((flaw(&parsed), parsed.objects.len()), ((kind, what), 0), "{text}");
    }
    for text in ["~\n", "---\nnull\n"] {
        assert_eq!(yaml_file(text), Parsed::default(), "{text:?} says nothing");
    }
}

#[test]
fn json_may_hold_several_values_and_what_stands_before_an_error_counts() {
    let service = |name| format!(r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}"}}}}"#);
    let parsed = parse_json(&format!("{}\n{}", service("a"), service("b")), "");
    assert_eq!((names(&parsed).len(), parsed.flaws), (2, vec![]));
    let parsed = parse_json(&format!("{}\n{{\"kind\":", service("a")), "");
    assert_eq!(names(&parsed), ["Service default/a"]);
    let (kind, what) = flaw(&parsed);
    assert!(kind == ProblemKind::Syntax && what.contains("line 2 column"), "{what}");
    let parsed = parse_json(
        r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"a","labels":{"b":1e999}}}"#,
        "",
    );
    let (kind, what) = flaw(&parsed);
    assert!(kind == ProblemKind::InvalidObject && what.starts_with("the Service a: "), "{what}");
}

#[test]
fn an_item_of_a_list_costs_only_itself() {
    let deep = "[".repeat(50_000) + &"]".repeat(50_000);
    let item = |name: &str, more: &str| {
        format!(r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}"{more}}}}}"#)
    };
    let items = [
        item("a", ""),
        item("b", r#","labels":{"l":1e999}"#),
        "null".to_owned(),
        deep.clone(),
        item("c", &format!(r#","managedFields":{deep},"annotations":{{"d":{deep}}}"#)),
        r#"{"apiVersion":7}"#.to_owned(),
        item("d", ""),
    ];
    let parsed =
        parse_json(&format!(r#"{{"apiVersion":"v1","kind":"List","items":[{}]}}"#, items.join(",")), "");
    assert_eq!(names(&parsed), ["Service default/a", "Service default/c", "Service default/d"]);
    let places: Vec<_> =
        parsed.flaws.iter().map(|flaw| flaw.what.split(':').next().unwrap_or_default()).collect();
    assert_eq!(places, ["items[1]", "items[3]", "items[5]"], "{:?}", parsed.flaws);

    let cut = format!(r#"{{"apiVersion":"v1","kind":"List","items":[{},{{"#, items[..2].join(","));
    let parsed = parse_json(&cut, "");
    assert_eq!(names(&parsed), ["Service default/a"]);
    let kinds: Vec<_> = parsed.flaws.iter().map(|flaw| flaw.kind).collect();
    assert_eq!(kinds, [ProblemKind::InvalidObject, ProblemKind::Syntax]);
}

#[test]
fn aliases_do_not_blow_up() {
    let mut text = String::from("apiVersion: v1\nkind: List\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        text += &format!("a{level}: &a{level} [{aliases}]\n");
    }
    assert_eq!(flaw(&yaml_file(&text)).0, ProblemKind::Syntax);
    // A few are nobody's harm.
    let parsed =
        yaml_file("apiVersion: v1\nkind: Service\nmetadata:\n  name: &name web\n  labels: {app: *name}\n");
    assert_eq!((names(&parsed), parsed.flaws), (vec!["Service default/web".to_owned()], vec![]));
}

#[test]
fn deep_nesting_and_deep_lists_end_in_a_flaw() {
    for text in ["[".repeat(100_000), "a: ".repeat(1000), "- ".repeat(100_000)] {
        assert_eq!(yaml_file(&text).flaws.len(), 1);
        assert_eq!(parse_json(&text, "").flaws.len(), 1);
    }
    let mut nested = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"}}"#.to_owned();
    for _ in 0..=LIST_DEPTH {
        nested = format!(r#"{{"apiVersion":"v1","kind":"List","items":[{nested}]}}"#);
    }
    assert_eq!(flaw(&parse_json(&nested, "")).0, ProblemKind::InvalidObject);
}

#[test]
fn the_same_text_has_the_same_number_and_an_equal_item_of_a_list_too() {
    let [first, second] = &split_yaml("---\na: 1\n---\na: 1")[..] else { panic!("two documents") };
    assert_eq!(first.hash(), second.hash());
    let list = |order: &str| format!(r#"{{"apiVersion":"v1","kind":"List","items":[{order}]}}"#);
    let hashes = |text: &str| parse_json(text, "").objects.iter().map(|item| item.hash).collect::<Vec<_>>();
    let one = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"a","labels":{"l":"u"}}}"#;
    let same =
        r#"{"kind":"Service","metadata":{"labels":{"l":"u"},"uid":"not read","name":"a"},"apiVersion":"v1"}"#;
    let other = r#"{"kind":"Service","metadata":{"labels":{"l":"v"},"name":"a"},"apiVersion":"v1"}"#;
    let [first, second, third] = hashes(&list(&format!("{one},{same},{other}")))[..] else {
        panic!("three items")
    };
    assert_eq!(first, second);
    assert_ne!(first, third);
    let no_list = format!(r#"{{"items":[{one}],"apiVersion":"v1","kind":"ConfigMap"}}"#);
    let parsed = parse_json(&no_list, "");
    assert_eq!((parsed.objects.len(), flaw(&parsed).0), (0, ProblemKind::UnknownKind));
}
