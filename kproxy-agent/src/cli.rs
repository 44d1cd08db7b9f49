//! The command line: names and meaning are the operator's interface and do not change.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::programs::Capacities;

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
    /// What happens to a connection, and why; from the maps or from YAML
    #[command(after_long_help = EXPLAIN_HELP)]
    Explain(Box<ExplainArgs>),
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

/// Whose processes the socket hooks serve.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub enum SocketHooks {
    /// Pods' and the host's: a Service is translated at connect
    All,
    /// The host's: pods see Service addresses, and their packets are translated on their interfaces
    Host,
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
    #[command(flatten)]
    pub tables: TableArgs,
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
    /// Where the cluster's pods live: who asks a ClusterIP from elsewhere is masqueraded
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
    /// Mask the client of every connection to a ClusterIP
    #[arg(long, env = "KPROXY_MASQUERADE_ALL")]
    pub masquerade_all: bool,
    /// Do not serve spec.externalIPs
    #[arg(long, env = "KPROXY_DISABLE_EXTERNAL_IPS")]
    pub disable_external_ips: bool,
    /// NodePorts do not answer on loopback addresses
    #[arg(long, env = "KPROXY_DISABLE_LOOPBACK_NODEPORTS")]
    pub disable_loopback_nodeports: bool,
    /// Let traffic of Services through where iptables' chain FORWARD drops by default
    #[arg(long, env = "KPROXY_ACCEPT_FORWARD")]
    pub accept_forward: bool,
    /// Leave the sysctls of conntrack as they are
    #[arg(long, env = "KPROXY_DISABLE_CONNTRACK_SYSCTLS")]
    pub disable_conntrack_sysctls: bool,
    /// Whose connections are translated at the socket. With `host` those of pods are translated on their interfaces
    /// instead, as a service mesh wants it that must see ClusterIPs
    #[arg(long, value_enum, env = "KPROXY_SOCKET_HOOKS", default_value_t = SocketHooks::All)]
    pub socket_hooks: SocketHooks,
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

/// How much the maps hold. Other numbers than before are other maps, filled beside the old ones at start.
#[derive(Args, Clone, Copy, Debug)]
pub struct TableArgs {
    /// How many frontends there is room for: addresses times ports of all Services
    #[arg(
        long,
        value_name = "N",
        env = "KPROXY_MAX_FRONTENDS",
        default_value_t = Capacities::DEFAULT.frontends,
        value_parser = clap::value_parser!(u32).range(16..=1_048_576)
    )]
    pub max_frontends: u32,
    /// How many backends: twice the endpoints of all Service ports, since a change is written beside what is there
    #[arg(
        long,
        value_name = "N",
        env = "KPROXY_MAX_BACKENDS",
        default_value_t = Capacities::DEFAULT.backends,
        value_parser = clap::value_parser!(u32).range(16..=16_777_216)
    )]
    pub max_backends: u32,
    /// How many loadBalancerSourceRanges, counted for each load-balancer address and port
    #[arg(
        long,
        value_name = "N",
        env = "KPROXY_MAX_SOURCE_RANGES",
        default_value_t = Capacities::DEFAULT.source_ranges,
        value_parser = clap::value_parser!(u32).range(16..=4_194_304)
    )]
    pub max_source_ranges: u32,
    /// How many flows of the packet path; 0: by the node's memory, one for every 256 KiB, rounded down to a power of two, at least 16384, at most 1048576
    #[arg(
        long,
        value_name = "N",
        env = "KPROXY_MAX_FLOWS",
        default_value_t = 0,
        value_parser = max_flows
    )]
    pub max_flows: u32,
    /// How many clients with session affinity, counted for each Service port, and twice where a client asks for both of
    /// its endpoint sets; 0: by the node's memory, one for every 128 KiB, rounded down to a power of two, at least
    /// 32768, at most 2097152
    #[arg(
        long,
        value_name = "N",
        env = "KPROXY_MAX_AFFINITY",
        default_value_t = 0,
        value_parser = max_flows
    )]
    pub max_affinity: u32,
}

fn max_flows(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(flows @ (0 | 1_024..=16_777_216)) => Ok(flows),
        _ => Err("0, or 1024 to 16777216".to_owned()),
    }
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

const EXPLAIN_HELP: &str = "\
Without --manifests the maps of this node are read, in its network namespace; the agent need not run. With it nothing
but the files is looked at: no root, no kernel, any machine; the flags of the agent below --manifests count only then.

The client is the host if --from is one of the node's addresses or loopback. From the maps it is a pod if the programs
know its interface as a pod's. From manifests it is a pod if it lies in a podCIDR of the Node, or in a cluster CIDR where
the Node has no podCIDRs, unless an endpoint with its address or --from-node NAME says that it is on another node.
Everyone else is outside, pods of other nodes too.

--queries reads one JSON object a line, and answers each with one:
  {\"from\": \"10.244.1.7\", \"to\": \"198.51.100.10:80\", \"protocol\": \"tcp\"}
protocol may be left out. A line that cannot be read is answered with {\"error\": …, \"line\": …}; the others are
answered all the same, and the exit status is 2. Fields with another name are listed in ignored_fields.

An answer has these fields:
  from, to, protocol  as asked
  client              pod, host or outside
  verdict             forward, pass, reject or drop
  service             namespace/name:port, the port by its name, or its number where it has none; or null
  frontend            what of the Service matched, as \"ClusterIP 10.96.0.10:53/UDP\"; or null
  way                 who translates it: socket (at connect, packets are not touched) or packet; or null
  backends            address, source (kept or masked: what the backend sees), local (on this node); each as likely
  affinity            how long the client stays with its backend, in seconds; or null
  pass_through        whether it is left alone so that it reaches the load balancer
  reason              the word of the counters and metrics, as no-endpoints
  rule                the rule that decided, as a sentence
  left_out            endpoints and EndpointSlices that the chosen set does not have, and why

The exit status is 0 whatever the verdict, 2 if the call or its input is wrong.";

#[derive(Args, Clone, Debug)]
pub struct ExplainArgs {
    /// Who opens the connection
    #[arg(long, value_name = "IP", required_unless_present = "queries", conflicts_with = "queries")]
    pub from: Option<String>,
    /// Where to
    #[arg(long, value_name = "IP:PORT", required_unless_present = "queries", conflicts_with = "queries")]
    pub to: Option<String>,
    /// tcp, udp or sctp [default: tcp]
    #[arg(long, value_name = "PROTOCOL", conflicts_with = "queries")]
    pub protocol: Option<String>,
    /// Many questions at once: lines of JSON from a file, or from the standard input with `-`; see below
    #[arg(long, value_name = "FILE")]
    pub queries: Option<PathBuf>,
    /// How it is printed [default: text]
    #[arg(short, long, value_enum)]
    pub output: Option<OutputFormat>,
    /// Services, EndpointSlices and Nodes from YAML or JSON, files or folders, instead of this node's maps
    // Without the agent's environment variable: a shell in the agent's container asks about the maps.
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    pub manifests: Vec<PathBuf>,
    /// With --manifests: on which node clients with an address in a cluster CIDR are [default: this one, unless
    /// endpoints or the Node's podCIDRs say otherwise]
    #[arg(long, value_name = "NAME", requires = "manifests")]
    pub from_node: Option<String>,
    #[command(flatten)]
    pub node: NodeArgs,
    #[command(flatten)]
    pub rules: RuleArgs,
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
