//! Flows of the packet path: what a packet of a known flow is translated to, at each hook that it meets.
//!
//! Ingress hooks write destinations, egress hooks write sources. A flow from client C to frontend F, sent to
//! backend B, has two entries; if the client is masked with M, four:
//!
//! | role | hook | packet as it arrives | what is written |
//! |---|---|---|---|
//! | request | ingress, facing the client | C → F | destination B |
//! | forwarded | egress, facing the backend | C → B | source M |
//! | return | ingress, facing the backend | B → M | destination C |
//! | reply | egress, facing the client | B → C | source F |
//!
//! What this node sends past every frontend has a flow where it could meet one of a Service's (see `packet::node`), with
//! two entries, and no frontend:
//!
//! | role | hook | packet as it arrives | what is written |
//! |---|---|---|---|
//! | node request | egress | N → B | source N, with another port where another flow has this one |
//! | node reply | ingress | B → N | destination N, with its own port |
//!
//! Where another flow between the same client and backend has the client's port already (two frontends that lead to
//! one backend), the request's source port is written as well, and the reply's destination port back: between the two
//! hooks the client then has another port, its *inner* one.
//!
//! What a flow goes through is told by [`FlowState`] (its beginning) and [`Ends`] (its end). All its entries say the
//! same. `store` moves entries between the two tables; `packet::life` says which packet does what.

mod codec;
mod lifetime;
pub mod store;

use core::mem::size_of;

use crate::{Address, InvalidLayout, Protocol};

pub use lifetime::{HURRIED_REST, NOTE_EVERY, QUIET, REST, is_over, lifetime};
pub use store::{Action, FlowStore, FlowTable, Marks};

macro_rules! flow_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $name {
            $($(#[$variant_doc])* $variant = $number,)*
        }

        impl TryFrom<u8> for $name {
            type Error = InvalidLayout;

            fn try_from(value: u8) -> Result<Self, InvalidLayout> {
                match value {
                    $($number => Ok(Self::$variant),)*
                    value => Err(InvalidLayout { what: stringify!($name), value }),
                }
            }
        }
    };
}

flow_enum! {
    /// Where a packet is seen.
    Hook {
        /// Coming in, before routing.
        Ingress = 1,
        /// Going out, after routing.
        Egress = 2,
    }
}

flow_enum! {
    /// What an entry is for; see the module's table.
    Role {
        /// From the client, to the frontend.
        Request = 1,
        /// From the client, to the backend, to be masked.
        Forwarded = 2,
        /// From the backend, to the mask.
        Return = 3,
        /// From the backend, to the client.
        Reply = 4,
        /// From an address of this node, to a peer past every frontend.
        NodeRequest = 5,
        /// From that peer, to this node.
        NodeReply = 6,
    }
}

flow_enum! {
    /// How far a flow has come. How it ends, [`Ends`] tells.
    FlowState {
        /// The backend has not answered yet.
        Opening = 1,
        /// It has, and the client has not gone on since: either may be forged still.
        Answered = 5,
        /// The client has answered the backend.
        Established = 2,
    }
}

flow_enum! {
    /// What one end of a flow has said about ending it.
    FlowEnd {
        /// Nothing: it goes on.
        Open = 0,
        /// It has sent its FIN.
        Finished = 1,
        /// It has sent RST.
        Reset = 2,
    }
}

/// What both ends of a flow have said about ending it, or strangers in their names: no hook sees whether a receiver
/// takes a FIN or RST for what it says. So these only begin an end. Who goes on talking takes his back, and silence
/// ends the flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ends {
    /// What the client has said.
    pub client: FlowEnd,
    /// What the backend has said.
    pub backend: FlowEnd,
}

impl Ends {
    /// Nobody has said anything.
    pub const OPEN: Self = Self { client: FlowEnd::Open, backend: FlowEnd::Open };
    /// It was refused, or has made room for another flow.
    pub const RESET: Self = Self { client: FlowEnd::Reset, backend: FlowEnd::Reset };

    /// Whether both have ended it.
    #[inline(always)]
    pub const fn is_done(self) -> bool {
        !matches!(self.client, FlowEnd::Open) && !matches!(self.backend, FlowEnd::Open)
    }

    /// Whether it is over if what was said is true: both have ended it, or one has broken it off.
    #[inline(always)]
    pub const fn is_closed(self) -> bool {
        self.is_done() || matches!(self.client, FlowEnd::Reset) || matches!(self.backend, FlowEnd::Reset)
    }

    /// Whether one has finished while the other goes on.
    #[inline(always)]
    pub const fn is_half_closed(self) -> bool {
        !self.is_closed()
            && (matches!(self.client, FlowEnd::Finished) || matches!(self.backend, FlowEnd::Finished))
    }
}

/// Key of `flow` and `flow_transient`: the packet as it arrives at a hook.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FlowKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, host order.
    pub source_port: u16,
    /// Destination port, host order.
    pub destination_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Where it is seen.
    pub hook: Hook,
    /// Zero.
    pub _pad: u16,
}

