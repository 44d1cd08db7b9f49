//! The control plane: a real etcd and a real kube-apiserver on the underlay, and kubectl.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::Lab;
use crate::member::Member;
use crate::process::{Output, Process};
use crate::spec::{SERVICES_V4, SERVICES_V6};

/// Names the folder with the binaries, as for Kubernetes' own test tooling.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// What must be in the folder.
const BINARIES: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];

/// The API server's port.
const PORT: u16 = 6443;

/// How long the API server may take to be ready: seconds on an idle machine, more on a busy one.
const READY: Duration = Duration::from_secs(60);

/// A running control plane. It ends when this is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    member: Member,
    assets: PathBuf,
    /// Whether kubelets and controllers are there, which the API server then speaks to.
    full: bool,
    api_server: Option<Process>,
    _etcd: Process,
}

impl ControlPlane {
    /// Where the binaries are: the folder named by `KUBEBUILDER_ASSETS`, or the newest
    /// `kubernetes-v…` in the cache folder of kproxy.
    ///
    /// # Errors
    /// When there is none, with what to do. A scenario that can be skipped says this.
    pub fn assets() -> Result<PathBuf> {
        if let Some(folder) = std::env::var_os(ASSETS) {
            return complete(PathBuf::from(folder)).with_context(|| format!("named by {ASSETS}"));
        }
        let cache = match std::env::var_os("XDG_CACHE_HOME") {
            Some(folder) => PathBuf::from(folder),
            None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
        };
        let cache = cache.join("kproxy");
        let mut found: Vec<PathBuf> = fs::read_dir(&cache)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("kubernetes-v")
            })
            .collect();
        found.sort_unstable();
        let newest = found.pop().with_context(|| {
            format!(
                "there are no Kubernetes binaries in {}: get them with `cargo xtask setup`, or name a folder in {ASSETS}",
                cache.display()
            )
        })?;
        complete(newest)
    }

    /// Starts etcd and kube-apiserver on the lab's machine `control` (see
    /// [`crate::LabBuilder::control`]) and waits until the API server is ready.
    ///
    /// Roles are enforced (RBAC); [`ControlPlane::kubeconfig`] may do everything.
    ///
    /// # Errors
    /// When a binary is missing, or does not come up.
    pub fn start(lab: &Lab, assets: &Path) -> Result<Self> {
        Self::start_as(lab, assets, false)
    }

    /// Starts the same for a cluster of full nodes: pods get tokens, kubelets are told from each other, and the API
    /// server may ask them for logs.
    pub(crate) fn start_full(lab: &Lab, assets: &Path) -> Result<Self> {
        Self::start_as(lab, assets, true)
    }

    fn start_as(lab: &Lab, assets: &Path, full: bool) -> Result<Self> {
        let member = lab.host("control")?.clone();
        let assets = complete(assets.to_owned())?;
        let folder = member.folder().join("control-plane");
        fs::create_dir(&folder).context("this lab has a control plane already")?;
        let etcd = start_etcd(&member, &assets, &folder)?;
        let mut control = Self { member, assets, full, api_server: None, _etcd: etcd };
        control.make_identities()?;
        control.start_api_server()?;
        Ok(control)
    }

    /// The machine.
    pub fn member(&self) -> &Member {
        &self.member
    }

    /// The API server's address, `https://192.0.2.2:6443`.
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.member.v4())
    }

    /// Access as an administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.file("admin.kubeconfig")
    }

    /// Access as a user of some groups, by a certificate; returns the kubeconfig's path.
    ///
    /// # Errors
    /// When openssl refuses.
    pub fn kubeconfig_for(&self, user: &str, groups: &[&str]) -> Result<PathBuf> {
        let stem = user.replace([':', '/'], "-");
        self.certificate(&stem, &subject(user, groups), "extendedKeyUsage=clientAuth\n")?;
        let credentials = format!(
            "client-certificate: {}\n    client-key: {}",
            self.file(&format!("{stem}.crt")).display(),
            self.file(&format!("{stem}.key")).display()
        );
        self.write_kubeconfig(&stem, &credentials)
    }

    /// Access as a ServiceAccount, which must be there, by a token as a pod has it; returns the
    /// kubeconfig's path.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn kubeconfig_for_service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let token = self.kubectl(&["create", "token", "--namespace", namespace, name])?.success()?;
        let stem = format!("sa-{namespace}-{name}");
        self.write_kubeconfig(&stem, &format!("token: {}", token.trim()))
    }

    /// Runs kubectl as an administrator.
    ///
    /// # Errors
    /// When it has not ended within 30 s. That it failed is no error here.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<Output> {
        self.kubectl_with(&self.kubeconfig(), arguments, "")
    }

    /// Runs `kubectl apply` on YAML text; it must succeed.
    ///
    /// # Errors
    /// When the API server refuses, with what kubectl said.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl_with(&self.kubeconfig(), &["apply", "-f", "-"], yaml)?.success()
    }

    /// Runs kubectl with a kubeconfig of choice, and text for its standard input.
    ///
    /// # Errors
    /// When it has not ended within 30 s. That it failed is no error here.
    pub fn kubectl_with(&self, kubeconfig: &Path, arguments: &[&str], input: &str) -> Result<Output> {
        self.member
            .command(self.assets.join("kubectl"))?
            // Its cache goes where everything of the lab goes.
            .env("HOME", self.file(""))
            .env("KUBECONFIG", kubeconfig)
            .args(arguments)
            .input(input)
            .deadline(Duration::from_secs(30))
            .run()
    }

    /// Creates thousands of objects of one collection, as `/api/v1/namespaces/default/services`, many requests at a
    /// time: kubectl limits itself to a few dozen a second.
    ///
    /// # Errors
    /// When one is refused, or they are not done by the deadline.
    pub fn create_many(&self, collection: &str, objects: &[Value], deadline: Duration) -> Result<()> {
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let mut config = String::new();
        for object in objects {
            if !config.is_empty() {
                config.push_str("next\n");
            }
            // What is set holds until the next `next`.
            config.push_str(&format!(
                "url = \"{}{collection}\"\ncacert = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n\
                 header = \"Content-Type: application/json\"\n\
                 header = \"Accept: application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io,application/json\"\n\
                 data-binary = \"{}\"\nfail-with-body\n\
                 silent\nshow-error\n",
                self.url(),
                self.file("ca.crt").display(),
                self.file("admin.crt").display(),
                self.file("admin.key").display(),
                quoted(&object.to_string()),
            ));
        }
        let output = self
            .member
            .command("curl")?
            .args(["--parallel", "--parallel-max", "32", "--fail-early", "--config", "-"])
            .input(config)
            .deadline(deadline)
            .run()?;
        let refusal =
            output.stdout.split("\"message\":").nth(1).map(|rest| rest.chars().take(300).collect::<String>());
        output.success().with_context(|| format!("the API server says: {}", refusal.unwrap_or_default()))?;
        Ok(())
    }

    /// Kills the API server, as an outage; etcd keeps what it knew.
    ///
    /// # Errors
    /// When it has not ended within 10 s.
    pub fn stop_api_server(&mut self) -> Result<()> {
        if let Some(mut process) = self.api_server.take() {
            process.signal(Signal::SIGKILL)?;
            process.wait(Duration::from_secs(10))?;
        }
        Ok(())
    }

    /// Starts the API server again after [`ControlPlane::stop_api_server`], and waits until it is
    /// ready.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_api_server(&mut self) -> Result<()> {
        let file = |name: &str| self.file(name).display().to_string();
        let command = self.member.command(self.assets.join("kube-apiserver"))?;
        let command = if self.full {
            command
                .arg("--authorization-mode=Node,RBAC")
                .arg(format!("--kubelet-client-certificate={}", file("admin.crt")))
                .arg(format!("--kubelet-client-key={}", file("admin.key")))
                .arg("--kubelet-preferred-address-types=InternalIP")
                .arg("--max-requests-inflight=2000")
                .arg("--max-mutating-requests-inflight=1000")
        } else {
            command
                .arg("--authorization-mode=RBAC")
                // Nobody makes the ServiceAccounts and tokens that it would demand of pods.
                .arg("--disable-admission-plugins=ServiceAccount")
        };
        let mut process = command
            .arg(format!("--advertise-address={}", self.member.v4()))
            .arg(format!("--secure-port={PORT}"))
            .arg("--etcd-servers=http://127.0.0.1:2379")
            .arg(format!("--service-cluster-ip-range={SERVICES_V4},{SERVICES_V6}"))
            .arg(format!("--cert-dir={}", file("")))
            .arg(format!("--tls-cert-file={}", file("server.crt")))
            .arg(format!("--tls-private-key-file={}", file("server.key")))
            .arg(format!("--client-ca-file={}", file("ca.crt")))
            .arg(format!("--service-account-issuer={}", self.url()))
            .arg(format!("--service-account-signing-key-file={}", file("server.key")))
            .arg(format!("--service-account-key-file={}", file("server.crt")))
            // A DaemonSet for every node wants it.
            .arg("--allow-privileged=true")
            .spawn()?;
        let url = format!("{}/readyz", self.url());
        let member = &self.member;
        process.wait_ready("the API server being ready", READY, |_| {
            let text = member
                .command("curl")?
                .args(["-sS", "--max-time", "2"])
                .args(["--cacert", &file("ca.crt")])
                .args(["--cert", &file("admin.crt")])
                .args(["--key", &file("admin.key")])
                .arg(&url)
                .run()?
                .success()?;
            Ok((text == "ok").then_some(()))
        })?;
        self.api_server = Some(process);
        Ok(())
    }

    /// The certificate authority, the server's certificate and the administrator's access.
    fn make_identities(&self) -> Result<()> {
        self.openssl(
            "ca",
            &subject("kproxy-lab", &[]),
            "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n",
            &[],
        )?;
        let names = format!(
            "subjectAltName=IP:{},IP:{},IP:127.0.0.1,IP:{},DNS:kubernetes.default.svc\n",
            self.member.v4(),
            self.member.v6(),
            // The kubernetes Service has the first address.
            SERVICES_V4.hosts().next().context("the service range has no address")?,
        );
        self.certificate("server", &subject("kube-apiserver", &[]), &names)?;
        let kubeconfig = self.kubeconfig_for("admin", &["system:masters"])?;
        ensure!(kubeconfig == self.kubeconfig(), "the administrator's kubeconfig is elsewhere");
        Ok(())
    }

    /// A certificate `<stem>.crt` with a key `<stem>.key`, signed by the authority.
    fn certificate(&self, stem: &str, subject: &str, extensions: &str) -> Result<()> {
        let ca = self.file("ca.crt");
        let key = self.file("ca.key");
        let signer = [Path::new("-CA"), &ca, Path::new("-CAkey"), &key];
        self.openssl(stem, subject, extensions, &signer)
    }

    fn openssl(&self, stem: &str, subject: &str, extensions: &str, signer: &[&Path]) -> Result<()> {
        // A configuration of its own: the machine's adds extensions of its choice.
        let config = self.file(&format!("{stem}.cnf"));
        let text = format!(
            "[req]\nprompt=no\ndistinguished_name=subject\nx509_extensions=extensions\n\
             [subject]\n{subject}[extensions]\n{extensions}"
        );
        write(&config, &text)?;
        self.member
            .command("openssl")?
            .args(["req", "-x509", "-nodes", "-days", "30", "-newkey", "ec"])
            .args(["-pkeyopt", "ec_paramgen_curve:prime256v1", "-config"])
            .arg(config)
            .arg("-keyout")
            .arg(self.file(&format!("{stem}.key")))
            .arg("-out")
            .arg(self.file(&format!("{stem}.crt")))
            .args(signer)
            .run()?
            .success()
            .with_context(|| format!("cannot make the certificate of {stem}"))?;
        Ok(())
    }

    fn write_kubeconfig(&self, stem: &str, credentials: &str) -> Result<PathBuf> {
        let path = self.file(&format!("{stem}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\n\
             kind: Config\n\
             clusters:\n\
             - name: lab\n\
             \x20 cluster:\n\
             \x20   server: {}\n\
             \x20   certificate-authority: {}\n\
             users:\n\
             - name: user\n\
             \x20 user:\n\
             \x20   {credentials}\n\
             contexts:\n\
             - name: lab\n\
             \x20 context:\n\
             \x20   cluster: lab\n\
             \x20   user: user\n\
             current-context: lab\n",
            self.url(),
            self.file("ca.crt").display(),
        );
        write(&path, &text)?;
        Ok(path)
    }

    /// A file in the control plane's folder.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.member.folder().join("control-plane").join(name)
    }
}

