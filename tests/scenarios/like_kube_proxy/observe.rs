//! What a client gets, in the table's words.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kproxy_lab::{Answer, Member, Worker, WorkerError, WorkerResult};
use nix::errno::Errno;

use super::objects::Side;
use super::table::{Case, Outcome};
use crate::cluster::{SILENCE, TARGET, Transport};

/// How often a client asks before it is believed that nobody else answers: one of two that answer in
/// turns is missed in one of 256 runs.
const ASKED: usize = 8;

/// How often it asks until all who must have answered: one of three is missed in one of 10^7 runs.
const MOST: usize = 40;

/// How long an answer may take that must come, on a machine under load.
const ANSWER: Duration = Duration::from_secs(3);

/// The first of the ports that clients on nodes ask from: beyond NodePorts and the listeners of health checks.
pub const PORTS_OF_NODES: u16 = 34_000;

/// The first port of those whom both sides share, for the side of kproxy.
const PORTS_OF_OTHERS: u16 = 8_000;

/// A client in the lab.
pub struct Client {
    worker: Worker,
    addresses: BTreeSet<IpAddr>,
    /// No port is used twice: where another flow to the same backend has it, the backend may see another.
    next_port: AtomicU16,
}

/// An answer, with the client's own address, and where it came from and should have come from.
struct Answered {
    answer: Answer,
    local: SocketAddr,
    from: SocketAddr,
    to: SocketAddr,
}

impl Client {
    /// Behind each of these addresses it is itself.
    pub fn at(member: &Member, side: &Side, addresses: BTreeSet<IpAddr>) -> Result<Self> {
        let is_shared = !side.pods().contains(&member.name()) && member.name() != side.node.name();
        let first = if is_shared && side.number == 1 { PORTS_OF_OTHERS } else { PORTS_OF_NODES };
        Ok(Self { worker: member.worker()?, addresses, next_port: AtomicU16::new(first) })
    }

    /// Asks these addresses in turns until it is clear whether the outcome is as expected, and says
    /// what was seen.
    pub fn observe(
        &self,
        side: &Side,
        node_addresses: &BTreeSet<IpAddr>,
        transport: Transport,
        to: &[SocketAddr],
        case: &Case,
        expected: &Outcome,
    ) -> Result<BTreeSet<String>> {
        let is_ours_and_pending = case.pending.is_some() && side.number == 1;
        let patience = if expected.has_silence() || is_ours_and_pending { SILENCE } else { ANSWER };
        let word = |asked: WorkerResult<Answered>| match asked {
            Ok(answered) => Ok(self.word(side, node_addresses, &answered)),
            Err(error) => failure(error),
        };
        let port = self.port();
        if case.one_port {
            return self.ask_from_one_port(transport, to, port, patience)?.into_iter().map(word).collect();
        }
        let fails = |word: &String| ["refused", "silence", "forbidden"].contains(&word.as_str());
        let enough = match expected {
            // A refusal is no matter of chance.
            Outcome::All(words) if words.iter().all(fails) => 1,
            _ => ASKED.max(2 * to.len()),
        };
        let mut seen = BTreeSet::new();
        for (asked, to) in to.iter().cycle().take(MOST).enumerate() {
            let ask = || word(self.ask(transport, *to, self.port(), patience));
            let mut got = ask()?;
            // Of the host only the port tells, and a mask's, picked at random, is the socket's own now and then.
            let is_host = !self.addresses.is_disjoint(node_addresses);
            let is_masked = expected.words().contains(&format!("{got}*"));
            if is_host && is_masked && !expected.words().contains(&got) {
                got = ask()?;
            }
            let unexpected = !expected.words().contains(&got);
            seen.insert(got);
            if unexpected || (asked + 1 >= enough && expected.is(&seen)) {
                break;
            }
        }
        Ok(seen)
    }

