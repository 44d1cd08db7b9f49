//! Whether a load-balancer address must be reached through the load balancer, and which rule says so.

use kproxy_common::{Mode, TrafficPolicy};

use super::config::{PassThroughConfig, PassThroughScope};
use super::objects::{LoadBalancer, PassThroughValue, Service};
use crate::wanted::PassThroughRule;

/// What was decided about one load-balancer address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassThrough {
    /// The rule that decided: the first that has something to say.
    pub rule: PassThroughRule,
    /// What it decided.
    pub is_on: bool,
}

/// The decision about `address` of `service`: its annotations, then the address's ipMode, then the node's
/// default.
pub fn decide(service: &Service, address: &LoadBalancer, config: &PassThroughConfig) -> PassThrough {
    for (rule, value) in &service.pass_through {
        match value {
            PassThroughValue::On => return PassThrough { rule: *rule, is_on: true },
            PassThroughValue::Off => return PassThrough { rule: *rule, is_on: false },
            PassThroughValue::OnlyLocal if service.external_policy == TrafficPolicy::Local => {
                return PassThrough { rule: *rule, is_on: true };
            }
            PassThroughValue::OnlyLocal => {}
        }
    }
    if address.is_proxy {
        return PassThrough { rule: PassThroughRule::IpMode, is_on: true };
    }
    PassThrough { rule: PassThroughRule::Default, is_on: config.default }
}

/// What an address in pass-through does for clients inside.
pub fn inside_mode(scope: PassThroughScope) -> Mode {
    match scope {
        PassThroughScope::All => Mode::PassThrough,
        PassThroughScope::Pods => Mode::PassThroughPods,
        PassThroughScope::Nodes => Mode::PassThroughHost,
    }
}
