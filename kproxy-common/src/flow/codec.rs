//! Entries as the bytes that the maps hold: the agent reads and writes them with system calls.

use core::mem::offset_of;

use super::{Ends, Flow, FlowEnd, FlowKey, FlowState, Hook, Role};
use crate::{Address, InvalidLayout, Protocol};

impl FlowKey {
    /// How many bytes it takes.
    pub const SIZE: usize = size_of::<Self>();

    /// As it lies in a map, in this machine's byte order.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let Self { source, destination, source_port, destination_port, protocol, hook, _pad } = self;
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, offset_of!(Self, source), &source.octets());
        put(&mut bytes, offset_of!(Self, destination), &destination.octets());
        put(&mut bytes, offset_of!(Self, source_port), &source_port.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, destination_port), &destination_port.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, protocol), &[*protocol as u8]);
        put(&mut bytes, offset_of!(Self, hook), &[*hook as u8]);
        put(&mut bytes, offset_of!(Self, _pad), &_pad.to_ne_bytes());
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) writes. An error: programs of another version wrote
    /// it.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Result<Self, InvalidLayout> {
        Ok(Self {
            source: Address::new(take(bytes, offset_of!(Self, source))),
            destination: Address::new(take(bytes, offset_of!(Self, destination))),
            source_port: u16::from_ne_bytes(take(bytes, offset_of!(Self, source_port))),
            destination_port: u16::from_ne_bytes(take(bytes, offset_of!(Self, destination_port))),
            protocol: Protocol::try_from(bytes[offset_of!(Self, protocol)])?,
            hook: Hook::try_from(bytes[offset_of!(Self, hook)])?,
            _pad: u16::from_ne_bytes(take(bytes, offset_of!(Self, _pad))),
        })
    }
}

impl Flow {
    /// How many bytes it takes.
    pub const SIZE: usize = size_of::<Self>();

    const CLIENT_END: usize = offset_of!(Self, ends) + offset_of!(Ends, client);
    const BACKEND_END: usize = offset_of!(Self, ends) + offset_of!(Ends, backend);

