//! Network address translation as one would explain it: a list of sessions, looked through from end to end. It
//! knows no hooks, no tables and no hashes; which backend a new session gets, it is told, and checks.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

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

/// How far two ends have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// The backend has not answered.
    Asked,
    /// The backend has not answered, and the client has given up.
    GivenUp,
    /// The backend has refused.
    Refused,
    /// The backend has answered, and the client not gone on since.
    Answered,
    /// Both have answered each other.
    Open,
    /// It is over, and its backend has accepted a connection past the frontend since, which is on the same ends for it.
    Past,
}

/// What an end has said about its being over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Nothing,
    Finished,
    /// It has broken it off, then.
    Reset(Instant),
}

/// Before this, what goes on after a RST may have been sent before it; a little later, it is not.
const AT_ONCE: Duration = Duration::from_millis(900);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Session {
    pub protocol: Protocol,
    pub client: SocketAddr,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    /// Who the backend thinks that it talks to.
    pub peer: SocketAddr,
    state: State,
    client_end: End,
    backend_end: End,
    /// Nobody can say whether what was said about its end still holds: it depends on when it was taken back.
    is_vague: bool,
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
    /// Every session that there was: protocol, client, frontend and backend.
    had: Vec<(Protocol, SocketAddr, SocketAddr, SocketAddr)>,
}

/// What becomes of a client's packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It goes where the session goes.
    Along(Session),
    /// It goes where the session goes, unless its client is turned away.
    Again(Session),
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
            return match session.state {
                _ if session.is_vague => Fate::Either(*session),
                State::GivenUp => Fate::Either(*session),
                State::Asked => Fate::Along(*session),
                State::Answered | State::Open if session.is_over() => Fate::Begins,
                State::Answered if session.is_broken_off() => Fate::Again(*session),
                State::Answered => Fate::Along(*session),
                // The client's, who uses its port again, or a stranger's: the backend knows.
                State::Open => Fate::Again(*session),
                State::Refused | State::Past => Fate::Begins,
            };
        }
        let has = |flag| protocol == Protocol::Tcp && flags & flag != 0;
        let is_plain = !has(SYN) && !has(RST) && !has(FIN);
        session.client_end = session.taken_back(session.client_end, is_plain);
        // A SYN with an ACK does not take up an answer to a SYN.
        if session.state == State::Answered && !session.is_broken_off() && !has(SYN) && !has(RST) {
            session.state = State::Open;
        }
        match session.state {
            State::Asked if has(RST) => session.state = State::GivenUp,
            State::Answered if has(RST) && !session.is_broken_off() => {
                session.client_end = End::Reset(Instant::now());
            }
            State::Open if !session.is_over() && has(RST) => session.client_end = session.client_end.reset(),
            State::Open if !session.is_over() && has(FIN) => session.client_end = End::Finished,
            _ => {}
        }
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
        let has = |flag| protocol == Protocol::Tcp && flags & flag != 0;
        let accepts = protocol == Protocol::Tcp && flags == SYN | ACK;
        let is_plain = !has(SYN) && !has(RST) && !has(FIN);
        let is_hidden = session.peer.ip() != session.client.ip();
        session.backend_end = session.taken_back(session.backend_end, is_plain);
        match session.state {
            State::Past => {}
            State::Answered | State::Open | State::Refused
                if session.is_over() || session.state == State::Refused =>
            {
                if accepts && !is_hidden {
                    session.state = State::Past;
                }
            }
            State::Asked | State::GivenUp if has(RST) => session.state = State::Refused,
            State::Asked | State::GivenUp => session.state = State::Answered,
            // What went where the session goes was the client's, who begins again.
            State::Answered | State::Open if accepts && session.is_broken_off() => {
                (session.client_end, session.backend_end) = (End::Nothing, End::Nothing);
            }
            State::Answered if has(RST) && session.backend_end == End::Nothing => {
                session.backend_end = End::Reset(Instant::now());
            }
            State::Open if has(RST) => session.backend_end = session.backend_end.reset(),
            State::Open if has(FIN) => session.backend_end = End::Finished,
            State::Answered | State::Open | State::Refused => {}
        }
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
        // Its entries are gone.
        self.give_up(|session| {
            session.is_past()
                && (session.protocol, session.client, session.backend) == (protocol, client, backend)
        });
        let taken = self
            .sessions
            .iter()
            .find(|session| (session.protocol, session.backend, session.peer) == (protocol, backend, peer));
        assert_eq!(taken, None, "{backend} cannot tell {client}'s session from it");
        self.had.push((protocol, client, frontend, backend));
        self.sessions.push(Session {
            protocol,
            client,
            frontend,
            backend,
            peer,
            state: State::Asked,
            client_end: End::Nothing,
            backend_end: End::Nothing,
            is_vague: false,
        });
    }

    /// Whether the client's port may not be free towards this backend: it was in use there by another frontend, and the
    /// backend has had no time to forget.
    pub fn had_by_another(
        &self,
        protocol: Protocol,
        client: SocketAddr,
        frontend: SocketAddr,
        backend: SocketAddr,
    ) -> bool {
        let is_other = |had: &(Protocol, SocketAddr, SocketAddr, SocketAddr)| {
            (had.0, had.1, had.3) == (protocol, client, backend) && had.2 != frontend
        };
        self.had.iter().any(is_other)
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

impl Session {
    /// Whether both have said that it is over.
    fn is_over(&self) -> bool {
        self.client_end != End::Nothing && self.backend_end != End::Nothing
    }

    /// Whether one has broken it off.
    fn is_broken_off(&self) -> bool {
        [self.client_end, self.backend_end].iter().any(|end| matches!(end, End::Reset(_)))
    }

    /// What an end has said, after it has sent something else. That of TCP carries no data here.
    fn taken_back(&mut self, end: End, is_plain: bool) -> End {
        match end {
            End::Reset(when) if is_plain && when.elapsed() >= AT_ONCE => {
                self.is_vague = true;
                end
            }
            end => end,
        }
    }
}

impl End {
    fn reset(self) -> Self {
        match self {
            Self::Reset(_) => self,
            Self::Nothing | Self::Finished => Self::Reset(Instant::now()),
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
