//! Network address translation as one would explain it: a list of sessions, looked through from end to end. It
//! knows no hooks, no tables and no hashes; which backend a new session gets, it is told, and checks.

use std::net::SocketAddr;

use kproxy_common::Protocol;

use crate::{
    cluster::{Family, Who},
    frame::{ACK, FIN, RST, SYN},
};

/// Endpoints that a client may be sent to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    pub backends: Vec<Who>,
    /// The backends see this node instead of the client, wherever they are.
    pub hides_client: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// The backend has not answered.
    Asked,
    /// The backend has not answered, and the client has given up.
    GivenUp,
    /// The backend has answered, and the client not gone on since.
    Answered,
    /// Both have answered each other.
    Open { client_is_done: bool, backend_is_done: bool },
    /// Both are done, or one has broken it off.
    Over,
    /// It is over, and its backend has accepted a connection past the frontend since, which is on the same ends for it.
    Past,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Session {
    pub protocol: Protocol,
    pub client: SocketAddr,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    /// Who the backend thinks that it talks to.
    pub peer: SocketAddr,
    state: State,
}

impl Session {
    /// From whom to whom the backend's packets arrive.
    pub fn answers(&self) -> (SocketAddr, SocketAddr) {
        if self.is_past() { (self.backend, self.peer) } else { (self.frontend, self.client) }
    }

    /// Whether another connection has its ends, past the frontend.
    pub fn is_past(&self) -> bool {
        self.state == State::Past
    }
}

#[derive(Default)]
pub struct Nat {
    pub sessions: Vec<Session>,
    /// What has made room, for another session or because the client was turned away when it wanted a new one.
    gone: Vec<Session>,
}

/// What becomes of a client's packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It goes where the session goes.
    Along(Session),
    /// It may begin a session.
    Begins,
    /// It goes where the session goes, or begins a new one: both are right.
    Either(Session),
    /// It is of a session that is gone: it goes where that went, or is none of ours. Both are right.
    Late(Session),
    /// It is none of ours.
    Untouched,
}

impl Nat {
    /// A packet of the client.
    pub fn client_sends(
        &mut self,
        protocol: Protocol,
        client: SocketAddr,
        frontend: SocketAddr,
        flags: u8,
    ) -> Fate {
        let opens = protocol != Protocol::Tcp || flags == SYN;
        let known = self.sessions.iter_mut().find(|session| session.is_by(protocol, client, frontend));
        let Some(session) = known else {
            let is_same = |gone: &&Session| gone.is_by(protocol, client, frontend);
            return match self.gone.iter().find(is_same) {
                _ if opens => Fate::Begins,
                Some(gone) => Fate::Late(*gone),
                None => Fate::Untouched,
            };
        };
        if protocol == Protocol::Tcp && opens {
            match session.state {
                State::Asked | State::Answered => return Fate::Along(*session),
                State::GivenUp => return Fate::Either(*session),
                // The client uses its port again.
                State::Open { .. } | State::Over | State::Past => return Fate::Begins,
            }
        }
        let has = |flag| protocol == Protocol::Tcp && flags & flag != 0;
        // A SYN with an ACK does not take up an answer to a SYN.
        if session.state == State::Answered && !has(SYN) {
            session.state = State::Open { client_is_done: false, backend_is_done: false };
        }
        session.state = match session.state {
            State::Asked if has(RST) => State::GivenUp,
            State::Open { .. } if has(RST) => State::Over,
            State::Open { backend_is_done, .. } if has(FIN) => {
                State::Open { client_is_done: true, backend_is_done }.settled()
            }
            state => state,
        };
        Fate::Along(*session)
    }

