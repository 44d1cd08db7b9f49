//! A cluster in network namespaces: nodes, pods, clients, a load balancer and a control plane, with
//! real programs in them. Tests, the demo and the benchmarks run in here.
//!
//! A program that uses it calls [`isolated`] from its `main` and describes a lab in the run that it
//! is given:
//!
//! ```no_run
//! use kproxy_lab::{Cni, Context, ElbSpec, Family, NodeSpec};
//!
//! fn main() -> std::process::ExitCode {
//!     kproxy_lab::isolated(|run| {
//!         Context::scenario(&run, "pods reach pods", |ctx| {
//!             let lab = ctx.lab(|lab| {
//!                 lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
//!                     .node(NodeSpec::new("node-b", 2, &["b1"]).cni(Cni::Bridge))
//!                     .elb(ElbSpec::new())
//!                     .client("client")
//!             })?;
//!             let server = lab.pod("b1")?.echo(8080)?;
//!             let worker = lab.pod("a1")?.worker()?;
//!             let answer = worker.ask_tcp(server.address(Family::V4))?;
//!             anyhow::ensure!(answer.server == "b1");
//!             Ok(())
//!         })?;
//!         Ok(std::process::ExitCode::SUCCESS)
//!     })
//! }
//! ```
//!
//! Nothing gets out: see [`self_check`]. Nothing stays: processes, namespaces, mounts and cgroups
//! end with the run, by whatever way it ends; see [`isolated`].

mod add_pod;
mod agent;
mod agent_log;
mod capture;
mod cgroup;
mod check;
pub mod cluster;
mod context;
mod control;
mod elb;
mod isolate;
mod kube_proxy;
mod lab;
mod leftovers;
mod manifests;
mod member;
mod netns;
mod nginx;
mod offload;
mod process;
mod spec;
mod strays;
mod tun;
mod wait;
mod wire;
mod wiring;
pub mod worker;

pub use agent::{Agent, AgentBuilder, kproxy_binary, wait_kproxy};
pub use agent_log::LogLine;
pub use capture::Capture;
pub use cgroup::{mount_point as cgroup_mount_point, processes as cgroup_processes};
pub use check::{Guarded, check_guarded, self_check};
pub use context::Context;
pub use control::ControlPlane;
pub use elb::{Check, Elb, Frontend};
pub use isolate::{Run, isolated};
pub use kube_proxy::{KubeProxy, KubeProxySettings};
pub use lab::{Lab, LabBuilder};
pub use leftovers::{Owned, own_name, remove_leftovers};
pub use manifests::Manifests;
pub use member::{Family, Member, Node, Pod, Surroundings};
pub use netns::{Netns, NetnsId};
pub use nginx::{Nginx, NginxAnswer};
pub use process::{Cmd, Output, Process, errno_of};
pub use spec::{
    Cni, EXTERNAL_V4, EXTERNAL_V6, ElbSpec, GATEWAY_V4, GATEWAY_V6, HostSpec, NodeSpec, RpFilter,
    SERVICES_V4, SERVICES_V6, UNDERLAY_V4, UNDERLAY_V6, VIPS_V4, VIPS_V6,
};
pub use tun::TunLink;
pub use wait::{wait_for, wait_until};
pub use wire::Wire;
pub use wiring::{POD_BRIDGE, UPLINK, VXLAN, port_name, veth_name};
pub use worker::{
    Answer, BurstReport, BurstSpec, Datagram, EchoServer, Probed, Socket, Worker, WorkerError, WorkerResult,
};
