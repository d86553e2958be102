//! Deployments to pods: how many, from which template, under which names.
//!
//! A name is `DEPLOYMENT-TEMPLATE-POD`, where TEMPLATE follows from the pod template and POD from the
//! pod's index: the same YAML always gives the same names, and a changed template gives new ones, which is
//! what makes a rollout.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use model::Str;

use crate::diagnostics::{Code, Diagnostic};
use crate::object::Sourced;
use crate::selection::fits;

/// Most pods of one Deployment: a slip of the keyboard must not fill the machine.
const MAX_REPLICAS: i32 = 500;
/// Host names are labels of at most 63 characters: what is left after two hashes and dashes.
const MAX_BASE: usize = 63 - 1 - TEMPLATE_LETTERS - 1 - POD_LETTERS;
const TEMPLATE_LETTERS: usize = 9;
const POD_LETTERS: usize = 5;

/// A pod that a Deployment wants.
pub(super) struct Wanted {
    pub pod: Pod,
    pub hash: String,
}

/// The pods of a Deployment, or what is wrong with it. `taken`: names that are in use.
pub(super) fn expand(
    (namespace, name): &(Str, Str),
    sourced: &Sourced<Deployment>,
    taken: &BTreeSet<(Str, Str)>,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Wanted> {
    let Some(spec) = &sourced.value.spec else {
        diagnostics.push(Diagnostic::error(Code::InvalidField, "has no spec").field("spec"));
        return Vec::new();
    };
    if let Err(diagnostic) = check(spec) {
        diagnostics.push(*diagnostic);
        return Vec::new();
    }
    let mut replicas = spec.replicas.unwrap_or(1);
    if replicas > MAX_REPLICAS {
        let message =
            format!("{replicas} replicas are more than {MAX_REPLICAS}, the most we start");
        let d = Diagnostic::error(Code::LimitExceeded, message).field("spec.replicas");
        diagnostics.push(d);
        replicas = MAX_REPLICAS;
    }
    let hash = hash_of(&spec.template);
    let template_name = letters(hash, TEMPLATE_LETTERS);
    let mut base = name.get(..MAX_BASE).unwrap_or(name);
    base = base.trim_end_matches(['-', '.']);
    let mut names = BTreeSet::new();
    let mut wanted = Vec::new();
    for index in 0..replicas {
        let candidates = (0_u32..).map(|attempt| {
            let seed = format!("{namespace}/{name}/{template_name}/{index}/{attempt}");
            format!("{base}-{template_name}-{}", letters(fnv(seed.as_bytes()), POD_LETTERS))
        });
        let is_free = |candidate: &String| {
            !names.contains(candidate)
                && !taken.contains(&(namespace.clone(), candidate.as_str().into()))
        };
        // 14 million names for at most a few hundred pods: the second attempt is rare already.
        let Some(pod_name) = candidates.take(100).find(is_free) else { continue };
        names.insert(pod_name.clone());
        let pod = pod(namespace, name, &pod_name, &template_name, spec);
        wanted.push(Wanted { pod, hash: template_name.clone() });
    }
    wanted
}

fn check(spec: &DeploymentSpec) -> Result<(), Box<Diagnostic>> {
    let labels = spec.template.metadata.as_ref().and_then(|m| m.labels.as_ref());
    if spec.template.spec.is_none() {
        let message = "the template has no spec: there is nothing to run";
        return Err(Box::new(
            Diagnostic::error(Code::InvalidField, message).field("spec.template"),
        ));
    }
    let empty = spec.selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
        && spec.selector.match_expressions.as_ref().is_none_or(Vec::is_empty);
    if empty || !fits(&spec.selector, labels) {
        let message =
            "the selector does not select the labels of the template; no pods are started";
        let d = Diagnostic::error(Code::InvalidField, message).field("spec.selector");
        return Err(Box::new(d.help("repeat the labels of spec.template.metadata.labels")));
    }
    Ok(())
}

fn pod(
    namespace: &str,
    deployment: &str,
    name: &str,
    template: &str,
    spec: &DeploymentSpec,
) -> Pod {
    let from = spec.template.metadata.clone().unwrap_or_default();
    let mut labels = from.labels.unwrap_or_default();
    labels.insert("pod-template-hash".to_owned(), template.to_owned());
    Pod {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels),
            annotations: from.annotations,
            owner_references: Some(vec![OwnerReference {
                api_version: "apps/v1".to_owned(),
                kind: "Deployment".to_owned(),
                name: deployment.to_owned(),
                controller: Some(true),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: spec.template.spec.clone(),
        status: None,
    }
}

/// A number that changes when the value does.
pub(super) fn hash_of(value: &impl serde::Serialize) -> u64 {
    // Through a tree with ordered keys: the text is the same for equal values.
    let tree = serde_json::to_value(value).unwrap_or_default();
    fnv(tree.to_string().as_bytes())
}

/// FNV-1a. Nobody gains by a collision: at worst a change of one's own template is overlooked.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A number in the letters that Kubernetes uses: none that could spell a word.
pub(super) fn letters(mut number: u64, count: usize) -> String {
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    // FNV's low bits are its weakest: fold the high ones in.
    number ^= number >> 32;
    let mut text = String::with_capacity(count);
    for _ in 0..count {
        let digit = usize::try_from(number % 27).unwrap_or(0);
        text.push(char::from(LETTERS[digit]));
        number /= 27;
    }
    text
}
