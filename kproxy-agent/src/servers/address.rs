//! `--healthz-bind-address` and `--metrics-bind-address`, in kube-proxy's spelling.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

/// Where a server listens, or that it does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BindAddress(Option<SocketAddr>);

/// A text that is no bind address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} is neither an address nor address:port: write it as 0.0.0.0:{1} or [::]:{1}; empty or port 0: no server"
)]
pub struct BindAddressError(String, u16);

impl BindAddress {
    /// The port of `/healthz` where only an address is given.
    pub const HEALTHZ_PORT: u16 = 10256;
    /// The port of `/metrics` where only an address is given.
    pub const METRICS_PORT: u16 = 10249;

    /// The value of `--healthz-bind-address`.
    pub fn healthz(text: &str) -> Result<Self, BindAddressError> {
        Self::parse(text, Self::HEALTHZ_PORT)
    }

    /// The value of `--metrics-bind-address`.
    pub fn metrics(text: &str) -> Result<Self, BindAddressError> {
        Self::parse(text, Self::METRICS_PORT)
    }

    /// Where; `None`: nowhere.
    pub fn get(self) -> Option<SocketAddr> {
        self.0
    }

    fn parse(text: &str, default_port: u16) -> Result<Self, BindAddressError> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self(None));
        }
        let address = text
            .parse::<SocketAddr>()
            .or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, default_port)))
            .map_err(|_| BindAddressError(text.to_owned(), default_port))?;
        Ok(Self((address.port() != 0).then_some(address)))
    }
}

impl fmt::Display for BindAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_spelled_as_for_kube_proxy() {
        for (text, expected) in [
            ("0.0.0.0:10256", "0.0.0.0:10256"),
            ("127.0.0.1", "127.0.0.1:10256"),
            ("[::]:1", "[::]:1"),
            ("::1", "[::1]:10256"),
            ("", ""),
            ("0.0.0.0:0", ""),
        ] {
            assert_eq!(
                BindAddress::healthz(text).map(|address| address.to_string()),
                Ok(expected.to_owned())
            );
        }
        assert_eq!(
            BindAddress::metrics("::").map(|address| address.to_string()),
            Ok("[::]:10249".to_owned())
        );
        for text in ["localhost:10256", ":10256", "0.0.0.0:70000", "[::1]", "10256"] {
            let error = BindAddress::healthz(text).expect_err(text).to_string();
            assert!(error.contains(text) && error.contains("0.0.0.0:10256"), "{error}");
        }
    }
}
