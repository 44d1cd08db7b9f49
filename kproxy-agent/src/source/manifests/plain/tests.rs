use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::documents::yaml_parser;
use super::*;

fn plain(text: &str) -> Option<Value> {
    let json = to_json(text)?;
    Some(serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error} in {json} from {text:?}")))
}

#[test]
fn what_kubectl_writes_is_plain() {
    let text = r#"addressType: IPv4
apiVersion: discovery.k8s.io/v1
endpoints:
- addresses:
  - 10.244.0.7
  conditions:
    ready: true
    terminating: false
  nodeName: node-a
  targetRef:
    kind: Pod
    uid: 5f7e6a3c-0b5d-4c59-9d61-6d7f0e1f2a3b
  zone: zone a
# a comment
kind: EndpointSlice
metadata:
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      {"apiVersion":"v1","a\"b":["c"]}
      second line
    kubernetes.io/elb.pass-through: "true"
    empty: ''
  creationTimestamp: "2026-01-01T00:00:00Z"
  labels: {}
  managedFields:
  name: web-1
ports:
- name: ""
  port: 8080
  appProtocol: kubernetes.io/h2c
list:
  - fd00::1
  - 2001:db8::/64
  - -5
  - 0
"#;
    let expected = json!({
        "addressType": "IPv4",
        "apiVersion": "discovery.k8s.io/v1",
        "endpoints": [{
            "addresses": ["10.244.0.7"],
            "conditions": {"ready": true, "terminating": false},
            "nodeName": "node-a",
            "targetRef": {"kind": "Pod", "uid": "5f7e6a3c-0b5d-4c59-9d61-6d7f0e1f2a3b"},
            "zone": "zone a",
        }],
        "kind": "EndpointSlice",
        "metadata": {
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration":
                    "{\"apiVersion\":\"v1\",\"a\\\"b\":[\"c\"]}\nsecond line\n",
                "kubernetes.io/elb.pass-through": "true",
                "empty": "",
            },
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {},
            "managedFields": null,
            "name": "web-1",
        },
        "ports": [{"name": "", "port": 8080, "appProtocol": "kubernetes.io/h2c"}],
        "list": ["fd00::1", "2001:db8::/64", -5, 0],
    });
    assert_eq!(plain(text), Some(expected.clone()));
    assert_eq!(yaml_parser::<Value>(text).expect("it is YAML"), expected);
}

#[test]
fn what_is_not_plain_is_left_to_the_parser() {
    for text in [
        "",
        "a\n",
        "a: b: c\n",
        "a:b\n",
        "a: [1]\n",
        "a: {b: c}\n",
        "a: &x b\n",
        "a: *x\n",
        "a: !!str b\n",
        "a: >\n  b\n",
        "a: |-\n  b\n",
        "a: |\n\n  b\n",
        "a: |\n  b\n\n",
        "a: |\n  b",
        "a: |\n",
        "a: b\n  c\n",
        "a: \"b\n  c\"\n",
        "a: b # c\n",
        "a: b\na: c\n",
        "a: yes\n",
        "No: b\n",
        "1: b\n",
        "a: 1.5\n",
        "a: 0x10\n",
        "a: 012\n",
        "a: 1e3\n",
        "a: 1_000\n",
        "a: 190:20:30\n",
        "a: ~\n",
        "a: .inf\n",
        "a: b:\n",
        "a: \"b\\n\"\n",
        "a: 'b''c'\n",
        "a: \u{e9}\n",
        "\ta: b\n",
        " a: b\nc: d\n",
        "a: b\r\n",
        "a:\n    b: c\n  d: e\n",
        "- - a\n",
        "-\n  a: b\n",
        "-   a: b\n",
        "a:\n- b\n - c\n",
        "? a\n: b\n",
        "<<: a\n",
        "a: b\n---\nc: d\n",
        "a: @b\n",
        "a: `b\n",
        "a: %b\n",
        "a: 99999999999999999999\n",
    ] {
        assert_eq!(to_json(text), None, "{text:?}");
    }
    let deep: String = (0..100).map(|level| format!("{}a:\n", " ".repeat(level))).collect();
    assert_eq!(to_json(&deep), None);
}

