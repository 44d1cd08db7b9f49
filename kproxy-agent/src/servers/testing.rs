//! What tests of the servers share: a state, and an HTTP client of a few lines.

use std::net::SocketAddr;

use kproxy_common::Reason;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{KubeProxyConfiguration, Metrics, Moment, Readings, State, configz};
use crate::model::objects::Family;

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    /// The value of a header, named in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// What is answered to GET.
pub async fn get(address: SocketAddr, path: &str) -> Response {
    request(address, "GET", path).await
}

/// What is answered to a request without a body.
pub async fn request(address: SocketAddr, method: &str, path: &str) -> Response {
    let mut stream = TcpStream::connect(address).await.expect("the server listens");
    let request = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("the server reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("the server answers");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status line");
    let header =
        |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    Response {
        status: status.parse().expect("a number"),
        headers: lines.filter_map(header).collect(),
        body: body.to_owned(),
    }
}

/// The state of an agent that has just started, with one counted verdict.
pub fn state() -> State {
    let now = Moment::now();
    let readings = Readings {
        services: Box::new(|| Ok(Vec::new())),
        verdicts: Box::new(|| Ok(vec![(Reason::NoEndpoints, 7)])),
    };
    let configuration = KubeProxyConfiguration { hostname_override: "a".into(), ..Default::default() };
    let configz = configz(&configuration, serde_json::json!({})).expect("it has a form");
    State::new(Family::ALL, now, Metrics::new(Family::ALL, now.wall, readings), configz)
}
