//! The addresses on this node's interfaces.

use std::collections::BTreeMap;

use kproxy_common::Address;

/// Interfaces that other proxies leave on a node with the addresses of all Services, and whose they are.
const LEFTOVERS: [(&str, &str); 2] =
    [("kube-ipvs0", "kube-proxy's IPVS mode"), ("kube-dummy-if", "kube-router")];

/// Who left this interface with addresses of Services on this node, if it is one of that kind.
pub fn leftover_of(interface: &str) -> Option<&'static str> {
    LEFTOVERS.iter().find(|(name, _)| *name == interface).map(|(_, whose)| *whose)
}

/// The addresses that stand on interfaces of this node, loopback included or not, each with an interface.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LocalAddresses {
    interfaces: BTreeMap<Address, Box<str>>,
}

impl LocalAddresses {
    /// `address` stands on `interface`.
    pub fn insert(&mut self, address: Address, interface: &str) {
        // One that is in use counts before a leftover.
        if leftover_of(interface).is_none() || !self.interfaces.contains_key(&address) {
            self.interfaces.insert(address, interface.into());
        }
    }

    /// Whether this is an address of the node. One that stands on a leftover of another proxy alone is not.
    pub fn contains(&self, address: &Address) -> bool {
        self.interface(address).is_some_and(|interface| leftover_of(interface).is_none())
    }

    /// All addresses of the node, without those on leftovers.
    pub fn iter(&self) -> impl Iterator<Item = &Address> {
        let in_use = self.interfaces.iter().filter(|(_, interface)| leftover_of(interface).is_none());
        in_use.map(|(address, _)| address)
    }

    /// Where this address stands, on a leftover too.
    pub fn interface(&self, address: &Address) -> Option<&str> {
        self.interfaces.get(address).map(|interface| &**interface)
    }

    /// The addresses that stand here and not, or elsewhere, in `other`.
    pub fn changed(&self, other: &Self) -> Vec<Address> {
        let differs = |address: &&Address| self.interfaces.get(address) != other.interfaces.get(address);
        let gone = other.interfaces.keys().filter(|address| !self.interfaces.contains_key(address));
        self.interfaces.keys().filter(differs).chain(gone).copied().collect()
    }
}

impl<'a> FromIterator<(Address, &'a str)> for LocalAddresses {
    fn from_iter<I: IntoIterator<Item = (Address, &'a str)>>(addresses: I) -> Self {
        let mut local = Self::default();
        addresses.into_iter().for_each(|(address, interface)| local.insert(address, interface));
        local
    }
}

/// On interfaces whose names do not matter.
impl FromIterator<Address> for LocalAddresses {
    fn from_iter<I: IntoIterator<Item = Address>>(addresses: I) -> Self {
        addresses.into_iter().map(|address| (address, "an interface")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(addresses: &[(&str, &str)]) -> LocalAddresses {
        let parse = |ip: &str| Address::from(ip.parse::<std::net::IpAddr>().unwrap());
        addresses.iter().map(|(ip, interface)| (parse(ip), *interface)).collect()
    }

    #[test]
    fn leftovers_are_no_addresses_of_the_node() {
        let both = [("10.96.0.1", "kube-ipvs0"), ("10.96.0.2", "kube-dummy-if"), ("10.96.0.2", "lo")];
        for addresses in [both, [both[0], both[2], both[1]]] {
            let local = local(&addresses);
            let [one, two] =
                ["10.96.0.1", "10.96.0.2"].map(|ip| Address::from(ip.parse::<std::net::IpAddr>().unwrap()));
            assert!(!local.contains(&one) && local.contains(&two));
            assert_eq!(local.iter().collect::<Vec<_>>(), [&two]);
            assert_eq!((local.interface(&one), local.interface(&two)), (Some("kube-ipvs0"), Some("lo")));
        }
    }

    #[test]
    fn what_moves_has_changed() {
        let before = local(&[("10.96.0.1", "kube-ipvs0"), ("10.96.0.2", "lo"), ("10.96.0.3", "lo")]);
        let after = local(&[("10.96.0.1", "lo"), ("10.96.0.3", "lo"), ("10.96.0.4", "lo")]);
        let changed: Vec<_> = after.changed(&before).iter().map(ToString::to_string).collect();
        assert_eq!(changed, ["10.96.0.1", "10.96.0.4", "10.96.0.2"]);
    }
}
