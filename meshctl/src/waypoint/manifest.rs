//! The YAML of a waypoint, as `apply` and `generate` write it. Pure.

use compile::waypoints::{
    HBONE, HBONE_PORT, TrafficFor, USE_WAYPOINT, WAYPOINT_CLASS, WAYPOINT_FOR,
};
use compile::{Body, ParsedFile, parse_file};

/// The first line of a file that `apply` wrote.
pub(super) const MARK: &str =
    "# Written by `meshctl waypoint apply`; `meshctl waypoint delete` takes it away.";

/// A waypoint that somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) namespace: String,
    pub(super) name: String,
    /// `None`: what its class says.
    pub(super) traffic: Option<TrafficFor>,
    /// With the Namespace, labelled for the waypoint, because no other file has it.
    pub(super) with_namespace: bool,
}

impl Manifest {
    pub(super) fn yaml(&self) -> String {
        let Self { namespace, name, traffic, with_namespace } = self;
        let (namespace, name) = (word(namespace), word(name));
        let labels = traffic
            .map(|traffic| format!("  labels:\n    {WAYPOINT_FOR}: {traffic}\n"))
            .unwrap_or_default();
        let mut text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata:\n  name: {name}\n  namespace: {namespace}\n\
             {labels}spec:\n  gatewayClassName: {WAYPOINT_CLASS}\n  listeners:\n  - name: mesh\n    port: {HBONE_PORT}\n    \
             protocol: {HBONE}\n"
        );
        if *with_namespace {
            text.push_str(&format!(
                "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n  labels:\n    {USE_WAYPOINT}: {name}\n"
            ));
        }
        text
    }

    /// As a file.
    pub(super) fn file(&self) -> String {
        format!("{MARK}\n{}", self.yaml())
    }

    pub(super) fn file_name(&self) -> String {
        format!("waypoint-{}-{}.yaml", self.namespace, self.name)
    }

    /// What a file was made from, if it is as `apply` wrote it.
    pub(super) fn of_file(text: &str) -> Option<Self> {
        if !text.starts_with(MARK) {
            return None;
        }
        let ParsedFile { objects, .. } = parse_file("", text);
        let gateways = objects.iter().filter_map(|o| match &o.body {
            Body::Gateway(gateway) => Some((o, gateway)),
            _ => None,
        });
        let (object, gateway) = gateways.into_iter().next()?;
        let labels = gateway.metadata.labels.as_ref();
        let label = labels.and_then(|l| l.get(WAYPOINT_FOR));
        let manifest = Self {
            namespace: object.namespace.to_string(),
            name: object.name.to_string(),
            traffic: label.and_then(|text| TrafficFor::parse(text)),
            with_namespace: objects.len() > 1,
        };
        (manifest.file() == text).then_some(manifest)
    }
}

/// A name as YAML that means this text: some words and all numbers need quotes.
fn word(name: &str) -> String {
    let is_text = name.parse::<f64>().is_err()
        && !matches!(name, "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n")
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if is_text { name.to_owned() } else { format!("\"{name}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use compile::waypoints;
    use compile::{Folder, Severity};

    #[test]
    fn what_is_written_is_a_waypoint_and_is_known_again() {
        let check = |namespace: &str, name: &str, traffic, with_namespace| {
            let manifest = Manifest {
                namespace: namespace.into(),
                name: name.into(),
                traffic,
                with_namespace,
            };
            let text = manifest.file();
            assert_eq!(Manifest::of_file(&text).as_ref(), Some(&manifest), "{text}");
            let mut folder = Folder::new();
            folder.set_file(0, "f.yaml", &text);
            assert_eq!(folder.diagnostics(), [], "{text}");
            let objects = folder.objects();
            let all = waypoints::understand(&objects);
            let waypoint = all.values().next().expect("a waypoint");
            assert!(waypoint.is_accepted() && all.len() == 1, "{text}");
            assert_eq!(waypoint.traffic, traffic.unwrap_or_default());
            assert_eq!((&*waypoint.key.0, &*waypoint.key.1), (namespace, name));
            assert_eq!(objects.namespaces.len(), usize::from(with_namespace));
            // Edited: no longer ours.
            assert_eq!(Manifest::of_file(&format!("{text}# more\n")), None);
            assert_eq!(Manifest::of_file(&manifest.yaml()), None);
            let compiled = compile::compile(&objects, &compile::MeshConfig::default());
            let errors = compiled.diagnostics.iter().filter(|d| d.severity == Severity::Error);
            assert_eq!(errors.count(), 0, "{:?}", compiled.diagnostics);
        };
        check("shop", "waypoint", None, false);
        check("shop", "waypoint", Some(TrafficFor::Service), true);
        check("shop", "waypoint", Some(TrafficFor::All), false);
        check("true", "null", Some(TrafficFor::None), true);
        check("123", "y", Some(TrafficFor::Workload), true);
    }
}
