//! Kubernetes YAML for tests, from few words.

use std::fmt::Write as _;

/// A namespace; in the mesh when `ambient`.
pub fn namespace(name: &str, ambient: bool) -> String {
    let labels = if ambient { "\n  labels: {istio.io/dataplane-mode: ambient}" } else { "" };
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}{labels}\n")
}

pub fn service_account(namespace: &str, name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
    )
}

/// Puts objects into one file.
pub fn join(objects: &[String]) -> String {
    objects.join("---\n")
}

/// A pod with one container; its service account and its label `app` have its name.
#[derive(Clone, Debug)]
pub struct Pod {
    namespace: String,
    name: String,
    app: String,
    node: String,
    labels: Vec<(String, String)>,
    image: String,
    command: Vec<String>,
    args: Vec<String>,
    ports: Vec<(String, u16)>,
    probe: Option<u16>,
    user: Option<u32>,
    account: Option<String>,
}

pub fn pod(namespace: &str, name: &str, node: u16) -> Pod {
    Pod {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        app: name.to_owned(),
        node: format!("node-{node}"),
        labels: vec![],
        image: "meshprobe".to_owned(),
        command: vec![],
        args: vec![],
        ports: vec![],
        probe: None,
        user: None,
        account: None,
    }
}

impl Pod {
    /// An image of `--image` and its arguments.
    pub fn image(mut self, image: &str, args: &[&str]) -> Self {
        image.clone_into(&mut self.image);
        self.args = args.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// A program of the machine.
    pub fn command(mut self, command: &[&str]) -> Self {
        self.command = command.iter().map(|a| (*a).to_owned()).collect();
        self
    }

    /// A shell script.
    pub fn script(self, text: &str) -> Self {
        self.command(&["sh", "-ec", text])
    }

    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn app(mut self, app: &str) -> Self {
        app.clone_into(&mut self.app);
        self
    }

    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.to_owned(), port));
        self
    }

    /// Ready once this port takes connections.
    pub fn ready_on(mut self, port: u16) -> Self {
        self.probe = Some(port);
        self
    }

    pub fn user(mut self, id: u32) -> Self {
        self.user = Some(id);
        self
    }

    pub fn account(mut self, name: &str) -> Self {
        self.account = Some(name.to_owned());
        self
    }

    /// The service account and the pod.
    pub fn yaml(&self) -> String {
        let account = self.account.as_ref().unwrap_or(&self.name);
        format!("{}---\n{}", service_account(&self.namespace, account), self.alone())
    }

    /// The pod without its service account.
    pub fn alone(&self) -> String {
        let mut labels = format!("app: {}", self.app);
        for (name, value) in &self.labels {
            let _ = write!(labels, ", {name}: {value}");
        }
        let Self { namespace, name, node, .. } = self;
        let account = self.account.as_ref().unwrap_or(&self.name);
        let mut out = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
             spec:\n  nodeName: {node}\n  serviceAccountName: {account}\n  terminationGracePeriodSeconds: 2\n"
        );
        if let Some(user) = self.user {
            let _ = writeln!(out, "  securityContext: {{runAsUser: {user}, runAsGroup: {user}}}");
        }
        let _ = writeln!(out, "  containers:\n    - name: main\n      image: {}", self.image);
        if !self.command.is_empty() {
            let _ = writeln!(out, "      command: {}", list(&self.command));
        }
        if !self.args.is_empty() {
            let _ = writeln!(out, "      args: {}", list(&self.args));
        }
        if !self.ports.is_empty() {
            let port =
                |(name, port): &(String, u16)| format!("{{name: {name}, containerPort: {port}}}");
            let ports: Vec<String> = self.ports.iter().map(port).collect();
            let _ = writeln!(out, "      ports: [{}]", ports.join(", "));
        }
        if let Some(port) = self.probe {
            let _ = writeln!(
                out,
                "      readinessProbe: {{tcpSocket: {{port: {port}}}, periodSeconds: 1, failureThreshold: 1}}"
            );
        }
        out
    }
}

/// JSON is YAML, and its strings need no care.
fn list(items: &[String]) -> String {
    serde_json::Value::from(items.to_vec()).to_string()
}

/// A Service with addresses of both families for the pods with label `app`. Ports: name, port, target.
pub fn service(namespace: &str, name: &str, app: &str, ports: &[(&str, u16, &str)]) -> String {
    service_with("ipFamilyPolicy: RequireDualStack", namespace, name, app, ports)
}

pub fn headless(namespace: &str, name: &str, app: &str, ports: &[(&str, u16, &str)]) -> String {
    service_with("clusterIP: None\n  ipFamilyPolicy: RequireDualStack", namespace, name, app, ports)
}

fn service_with(
    first: &str,
    namespace: &str,
    name: &str,
    app: &str,
    ports: &[(&str, u16, &str)],
) -> String {
    let port = |(name, port, target): &(&str, u16, &str)| {
        format!("    - {{name: {name}, port: {port}, targetPort: {target}}}\n")
    };
    let ports: String = ports.iter().map(port).collect();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec:\n  {first}\n  selector: {{app: {app}}}\n  ports:\n{ports}"
    )
}

/// An `AuthorizationPolicy` for the pods with label `app`; `rules` is the YAML list in flow style, for example
/// `[{from: [{source: {namespaces: [a]}}]}]`.
pub fn policy(namespace: &str, name: &str, app: &str, action: &str, rules: &str) -> String {
    let selector = if app.is_empty() {
        String::new()
    } else {
        format!("  selector: {{matchLabels: {{app: {app}}}}}\n")
    };
    let rules = if rules.is_empty() { String::new() } else { format!("  rules: {rules}\n") };
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec:\n{selector}  action: {action}\n{rules}"
    )
}

/// A `PeerAuthentication` for a whole namespace.
pub fn peer_authentication(namespace: &str, mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\n\
         spec:\n  mtls: {{mode: {mode}}}\n"
    )
}
