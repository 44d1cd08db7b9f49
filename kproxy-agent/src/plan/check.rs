//! What can be stored at all.

use std::collections::HashSet;

use kproxy_common::NAME_LENGTH;

use super::PlanError;
use crate::wanted::{ServiceKey, WantedPort, WantedService};

/// Whether the tables can hold this Service, room apart.
pub(super) fn service(wanted: &WantedService) -> Result<(), PlanError> {
    let mut ports = HashSet::new();
    let mut frontends = HashSet::new();
    for port in &wanted.ports {
        let parts = [&wanted.key.namespace, &wanted.key.name, &port.name];
        let name = full_name(&wanted.key, &port.name);
        let unreadable = parts.iter().any(|part| part.contains(['/', ':', '\0']));
        if unreadable
            || wanted.key.namespace.is_empty()
            || wanted.key.name.is_empty()
            || name.len() >= NAME_LENGTH
        {
            return Err(PlanError::Name { name });
        }
        let Some(first) = port.frontends.first() else { continue };
        if !ports.insert((&port.name, port.protocol, first.key.address().is_v4())) {
            return Err(PlanError::SamePort { port: port.name.clone() });
        }
        if port.backends.len() > usize::from(u16::MAX) {
            return Err(PlanError::TooManyBackends { port: port.name.clone(), count: port.backends.len() });
        }
        consistent(port).map_err(|what| PlanError::Inconsistent { port: port.name.clone(), what })?;
        if !port.frontends.iter().all(|frontend| frontends.insert(frontend.key)) {
            return Err(PlanError::Inconsistent { port: port.name.clone(), what: "a frontend occurs twice" });
        }
    }
    Ok(())
}

/// `namespace/name:port`, as [`kproxy_common::ServiceInfo::name`] holds it.
pub(super) fn full_name(key: &ServiceKey, port: &str) -> String {
    if port.is_empty() { key.to_string() } else { format!("{key}:{port}") }
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
