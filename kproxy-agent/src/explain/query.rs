//! What is asked: read from flags, or from a line of JSON.

use std::net::{IpAddr, SocketAddr};

use kproxy_common::{Address, Protocol};
use serde_json::Value;

/// A connection that is asked about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Query {
    /// Who opens it.
    pub from: Address,
    /// Where to; the unspecified address is a socket's own loopback address.
    pub to: Address,
    /// The destination port, host order.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
}

/// What is wrong with a query.
#[derive(thiserror::Error, PartialEq, Eq, Debug)]
#[error("{0}")]
pub struct QueryError(String);

impl Query {
    /// From the values of `--from`, `--to` and `--protocol`.
    pub fn new(from: &str, to: &str, protocol: Option<&str>) -> Result<Self, QueryError> {
        let from: IpAddr = from.trim().parse().map_err(|_| {
            QueryError(format!("from: {from:?} is no IP address, as 10.244.1.7 or 2001:db8::7"))
        })?;
        let to: SocketAddr = to.trim().parse().map_err(|_| {
            QueryError(format!(
                "to: {to:?} is no IP address with a port, as 198.51.100.10:80 or [2001:db8::10]:80"
            ))
        })?;
        if let SocketAddr::V6(v6) = to
            && v6.scope_id() != 0
        {
            return Err(QueryError(format!("to: {to} has a zone, which no Service has")));
        }
        if to.port() == 0 {
            return Err(QueryError("to: 0 is no port (1 to 65535)".to_owned()));
        }
        let protocol = match protocol.map(str::to_ascii_lowercase).as_deref() {
            None | Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            Some("sctp") => Protocol::Sctp,
            Some(other) => {
                return Err(QueryError(format!("protocol: {other:?} is none of tcp, udp and sctp")));
            }
        };
        let query = Self { from: from.into(), to: to.ip().into(), port: to.port(), protocol };
        if query.from.is_unspecified() {
            return Err(QueryError(format!("from: {from} is nobody's address")));
        }
        if query.from.is_v4() != query.to.is_v4() {
            return Err(QueryError(format!("from {from} to {}: they are of different families", to.ip())));
        }
        Ok(query)
    }

    /// From a line of JSON, `{"from": IP, "to": "IP:PORT", "protocol": "tcp"}`, and the names of its other
    /// fields, which mean nothing here.
    pub fn from_json(line: &str) -> Result<(Self, Vec<String>), QueryError> {
        let value: Value =
            serde_json::from_str(line).map_err(|error| QueryError(format!("this is no JSON: {error}")))?;
        let Value::Object(mut fields) = value else {
            return Err(QueryError(
                "this is no JSON object with the fields from, to and protocol".to_owned(),
            ));
        };
        let mut text = |name: &str| match fields.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(QueryError(format!("{name}: {other} is no string"))),
        };
        let (from, to, protocol) = (text("from")?, text("to")?, text("protocol")?);
        let missing = |name: &str| QueryError(format!("{name}: it is missing"));
        let from = from.ok_or_else(|| missing("from"))?;
        let to = to.ok_or_else(|| missing("to"))?;
        let query = Self::new(&from, &to, protocol.as_deref())?;
        Ok((query, fields.keys().cloned().collect()))
    }

    /// The destination.
    pub fn to_socket(&self) -> SocketAddr {
        SocketAddr::new(self.to.into(), self.port)
    }
}

impl std::fmt::Display for Query {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} -> {}/{}", self.from, self.to_socket(), self.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read() {
        let query = Query::new("10.244.1.7", "198.51.100.10:80", None).unwrap();
        assert_eq!(query.to_string(), "10.244.1.7 -> 198.51.100.10:80/TCP");
        let query = Query::new("2001:db8::7", "[2001:db8::10]:53", Some("UDP")).unwrap();
        assert_eq!(query.to_string(), "2001:db8::7 -> [2001:db8::10]:53/UDP");
        let own = Query::new("2001:db8::7", "[::]:53", None).unwrap();
        assert_eq!(own.to_string(), "2001:db8::7 -> [::]:53/TCP");
        let mapped = Query::new("::ffff:10.0.0.1", "10.0.0.2:1", Some("sctp")).unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.1 -> 10.0.0.2:1/SCTP");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (from, to, protocol, field) in [
            ("pod-1", "10.0.0.1:80", None, "from: \"pod-1\""),
            ("", "10.0.0.1:80", None, "from: \"\""),
            ("10.0.0.1", "10.0.0.1", None, "to: \"10.0.0.1\""),
            ("10.0.0.1", "10.0.0.1:0", None, "to: 0"),
            ("10.0.0.1", "10.0.0.1:70000", None, "to: \"10.0.0.1:70000\""),
            ("10.0.0.1", "web.default:80", None, "to: \"web.default:80\""),
            ("10.0.0.1", "2001:db8::1:80", None, "to: \"2001:db8::1:80\""),
            ("10.0.0.1", "[2001:db8::1]:80", None, "different families"),
            ("fe80::1", "[fe80::2%3]:80", None, "zone"),
            ("0.0.0.0", "10.0.0.1:80", None, "nobody"),
            ("10.0.0.1", "10.0.0.1:80", Some("icmp"), "protocol: \"icmp\""),
        ] {
            let error = Query::new(from, to, protocol).unwrap_err().to_string();
            assert!(error.contains(field), "{from} {to} {protocol:?}: {error}");
        }
    }

    #[test]
    fn lines_of_json() {
        let (query, others) =
            Query::from_json(r#"{"from": "10.0.0.1", "to": "10.0.0.2:53", "protocol": "udp", "id": 7}"#)
                .unwrap();
        assert_eq!(
            (query.to_string().as_str(), others),
            ("10.0.0.1 -> 10.0.0.2:53/UDP", vec!["id".to_owned()])
        );
        for (line, what) in [
            ("nonsense", "no JSON"),
            ("[1]", "no JSON object"),
            (r#"{"from": "10.0.0.1"}"#, "to: it is missing"),
            (r#"{"from": 1, "to": "10.0.0.1:80"}"#, "from: 1 is no string"),
            (r#"{"from": "10.0.0.1", "to": "10.0.0.1:80", "protocol": 6}"#, "protocol: 6"),
        ] {
            let error = Query::from_json(line).unwrap_err().to_string();
            assert!(error.contains(what), "{line}: {error}");
        }
    }
}
