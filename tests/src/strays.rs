//! Reading the gateway's counters.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Packets by destination, from `nft -j list table inet stray`.
pub(crate) fn parse_strays(json: &str) -> Result<BTreeMap<IpAddr, u64>> {
    let document: Value = serde_json::from_str(json).context("nft does not speak JSON")?;
    let objects = document["nftables"].as_array().context("nft's list has no objects")?;
    let elements = objects.iter().filter_map(|object| object["set"]["elem"].as_array()).flatten();
    let mut counts = BTreeMap::new();
    for element in elements {
        let element = &element["elem"];
        let address = element["val"].as_str().context("an element has no address")?;
        let address = address.parse().with_context(|| format!("{address} is no address"))?;
        let packets =
            element["counter"]["packets"].as_u64().with_context(|| format!("{address} has no counter"))?;
        counts.insert(address, packets);
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_destination() {
        let json = r#"{"nftables": [{"metainfo": {}}, {"set": {"name": "v4", "elem": [
            {"elem": {"val": "10.96.0.1", "counter": {"packets": 3, "bytes": 180}}}]}},
            {"set": {"name": "v6"}}]}"#;
        let counts = parse_strays(json).unwrap();
        assert_eq!(counts, BTreeMap::from([("10.96.0.1".parse().unwrap(), 3)]));
    }
}
