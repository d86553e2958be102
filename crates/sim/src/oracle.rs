//! May they? Answered a second time, from what users wrote and not from what the mesh made of it.
//!
//! A proxy that is between two acknowledged versions holds a *mix*: addresses of one version, and policies of another,
//! with those that are to be removed still there; nothing promises that two types arrive at once. Of an
//! acknowledged version the mix is that one content, and the answer is exact. Where the control plane is wrong
//! about what it sent, each object may be of any version since, and the answer is no only if all say no.

use std::net::IpAddr;

use model::Identity;

use crate::content::{AppMode, Content, Mode, NAMESPACES, PORTS, Pod, Policy, Rule, Scope, Who};

/// What a proxy holds.
#[derive(Clone, Debug)]
pub(crate) struct Mix<'a> {
    /// What it was sent since the last acknowledged content, with that one.
    pub(crate) sent: Vec<&'a Content>,
    /// The content that its policies are of, but for those that are to be removed. `None`: of any that it was sent.
    pub(crate) policies: Option<&'a Content>,
    /// The same of its addresses, removals included.
    pub(crate) addresses: Option<&'a Content>,
}

impl<'a> Mix<'a> {
    /// One content and nothing else.
    pub(crate) fn of(content: &'a Content) -> Self {
        Self { sent: vec![content], policies: Some(content), addresses: Some(content) }
    }

    /// The contents that addresses may be of.
    pub(crate) fn places(&self) -> Vec<&'a Content> {
        self.addresses.map_or_else(|| self.sent.clone(), |one| vec![one])
    }
}

/// A connection that arrives at a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// The place of the pod.
    pub(crate) to: usize,
    pub(crate) port: u16,
    pub(crate) source: IpAddr,
    /// `None`: plaintext.
    pub(crate) peer: Option<Identity>,
}

/// Why a request must not have been let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// mTLS is demanded.
    Plaintext,
    Policy,
    /// No version knows the pod.
    Unknown,
}

/// What the contents of a mix say of a request. `lives`: it was let in before, and a policy that it needs and that
/// is in flight does not end it.
pub(crate) fn judge(mix: &Mix<'_>, request: &Request, lives: bool) -> Result<(), Denied> {
    let mut worst = Denied::Unknown;
    for at in mix.places() {
        let Some(pod) = &at.pods[request.to] else { continue };
        if request.peer.is_none() && !plaintext_taken(mix, at, pod, request.port) {
            worst = Denied::Plaintext;
            continue;
        }
        if policies_allow(mix, at, pod, request, lives) {
            return Ok(());
        }
        worst = Denied::Policy;
    }
    Err(worst)
}

/// Whether the pod takes plaintext on this port. Its labels are those of `at`; what they refer to is as the
/// policies are, or on its way out.
fn plaintext_taken(mix: &Mix<'_>, at: &Content, pod: &Pod, port: u16) -> bool {
    let place = mode_of(at, pod);
    let takes = |content: &Content| !demands(content, place, pod.namespace, port);
    match mix.policies {
        Some(now) if place == ModeOf::Wider || now.app_mode[pod.namespace].is_some() => {
            takes(now) || takes(at)
        }
        _ => mix.sent.iter().any(|content| takes(content)) || takes(at),
    }
}

/// Which PeerAuthentication decides about a pod.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ModeOf {
    App,
    Wider,
}

fn mode_of(content: &Content, pod: &Pod) -> ModeOf {
    match &content.app_mode[pod.namespace] {
        Some(app) if app.app == pod.app => ModeOf::App,
        _ => ModeOf::Wider,
    }
}

