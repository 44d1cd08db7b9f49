//! The per-node agent of kproxy: from Kubernetes objects to BPF maps, and the operator's commands.
//!
//! Data flows one way: [`source`] → [`model`] → [`plan`] → [`maps`] → the programs.

pub mod agent;
pub mod api;
pub mod cli;
pub mod commands;
pub mod devices;
pub mod events;
pub mod explain;
pub mod firewall;
pub mod flows;
mod ipsec;
pub mod maps;
pub mod model;
mod namespaces;
pub mod node;
pub mod opt_outs;
pub mod plan;
mod pretend;
pub mod programs;
pub mod servers;
pub mod sockets;
pub mod source;
pub mod source_routes;
pub mod wanted;