/// Value of `flow` and `flow_transient`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// What to write: at ingress as destination, at egress as source.
    pub address: Address,
    /// Of requests and replies: the mask, unspecified if the client's address is kept. Of the other two: the
    /// frontend.
    pub companion: Address,
    /// The port to write, host order.
    pub port: u16,
    /// The companion's port, host order.
    pub companion_port: u16,
    /// How far the flow has come.
    pub state: FlowState,
    /// What this entry is for.
    pub role: Role,
    /// The client's port, host order: of a request the inner one, of all others the client's own.
    pub client_port: u16,
    /// The frontend's number when the flow began.
    pub number: u32,
    /// [`ServiceIdentity::service`](crate::ServiceIdentity::service) of the backend.
    pub service: u32,
    /// [`Backend::id`](crate::Backend::id): by which the backend is found.
    pub backend_id: u32,
    /// Who has ended it.
    pub ends: Ends,
    /// Zero.
    pub _pad2: u16,
    /// The flow's last packet, in nanoseconds since boot; written about once a second. Of a connection that is being
    /// opened or closed: when that began.
    pub last_seen: u64,
}

/// A whole flow, from which each of its entries can be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conversation {
    /// Who asked.
    pub client: Address,
    /// What it asked.
    pub frontend: Address,
    /// Who answers.
    pub backend: Address,
    /// Behind what the client is hidden; unspecified if it is not, or if the mask is still to be chosen.
    pub mask: Address,
    /// The client's port, host order.
    pub client_port: u16,
    /// The frontend's port, host order.
    pub frontend_port: u16,
    /// The backend's port, host order.
    pub backend_port: u16,
    /// The mask's port, host order; 0 while it is still to be chosen.
    pub mask_port: u16,
    /// The client's port as this host and the backend see it, host order.
    pub inner_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// How far it has come.
    pub state: FlowState,
    /// Who has ended it.
    pub ends: Ends,
    /// See [`Flow::number`].
    pub number: u32,
    /// See [`Flow::service`].
    pub service: u32,
    /// See [`Flow::backend_id`].
    pub backend_id: u32,
    /// See [`Flow::last_seen`].
    pub last_seen: u64,
}

impl Conversation {
    /// A flow to be written over.
    pub const EMPTY: Self = Self {
        client: Address::UNSPECIFIED,
        frontend: Address::UNSPECIFIED,
        backend: Address::UNSPECIFIED,
        mask: Address::UNSPECIFIED,
        client_port: 0,
        frontend_port: 0,
        backend_port: 0,
        mask_port: 0,
        inner_port: 0,
        protocol: Protocol::Tcp,
        state: FlowState::Opening,
        ends: Ends::OPEN,
        number: 0,
        service: 0,
        backend_id: 0,
        last_seen: 0,
    };

    /// Reads the flow that an entry is part of. A function of its own that writes in place, as
    /// [`write_entry`](Self::write_entry).
    #[inline(never)]
    pub fn read_entry(&mut self, key: &FlowKey, flow: &Flow) {
        match flow.role {
            Role::Request => {
                (self.client, self.client_port) = (key.source, key.source_port);
                (self.frontend, self.frontend_port) = (key.destination, key.destination_port);
                (self.backend, self.backend_port) = (flow.address, flow.port);
                (self.mask, self.mask_port) = (flow.companion, flow.companion_port);
                self.inner_port = flow.client_port;
            }
            Role::Forwarded | Role::NodeRequest => {
                (self.client, self.inner_port) = (key.source, key.source_port);
                (self.frontend, self.frontend_port) = (flow.companion, flow.companion_port);
                (self.backend, self.backend_port) = (key.destination, key.destination_port);
                (self.mask, self.mask_port) = (flow.address, flow.port);
            }
            Role::Return | Role::NodeReply => {
                (self.client, self.inner_port) = (flow.address, flow.port);
                (self.frontend, self.frontend_port) = (flow.companion, flow.companion_port);
                (self.backend, self.backend_port) = (key.source, key.source_port);
                (self.mask, self.mask_port) = (key.destination, key.destination_port);
            }
            Role::Reply => {
                (self.client, self.inner_port) = (key.destination, key.destination_port);
                (self.frontend, self.frontend_port) = (flow.address, flow.port);
                (self.backend, self.backend_port) = (key.source, key.source_port);
                (self.mask, self.mask_port) = (flow.companion, flow.companion_port);
            }
        }
        if !matches!(flow.role, Role::Request) {
            self.client_port = flow.client_port;
        }
        self.protocol = key.protocol;
        self.state = flow.state;
        self.ends = flow.ends;
        self.number = flow.number;
        self.service = flow.service;
        self.backend_id = flow.backend_id;
        self.last_seen = flow.last_seen;
    }

    /// Whether the client is hidden, now or as soon as a mask was chosen.
    #[inline(always)]
    pub fn is_masked(&self) -> bool {
        self.mask_port != 0
    }

