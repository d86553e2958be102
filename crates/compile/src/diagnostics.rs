//! What is wrong with the configuration, where, and what to do about it.
//!
//! Every diagnostic has a code from one closed list ([`Code`]), names the object and the field, and the
//! place it was read from, so that a tool can print `file:line` and a person can fix it.

use std::fmt;

use serde::Serialize;

/// How bad it is. The order is the order of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something the user asked for does not happen.
    Error,
    /// It happens, but perhaps not as meant.
    Warning,
    Info,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
        })
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// The closed list of what can be wrong. The text is stable: scripts may match on it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code { $($(#[$doc])* $variant,)* }

        impl Code {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

codes! {
    /// The file is not YAML (or JSON), or is larger than we read.
    InvalidSyntax = "invalid_syntax",
    /// A file or folder that cannot be read.
    Unreadable = "unreadable",
    /// A formerly good file is empty; its objects stay in force.
    EmptyFile = "empty_file",
    /// The file's last good objects stay in force.
    LastGoodInForce = "last_good_in_force",
    /// Not an object with `apiVersion`, `kind` and a valid `metadata.name`.
    InvalidObject = "invalid_object",
    /// A field has the wrong type or a value that no such field may have.
    InvalidField = "invalid_field",
    /// A field that this kind does not have.
    UnknownField = "unknown_field",
    /// A kind or API version that nobody serves.
    UnknownKind = "unknown_kind",
    /// A kind that exists, but that this version does not handle.
    UnhandledKind = "unhandled_kind",
    /// A field or value that exists, but that this version does not handle.
    Unsupported = "unsupported",
    /// Two objects with one kind, namespace and name.
    DuplicateObject = "duplicate_object",
    /// A name that refers to nothing.
    DanglingReference = "dangling_reference",
    /// A selector that selects nothing.
    SelectsNothing = "selects_nothing",
    /// Two Services with one virtual address, or two pods with one address.
    DuplicateAddress = "duplicate_address",
    /// A policy for workloads that are outside the mesh, where nothing enforces it.
    NotInMesh = "not_in_mesh",
    /// A rule needs HTTP, and no waypoint is there to see it.
    L7WithoutWaypoint = "l7_without_waypoint",
    /// A policy with an action that is not enforced.
    ActionNotEnforced = "action_not_enforced",
    /// A policy that can never match.
    MatchesNothing = "matches_nothing",
    /// Several policies claim the same decision; the oldest wins.
    ConflictingPolicies = "conflicting_policies",
    /// Routes of two kinds, or two VirtualServices, claim one port of a Service; one of them has it.
    RouteConflict = "route_conflict",
    /// A rule that has nowhere to send requests.
    NoBackend = "no_backend",
    /// A field that has no effect where it stands.
    NoEffect = "no_effect",
    /// No node takes the pod.
    Unschedulable = "unschedulable",
    /// No free address.
    AddressesExhausted = "addresses_exhausted",
    /// A label names a Gateway that is no waypoint.
    NotAWaypoint = "not_a_waypoint",
    /// A waypoint does not take what is of this namespace.
    AttachmentDenied = "attachment_denied",
    /// A waypoint does not take traffic of this kind.
    UnsupportedTrafficType = "unsupported_traffic_type",
    /// A waypoint of which no proxy has been ready yet.
    WaypointNotReady = "waypoint_not_ready",
    /// More than this version takes.
    LimitExceeded = "limit_exceeded",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Diagnostic {
    pub severity: Severity,
    pub code: Code,
    /// `Kind/namespace/name`. Empty when no object could be made out.
    pub object: String,
    /// The path of the field, for example `spec.rules[0]`. Empty: the object as a whole.
    pub field: String,
    /// `file:line`. Empty: not known.
    pub origin: String,
    /// What is wrong.
    pub message: String,
    /// What to do. May be empty.
    pub help: String,
}

impl Diagnostic {
    pub fn new(severity: Severity, code: Code, message: impl Into<String>) -> Self {
        Self {
            severity,
            code,
            object: String::new(),
            field: String::new(),
            origin: String::new(),
            message: message.into(),
            help: String::new(),
        }
    }

    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, code, message)
    }

    pub fn warning(code: Code, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, code, message)
    }

    pub fn info(code: Code, message: impl Into<String>) -> Self {
        Self::new(Severity::Info, code, message)
    }

    #[must_use]
    pub fn object(mut self, object: impl Into<String>) -> Self {
        self.object = object.into();
        self
    }

    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    #[must_use]
    pub fn origin(mut self, origin: impl Into<String>) -> Self {
        self.origin = origin.into();
        self
    }

    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = help.into();
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.origin.is_empty() {
            write!(f, "{}: ", self.origin)?;
        }
        write!(f, "{}: ", self.severity)?;
        if !self.object.is_empty() {
            write!(f, "{}: ", self.object)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{}", self.message)?;
        if !self.help.is_empty() {
            write!(f, " ({})", self.help)?;
        }
        write!(f, " [{}]", self.code)
    }
}

/// The order in which diagnostics are shown: errors first, then by place; equal ones once.
pub fn sort(diagnostics: &mut Vec<Diagnostic>) {
    diagnostics.sort_by(|a, b| key(a).cmp(&key(b)));
    diagnostics.dedup();
}

fn key(d: &Diagnostic) -> impl Ord + '_ {
    let (file, line) = split_origin(&d.origin);
    (d.severity, file, line, &d.object, &d.field, d.code, &d.message, &d.help)
}

/// `file:12` as `("file", 12)`, so that line 9 comes before line 10.
fn split_origin(origin: &str) -> (&str, u32) {
    match origin.rsplit_once(':') {
        Some((file, line)) => line.parse().map_or((origin, 0), |line| (file, line)),
        None => (origin, 0),
    }
}
