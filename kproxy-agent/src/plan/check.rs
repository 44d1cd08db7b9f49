//! What can be stored at all.

use std::io::{self, Write};

use kproxy_common::NAME_LENGTH;

use super::PlanError;
use crate::wanted::{ServiceKey, WantedPort, WantedService};

/// Whether the tables can hold this Service, room apart.
pub(super) fn service(wanted: &WantedService) -> Result<(), PlanError> {
    let mut ports = Vec::with_capacity(wanted.ports.len());
    for port in &wanted.ports {
        check_name(&wanted.key, &port.name)?;
        let Some(first) = port.frontends.first() else { continue };
        if port.backends.len() > usize::from(u16::MAX) {
            return Err(PlanError::TooManyBackends { port: port.name.clone(), count: port.backends.len() });
        }
        consistent(port).map_err(|what| PlanError::Inconsistent { port: port.name.clone(), what })?;
        ports.push((&port.name, port.protocol, first.key.address().is_v4()));
    }
    ports.sort_unstable();
    if let Some(pair) = ports.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(PlanError::SamePort { port: pair[0].0.clone() });
    }
    Ok(())
}

/// A name must come back from the map as it went in.
fn check_name(key: &ServiceKey, port: &str) -> Result<(), PlanError> {
    let parts = [&key.namespace, &key.name, port];
    let unreadable = parts.iter().any(|part| part.contains(['/', ':', '\0']));
    let length = key.namespace.len() + 1 + key.name.len() + if port.is_empty() { 0 } else { 1 + port.len() };
    if unreadable || key.namespace.is_empty() || key.name.is_empty() || length >= NAME_LENGTH {
        let name = if port.is_empty() { key.to_string() } else { format!("{key}:{port}") };
        return Err(PlanError::Name { name });
    }
    Ok(())
}

/// `namespace/name:port`, as [`kproxy_common::ServiceInfo::name`] holds it.
pub(super) fn write_name(to: &mut impl Write, key: &ServiceKey, port: &str) -> io::Result<()> {
    for part in [key.namespace.as_str(), "/", &key.name, if port.is_empty() { "" } else { ":" }, port] {
        to.write_all(part.as_bytes())?;
    }
    Ok(())
}

fn consistent(port: &WantedPort) -> Result<(), &'static str> {
    if usize::from(port.in_sets) > port.backends.len() {
        return Err("its sets have more backends than it has");
    }
    let v4 = port.frontends.first().is_some_and(|frontend| frontend.key.address().is_v4());
    for frontend in &port.frontends {
        if frontend.key.address().is_v4() != v4 || frontend.key.protocol() != port.protocol {
            return Err("a frontend has another family or protocol");
        }
        for side in [frontend.inside, frontend.outside] {
            if u32::from(side.offset) + u32::from(side.count) > u32::from(port.in_sets) {
                return Err("a set lies outside the port's backends");
            }
        }
    }
    Ok(())
}
