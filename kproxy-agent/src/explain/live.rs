//! The maps of this node, read only, and where a client is by this node's routes. Works with the agent stopped.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use kproxy_common::{ClientKind, DeviceAddresses, FrontendKey, ServiceInfo, TrafficPolicy};
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

    /// The interface by which packets go to `address`, and its index; `None` if it is this node's own. An error where
    /// there is no route.
    fn interface_to(&self, address: IpAddr) -> Result<Option<(u32, &Device)>> {
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
        let device = index.and_then(|index| Some((index, self.devices.get(&index)?)));
        device.map(Some).context("the route names no interface")
    }

    /// What the programs know of an interface.
    fn known(&self, index: u32) -> Option<DeviceAddresses> {
        self.device.get(index).unwrap_or_else(|error| {
            self.error.borrow_mut().get_or_insert(error);
            None
        })
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
        match self.interface_to(from) {
            Ok(None) => place(ClientKind::Host, "an address of this node".to_owned()),
            // As the programs have it. Behind a bridge they know who is behind its ports.
            Ok(Some((index, device))) => match self.known(index).map(|known| known.clients()) {
                Some(ClientKind::Pod) => {
                    place(ClientKind::Pod, format!("a pod of this node, behind {}", device.name))
                }
                _ => place(ClientKind::Outside, format!("behind {}", device.name)),
            },
            Err(error) => place(ClientKind::Outside, format!("no route to it: {error:#}")),
        }
    }

    fn shares_bridge(&self, query: &Query) -> bool {
        let Ok(Some((bridge, _))) = self.interface_to(query.from.into()) else { return false };
        let is_bridged = |index: u32| {
            self.known(index).is_some_and(|known| match query.from.is_v4() {
                true => known.bridged_v4 != 0,
                false => known.bridged_v6 != 0,
            })
        };
        // A route leads to the bridge, the packet comes in by one of its ports.
        self.devices.iter().any(|(index, device)| device.bridge == Some(bridge) && is_bridged(*index))
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
