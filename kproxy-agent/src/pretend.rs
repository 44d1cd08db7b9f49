//! For tests: this kernel is taken for an older one, so that the ways around what that lacks are run where it can be
//! seen what comes of them. Not for operators: what a kernel has is found by trying.

use std::sync::OnceLock;

/// Names what is to be taken for missing, separated by commas.
const VARIABLE: &str = "KPROXY_TEST_WITHOUT";

/// Something that not every kernel has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Feature {
    /// TCX links (6.6).
    Tcx,
    /// `bpf_set_retval` in socket programs (5.18).
    SetRetval,
    /// SO_NETNS_COOKIE (5.14).
    NetnsCookie,
    /// Many map elements with one call (5.6).
    Batches,
}

impl Feature {
    const ALL: [(Self, &str); 4] = [
        (Self::Tcx, "tcx"),
        (Self::SetRetval, "set-retval"),
        (Self::NetnsCookie, "netns-cookie"),
        (Self::Batches, "batches"),
    ];
}

/// Whether this is to be taken for missing.
pub fn lacks(feature: Feature) -> bool {
    static MISSING: OnceLock<Vec<Feature>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        let names = std::env::var(VARIABLE).unwrap_or_default();
        let missing = parse(&names);
        if !missing.is_empty() {
            tracing::warn!("for a test, this kernel is taken for one without {names} ({VARIABLE})");
        }
        missing
    });
    missing.contains(&feature)
}

fn parse(names: &str) -> Vec<Feature> {
    let known =
        |name: &str| Feature::ALL.iter().find(|(_, known)| *known == name).map(|(feature, _)| *feature);
    names.split(',').filter_map(|name| known(name.trim())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        assert_eq!(parse("tcx, batches,nonsense"), [Feature::Tcx, Feature::Batches]);
        assert_eq!(parse(""), []);
        assert!(!lacks(Feature::Tcx), "unless somebody says so");
    }
}
