//! Flows of the packet path: what a packet of a known flow is translated to, in each direction.

use crate::{Address, Protocol};

/// Which way a packet goes.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Direction {
    /// From the client to the frontend.
    Request = 1,
    /// From the backend to the client.
    Reply = 2,
}

impl TryFrom<u8> for Direction {
    type Error = crate::InvalidLayout;

    fn try_from(value: u8) -> Result<Self, Self::Error> {
        match value {
            1 => Ok(Self::Request),
            2 => Ok(Self::Reply),
            value => Err(crate::InvalidLayout { what: "Direction", value }),
        }
    }
}

/// Key of `flow` and `flow_transient`: the packet as it arrives, before it is translated.
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
    /// Which way the packet goes.
    pub direction: Direction,
    /// Zero.
    pub _pad: u16,
}

/// How far a flow has come.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FlowState {
    /// The peer has not answered yet.
    Opening = 1,
    /// Packets went both ways.
    Established = 2,
    /// This direction has sent its TCP FIN.
    Finished = 3,
    /// Both directions have, or one has sent RST.
    Closed = 4,
}

/// Value of `flow` and `flow_transient`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// What to write: for requests the backend as destination, for replies the frontend as source.
    pub address: Address,
    /// The port to write, host order.
    pub port: u16,
    /// How far the flow has come, in this direction.
    pub state: FlowState,
    /// Zero.
    pub _pad: u8,
    /// The frontend's number when the flow began.
    pub number: u32,
    /// [`ServiceIdentity::service`](crate::ServiceIdentity::service) of the backend.
    pub service: u32,
    /// Where the backend stood when the flow began.
    pub slot: u32,
    /// The last packet of this direction, in nanoseconds since boot; written about once a second.
    pub last_seen: u64,
}

impl Flow {
    /// The key under which the other direction of this flow stands.
    #[inline(always)]
    pub fn other_key(&self, key: &FlowKey) -> FlowKey {
        match key.direction {
            // client -> frontend becomes backend -> client.
            Direction::Request => FlowKey {
                source: self.address,
                destination: key.source,
                source_port: self.port,
                destination_port: key.source_port,
                direction: Direction::Reply,
                ..*key
            },
            // backend -> client becomes client -> frontend.
            Direction::Reply => FlowKey {
                source: key.destination,
                destination: self.address,
                source_port: key.destination_port,
                destination_port: self.port,
                direction: Direction::Request,
                ..*key
            },
        }
    }

    /// The value of the other direction of this flow.
    #[inline(always)]
    pub fn other(&self, key: &FlowKey) -> Self {
        let (address, port) = match key.direction {
            Direction::Request => (key.destination, key.destination_port),
            Direction::Reply => (key.source, key.source_port),
        };
        Self { address, port, ..*self }
    }
}

const _: () = {
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 40);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_way_and_back_is_the_same() {
        let key = FlowKey {
            source: Address::from_v4_word(1),
            destination: Address::from_v4_word(2),
            source_port: 40_000,
            destination_port: 80,
            protocol: Protocol::Tcp,
            direction: Direction::Request,
            _pad: 0,
        };
        let flow = Flow {
            address: Address::from_v4_word(3),
            port: 8_080,
            state: FlowState::Opening,
            _pad: 0,
            number: 7,
            service: 5,
            slot: 9,
            last_seen: 1,
        };
        let (reply_key, reply) = (flow.other_key(&key), flow.other(&key));
        assert_eq!((reply_key.source, reply_key.destination), (flow.address, key.source));
        assert_eq!((reply.address, reply.port), (key.destination, 80));
        assert_eq!((reply.other_key(&reply_key), reply.other(&reply_key)), (key, flow));
    }
}
