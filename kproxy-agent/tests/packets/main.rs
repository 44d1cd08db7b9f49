//! The loaded packet programs under BPF_PROG_TEST_RUN, and the same decision on the host: no packet leaves this
//! process, and no program is attached.

mod answers;
mod checksums;
mod cluster;
mod direct;
mod endings;
mod errors;
mod flow;
mod fragments;
mod frame;
mod fuzz;
mod hostile;
mod lifetimes;
mod longrun;
#[path = "../support/map_fds.rs"]
mod map_fds;
mod masks;
mod messages;
mod nat;
mod node;
mod parts;
mod property;
mod quotations;
mod refusals;
mod seldom;
mod signatures;
mod table;
mod verifier;
mod world;