    /// As it lies in a map, in this machine's byte order.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let Self {
            address,
            companion,
            port,
            companion_port,
            state,
            role,
            client_port,
            number,
            service,
            backend_id,
            ends: Ends { client, backend },
            _pad2,
            last_seen,
        } = self;
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, offset_of!(Self, address), &address.octets());
        put(&mut bytes, offset_of!(Self, companion), &companion.octets());
        put(&mut bytes, offset_of!(Self, port), &port.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, companion_port), &companion_port.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, state), &[*state as u8]);
        put(&mut bytes, offset_of!(Self, role), &[*role as u8]);
        put(&mut bytes, offset_of!(Self, client_port), &client_port.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, number), &number.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, service), &service.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, backend_id), &backend_id.to_ne_bytes());
        put(&mut bytes, Self::CLIENT_END, &[*client as u8]);
        put(&mut bytes, Self::BACKEND_END, &[*backend as u8]);
        put(&mut bytes, offset_of!(Self, _pad2), &_pad2.to_ne_bytes());
        put(&mut bytes, offset_of!(Self, last_seen), &last_seen.to_ne_bytes());
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) writes. An error: programs of another version wrote
    /// it.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Result<Self, InvalidLayout> {
        let ends = Ends {
            client: FlowEnd::try_from(bytes[Self::CLIENT_END])?,
            backend: FlowEnd::try_from(bytes[Self::BACKEND_END])?,
        };
        let state = FlowState::try_from(bytes[offset_of!(Self, state)])?;
        Self::read(bytes, state, ends)
    }

    /// Reads the value of an entry as it was laid out up to version 4: `client_port` was 0 where
    /// the client had one port only; there were no `ends`, but two more states, 3 for a direction
    /// that had sent its FIN, and 4 for a flow that had ended.
    pub fn from_bytes_v4(key: &FlowKey, bytes: &[u8; Self::SIZE]) -> Result<Self, InvalidLayout> {
        const FINISHED: u8 = 3;
        const CLOSED: u8 = 4;
        let role = Role::try_from(bytes[offset_of!(Self, role)])?;
        let (state, ends) = match (bytes[offset_of!(Self, state)], role) {
            (FINISHED, Role::Request | Role::Forwarded) => {
                (FlowState::Established, Ends { client: FlowEnd::Finished, ..Ends::OPEN })
            }
            (FINISHED, Role::Return | Role::Reply) => {
                (FlowState::Established, Ends { backend: FlowEnd::Finished, ..Ends::OPEN })
            }
            (CLOSED, _) => (FlowState::Established, Ends::RESET),
            (state, _) => (FlowState::try_from(state)?, Ends::OPEN),
        };
        let mut flow = Self::read(bytes, state, ends)?;
        if flow.client_port == 0 {
            flow.client_port = match role {
                Role::Request | Role::Forwarded | Role::NodeRequest => key.source_port,
                Role::Return | Role::NodeReply => flow.port,
                Role::Reply => key.destination_port,
            };
        }
        Ok(flow)
    }

    fn read(bytes: &[u8; Self::SIZE], state: FlowState, ends: Ends) -> Result<Self, InvalidLayout> {
        Ok(Self {
            address: Address::new(take(bytes, offset_of!(Self, address))),
            companion: Address::new(take(bytes, offset_of!(Self, companion))),
            port: u16::from_ne_bytes(take(bytes, offset_of!(Self, port))),
            companion_port: u16::from_ne_bytes(take(bytes, offset_of!(Self, companion_port))),
            state,
            role: Role::try_from(bytes[offset_of!(Self, role)])?,
            client_port: u16::from_ne_bytes(take(bytes, offset_of!(Self, client_port))),
            number: u32::from_ne_bytes(take(bytes, offset_of!(Self, number))),
            service: u32::from_ne_bytes(take(bytes, offset_of!(Self, service))),
            backend_id: u32::from_ne_bytes(take(bytes, offset_of!(Self, backend_id))),
            ends,
            _pad2: 0,
            last_seen: u64::from_ne_bytes(take(bytes, offset_of!(Self, last_seen))),
        })
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Conversation;

    /// What version 4 wrote for this entry.
    fn v4(flow: &Flow, state: u8, has_one_port: bool) -> [u8; Flow::SIZE] {
        let mut bytes = Flow { ends: Ends::OPEN, ..*flow }.to_bytes();
        bytes[offset_of!(Flow, state)] = state;
        if has_one_port {
            put(&mut bytes, offset_of!(Flow, client_port), &[0, 0]);
        }
        bytes
    }

    #[test]
    fn entries_of_version_4_are_read() {
        let client_finished = Ends { client: FlowEnd::Finished, ..Ends::OPEN };
        let backend_finished = Ends { backend: FlowEnd::Finished, ..Ends::OPEN };
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
                last_seen: 7,
                ..Conversation::EMPTY
            };
            for role in [Role::Request, Role::Forwarded, Role::Return, Role::Reply] {
                let is_clients = matches!(role, Role::Request | Role::Forwarded);
                for (number, state, ends) in [
                    (1, FlowState::Opening, Ends::OPEN),
                    (2, FlowState::Established, Ends::OPEN),
                    (3, FlowState::Established, if is_clients { client_finished } else { backend_finished }),
                    (4, FlowState::Established, Ends::RESET),
                    (5, FlowState::Answered, Ends::OPEN),
                ] {
                    let (mut key, mut flow) = (FlowKey::EMPTY, Flow::EMPTY);
                    Conversation { state, ends, ..whole }.write_entry(role, &mut key, &mut flow);
                    let read = Flow::from_bytes_v4(&key, &v4(&flow, number, inner_port == 40_000));
                    assert_eq!(read, Ok(flow), "{role:?} {number}");
                }
            }
        }
        let bytes = v4(&Flow::EMPTY, 6, false);
        assert!(Flow::from_bytes_v4(&FlowKey::EMPTY, &bytes).is_err(), "no such state");
    }
}
