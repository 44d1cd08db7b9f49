//! `kproxy explain --manifests` as a process: by whom it can be run, what it prints, and how it ends.

use std::{
    fs,
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

const OBJECTS: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: node-a}
status: {addresses: [{type: InternalIP, address: 192.0.2.11}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIPs: [10.96.0.30]
  externalTrafficPolicy: Local
  sessionAffinity: ClientIP
  ports: [{name: http, port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.9}, {ip: 203.0.113.10, ipMode: Proxy}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.244.1.5], nodeName: node-a}
- {addresses: [10.244.2.5], nodeName: node-b}
- {addresses: [10.244.2.6], nodeName: node-b, conditions: {ready: false}}
"#;

/// A folder that goes with this.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kproxy-explain-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("objects.yaml"), OBJECTS).unwrap();
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn explain(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kproxy"));
    command.env_clear();
    command.args(["explain", "--node-name", "node-a", "--cluster-cidr", "10.244.0.0/16", "--service-cidr"]);
    command.arg("10.96.0.0/16").arg("--manifests").arg(folder).args(arguments);
    command
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn one_question_in_every_format() {
    let folder = Folder::new("one");
    let ask = |format: &[&str]| {
        let arguments = [&["--from", "198.51.100.1", "--to", "192.0.2.11:30080"], format].concat();
        let output = explain(folder.path(), &arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        text(&output).0
    };
    let answer: Value = serde_json::from_str(&ask(&["-o", "json"])).unwrap();
    assert_eq!(answer["verdict"], "forward");
    assert_eq!(answer["service"], "shop/web:http");
    assert_eq!(answer["backends"], json!([{"address": "10.244.1.5:8080", "source": "kept", "local": true}]));
    assert_eq!(answer["affinity"], 10_800);
    assert_eq!(answer["pass_through"], false);
    assert_eq!(answer["reason"], "forwarded");
    assert!(answer["rule"].as_str().unwrap().contains("externalTrafficPolicy: Local"), "{answer:#}");
    assert_eq!(answer["left_out"][0]["what"], "10.244.2.5:8080");
    let yaml = ask(&["-o", "yaml"]);
    assert!(yaml.contains("service: shop/web:http"), "{yaml}");
    for what in ["outside", "NodePort 30080/TCP", "shop/web:http", "10.244.1.5:8080", "on node-b"] {
        let path = ask(&[]);
        assert!(path.contains(what), "no {what} in:\n{path}");
    }
}

#[test]
fn on_which_node_a_pod_is_can_be_said() {
    let folder = Folder::new("nodes");
    let to = ["--to", "192.0.2.11:30080", "-o", "json"];
    let client = |from: &str, node: &[&str]| {
        let output = explain(folder.path(), &[&["--from", from][..], &to, node].concat()).output().unwrap();
        let answer: Value = serde_json::from_str(&text(&output).0).unwrap_or_else(|_| panic!("{output:?}"));
        (answer["client"].as_str().unwrap().to_owned(), answer["backends"].as_array().unwrap().len())
    };
    let (pod, outside) = (("pod".to_owned(), 2), ("outside".to_owned(), 1));
    let (here, there) = (["--from-node", "node-a"], ["--from-node", "Node-B"]);
    for (from, by_default) in [("10.244.1.7", &pod), ("10.244.2.7", &pod), ("10.244.2.5", &outside)] {
        assert_eq!(client(from, &[]), *by_default, "{from}");
        assert_eq!((client(from, &here), client(from, &there)), (pod.clone(), outside.clone()), "{from}");
    }
    assert_eq!(client("198.51.100.1", &here), outside);
    // The Node's podCIDRs know it better than the cluster CIDR.
    let node = OBJECTS
        .replace("metadata: {name: node-a}", "metadata: {name: node-a}\nspec: {podCIDRs: [10.244.1.0/24]}");
    fs::write(folder.path().join("objects.yaml"), node).unwrap();
    assert_eq!((client("10.244.1.7", &[]), client("10.244.2.7", &[])), (pod.clone(), outside.clone()));
    assert_eq!(client("10.244.2.7", &here), pod);
}

#[test]
fn sockets_of_pods_are_left_alone_where_the_flag_says_so() {
    let folder = Folder::new("hooks");
    for (hooks, from, way) in [
        ("all", "10.244.1.7", "socket"),
        ("all", "192.0.2.11", "socket"),
        ("host", "10.244.1.7", "packet"),
        ("host", "192.0.2.11", "socket"),
        ("host", "198.51.100.1", "packet"),
    ] {
        let arguments = ["--socket-hooks", hooks, "--from", from, "--to", "192.0.2.11:30080", "-o", "json"];
        let output = explain(folder.path(), &arguments).output().unwrap();
        let answer: Value = serde_json::from_str(&text(&output).0).unwrap();
        assert_eq!((&answer["verdict"], &answer["way"]), (&json!("forward"), &json!(way)), "{arguments:?}");
    }
}

#[test]
fn a_pod_can_be_opted_out_of_the_socket_hooks() {
    let folder = Folder::new("opted-out");
    let pod = r#"
apiVersion: v1
kind: Pod
metadata: {name: mesh, namespace: shop, annotations: {kproxy.io/socket-hooks: "false"}}
spec: {nodeName: node-a, containers: []}
status: {phase: Running, podIPs: [{ip: 10.244.1.7}]}
"#;
    fs::write(folder.path().join("pod.yaml"), pod).unwrap();
    for (from, way) in [("10.244.1.7", "packet"), ("10.244.1.8", "socket")] {
        let arguments = ["--from", from, "--to", "10.96.0.30:80", "-o", "json"];
        let output = explain(folder.path(), &arguments).output().unwrap();
        let answer: Value = serde_json::from_str(&text(&output).0).unwrap();
        assert_eq!((&answer["verdict"], &answer["way"]), (&json!("forward"), &json!(way)), "{from}");
    }
}

#[test]
fn lines_in_lines_out() {
    let folder = Folder::new("lines");
    let mut child = explain(folder.path(), &["--queries", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = concat!(
        r#"{"from": "10.244.1.7", "to": "10.96.0.30:80"}"#,
        "\n{\"from\": \"\u{1f980}\", \"to\": \"10.96.0.30:80\"}\n\n",
        "\u{feff}nonsense\n",
        r#"{"from": "198.51.100.1", "to": "203.0.113.10:80", "protocol": "TCP", "id": 7}"#,
        "\n",
        r#"{"from": "10.244.1.7", "to": "10.96.0.30:80", "protocol": "sctp"}"#,
    );
    let mut input = child.stdin.take().unwrap();
    input.write_all(lines.as_bytes()).unwrap();
    // Not UTF-8, and without an end.
    input.write_all(b"\n\xff\xfe").unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let (answers, said) = text(&output);
    assert_eq!(output.status.code(), Some(2), "three lines were wrong");
    assert!(said.contains("3 of the queries"), "{said}");
    let answers: Vec<Value> = answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [pod, crab, nonsense, passed, refused, bytes] = answers.as_slice() else {
        panic!("six lines were not empty: {answers:#?}")
    };
    assert_eq!((&pod["verdict"], pod["backends"].as_array().unwrap().len()), (&json!("forward"), 2));
    assert!(crab["error"].as_str().unwrap().contains("no IP address") && crab["line"] == 2, "{crab}");
    assert!(nonsense["error"].is_string() && nonsense["line"] == 4, "{nonsense}");
    assert_eq!((&passed["verdict"], &passed["pass_through"]), (&json!("pass"), &json!(true)));
    assert_eq!(passed["ignored_fields"], json!(["id"]));
    assert_eq!((&refused["verdict"], &refused["reason"]), (&json!("reject"), &json!("undefined-port")));
    assert_eq!((&refused["service"], &refused["backends"]), (&Value::Null, &json!([])));
    assert!(bytes["error"].is_string() && bytes["line"] == 7, "{bytes}");
}

#[test]
fn wrong_calls_end_with_2_and_say_why() {
    let folder = Folder::new("wrong");
    fs::write(folder.path().join("broken.yaml"), "kind: [Service\n").unwrap();
    let good = Folder::new("right");
    let to = ["--from", "10.244.1.7", "--to", "10.96.0.30:80"];
    for (path, arguments, what) in [
        (good.path(), vec!["--from", "10.244.1.7", "--to", "10.96.0.30"], "--to"),
        (good.path(), vec!["--from", "web", "--to", "10.96.0.30:80"], "--from"),
        (good.path(), vec!["--from", "10.244.1.7", "--to", "[2001:db8::1]:80"], "families"),
        (good.path(), vec!["--from", "10.244.1.7"], "--to"),
        (good.path(), [&to[..], &["--protocol", "icmp"]].concat(), "icmp"),
        (good.path(), [&to[..], &["--queries", "-"]].concat(), "--queries"),
        (good.path(), vec!["--queries", "-", "-o", "yaml"], "-o"),
        (good.path(), vec!["--queries", "/nowhere/queries"], "/nowhere/queries"),
        (good.path(), [&to[..], &["--nodeport-addresses", "some"]].concat(), "--nodeport-addresses"),
        (Path::new("/nowhere/manifests"), to.to_vec(), "/nowhere/manifests"),
        (folder.path(), to.to_vec(), "broken.yaml"),
    ] {
        let output = explain(path, &arguments).stdin(Stdio::null()).output().unwrap();
        let (out, said) = text(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {out}{said}");
        assert!(said.contains(what), "{arguments:?}: no {what} in {said}");
        assert!(out.is_empty(), "{arguments:?}: {out}");
    }
}

/// Whoever runs it needs no rights, and the machine nothing but the files: neither /sys nor /proc, no BPF.
#[test]
fn nobody_can_ask_where_there_is_nothing() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: hiding /sys and /proc from a process takes root");
        return;
    }
    let folder = Folder::new("nobody");
    // Where others can read it, wherever the sources are.
    let binary = folder.path().join("kproxy");
    // By another process: this one forks in other threads meanwhile, and a child that has the file open for writing until it
    // becomes another program keeps this one from being run (ETXTBSY).
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_kproxy")).arg(&binary).status().unwrap();
    assert!(copied.success());
    for path in [folder.path(), &binary, &folder.path().join("objects.yaml")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let asked = explain(folder.path(), &["--from", "10.244.1.7", "--to", "10.96.0.30:80", "-o", "json"]);
    let mut command = Command::new(&binary);
    command.env_clear().args(asked.get_args());
    // SAFETY: between fork and exec nothing but system calls is made, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            use nix::mount::{MsFlags, mount};
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            for hidden in ["/sys", "/proc"] {
                mount(Some("tmpfs"), hidden, Some("tmpfs"), MsFlags::empty(), none)?;
            }
            nix::unistd::setgroups(&[])?;
            nix::unistd::setgid(nix::unistd::Gid::from_raw(65_534))?;
            nix::unistd::setuid(nix::unistd::Uid::from_raw(65_534))?;
            Ok(())
        });
    }
    let output = command.output().unwrap();
    let (out, said) = text(&output);
    assert!(output.status.success(), "{said}");
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(answer["verdict"], "forward");
    assert!(!said.contains("ERROR"), "{said}");
}