    fn port(&self) -> u16 {
        self.next_port.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks once, from a port.
    fn ask(
        &self,
        transport: Transport,
        to: SocketAddr,
        port: u16,
        patience: Duration,
    ) -> WorkerResult<Answered> {
        if transport == Transport::Tcp {
            let socket = self.worker.tcp_connect_with(to, Some(any(to, port)), patience)?;
            let answer = self.worker.tcp_ask(socket.id, "hello");
            self.worker.close(socket.id)?;
            return Ok(Answered { answer: answer?, local: socket.local, from: to, to });
        }
        let socket = self.worker.udp_socket_at(any(to, port))?;
        let answered = self.ask_by(socket.id, transport, to, patience);
        self.worker.close(socket.id)?;
        answered
    }

    /// Asks each once, by connections that stay open, or by one socket.
    fn ask_from_one_port(
        &self,
        transport: Transport,
        to: &[SocketAddr],
        port: u16,
        patience: Duration,
    ) -> WorkerResult<Vec<WorkerResult<Answered>>> {
        let mut open = Vec::new();
        let mut answers = Vec::new();
        if transport == Transport::Tcp {
            for to in to {
                answers.push(self.worker.tcp_connect_with(*to, Some(any(*to, port)), patience).and_then(
                    |socket| {
                        open.push(socket.id);
                        let answer = self.worker.tcp_ask(socket.id, "hello")?;
                        Ok(Answered { answer, local: socket.local, from: *to, to: *to })
                    },
                ));
            }
            // The earlier ones still lead where they led.
            for socket in &open {
                self.worker.tcp_ask(*socket, "again")?;
            }
        } else if let Some(first) = to.first() {
            let socket = self.worker.udp_socket_at(any(*first, port))?;
            open.push(socket.id);
            answers.extend(to.iter().map(|to| self.ask_by(socket.id, transport, *to, patience)));
        }
        for socket in open {
            self.worker.close(socket)?;
        }
        Ok(answers)
    }

    fn ask_by(
        &self,
        socket: u64,
        transport: Transport,
        to: SocketAddr,
        patience: Duration,
    ) -> WorkerResult<Answered> {
        let worker = &self.worker;
        if transport == Transport::UdpConnected {
            worker.udp_connect(socket, to)?;
            worker.udp_send(socket, "hello")?;
        } else {
            worker.udp_send_to(socket, to, "hello")?;
        }
        let datagram = worker.udp_receive(socket, patience)?;
        let answer = serde_json::from_str(&datagram.data)
            .with_context(|| format!("no echo server answers like this: {:?}", datagram.data))
            .map_err(WorkerError::Broken)?;
        Ok(Answered { answer, local: worker.names(socket)?.local, from: datagram.from, to })
    }

    fn word(&self, side: &Side, node_addresses: &BTreeSet<IpAddr>, answered: &Answered) -> String {
        let Answered { answer, local, from, to } = answered;
        let mut word = side.word(&answer.server);
        let client = SocketAddr::new(answer.client.ip().to_canonical(), answer.client.port());
        // Of the host itself only the port tells; of others it may change where another flow has it.
        let is_host = !self.addresses.is_disjoint(node_addresses);
        let own = self.addresses.contains(&client.ip()) && (!is_host || client.port() == local.port());
        if !own {
            word.push_str(&if node_addresses.contains(&client.ip()) {
                String::from("*")
            } else {
                format!("?{client}")
            });
        }
        if answer.server != "elb" && answer.local.port() != TARGET {
            word.push_str(&format!(":{}", answer.local.port()));
        }
        if from != to {
            word.push_str(&format!("!{from}"));
        }
        word
    }
}

/// Every address of its family, with this port.
fn any(family: SocketAddr, port: u16) -> SocketAddr {
    let any: IpAddr =
        if family.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, port)
}

/// An errno in the table's words; an error where the worker itself failed.
fn failure(error: WorkerError) -> Result<String> {
    let errno = error.errno();
    Ok(match (errno, error) {
        (Some(Errno::ECONNREFUSED), _) => String::from("refused"),
        (Some(Errno::EPERM), _) => String::from("forbidden"),
        (Some(Errno::ETIMEDOUT | Errno::EAGAIN), _) => String::from("silence"),
        (Some(errno), _) => format!("{errno:?}"),
        (None, error) => return Err(error.into()),
    })
}
