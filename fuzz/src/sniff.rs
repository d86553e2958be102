//! The first bytes of a connection on a port of which nobody said what it speaks.

use waypoint::sniff::{MAX_LINE, SERVER_WORDS, judge, judge_version, server_said};

use crate::planted;

/// The bytes as a client's, and as a server's that speaks first.
pub fn sniff(data: &[u8]) {
    whatever_the_pieces(data, judge);
    whatever_the_pieces(data, judge_version);
    whatever_the_pieces(data, server_said);
    planted::spoken(data, judge(data));
    // Nobody is waited for, or kept in memory, without an end.
    let long = |length| data.iter().copied().cycle().take(length).collect::<Vec<u8>>();
    if !data.is_empty() && judge(data).is_none() {
        assert!(judge(&long(MAX_LINE + 1)).is_some(), "the beginning has no end");
    }
    assert!(data.is_empty() || server_said(&long(SERVER_WORDS)).is_some(), "nor has a server's");
}

/// The first verdict on a part of the bytes is the verdict on all of them.
fn whatever_the_pieces<T: PartialEq + std::fmt::Debug>(data: &[u8], judge: fn(&[u8]) -> Option<T>) {
    let whole = judge(data);
    let mut first = None;
    // Every cut is tried where cuts are that matter, and some of those behind.
    let cuts = (0..data.len()).filter(|at| *at < 256 || at % 61 == 0);
    for (at, verdict) in cuts.filter_map(|at| Some((at, judge(&data[..at])?))) {
        assert_eq!(Some(&verdict), whole.as_ref(), "at {at}, {:?} first", first.unwrap_or(at));
        first.get_or_insert(at);
    }
}
