//! Default routes, by which uplinks are known.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::{
    MulticastGroup, RouteMessageBuilder, new_multicast_connection,
    packet_route::{
        RouteNetlinkMessage,
        route::{RouteAttribute, RouteMessage, RouteType},
    },
};
use tokio::sync::mpsc;

/// After the kernel has closed the socket, because more changed than it had room for.
const REOPEN: Duration = Duration::from_secs(1);

/// The interfaces by which default routes lead out, whatever the routing table.
pub async fn default_routes(handle: &rtnetlink::Handle) -> Result<BTreeSet<u32>> {
    let mut interfaces = BTreeSet::new();
    let all_v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let all_v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for mut request in [all_v4, all_v6] {
        // Of all tables.
        request.header.table = 0;
        let mut routes = handle.route().get(request).execute();
        while let Some(route) = routes.try_next().await.context("cannot list the routes (rtnetlink)")? {
            if is_default(&route) {
                interfaces.extend(interfaces_of(&route));
            }
        }
    }
    Ok(interfaces)
}

/// Says when default routes may have changed, until the receiver is gone. By a socket of its own, which nodes that are told
/// of very many routes may overrun.
pub async fn watch(changed: mpsc::Sender<()>) {
    while !changed.is_closed() {
        match new_multicast_connection(&[MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route]) {
            Ok((connection, _, mut messages)) => {
                tokio::spawn(connection);
                // Nobody has listened until now.
                note(&changed);
                while let Some((message, _)) = messages.next().await {
                    if changes_default_routes(&message) {
                        note(&changed);
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "cannot listen for changes of routes (rtnetlink)"),
        }
        tokio::time::sleep(REOPEN).await;
    }
}

/// The interface that a message about interfaces or addresses is about.
pub fn interface_of(message: &NetlinkMessage<RouteNetlinkMessage>) -> Option<u32> {
    match &message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
        ) => Some(link.header.index),
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
        ) => Some(address.header.index),
        _ => None,
    }
}

/// One that is waiting to be seen says it, too.
fn note(changed: &mpsc::Sender<()>) {
    let _ = changed.try_send(());
}

fn changes_default_routes(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
        ) => is_default(route),
        _ => false,
    }
}

fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
}

fn interfaces_of(route: &RouteMessage) -> Vec<u32> {
    let mut interfaces = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => interfaces.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    interfaces
}