fn start_etcd(member: &Member, assets: &Path, folder: &Path) -> Result<Process> {
    let client = "http://127.0.0.1:2379";
    let peer = "http://127.0.0.1:2380";
    let mut process = member
        .command(assets.join("etcd"))?
        .arg("--data-dir")
        .arg(folder.join("etcd"))
        .args(["--listen-client-urls", client])
        .args(["--advertise-client-urls", client])
        .args(["--listen-peer-urls", peer])
        .args(["--initial-advertise-peer-urls", peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        // It ends with the run in any case.
        .arg("--unsafe-no-fsync")
        .spawn()?;
    let url = format!("{client}/health");
    process.wait_ready("etcd being healthy", READY, |_| {
        let text = member.run(&["curl", "-sS", "--max-time", "2", &url])?.success()?;
        Ok(text.contains("true").then_some(()))
    })?;
    Ok(process)
}

/// A subject as openssl's configuration wants it: the name, and an organisation for each group.
fn subject(name: &str, groups: &[&str]) -> String {
    let mut text = format!("CN={name}\n");
    for (index, group) in groups.iter().enumerate() {
        text.push_str(&format!("{index}.O={group}\n"));
    }
    text
}

fn complete(folder: PathBuf) -> Result<PathBuf> {
    for binary in BINARIES {
        ensure!(folder.join(binary).is_file(), "{} has no {binary}", folder.display());
    }
    Ok(folder)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