fn demands(content: &Content, place: ModeOf, namespace: usize, port: u16) -> bool {
    let wide = match (content.namespace_mode[namespace], content.mesh_mode) {
        (Mode::Unset, mesh) => mesh == Mode::Strict,
        (mode, _) => mode == Mode::Strict,
    };
    let (ModeOf::App, Some(AppMode { mode, port: of_port, .. })) =
        (place, &content.app_mode[namespace])
    else {
        return wide;
    };
    let main = if *mode == Mode::Unset { wide } else { *mode == Mode::Strict };
    match of_port {
        Mode::Unset => main,
        of_port if port == PORTS[1] => *of_port == Mode::Strict,
        _ => main,
    }
}

/// What one policy object may do to a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    Nothing,
    Denies,
    Allows,
    /// An ALLOW policy that does not match: somebody must allow.
    Asks,
}

fn policies_allow(mix: &Mix<'_>, at: &Content, pod: &Pod, request: &Request, lives: bool) -> bool {
    let (mut may_allow, mut may_be_free) = (false, true);
    for key in keys(mix) {
        let effects = effects(mix, (at, pod), request, &key, lives);
        if effects.iter().all(|effect| *effect == Effect::Denies) {
            return false;
        }
        may_allow |= effects.contains(&Effect::Allows);
        may_be_free &= effects.contains(&Effect::Nothing);
    }
    may_allow || may_be_free
}

type Key = (&'static str, String);

fn keys(mix: &Mix<'_>) -> Vec<Key> {
    let contents = mix.sent.iter().copied().chain(mix.policies);
    let mut keys: Vec<_> = contents.flat_map(policies).map(|(key, _)| key).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

fn policies(content: &Content) -> impl Iterator<Item = (Key, &Policy)> {
    let places = (0..).zip(&content.policies);
    places.filter_map(|(place, policy)| Some((policy.as_ref()?.key(place), policy.as_ref()?)))
}

/// What each version of one object does; a selector selects as `at` says. An object that the pod refers to and that
/// is not there does nothing for what lives, and lets nothing new in.
fn effects(
    mix: &Mix<'_>,
    (at, pod): (&Content, &Pod),
    request: &Request,
    key: &Key,
    lives: bool,
) -> Vec<Effect> {
    let of = |content: &Content| {
        let found = policies(content).find(|(k, _)| k == key);
        found.map(|(_, policy)| policy.clone())
    };
    let selected = of(at).is_some_and(|policy| policy.scope == Scope::App(pod.namespace, pod.app));
    let effect = |content: &Content| {
        let Some(policy) = of(content) else {
            return if selected && !lives { Effect::Denies } else { Effect::Nothing };
        };
        let applies = match policy.scope {
            Scope::Mesh => true,
            Scope::Namespace(ns) => ns == pod.namespace,
            Scope::App(..) => selected,
        };
        let matches = policy.rules.iter().any(|rule| rule_matches(rule, request));
        match (applies, policy.deny, matches) {
            (false, _, _) | (true, true, false) => Effect::Nothing,
            (true, true, true) => Effect::Denies,
            (true, false, true) => Effect::Allows,
            (true, false, false) => Effect::Asks,
        }
    };
    match mix.policies.filter(|now| of(now).is_some()) {
        Some(now) => vec![effect(now)],
        None => mix.sent.iter().copied().chain(mix.policies).map(effect).collect(),
    }
}

fn rule_matches(rule: &Rule, request: &Request) -> bool {
    let who = |namespace: usize, account: usize| {
        let account = ["web", "db"][account];
        request.peer.as_ref().is_some_and(|peer| {
            *peer.namespace == *NAMESPACES[namespace] && *peer.service_account == *account
        })
    };
    let from = match rule.from {
        None => true,
        Some(Who::Principal(namespace, account)) => who(namespace, account),
        Some(Who::NotPrincipal(namespace, account)) => !who(namespace, account),
        Some(Who::Namespace(namespace)) => {
            request.peer.as_ref().is_some_and(|peer| *peer.namespace == *NAMESPACES[namespace])
        }
        Some(Who::Address(ip)) => request.source == ip,
    };
    from && rule.port.is_none_or(|port| port == request.port)
}
