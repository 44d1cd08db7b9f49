//! The maps of this node, read only, and where a client is by this node's routes. Works with the agent stopped.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use kproxy_common::{
    Address, AddressKind, ClientKind, FrontendKey, ServiceInfo, Tables as _, TrafficPolicy, client_of,
};
use rtnetlink::{
    RouteMessageBuilder, new_connection,
    packet_route::route::{RouteAttribute, RouteType},
};

use super::{Ground, Place, Query, ServicePort};
use crate::{
    devices::{self, Device, Devices},
    maps::kernel::{DeviceMap, FirstError, KernelMaps, Lookup},
    model::LeftOut,
};

/// The node's maps, its interfaces and its routes.
pub struct Live<'a> {
    maps: &'a KernelMaps,
    error: FirstError,
    runtime: tokio::runtime::Runtime,
    routes: rtnetlink::Handle,
    devices: Devices,
    /// What the packet programs know of each interface.
    device: DeviceMap,
}

impl<'a> Live<'a> {
    /// Over `maps`, which are this node's and pinned below `root`, in its network namespace.
    pub fn new(maps: &'a KernelMaps, root: &Path) -> Result<Self> {
        let device = DeviceMap::open(root)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")?;
        let (connection, routes, _) = {
            let _in_runtime = runtime.enter();
            new_connection().context("cannot ask for routes (rtnetlink)")?
        };
        runtime.spawn(connection);
        let devices = runtime.block_on(devices::list(&routes))?;
        Ok(Self { maps, error: FirstError::default(), runtime, routes, devices, device })
    }

    fn lookup(&self) -> Lookup<'_> {
        Lookup::new(self.maps, &self.error)
    }

    /// The interface by which packets go to `address`; `None` if it is this node's own. An error where there is
    /// no route.
    fn interface_to(&self, address: IpAddr) -> Result<Option<&Device>> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let message = RouteMessageBuilder::<IpAddr>::new().destination_prefix(address, bits)?.build();
        let route =
            self.runtime.block_on(async { self.routes.route().get(message).execute().try_next().await });
        let route = route?.context("the kernel named no route")?;
        if route.header.kind == RouteType::Local {
            return Ok(None);
        }
        let index = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        let device = index.and_then(|index| self.devices.get(&index));
        device.map(Some).context("the route names no interface")
    }

    /// Whether pods of this node are behind `device`: a pair into another namespace, or a bridge over such, that
    /// has none of the addresses which NodePorts answer on.
    fn leads_to_pods(&self, device: &Device) -> bool {
        let lookup = self.lookup();
        let is_node_address =
            |address: &IpAddr| lookup.address(&Address::from(*address)) == Some(AddressKind::NodePort);
        (device.leads_to_namespace || device.is_bridge) && !device.addresses.iter().any(is_node_address)
    }
}

impl Ground for Live<'_> {
    fn tables(&self) -> impl kproxy_common::Tables {
        self.lookup()
    }

    fn info(&self, number: u32) -> Option<ServiceInfo> {
        self.lookup().info(number)
    }

    fn frontends(&self) -> Vec<(FrontendKey, u32)> {
        self.lookup().frontends()
    }

    fn place(&self, query: &Query) -> Place {
        // It has the addresses of pods that are opted out.
        let netns_cookie = self.lookup().opted_out_at(&query.from).unwrap_or(0);
        let place = |behind, because: String| Place { behind, because, netns_cookie };
        let from = IpAddr::from(query.from);
        if from.is_loopback() {
            return place(ClientKind::Host, "a loopback address".to_owned());
        }
        let own: BTreeSet<IpAddr> = devices::local_addresses(&self.devices);
        if own.contains(&from) {
            return place(ClientKind::Host, "an address of this node".to_owned());
        }
        let is_pod = client_of(&self.lookup(), ClientKind::Outside, &query.from) == ClientKind::Pod;
        let in_cidr = if is_pod { ", in a cluster CIDR" } else { "" };
        match self.interface_to(from) {
            Ok(None) => place(ClientKind::Host, "an address of this node".to_owned()),
            Ok(Some(device)) if self.leads_to_pods(device) => {
                place(ClientKind::Pod, format!("a pod of this node, behind {}", device.name))
            }
            Ok(Some(device)) => place(ClientKind::Outside, format!("behind {}{in_cidr}", device.name)),
            Err(error) if is_pod => {
                place(ClientKind::Pod, format!("in a cluster CIDR, taken to be on this node: {error:#}"))
            }
            Err(error) => place(ClientKind::Outside, format!("no route to it: {error:#}")),
        }
    }

    fn shares_bridge(&self, query: &Query) -> bool {
        let Ok(Some(way)) = self.interface_to(query.from.into()) else { return false };
        let is_bridged = |index: &u32| match self.device.shares_bridge(*index, query.from.is_v4()) {
            Ok(is_bridged) => is_bridged,
            Err(error) => {
                self.error.borrow_mut().get_or_insert(error);
                false
            }
        };
        // A route leads to the bridge, the packet comes in by one of its ports.
        let bridge =
            self.devices.iter().find(|(_, device)| std::ptr::eq(*device, way)).map(|(index, _)| *index);
        let ports =
            self.devices.iter().filter(|(_, device)| device.bridge.is_some() && device.bridge == bridge);
        ports.map(|(index, _)| index).any(is_bridged)
    }

    fn left_out(&self, _: &ServicePort, _: TrafficPolicy) -> Option<Vec<LeftOut>> {
        None
    }

    fn check(&self) -> Result<()> {
        match self.error.take() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}
