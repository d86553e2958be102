//! How much the routes of one Service may hold: whoever makes routes keeps to it, and a proxy reads no more.
//!
//! Invariant: [`Amount::bytes`] is no less than what the routes take on the wire.

use rustc_hash::FxHashSet;

use super::{
    Audience, Cors, Fault, FieldMatch, Filter, HeaderEdits, OriginMatch, PathMatch, PathRewrite,
    Pattern, Rewrite, RouteMatch, RouteRule, SourceMatch, Target, TextMatch,
};
use crate::{ServiceKey, Str};

/// Bytes of the routes of one Service: ten of the largest objects that Kubernetes stores (1.5 MiB).
pub const MAX_ROUTES_BYTES: usize = 16 << 20;
/// Sets of one Service: one for everybody and one for each namespace with routes of its own, for each group of ports.
/// Kubernetes is built for ten thousand namespaces.
pub const MAX_SETS: usize = 16_384;
/// Rules, and matches, of one Service. Generated prefixes come in tens of thousands; one takes less than a KiB of memory.
pub const MAX_RULES: usize = 65_536;
/// Entries of a list that is walked for a request: headers, filters, backends. Gateway API allows 64 at most, Istio says
/// nothing.
pub const MAX_LIST: usize = 1024;
/// Different patterns of one Service. Most take a few KiB, but each may take half a MiB ([`Pattern`]).
pub const MAX_PATTERNS: usize = 1024;
/// Ports of one Service: all there are.
pub const MAX_PORTS: usize = 65_535;

/// What a value takes beside its texts: a tag and a length each for itself and for what it stands in, and a number.
const OVERHEAD: usize = 32;
/// What a text takes beside its bytes: a tag and a length.
const TEXT: usize = 8;

/// How much some routes of one Service hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    pub sets: usize,
    pub rules: usize,
    pub matches: usize,
    /// On the wire, at most.
    pub bytes: usize,
    /// The longest list that is walked for a request.
    pub list: usize,
    /// The texts of the patterns, each once.
    pub patterns: FxHashSet<Str>,
}

impl Amount {
    /// What the Service's own name and ports take.
    pub fn of_service(service: &ServiceKey, ports: usize) -> Self {
        let mut amount = Self::default();
        amount.service(service);
        amount.bytes += ports * OVERHEAD;
        amount
    }

    /// Adds a set, without what is in it.
    pub fn set(&mut self, audience: &Audience, ports: usize) {
        self.sets += 1;
        self.bytes += OVERHEAD + ports * TEXT;
        if let Audience::Namespace(namespace) = audience {
            self.text(namespace);
        }
    }