    /// A packet of the backend to whom it thinks it talks; the session that it is of, if it is of one.
    pub fn backend_sends(
        &mut self,
        protocol: Protocol,
        backend: SocketAddr,
        peer: SocketAddr,
        flags: u8,
    ) -> Option<Session> {
        let session = self
            .sessions
            .iter_mut()
            .find(|session| (session.protocol, session.backend, session.peer) == (protocol, backend, peer))?;
        let is_reset = protocol == Protocol::Tcp && flags & RST != 0;
        let is_last = protocol == Protocol::Tcp && flags & FIN != 0;
        let accepts = protocol == Protocol::Tcp && flags == SYN | ACK;
        let is_hidden = session.peer.ip() != session.client.ip();
        session.state = match session.state {
            State::Over if accepts && !is_hidden => State::Past,
            State::Past => State::Past,
            _ if is_reset => State::Over,
            State::Asked | State::GivenUp => State::Answered,
            State::Open { client_is_done, .. } if is_last => {
                State::Open { client_is_done, backend_is_done: true }.settled()
            }
            state => state,
        };
        Some(*session)
    }

    /// The session that a client's packet began, in place of the one before on the same ends.
    pub fn begin(
        &mut self,
        protocol: Protocol,
        client: SocketAddr,
        frontend: SocketAddr,
        backend: SocketAddr,
        peer: SocketAddr,
    ) {
        self.sessions.retain(|session| !session.is_by(protocol, client, frontend));
        self.gone.retain(|session| !session.is_by(protocol, client, frontend));
        // One that is over by another frontend gives way to one that the backend could not tell from it.
        self.give_up(|session| {
            matches!(session.state, State::Over | State::Past)
                && (session.protocol, session.client, session.backend) == (protocol, client, backend)
        });
        let taken = self
            .sessions
            .iter()
            .find(|session| (session.protocol, session.backend, session.peer) == (protocol, backend, peer));
        assert_eq!(taken, None, "{backend} cannot tell {client}'s session from it");
        self.sessions.push(Session { protocol, client, frontend, backend, peer, state: State::Asked });
    }

    /// A client was turned away when it wanted a new session: what was there before is over.
    pub fn forget(&mut self, protocol: Protocol, client: SocketAddr, frontend: SocketAddr) {
        self.give_up(|session| session.is_by(protocol, client, frontend));
    }

    fn give_up(&mut self, is_meant: impl Fn(&Session) -> bool) {
        self.gone.extend(self.sessions.extract_if(.., |session| is_meant(session)));
    }
}

impl Session {
    fn is_by(&self, protocol: Protocol, client: SocketAddr, frontend: SocketAddr) -> bool {
        (self.protocol, self.client, self.frontend) == (protocol, client, frontend)
    }
}

impl State {
    fn settled(self) -> Self {
        match self {
            Self::Open { client_is_done: true, backend_is_done: true } => Self::Over,
            state => state,
        }
    }
}

/// What a Service with these policies offers to whom. Not what the plan computes: what the rules say.
pub fn offer(endpoints: &[Who], is_cluster_ip: bool, is_local_policy: bool, client: Who) -> Option<Offer> {
    // Pods of other nodes are outside; but they are pods of the cluster.
    let is_outside = !matches!(client, Who::Here(_));
    let hides_client = is_cluster_ip && matches!(client, Who::Client(_));
    let backends: Vec<Who> = if is_local_policy && !is_cluster_ip && is_outside {
        endpoints.iter().copied().filter(|who| matches!(who, Who::Here(_))).collect()
    } else {
        endpoints.to_vec()
    };
    (!backends.is_empty()).then_some(Offer { backends, hides_client })
}

impl Offer {
    /// Whether the backend sees this node instead of the client.
    pub fn is_hidden(&self, client: Who, backend: Who) -> bool {
        let came_by_uplink = !matches!(client, Who::Here(_));
        self.hides_client || came_by_uplink && !matches!(backend, Who::Here(_))
    }

    /// Whose address this is.
    pub fn whose(&self, family: Family, backend: SocketAddr) -> Option<Who> {
        self.backends.iter().copied().find(|who| who.ip(family) == backend.ip())
    }
}
