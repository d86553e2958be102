//! The page `docs/reasons.md`, made from the closed list in `model`.

use std::fmt::Write as _;

use model::Reason;

/// The text that `docs/reasons.md` must have.
pub fn reasons_page() -> String {
    let mut page = String::from(HEAD);
    for reason in Reason::ALL {
        // Writing to a String cannot fail.
        let _ = write!(
            page,
            "\n## `{}`\n\n{}\n\n*What to do*: {} Istio's `response_flags`: `{}`.\n",
            reason.code(),
            reason.meaning(),
            reason.help(),
            reason.response_flags(),
        );
    }
    page
}

const HEAD: &str = "\
# Why was my connection refused?

Every refusal and every loss of a connection that the mesh causes or sees has one code from this list. The code is
the same in the access log (`reason=`), in the metric label, in the header `x-ambit-reason` and in the output of `meshctl`.

<!-- Made from crates/model/src/reason.rs: TIDY_WRITE=1 cargo test -p tidy --test docs -->
";
