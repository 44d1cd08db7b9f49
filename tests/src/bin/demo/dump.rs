//! A look into a node's maps with bpftool, as an operator would.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::Node;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::tell::{Style, Tell};

/// An element as `bpftool -j` prints it: the bytes, and what the map's BTF makes of them.
#[derive(Deserialize)]
struct Element {
    key: Vec<String>,
    value: Vec<String>,
    formatted: Box<RawValue>,
}

/// Prints the map of frontends, and what the one at `vip` and `port` does now.
pub fn print(tell: &Tell, node: &Node, vip: IpAddr, port: u16) -> Result<()> {
    let text = bpftool(node, "dump", "frontend", &[])?;
    let elements: Vec<Element> =
        serde_json::from_str(&text).context("cannot read what bpftool printed of the map frontend")?;
    tell.line(tell.style(Style::Dim, "# bpftool -j map dump pinned $KPROXY_BPF_ROOT/frontend"));
    for element in &elements {
        tell.line(element.formatted.get());
    }

    let wanted = key_bytes(vip, port);
    let number = elements.iter().find(|element| element.key.starts_with(&wanted));
    let number = &number.with_context(|| format!("no frontend at {vip} port {port} in this map"))?.value;
    let text = bpftool(node, "lookup", "service", number)?;
    let element: Element =
        serde_json::from_str(&text).context("cannot read what bpftool printed of the map service")?;
    let command = format!("# bpftool -j map lookup pinned $KPROXY_BPF_ROOT/service key {}", number.join(" "));
    tell.line(tell.style(Style::Dim, command));
    tell.line(element.formatted.get());
    Ok(())
}

/// What `bpftool -j map COMMAND` prints of a pinned map, of one key or of all.
fn bpftool(node: &Node, command: &str, map: &str, key: &[String]) -> Result<String> {
    let pinned = node.bpf_root().join(map);
    let mut call = node.command("bpftool")?.args(["-j", "map", command, "pinned"]).arg(&pinned);
    if !key.is_empty() {
        call = call.arg("key").args(key);
    }
    let output = call.run()?;
    // With -j its errors are JSON as well, on standard output.
    ensure!(output.status.success(), "{output}\n{}", output.stdout.trim());
    Ok(output.stdout)
}

/// How a frontend's key begins: the address, IPv4 in its mapped form, then the port in the
/// machine's own byte order.
fn key_bytes(address: IpAddr, port: u16) -> Vec<String> {
    let octets = match address {
        IpAddr::V4(v4) => Ipv4Addr::to_ipv6_mapped(&v4).octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    octets.into_iter().chain(port.to_ne_bytes()).map(|byte| format!("0x{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_found_by_their_bytes() {
        let text = r#"{"key":["0x00","0x50"],"value":["0x03","0x00","0x00","0x00"],
            "formatted":{"key":{"port":80,"a":1},"value":3}}"#;
        let element: Element = serde_json::from_str(text).unwrap();
        assert_eq!(element.formatted.get(), r#"{"key":{"port":80,"a":1},"value":3}"#);
        let bytes = key_bytes("203.0.113.10".parse().unwrap(), 80);
        assert_eq!(bytes[10..16].join(" "), "0xff 0xff 0xcb 0x00 0x71 0x0a");
        assert_eq!(bytes.len(), 18);
    }
}
