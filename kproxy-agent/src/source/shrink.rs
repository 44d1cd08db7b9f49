//! The rule against a list that came back short: most of what is there is only deleted after a second look.

/// A change that takes away no more objects than this is never doubted.
const ALWAYS_BELIEVED: usize = 10;

/// Whether a listing that lacks `missing` of the `known` objects is to be confirmed by a second one, before
/// anything is deleted: more than half of them, and more than ten.
pub(super) fn needs_confirmation(known: usize, missing: usize) -> bool {
    missing > ALWAYS_BELIEVED && missing > known / 2
}

#[cfg(test)]
mod tests {
    use super::needs_confirmation;

    #[test]
    fn only_the_loss_of_most_of_many_is_doubted() {
        for (known, missing, doubted) in [
            (0, 0, false),
            (10, 10, false),
            (11, 11, true),
            (100, 50, false),
            (100, 51, true),
            (10_000, 5_001, true),
        ] {
            assert_eq!(needs_confirmation(known, missing), doubted, "{missing} of {known}");
        }
    }
}