    /// Adds what is in a set.
    pub fn content<'a>(
        &mut self,
        rules: impl IntoIterator<Item = &'a RouteRule>,
        matches: impl IntoIterator<Item = &'a RouteMatch>,
    ) {
        for rule in rules {
            self.rules += 1;
            self.rule(rule);
        }
        for one in matches {
            self.matches += 1;
            self.one_match(one);
        }
    }

    /// Adds what another holds.
    pub fn add(&mut self, other: &Self) {
        self.sets += other.sets;
        self.rules += other.rules;
        self.matches += other.matches;
        self.bytes += other.bytes;
        self.list = self.list.max(other.list);
        self.patterns.extend(other.patterns.iter().cloned());
    }

    /// What there is too much of.
    pub fn excess(&self) -> Option<String> {
        let amounts = [
            ("sets of rules", self.sets, MAX_SETS),
            ("rules", self.rules, MAX_RULES),
            ("matches", self.matches, MAX_RULES),
            ("bytes", self.bytes, MAX_ROUTES_BYTES),
            ("different patterns", self.patterns.len(), MAX_PATTERNS),
            ("entries in one list", self.list, MAX_LIST),
        ];
        let over = amounts.into_iter().find(|(_, n, most)| n > most);
        over.map(|(what, n, most)| format!("{n} {what}, at most {most} are taken"))
    }

    /// Millionths of all there may be, of what it holds most of.
    pub fn share(&self) -> usize {
        let parts = [
            (self.sets, MAX_SETS),
            (self.rules, MAX_RULES),
            (self.matches, MAX_RULES),
            (self.bytes, MAX_ROUTES_BYTES),
            (self.patterns.len(), MAX_PATTERNS),
        ];
        let millionths = |(n, most): (usize, usize)| n.saturating_mul(1_000_000) / most;
        parts.into_iter().map(millionths).max().unwrap_or_default()
    }

    fn text(&mut self, text: &str) {
        self.bytes += TEXT + text.len();
    }

    fn texts(&mut self, all: &[Str]) {
        self.list(all.len());
        all.iter().for_each(|text| self.text(text));
    }

    fn list(&mut self, length: usize) {
        self.list = self.list.max(length);
    }

    fn pattern(&mut self, pattern: &Pattern) {
        self.text(pattern.text());
        if !self.patterns.contains(pattern.text()) {
            self.patterns.insert(pattern.text().clone());
        }
    }

    fn service(&mut self, service: &ServiceKey) {
        self.bytes += OVERHEAD;
        self.text(&service.namespace);
        self.text(&service.hostname);
    }

    fn rule(&mut self, rule: &RouteRule) {
        let RouteRule { route, name, provenance, filters, backends, timeouts: _ } = rule;
        self.bytes += 2 * OVERHEAD;
        for text in [route, name, &provenance.object, &provenance.field, &provenance.origin] {
            self.text(text);
        }
        self.filters(filters);
        self.list(backends.len());
        for backend in backends {
            self.bytes += OVERHEAD;
            self.target(&backend.target);
            self.filters(&backend.filters);
        }
    }

    fn target(&mut self, target: &Target) {
        self.bytes += OVERHEAD;
        match target {
            Target::Service { service, port: _, subset } => {
                self.service(service);
                subset.iter().for_each(|subset| self.text(subset));
            }
            Target::Invalid { message } => self.text(message),
        }
    }

    fn filters(&mut self, filters: &[Filter]) {
        self.list(filters.len());
        for filter in filters {
            self.bytes += 2 * OVERHEAD;
            match filter {
                Filter::RequestHeaders(edits) | Filter::ResponseHeaders(edits) => self.edits(edits),
                Filter::Rewrite(Rewrite { host, path }) => {
                    host.iter().for_each(|host| self.text(host));
                    self.rewrite(path.as_ref());
                }
                Filter::Redirect(redirect) => {
                    redirect.scheme.iter().chain(&redirect.host).for_each(|text| self.text(text));
                    self.rewrite(redirect.path.as_ref());
                }
                Filter::Mirror(mirror) => self.target(&mirror.target),
                Filter::Cors(cors) => self.cors(cors),
                Filter::Fault(fault) => self.fault(fault),
                Filter::Respond(response) => self.text(&response.body),
                Filter::Fail { reason, message } => {
                    self.text(reason.code());
                    self.text(message);
                }
            }
        }
    }

    fn edits(&mut self, edits: &HeaderEdits) {
        let HeaderEdits { remove, set, add } = edits;
        self.texts(remove);
        for pairs in [set, add] {
            self.list(pairs.len());
            for (name, value) in pairs {
                self.bytes += OVERHEAD;
                self.text(name);
                self.text(value);
            }
        }
    }

    fn rewrite(&mut self, rewrite: Option<&PathRewrite>) {
        self.bytes += OVERHEAD;
        match rewrite {
            None => {}
            Some(PathRewrite::Full(s) | PathRewrite::Segments(s) | PathRewrite::Text(s)) => {
                self.text(s);
            }
            Some(PathRewrite::Regex { pattern, substitution }) => {
                self.pattern(pattern);
                self.text(substitution);
            }
        }
    }

    fn cors(&mut self, cors: &Cors) {
        self.list(cors.allow_origins.len());
        for origin in &cors.allow_origins {
            self.bytes += OVERHEAD;
            match origin {
                OriginMatch::Any => {}
                OriginMatch::Exact(s) | OriginMatch::Prefix(s) => self.text(s),
                OriginMatch::Wildcard { before, after } => {
                    self.text(before);
                    self.text(after);
                }
                OriginMatch::Regex(pattern) => self.pattern(pattern),
            }
        }
        for texts in [&cors.allow_methods, &cors.allow_headers, &cors.expose_headers] {
            self.texts(texts);
        }
    }

    fn fault(&mut self, fault: &Fault) {
        self.bytes += 4 * OVERHEAD;
        self.fields(&fault.headers);
        self.source(&fault.source);
    }

    fn one_match(&mut self, one: &RouteMatch) {
        self.bytes += 2 * OVERHEAD;
        match &one.path {
            PathMatch::Any => {}
            PathMatch::Exact(s)
            | PathMatch::Segments(s)
            | PathMatch::Prefix(s)
            | PathMatch::ExactIgnoringCase(s)
            | PathMatch::PrefixIgnoringCase(s)
            | PathMatch::GrpcMethod(s) => self.text(s),
            PathMatch::Regex(pattern) => self.pattern(pattern),
        }
        for value in [&one.method, &one.scheme, &one.authority].into_iter().flatten() {
            self.value(value);
        }
        for fields in [&one.headers, &one.without_headers, &one.query] {
            self.fields(fields);
        }
        self.source(&one.source);
    }

    fn fields(&mut self, fields: &[FieldMatch]) {
        self.list(fields.len());
        for field in fields {
            self.text(&field.name);
            self.value(&field.value);
        }
    }

    fn value(&mut self, value: &TextMatch) {
        self.bytes += OVERHEAD;
        match value {
            TextMatch::Exact(s)
            | TextMatch::ExactIgnoringCase(s)
            | TextMatch::Prefix(s)
            | TextMatch::PrefixIgnoringCase(s) => self.text(s),
            TextMatch::Regex(pattern) => self.pattern(pattern),
            TextMatch::Present => {}
        }
    }

    fn source(&mut self, source: &SourceMatch) {
        self.bytes += OVERHEAD;
        self.texts(&source.namespaces);
        self.list(source.identities.len());
        for identity in &source.identities {
            // spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT
            self.bytes += OVERHEAD;
            self.text(&identity.trust_domain);
            self.text(&identity.namespace);
            self.text(&identity.service_account);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_there_is_too_much_of() {
        let check = |change: &dyn Fn(&mut Amount), want: Option<&str>| {
            let mut amount = Amount::default();
            change(&mut amount);
            assert_eq!(amount.excess().as_deref(), want);
        };
        check(&|a| a.rules = MAX_RULES, None);
        check(&|a| a.rules = MAX_RULES + 1, Some("65537 rules, at most 65536 are taken"));
        check(&|a| a.list = MAX_LIST + 1, Some("1025 entries in one list, at most 1024 are taken"));
        let one = RouteMatch {
            path: PathMatch::Regex(Pattern::new("a+").unwrap()),
            method: Some(TextMatch::Regex(Pattern::new("a+").unwrap())),
            ..RouteMatch::default()
        };
        let mut amount = Amount::default();
        amount.set(&Audience::Everybody, 1);
        amount.content([], [&one, &one]);
        assert_eq!((amount.sets, amount.matches, amount.patterns.len()), (1, 2, 1));
        assert_eq!(amount.share(), 1_000_000 / MAX_PATTERNS);
    }
}
