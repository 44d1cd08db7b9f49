//! The worker's own side: reads what to do, does it, answers.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use serde_json::{Value, json};

use super::burst::Burst;
use super::echo;
use super::probe::probe;
use super::protocol::{Datagram, Id, Reply, Request, Socket};
use super::sockets::{
    Failed, Headers, Named as _, http_get, tcp_connect, tcp_exchange, tcp_transfer, udp_connect,
    udp_send_segments, udp_socket,
};
use super::transfer::Transfer;

/// Reads requests until the other side closes.
pub fn serve() -> ExitCode {
    let mut sockets = Table::default();
    let mut bursts = BTreeMap::new();
    let mut stdout = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else {
            return ExitCode::FAILURE;
        };
        let reply = match serde_json::from_str(&line) {
            Ok(request) => reply(&mut sockets, &mut bursts, request),
            Err(error) => Reply::Failed(format!("cannot read {line:?}: {error}")),
        };
        let Ok(mut text) = serde_json::to_string(&reply) else {
            return ExitCode::FAILURE;
        };
        text.push('\n');
        if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Table {
    next: Id,
    tcp: BTreeMap<Id, BufReader<TcpStream>>,
    udp: BTreeMap<Id, UdpSocket>,
    headers: Headers,
}

enum Trouble {
    Call(Failed),
    Own(String),
}

impl From<Failed> for Trouble {
    fn from(failed: Failed) -> Self {
        Self::Call(failed)
    }
}

fn reply(sockets: &mut Table, bursts: &mut BTreeMap<Id, Burst>, request: Request) -> Reply {
    match perform(sockets, bursts, request) {
        Ok(value) => Reply::Done(value),
        Err(Trouble::Call(failed)) => {
            Reply::Errno { call: failed.call.to_owned(), number: failed.errno as i32 }
        }
        Err(Trouble::Own(text)) => Reply::Failed(text),
    }
}

fn perform(
    sockets: &mut Table,
    bursts: &mut BTreeMap<Id, Burst>,
    request: Request,
) -> Result<Value, Trouble> {
    match request {
        Request::UseSeldomHeaders => {
            sockets.headers = Headers::Seldom;
            Ok(Value::Null)
        }
        Request::TcpConnect { to, bind, timeout_ms } => {
            let stream = tcp_connect(to, bind, sockets.headers, Duration::from_millis(timeout_ms))?;
            let id = sockets.number();
            sockets.tcp.insert(id, BufReader::new(stream));
            sockets.names(id)
        }
        Request::TcpAsk { id, send, timeout_ms } => {
            let stream = sockets.tcp.get_mut(&id).ok_or_else(|| no_such(id))?;
            let line = tcp_exchange(stream, &send, Duration::from_millis(timeout_ms))?;
            Ok(json!(line))
        }
        Request::HttpGet { id, host, timeout_ms } => {
            let stream = sockets.tcp.get_mut(&id).ok_or_else(|| no_such(id))?;
            let body = http_get(stream, &host, Duration::from_millis(timeout_ms))?;
            Ok(json!(body))
        }
        Request::TcpTransfer { id, up, down, timeout_ms } => {
            let stream = sockets.tcp.get_mut(&id).ok_or_else(|| no_such(id))?;
            tcp_transfer(stream, Transfer { up, down }, Duration::from_millis(timeout_ms))?;
            Ok(Value::Null)
        }
        Request::UdpSocket { family, bind } => {
            let socket = udp_socket(family, bind, sockets.headers)?;
            let id = sockets.number();
            sockets.udp.insert(id, socket);
            sockets.names(id)
        }
        Request::UdpConnect { id, to } => {
            udp_connect(sockets.udp(id)?, to)?;
            sockets.names(id)
        }
        Request::UdpSend { id, to, data } => {
            let socket = sockets.udp(id)?;
            match to {
                Some(to) => socket.send_to(data.as_bytes(), to).named("sendto")?,
                None => socket.send(data.as_bytes()).named("send")?,
            };
            Ok(Value::Null)
        }
        Request::UdpSendSegments { id, to, data, size } => {
            udp_send_segments(sockets.udp(id)?, to, data.as_bytes(), size)?;
            Ok(Value::Null)
        }
        Request::UdpReceive { id, timeout_ms } => {
            let socket = sockets.udp(id)?;
            // Zero would mean for ever.
            let timeout = Duration::from_millis(timeout_ms.max(1));
            socket.set_read_timeout(Some(timeout)).named("setsockopt")?;
            let mut buffer = vec![0; 65536];
            let (length, from) = socket.recv_from(&mut buffer).named("recvfrom")?;
            let data = String::from_utf8_lossy(&buffer[..length]).into_owned();
            Ok(json!(Datagram { data, from }))
        }
        Request::Probe { to, tcp, hops, timeout_ms } => {
            Ok(json!(probe(to, tcp, hops, Duration::from_millis(timeout_ms))?))
        }
        Request::Names { id } => sockets.names(id),
        Request::Close { id } => {
            if sockets.tcp.remove(&id).is_none() && sockets.udp.remove(&id).is_none() {
                return Err(no_such(id));
            }
            Ok(Value::Null)
        }
        Request::Echo { name, addresses, port } => {
            echo::start(&name, &addresses, port)?;
            Ok(Value::Null)
        }
        Request::BurstStart(spec) => {
            let id = sockets.number();
            bursts.insert(id, Burst::start(spec));
            Ok(json!(id))
        }
        Request::BurstLook { id } => {
            let burst = bursts.get(&id).ok_or_else(|| no_such(id))?;
            Ok(json!(burst.look()))
        }
        Request::BurstStop { id, now } => {
            let burst = bursts.remove(&id).ok_or_else(|| no_such(id))?;
            match burst.finish(now) {
                Some(report) => Ok(json!(report)),
                None => Err(Trouble::Own(String::from(
                    "a burst without a count or a time has no end to wait for",
                ))),
            }
        }
    }
}

impl Table {
    fn number(&mut self) -> Id {
        self.next += 1;
        self.next
    }

    fn udp(&self, id: Id) -> Result<&UdpSocket, Trouble> {
        self.udp.get(&id).ok_or_else(|| no_such(id))
    }

    fn names(&self, id: Id) -> Result<Value, Trouble> {
        let (local, peer) = if let Some(stream) = self.tcp.get(&id) {
            let stream = stream.get_ref();
            (stream.local_addr(), stream.peer_addr())
        } else {
            let socket = self.udp(id)?;
            (socket.local_addr(), socket.peer_addr())
        };
        let local = local.named("getsockname")?;
        let peer = match peer.named("getpeername") {
            Ok(peer) => Some(peer),
            Err(failed) if failed.errno == Errno::ENOTCONN => None,
            Err(failed) => return Err(failed.into()),
        };
        Ok(json!(Socket { id, local, peer }))
    }
}

fn no_such(id: Id) -> Trouble {
    Trouble::Own(format!("there is no socket or burst {id}"))
}
