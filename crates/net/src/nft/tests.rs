//! Our tables as the real `nft` program sees them, and what is noticed when somebody edits them.

use std::process::Command;

use super::*;
use crate::capture::{self, Dns, State};
use crate::testing::in_user_ns;

/// Runs the real `nft`: these tests need it, though the program does not.
pub(crate) fn nft(args: &[&str]) -> String {
    let out = Command::new("nft").args(args).output();
    let out = out.expect("the tests compare with the real nft program: install nftables");
    assert!(out.status.success(), "nft {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The ruleset as `nft` prints it, without comments and blank lines.
pub(crate) fn ruleset() -> Vec<String> {
    let plain = |line: &str| line.split(" comment ").next().unwrap_or_default().trim().to_owned();
    let all = nft(&["list", "ruleset"]);
    all.lines().map(plain).filter(|l| !l.is_empty() && !l.starts_with("comment")).collect()
}

#[test]
fn capture_reads_as_the_design_says() {
    in_user_ns(|| {
        let both = [
            (Dns::Captured, include_str!("capture.expected")),
            (Dns::Left, include_str!("capture-without-dns.expected")),
        ];
        for (dns, want) in both.into_iter().chain(both) {
            replace(&capture::table(State::Captured, dns)).unwrap();
            assert_eq!(ruleset(), want.lines().map(str::trim).collect::<Vec<_>>());
            assert!(is_intact(&capture::table(State::Captured, dns)).unwrap());
        }
        delete(Family::Inet, capture::TABLE).unwrap();
        delete(Family::Inet, capture::TABLE).unwrap();
        assert_eq!(ruleset(), [""; 0]);
        assert!(!is_intact(&capture::table(State::Captured, Dns::Captured)).unwrap());
    });
}

#[test]
fn edits_by_hand_are_noticed_and_repaired() {
    in_user_ns(|| {
        let ours = capture::table(State::Captured, Dns::Captured);
        replace(&ours).unwrap();
        // Handles count up from the beginning whenever the table is new.
        let last = nft(&["-a", "list", "chain", "inet", "ambit", "output"]);
        let last = last.lines().rfind(|l| l.contains("comment")).unwrap();
        let last = last.rsplit(' ').next().unwrap();
        let edits: [&[&str]; 8] = [
            &["flush", "ruleset"],
            &["flush", "table", "inet", "ambit"],
            &["flush", "chain", "inet", "ambit", "output"],
            &["insert", "rule", "inet", "ambit", "output", "accept"],
            &["add", "rule", "inet", "ambit", "prerouting", "drop"],
            &["delete", "rule", "inet", "ambit", "output", "handle", last],
            &["replace", "rule", "inet", "ambit", "output", "handle", last, "accept"],
            &["add", "chain", "inet", "ambit", "output", "{ policy drop; }"],
        ];
        for edit in edits {
            delete(Family::Inet, capture::TABLE).unwrap();
            replace(&ours).unwrap();
            assert!(is_intact(&ours).unwrap());
            nft(edit);
            assert!(!is_intact(&ours).unwrap(), "{edit:?} went unnoticed");
            replace(&ours).unwrap();
            assert!(is_intact(&ours).unwrap());
        }
        nft(&["add", "table", "inet", "other"]);
        nft(&["add", "chain", "inet", "other", "c"]);
        assert!(is_intact(&ours).unwrap(), "other tables are none of our business");
    });
}

#[test]
fn a_refused_table_leaves_the_old_one_and_says_which_rule() {
    in_user_ns(|| {
        let good = capture::table(State::Captured, Dns::Captured);
        replace(&good).unwrap();
        let mut bad = good.clone();
        bad.chains[1].rules.push(Rule::new("nowhere").verdict(Verdict::Jump("missing".into())));
        let e = replace(&bad).unwrap_err();
        assert!(e.object.contains("chain output rule \"nowhere\""), "{e}");
        assert_eq!(e.source.errno, Errno::ENOENT, "{e}");
        assert!(is_intact(&good).unwrap());
        // TPROXY works in prerouting only.
        let mut bad = good;
        bad.chains[1].rules.push(Rule::new("wrong hook").protocol(TCP).tproxy(1));
        let e = replace(&bad).unwrap_err();
        assert!(e.hint.as_ref().is_some_and(|h| h.contains("nft_tproxy")), "{e}");
    });
}
