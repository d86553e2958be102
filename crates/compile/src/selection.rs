//! Which of many a selector picks, without looking at all of them.
//!
//! Ten thousand Services over a hundred thousand pods are a billion comparisons the plain way: an index by label
//! leaves those that can match.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::istio::selects;

/// The labels of an object: none and empty are the same.
pub(crate) type Labels = Option<BTreeMap<String, String>>;

/// Things with labels, in the order in which they were added.
#[derive(Debug)]
pub(crate) struct ByLabel<'a, T> {
    all: Vec<(&'a Labels, T)>,
    /// Positions in `all`, ascending.
    by_label: HashMap<(&'a str, &'a str), Vec<usize>>,
}

impl<T> Default for ByLabel<'_, T> {
    fn default() -> Self {
        Self { all: Vec::new(), by_label: HashMap::new() }
    }
}

impl<'a, T: Copy> ByLabel<'a, T> {
    pub(crate) fn add(&mut self, labels: &'a Labels, value: T) {
        for (name, label) in labels.iter().flatten() {
            self.by_label.entry((name, label)).or_default().push(self.all.len());
        }
        self.all.push((labels, value));
    }

    /// Everything that has all labels of the selector; an empty one selects everything.
    pub(crate) fn selected<'s>(
        &'s self,
        selector: &'s BTreeMap<String, String>,
    ) -> impl Iterator<Item = T> + 's {
        let with = |(name, label): (&'s String, &'s String)| {
            self.by_label.get(&(name.as_str(), label.as_str())).map_or(&[][..], Vec::as_slice)
        };
        // The rarest of the labels leaves the fewest to look at.
        let some = selector.iter().map(with).min_by_key(|positions| positions.len());
        let everything = if some.is_none() { 0..self.all.len() } else { 0..0 };
        let positions = some.unwrap_or_default().iter().copied().chain(everything);
        let candidates = positions.filter_map(|position| self.all.get(position));
        candidates.filter(|(labels, _)| selects(selector, labels.as_ref())).map(|(_, value)| *value)
    }
}

/// Whether a selector of Kubernetes' own, with its expressions, picks these labels.
pub(crate) fn fits(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    let expressions = selector.match_expressions.iter().flatten();
    selector.match_labels.as_ref().is_none_or(|wanted| selects(wanted, labels))
        && expressions.into_iter().all(|e| {
            let value = labels.and_then(|l| l.get(&e.key));
            let listed = value.is_some_and(|v| e.values.iter().flatten().any(|w| w == v));
            match e.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_as_looking_at_all() {
        let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let things: Vec<Labels> = vec![
            None,
            Some(labels(&[])),
            Some(labels(&[("app", "a")])),
            Some(labels(&[("app", "a"), ("v", "1")])),
            Some(labels(&[("app", "b"), ("v", "1")])),
        ];
        let mut index = ByLabel::default();
        for (number, labels) in things.iter().enumerate() {
            index.add(labels, number);
        }
        let check = |selector: &[(&str, &str)], want: &[usize]| {
            let selector = labels(selector);
            assert_eq!(index.selected(&selector).collect::<Vec<_>>(), want, "{selector:?}");
            let plain = things.iter().enumerate().filter(|(_, l)| selects(&selector, l.as_ref()));
            assert_eq!(plain.map(|(n, _)| n).collect::<Vec<_>>(), want, "{selector:?}");
        };
        check(&[], &[0, 1, 2, 3, 4]);
        check(&[("app", "a")], &[2, 3]);
        check(&[("app", "a"), ("v", "1")], &[3]);
        check(&[("v", "1")], &[3, 4]);
        check(&[("v", "2")], &[]);
        check(&[("app", "b"), ("x", "y")], &[]);
    }
}
