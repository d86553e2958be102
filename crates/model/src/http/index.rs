//! Which matches of a route set a path may fit, without looking at each: exact paths and prefixes by hash, what can only be
//! tried in a list of its own. Ten thousand prefixes cost a handful of look-ups, one per length that occurs.
//!
//! Invariant: [`PathIndex::candidates`] yields every match whose path fits, each place in ascending order; it may yield
//! some that do not fit.

use rustc_hash::FxHashMap;

use super::PathMatch;
use crate::Str;

/// See the module. Positions are those of the matches the index was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathIndex {
    exact: FxHashMap<Str, Vec<u32>>,
    prefix: FxHashMap<Str, Vec<u32>>,
    /// Lengths of the prefixes, each once, ascending.
    lengths: Vec<usize>,
    /// Matches of any path, patterns, and those that ignore case.
    tried: Vec<u32>,
}

impl PathIndex {
    pub fn new<'a>(paths: impl IntoIterator<Item = &'a PathMatch>) -> Self {
        let mut index = Self::default();
        for (position, path) in (0_u32..).zip(paths) {
            match path {
                PathMatch::Exact(text) => {
                    index.exact.entry(text.clone()).or_default().push(position);
                }
                PathMatch::Segments(text) | PathMatch::Prefix(text) => {
                    index.prefix.entry(text.clone()).or_default().push(position);
                    index.lengths.push(text.len());
                }
                PathMatch::Any
                | PathMatch::ExactIgnoringCase(_)
                | PathMatch::PrefixIgnoringCase(_)
                | PathMatch::Regex(_)
                | PathMatch::GrpcMethod(_) => index.tried.push(position),
            }
        }
        index.lengths.sort_unstable();
        index.lengths.dedup();
        index
    }

    /// Lists of positions, each ascending, that together hold every match whose path may fit.
    pub fn candidates<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a [u32]> {
        let prefixes = self
            .lengths
            .iter()
            .take_while(|length| **length <= path.len())
            .filter_map(|length| self.prefix.get(path.get(..*length)?));
        self.exact
            .get(path)
            .into_iter()
            .chain(prefixes)
            .map(Vec::as_slice)
            .chain(std::iter::once(self.tried.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_may_fit() {
        let paths = [
            PathMatch::Segments("/a".into()),
            PathMatch::Exact("/a/b".into()),
            PathMatch::Any,
            PathMatch::Prefix("/a/b".into()),
            PathMatch::Exact("/a/b".into()),
        ];
        let index = PathIndex::new(&paths);
        let found = |path: &str| {
            let mut all: Vec<u32> = index.candidates(path).flatten().copied().collect();
            all.sort_unstable();
            all
        };
        assert_eq!(found("/a/b"), [0, 1, 2, 3, 4]);
        assert_eq!(found("/a/bc"), [0, 2, 3]);
        assert_eq!(found("/ab"), [0, 2], "a prefix of whole segments is only a candidate");
        assert_eq!(found("/é"), [2]);
        assert_eq!(found(""), [2]);
    }
}
