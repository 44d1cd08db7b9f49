//! Why a connection got its verdict: one list for the counters, the metrics and what operators read.

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $word:literal;)*) => {
        /// Why a connection or a packet got its verdict. The number is the index of its counter.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Reason {
            $($(#[$doc])* $variant = $number,)*
        }

        impl Reason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The stable word for it in metrics and output.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }
    };
}

reasons! {
    /// No Service has this address, port and protocol: not our business.
    NotAService = 0, "not-a-service";
    /// Sent on to a backend of the Service.
    Forwarded = 1, "forwarded";
    /// A load-balancer address that must be reached through the load balancer.
    PassThrough = 2, "pass-through";
    /// The Service has no endpoint at all.
    NoEndpoints = 3, "no-endpoints";
    /// The policy is Local and no endpoint is on this node.
    NoLocalEndpoints = 4, "no-local-endpoints";
    /// The client is in none of the Service's loadBalancerSourceRanges.
    SourceRange = 5, "source-range";
    /// An allocated ClusterIP, asked on a port or protocol that it does not have.
    UndefinedPort = 6, "undefined-port";
    /// Inside a ServiceCIDR, but no Service has this ClusterIP.
    UnallocatedAddress = 7, "unallocated-address";
    /// The ClusterIP belongs to a Service that another proxy serves.
    OtherProxy = 8, "other-proxy";
    /// The ClusterIP stands on an interface of this node, and is left to whoever put it there.
    LocalAddress = 9, "local-address";
    /// The packet hook will decide: the socket hook lacks the source address, or is to leave this pod alone, or nothing is
    /// sent yet.
    LeftToPackets = 10, "left-to-packets";
    /// The client is to be masked, but the interface that it leaves by has no address of its family.
    NoMaskAddress = 11, "no-mask-address";
    /// Sent by this host to a ClusterIP in a way that no socket hook serves.
    Unserved = 12, "unserved";
    /// The packet could not be rewritten; it was dropped rather than sent on half translated.
    RewriteFailed = 13, "rewrite-failed";
    /// The tables contradict themselves: a backend slot that belongs to another Service, or is out of range.
    TableError = 14, "table-error";
    /// The packet is cut short, or its headers lie about their length.
    Malformed = 15, "malformed";
    /// A later fragment, or a header chain that is not followed: left alone.
    Unparsed = 16, "unparsed";
    /// A TCP packet that opens nothing and belongs to no flow.
    NoFlow = 17, "no-flow";
    /// No port was free to mask the client with, towards this backend.
    MaskPortsExhausted = 18, "mask-ports-exhausted";
    /// A later fragment that came before its datagram's first, or whose first was not sent on.
    EarlyFragment = 19, "early-fragment";
    /// From an address or port that nobody can have: a group's, a loopback device's, the destination's own, port 0.
    HostileSource = 20, "hostile-source";
    /// An ICMP redirect about a translated flow: whoever believed it would lose the Service.
    IcmpRedirect = 21, "icmp-redirect";
    /// An ICMP error about a translated packet, translated as well.
    IcmpTranslated = 22, "icmp-translated";
    /// An echo request to a ClusterIP, answered.
    EchoAnswered = 23, "echo-answered";
    /// To be refused, but this processor has sent as many refusals this second as it may.
    RefusalsLimited = 24, "refusals-limited";
    /// A packet program's second part is not there: the packet was left alone.
    ProgramMissing = 25, "program-missing";
    /// A fragment of SCTP whose ports would change, or that would open an association: its checksum could not be made up for.
    SctpFragment = 26, "sctp-fragment";
    /// A frame with a VLAN tag: left alone. If it is for a VLAN of this host, that has a device of its own, which sees it next.
    VlanTagged = 27, "vlan-tagged";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions_and_words_differ() {
        for (position, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, position);
            assert!(Reason::ALL.iter().all(|other| other == reason || other.word() != reason.word()));
        }
    }
}
