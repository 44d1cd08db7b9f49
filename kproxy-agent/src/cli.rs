//! The command line: names and meaning are the operator's interface and do not change.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

/// kube-proxy's job in eBPF, for any CNI, with load-balancer addresses under the operator's control.
#[derive(Parser, Debug)]
#[command(name = "kproxy", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Folder on a bpffs that holds the pinned maps and links
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "KPROXY_BPF_ROOT",
        default_value = "/sys/fs/bpf/kproxy"
    )]
    pub bpf_root: PathBuf,
    /// How logs are written; they go to stderr, results to stdout
    #[arg(long, global = true, value_enum, env = "KPROXY_LOG_FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Say more; twice: all there is
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// The daemon: one per node
    Agent(Box<AgentArgs>),
    /// What is served here, read from the maps (works with the agent stopped)
    Services(ServicesArgs),
    /// Live flows of the packet path
    Flows(FlowsArgs),
    /// Drops and refusals as they happen, with reason and Service
    Drops(DropsArgs),
    /// Can this node run kproxy; what is missing, and what that costs
    Check(CheckArgs),
    /// Take everything of kproxy off this node
    Cleanup(CleanupArgs),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub enum OutputFormat {
    Table,
    Wide,
    Json,
    Yaml,
}

/// Which clients inside the cluster are passed through.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub enum Scope {
    /// Pods and processes on the nodes
    All,
    /// Pods only; the host is short-circuited
    Pods,
    /// Processes on the nodes only; pods are short-circuited
    Nodes,
}

#[derive(Args, Clone, Debug)]
pub struct CgroupArgs {
    /// cgroup v2 folder whose processes are served [default: the cgroup v2 mount, wherever it is]
    #[arg(long, value_name = "DIR", env = "KPROXY_CGROUP_ROOT")]
    pub cgroup_root: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub struct AgentArgs {
    #[command(flatten)]
    pub cgroup: CgroupArgs,
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub node: NodeArgs,
    #[command(flatten)]
    pub rules: RuleArgs,
    /// Interfaces that get packet programs; names with * [default: all that can carry service traffic]
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', env = "KPROXY_DEVICES")]
    pub devices: Vec<String>,
    /// Interfaces that get none; names with *
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', env = "KPROXY_EXCLUDE_DEVICES")]
    pub exclude_devices: Vec<String>,
    /// Where /healthz and /livez are served; empty or port 0: nowhere
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "KPROXY_HEALTHZ_BIND_ADDRESS",
        default_value = "0.0.0.0:10256"
    )]
    pub healthz_bind_address: String,
    /// Where /metrics, /configz and /proxyMode are served; empty or port 0: nowhere
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "KPROXY_METRICS_BIND_ADDRESS",
        default_value = "127.0.0.1:10249"
    )]
    pub metrics_bind_address: String,
}

#[derive(Args, Clone, Debug)]
pub struct SourceArgs {
    /// How the API server is reached [default: in-cluster, else KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE", env = "KPROXY_KUBECONFIG", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,
    /// API servers dialled directly, tried in turn; never a service address [default: the kubeconfig's]
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        env = "KPROXY_API_SERVER",
        visible_alias = "master",
        conflicts_with = "manifests"
    )]
    pub api_server: Vec<String>,
    /// Services, EndpointSlices and Nodes from YAML or JSON, files or folders, instead of an API server;
    /// changes are followed
    #[arg(long, value_name = "PATH", value_delimiter = ',', env = "KPROXY_MANIFESTS")]
    pub manifests: Vec<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// This node's name in EndpointSlices [default: the host name]
    #[arg(long, value_name = "NAME", env = "NODE_NAME", visible_alias = "hostname-override")]
    pub node_name: Option<String>,
    /// The node's own addresses [default: the Node object's, else its interfaces']
    #[arg(long, value_name = "IP", value_delimiter = ',', env = "KPROXY_NODE_ADDRESS")]
    pub node_address: Vec<IpAddr>,
    /// Where pods live: sources within count as inside
    #[arg(long, value_name = "CIDR", value_delimiter = ',', env = "KPROXY_CLUSTER_CIDR")]
    pub cluster_cidr: Vec<IpNet>,
    /// Where ClusterIPs come from [default: ServiceCIDR objects, where the API has them]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', env = "KPROXY_SERVICE_CIDR")]
    pub service_cidr: Vec<IpNet>,
    /// Addresses that answer NodePorts: `primary` or CIDRs
    #[arg(
        long,
        value_name = "primary|CIDR",
        value_delimiter = ',',
        env = "KPROXY_NODEPORT_ADDRESSES",
        default_value = "primary"
    )]
    pub nodeport_addresses: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct RuleArgs {
    /// Do not serve spec.externalIPs
    #[arg(long, env = "KPROXY_DISABLE_EXTERNAL_IPS")]
    pub disable_external_ips: bool,
    /// NodePorts do not answer on loopback addresses
    #[arg(long, env = "KPROXY_DISABLE_LOOPBACK_NODEPORTS")]
    pub disable_loopback_nodeports: bool,
    /// Pass through load-balancer addresses that no annotation and no ipMode decides about
    #[arg(long, env = "KPROXY_PASS_THROUGH_DEFAULT")]
    pub pass_through_default: bool,
    /// Which clients inside are passed through
    #[arg(long, value_enum, env = "KPROXY_PASS_THROUGH_SCOPE", default_value_t = Scope::All)]
    pub pass_through_scope: Scope,
    /// Another annotation that is read like kubernetes.io/elb.pass-through
    #[arg(long, value_name = "KEY", value_delimiter = ',', env = "KPROXY_PASS_THROUGH_ANNOTATION")]
    pub pass_through_annotation: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct ServicesArgs {
    /// Only Services whose namespace/name contains this
    #[arg(value_name = "FILTER")]
    pub filter: Option<String>,
    /// How it is printed
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
}

#[derive(Args, Clone, Debug)]
pub struct FlowsArgs {
    /// Only flows of this Service
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub service: Option<String>,
    /// Only flows of these clients: an address, an address and port, or a prefix
    #[arg(long, value_name = "ADDRESS")]
    pub client: Option<String>,
    /// Only flows to these backends: an address, an address and port, or a prefix
    #[arg(long, value_name = "ADDRESS")]
    pub backend: Option<String>,
    /// How it is printed
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
}

#[derive(Args, Clone, Debug)]
pub struct DropsArgs {
    /// How it is printed; json: an object a line
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
}

#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    pub cgroup: CgroupArgs,
    /// How it is printed
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
}

#[derive(Args, Clone, Debug)]
pub struct CleanupArgs {
    #[command(flatten)]
    pub cgroup: CgroupArgs,
}
