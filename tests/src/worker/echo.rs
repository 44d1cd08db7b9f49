//! Echo servers: say who answered and whom they saw.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::thread;

use super::protocol::Answer;
use super::sockets::{Failed, tcp_server, udp_answer, udp_receive, udp_server};
use super::transfer::{self, Transfer};

/// Starts a server for TCP and UDP at these addresses. Bound when this returns.
pub fn start(name: &str, addresses: &[IpAddr], port: u16) -> Result<(), Failed> {
    for address in addresses {
        let listener = tcp_server((*address, port).into())?;
        let socket = udp_server((*address, port).into())?;
        let for_tcp = name.to_owned();
        let for_udp = name.to_owned();
        thread::spawn(move || serve_tcp(&listener, &for_tcp));
        thread::spawn(move || serve_udp(&socket, &for_udp, port));
    }
    Ok(())
}

fn serve_tcp(listener: &TcpListener, name: &str) {
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                let name = name.to_owned();
                thread::spawn(move || {
                    // A client that goes away in the middle is nothing to speak of.
                    let _ = converse(stream, &name);
                });
            }
            Err(error) => eprintln!("accept: {error}"),
        }
    }
}

/// Answers each line of a connection, until the client closes; a line may ask for a transfer.
fn converse(stream: TcpStream, name: &str) -> std::io::Result<()> {
    let client = stream.peer_addr()?;
    let local = stream.local_addr()?;
    stream.set_nodelay(true)?;
    let mut to = stream.try_clone()?;
    let mut from = BufReader::new(stream);
    let mut line = String::new();
    while from.read_line(&mut line)? != 0 {
        let data = line.trim_end().to_owned();
        line.clear();
        if let Some(asked) = Transfer::asked(&data) {
            transfer::receive(&mut from, asked.up)?;
            to.write_all(transfer::RECEIVED.as_bytes())?;
            transfer::send(&mut to, asked.down)?;
            continue;
        }
        let answer = Answer { server: name.to_owned(), client, local, data };
        let mut text = serde_json::to_string(&answer)?;
        text.push('\n');
        to.write_all(text.as_bytes())?;
    }
    Ok(())
}

fn serve_udp(socket: &OwnedFd, name: &str, port: u16) {
    loop {
        let asked = match udp_receive(socket, port) {
            Ok(asked) => asked,
            Err(failed) => {
                // An ICMP error about an earlier answer, at most.
                eprintln!("{}: {}", failed.call, failed.errno);
                continue;
            }
        };
        let answer = Answer {
            server: name.to_owned(),
            client: asked.from,
            local: asked.local,
            data: String::from_utf8_lossy(&asked.data).into_owned(),
        };
        let text = serde_json::to_vec(&answer).unwrap_or_default();
        if let Err(failed) = udp_answer(socket, &asked, &text) {
            eprintln!("{} to {}: {}", failed.call, asked.from, failed.errno);
        }
    }
}