    /// The role of the entry by which this flow holds the port that its backend sees.
    #[inline(always)]
    pub fn port_holder(&self) -> Role {
        if self.frontend_port == 0 { Role::NodeReply } else { Role::Return }
    }

    /// Writes the entry with this role. A function of its own that writes in place: a dozen entries put
    /// together on the stack are more than a program's stack holds.
    #[inline(never)]
    pub fn write_entry(&self, role: Role, key: &mut FlowKey, flow: &mut Flow) {
        // References, not copies on the stack: a pointer to these that stays behind in a register is refused.
        let client = (&self.client, self.client_port);
        let inner = (&self.client, self.inner_port);
        let frontend = (&self.frontend, self.frontend_port);
        let backend = (&self.backend, self.backend_port);
        let mask = (&self.mask, self.mask_port);
        let (hook, source, destination, written, companion) = match role {
            Role::Request => (Hook::Ingress, client, frontend, backend, mask),
            Role::Forwarded | Role::NodeRequest => (Hook::Egress, inner, backend, mask, frontend),
            Role::Return | Role::NodeReply => (Hook::Ingress, backend, mask, inner, frontend),
            Role::Reply => (Hook::Egress, backend, inner, frontend, mask),
        };
        let client_port = if matches!(role, Role::Request) { self.inner_port } else { self.client_port };
        key.source = *source.0;
        key.destination = *destination.0;
        key.source_port = source.1;
        key.destination_port = destination.1;
        key.protocol = self.protocol;
        key.hook = hook;
        key._pad = 0;
        flow.address = *written.0;
        flow.companion = *companion.0;
        flow.port = written.1;
        flow.companion_port = companion.1;
        flow.state = self.state;
        flow.role = role;
        flow.client_port = client_port;
        flow.number = self.number;
        flow.service = self.service;
        flow.backend_id = self.backend_id;
        flow.ends = self.ends;
        flow._pad2 = 0;
        flow.last_seen = self.last_seen;
    }
}

impl FlowKey {
    /// A key to be written over.
    pub const EMPTY: Self = Self {
        source: Address::UNSPECIFIED,
        destination: Address::UNSPECIFIED,
        source_port: 0,
        destination_port: 0,
        protocol: Protocol::Tcp,
        hook: Hook::Ingress,
        _pad: 0,
    };
}

impl Flow {
    /// A value to be written over.
    pub const EMPTY: Self = Self {
        address: Address::UNSPECIFIED,
        companion: Address::UNSPECIFIED,
        port: 0,
        companion_port: 0,
        state: FlowState::Opening,
        role: Role::Request,
        client_port: 0,
        number: 0,
        service: 0,
        backend_id: 0,
        ends: Ends::OPEN,
        _pad2: 0,
        last_seen: 0,
    };

    /// Whether another entry with the same key and role leads to the same place.
    #[inline(always)]
    pub fn leads_like(&self, other: &Self) -> bool {
        (self.address, self.port, self.client_port) == (other.address, other.port, other.client_port)
    }

    /// Whether another entry with the same key and role is of a connection that, for its client, is between the same
    /// ends: client and frontend.
    #[inline(always)]
    pub fn is_of_same_ends(&self, other: &Self) -> bool {
        if self.client_port != other.client_port || self.role as u8 != other.role as u8 {
            return false;
        }
        match self.role {
            // The key has the client, and the value the frontend; the value has the node's own port.
            Role::Reply | Role::NodeReply => (self.address, self.port) == (other.address, other.port),
            // The value has both.
            Role::Return => {
                self.address == other.address
                    && (self.companion, self.companion_port) == (other.companion, other.companion_port)
            }
            // The key has the client, and the value the frontend.
            Role::Forwarded => {
                (self.companion, self.companion_port) == (other.companion, other.companion_port)
            }
            // The key has both.
            Role::Request | Role::NodeRequest => true,
        }
    }
}

const _: () = {
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 64);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_leads_back_to_the_whole() {
        for inner_port in [40_000, 61_001] {
            let whole = Conversation {
                client: Address::from_v4_word(1),
                frontend: Address::from_v4_word(2),
                backend: Address::from_v4_word(3),
                mask: Address::from_v4_word(4),
                client_port: 40_000,
                frontend_port: 80,
                backend_port: 8_080,
                mask_port: 61_000,
                inner_port,
                protocol: Protocol::Tcp,
                state: FlowState::Opening,
                ends: Ends { client: FlowEnd::Finished, backend: FlowEnd::Reset },
                number: 7,
                service: 5,
                backend_id: 9,
                last_seen: 1,
            };
            let roles = [Role::Request, Role::Forwarded, Role::Return, Role::Reply];
            for role in roles.into_iter().chain([Role::NodeRequest, Role::NodeReply]) {
                let (mut key, mut flow) = (FlowKey::EMPTY, Flow::EMPTY);
                whole.write_entry(role, &mut key, &mut flow);
                let mut read = Conversation::EMPTY;
                read.read_entry(&key, &flow);
                assert_eq!(read, whole, "{role:?}");
            }
        }
    }
}