/// A tree as text, in the styles that people and tools use: for one scalar that may be anything `plain` that
/// are plain.
fn tree(plain: u32) -> impl Strategy<Value = String> {
    let scalar = prop_oneof![
        plain.max(1) => "([a-z]{1,8}|[1-9][0-9]{0,3}|10\\.0\\.0\\.[1-9]|true|null|\"[a-z0-9 \\[{}]{0,4}\"|'[a-z\" ]{0,3}'|fd00::1|\\{\\}|\\[\\])",
        plain.div_ceil(8).max(1) => "[|](\n[a-z{}\": #-]{1,8}){1,3}",
        1 => "[a-zA-Z0-9./:_-]{0,8}",
        1 => "(true|no|null|~|0|-?[0-9]{1,4}|1e3|0x1f|[0-9]{1,3}\\.[0-9]{1,3}\\.1\\.1|fd00::1|2001:db8::1|\\.5|1:2)",
        1 => "\"[ -~&&[^\"]]{0,6}\"",
        1 => "'[ -~&&[^']]{0,6}'",
        1 => "[a-z]{1,4} [a-z:#]{0,4}",
        1 => "(\\{\\}|\\[\\]|\\[a, b\\]|\\{a: b\\}|[|>][-+]?)",
        1 => Just(String::new()),
    ];
    scalar.prop_map(|scalar| format!("{scalar}\n")).prop_recursive(4, 48, 5, |inner| {
        let key = prop_oneof![30 => "[a-m]", 1 => "[a-zA-Z0-9./_-]{1,6}", 1 => "(\"a\"|on|1|k8s.io/a-b)"];
        let indent = |text: &str, by: usize| {
            text.lines().map(|line| format!("{}{line}\n", " ".repeat(by))).collect::<String>()
        };
        let comment = prop_oneof![6 => Just(""), 1 => Just("# c\n"), 1 => Just("\n"), 1 => Just("   # c\n")];
        let entry = (inner, 0..4_usize, comment);
        prop_oneof![
            prop::collection::vec((key, entry.clone()), 1..5).prop_map(move |entries| {
                entries
                    .iter()
                    .map(|(key, (value, by, comment))| match value.lines().count() {
                        2.. if value.starts_with('|') => {
                            format!("{comment}{key}: {}", indent(value, by + 1).trim_start())
                        }
                        0 | 1 if !value.contains(": ") && !value.starts_with("- ") => {
                            format!("{comment}{key}: {value}")
                        }
                        _ => format!("{comment}{key}:\n{}", indent(value, *by)),
                    })
                    .collect::<String>()
            }),
            prop::collection::vec(entry, 1..5).prop_map(move |entries| {
                entries
                    .iter()
                    .map(|(value, _, comment)| {
                        format!("{comment}- {}", indent(value, 2).trim_start_matches(' '))
                    })
                    .collect::<String>()
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5_000, ..ProptestConfig::default() })]

    /// What is taken for plain means the same to the YAML parser.
    #[test]
    fn plain_yaml_is_what_the_parser_reads(
        text in prop_oneof![tree(0), tree(8), tree(40)],
        edits in prop::collection::vec((any::<prop::sample::Index>(), "[-a1 :\n#'\"|]{0,2}", any::<bool>()), 0..3),
    ) {
        let mut text = text;
        for (at, insert, delete) in edits {
            if !text.is_empty() && text.is_ascii() {
                let at = at.index(text.len());
                text.replace_range(at..at + usize::from(delete), &insert);
            }
        }
        if let Some(value) = plain(&text) {
            let parsed = yaml_parser::<Value>(&text);
            prop_assert!(matches!(&parsed, Ok(parsed) if *parsed == value), "{text:?}: {value} but {parsed:?}");
        }
    }

    /// Nothing makes it panic.
    #[test]
    fn any_text_is_read_or_not(text in "[-a1 :\n#'\"|{}\u{e9}\t]{0,40}") {
        plain(&text);
    }
}
