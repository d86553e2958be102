//! DestinationRule: subsets are served, traffic policies are named.

use super::Element::{Any, Bool, Integer, Message as Of, Number, OneOf, Text};
use super::{Field, Message};

const CHOICE: &str = "endpoints are drawn at random, with the Service's own traffic distribution";
const POOL: &str = "connections to endpoints have the proxy's own limits";
const EJECTION: &str = "an endpoint is left out when its pod is not ready, not for its answers";
const TLS: &str =
    "between workloads of the mesh there is mutual TLS always, and no other TLS is begun";
const RETRIES: &str = "nothing is tried twice yet";

pub(super) const MESSAGES: &[Message] = &[
    Message { name: "DestinationRule", fields: DESTINATION_RULE },
    Message { name: "Subset", fields: SUBSET },
    Message { name: "TrafficPolicy", fields: TRAFFIC_POLICY },
    Message { name: "TrafficPolicy.PortTrafficPolicy", fields: PORT_TRAFFIC_POLICY },
    Message { name: "LoadBalancerSettings", fields: LOAD_BALANCER_SETTINGS },
    Message { name: "LoadBalancerSettings.ConsistentHashLB", fields: CONSISTENT_HASH },
    Message { name: "LoadBalancerSettings.ConsistentHashLB.HTTPCookie", fields: HTTP_COOKIE },
    Message {
        name: "LoadBalancerSettings.ConsistentHashLB.HTTPCookie.Attribute",
        fields: &[Field::missed("name", Text, CHOICE), Field::missed("value", Text, CHOICE)],
    },
    Message {
        name: "LoadBalancerSettings.ConsistentHashLB.RingHash",
        fields: &[Field::missed("minimumRingSize", Integer, CHOICE)],
    },
    Message {
        name: "LoadBalancerSettings.ConsistentHashLB.MagLev",
        fields: &[Field::missed("tableSize", Integer, CHOICE)],
    },
    Message { name: "LocalityLoadBalancerSetting", fields: LOCALITY },
    Message {
        name: "LocalityLoadBalancerSetting.Distribute",
        fields: &[Field::missed("from", Text, CHOICE), Field::missed("to", Integer, CHOICE).map()],
    },
    Message {
        name: "LocalityLoadBalancerSetting.Failover",
        fields: &[Field::missed("from", Text, CHOICE), Field::missed("to", Text, CHOICE)],
    },
    Message { name: "ZoneAwareLoadBalancerSetting", fields: ZONE_AWARE },
    Message {
        name: "ZoneAwareLoadBalancerSetting.Failover",
        fields: &[Field::missed("from", Text, CHOICE), Field::missed("to", Text, CHOICE)],
    },
    Message { name: "WarmupConfiguration", fields: WARMUP },
    Message { name: "ConnectionPoolSettings", fields: CONNECTION_POOL },
    Message { name: "ConnectionPoolSettings.TCPSettings", fields: TCP_SETTINGS },
    Message { name: "ConnectionPoolSettings.TCPSettings.TcpKeepalive", fields: TCP_KEEPALIVE },
    Message { name: "ConnectionPoolSettings.HTTPSettings", fields: HTTP_SETTINGS },
    Message {
        name: "ConnectionPoolSettings.HTTPSettings.ConnectionKeepalive",
        fields: &[Field::missed("interval", Text, POOL), Field::missed("timeout", Text, POOL)],
    },
    Message { name: "OutlierDetection", fields: OUTLIER_DETECTION },
    Message { name: "ClientTLSSettings", fields: CLIENT_TLS },
    Message { name: "TrafficPolicy.TunnelSettings", fields: TUNNEL },
    Message {
        name: "TrafficPolicy.ProxyProtocol",
        fields: &[Field::missed(
            "version",
            OneOf(&["V1", "V2"]),
            "the pod sees the client's address as it is, without a header before it",
        )],
    },
    Message { name: "TrafficPolicy.RetryBudget", fields: RETRY_BUDGET },
];

const DESTINATION_RULE: &[Field] = &[
    Field::honoured("host", Text, "host").note("a Service, named as in a VirtualService"),
    Field::inside("trafficPolicy", "TrafficPolicy"),
    Field::inside("subsets", "Subset").list(),
    Field::no_effect("exportTo", Text, "the subsets are there for every route that names them")
        .list()
        .unless(&["*"]),
    Field::refused(
        "workloadSelector",
        Any,
        "a waypoint is no workload that could be selected; the whole object is left out",
    ),
];

const SUBSET: &[Field] = &[
    Field::honoured("name", Text, "subset_names"),
    Field::honoured("labels", Text, "subset_labels").map(),
    Field::inside("trafficPolicy", "TrafficPolicy"),
];

const TRAFFIC_POLICY: &[Field] = &[
    Field::inside("loadBalancer", "LoadBalancerSettings"),
    Field::inside("connectionPool", "ConnectionPoolSettings"),
    Field::inside("outlierDetection", "OutlierDetection"),
    Field::inside("tls", "ClientTLSSettings"),
    Field::inside("portLevelSettings", "TrafficPolicy.PortTrafficPolicy").list(),
    Field::inside("tunnel", "TrafficPolicy.TunnelSettings"),
    Field::inside("proxyProtocol", "TrafficPolicy.ProxyProtocol"),
    Field::inside("retryBudget", "TrafficPolicy.RetryBudget"),
];

const PORT_TRAFFIC_POLICY: &[Field] = &[
    Field::no_effect("port", Of("PortSelector"), "none of the settings of a port is served"),
    Field::inside("loadBalancer", "LoadBalancerSettings"),
    Field::inside("connectionPool", "ConnectionPoolSettings"),
    Field::inside("outlierDetection", "OutlierDetection"),
    Field::inside("tls", "ClientTLSSettings"),
];

const LOAD_BALANCER_SETTINGS: &[Field] = &[
    Field::missed(
        "simple",
        OneOf(&[
            "UNSPECIFIED",
            "LEAST_CONN",
            "RANDOM",
            "PASSTHROUGH",
            "ROUND_ROBIN",
            "LEAST_REQUEST",
        ]),
        CHOICE,
    )
    .unless(&["UNSPECIFIED", "RANDOM"]),
    Field::inside("consistentHash", "LoadBalancerSettings.ConsistentHashLB"),
    Field::inside("localityLbSetting", "LocalityLoadBalancerSetting"),
    Field::inside("zoneAwareLbSetting", "ZoneAwareLoadBalancerSetting"),
    Field::missed("warmupDurationSecs", Text, CHOICE),
    Field::inside("warmup", "WarmupConfiguration"),
];

const CONSISTENT_HASH: &[Field] = &[
    Field::missed("httpHeaderName", Text, CHOICE),
    Field::inside("httpCookie", "LoadBalancerSettings.ConsistentHashLB.HTTPCookie"),
    Field::missed("useSourceIp", Bool, CHOICE),
    Field::missed("httpQueryParameterName", Text, CHOICE),
    Field::inside("ringHash", "LoadBalancerSettings.ConsistentHashLB.RingHash"),
    Field::inside("maglev", "LoadBalancerSettings.ConsistentHashLB.MagLev"),
    Field::missed("minimumRingSize", Integer, CHOICE),
];

const HTTP_COOKIE: &[Field] = &[
    Field::missed("name", Text, CHOICE),
    Field::missed("path", Text, CHOICE),
    Field::missed("ttl", Text, CHOICE),
    Field::inside("attributes", "LoadBalancerSettings.ConsistentHashLB.HTTPCookie.Attribute")
        .list(),
];

const LOCALITY: &[Field] = &[
    Field::inside("distribute", "LocalityLoadBalancerSetting.Distribute").list(),
    Field::inside("failover", "LocalityLoadBalancerSetting.Failover").list(),
    Field::missed("failoverPriority", Text, CHOICE).list(),
    Field::missed("enabled", Bool, CHOICE),
];

const ZONE_AWARE: &[Field] = &[
    Field::missed("enabled", Bool, CHOICE),
    Field::inside("failover", "ZoneAwareLoadBalancerSetting.Failover").list(),
    Field::missed("failoverPriority", Text, CHOICE).list(),
    Field::missed("minClusterSize", Integer, CHOICE),
];

const WARMUP: &[Field] = &[
    Field::missed("duration", Text, CHOICE),
    Field::missed("minimumPercent", Number, CHOICE),
    Field::missed("aggression", Number, CHOICE),
];

const CONNECTION_POOL: &[Field] = &[
    Field::inside("tcp", "ConnectionPoolSettings.TCPSettings"),
    Field::inside("http", "ConnectionPoolSettings.HTTPSettings"),
];

const TCP_SETTINGS: &[Field] = &[
    Field::missed("maxConnections", Integer, POOL),
    Field::missed("connectTimeout", Text, POOL),
    Field::inside("tcpKeepalive", "ConnectionPoolSettings.TCPSettings.TcpKeepalive"),
    Field::missed("maxConnectionDuration", Text, POOL),
    Field::missed("idleTimeout", Text, POOL),
];

const TCP_KEEPALIVE: &[Field] = &[
    Field::missed("probes", Integer, POOL),
    Field::missed("time", Text, POOL),
    Field::missed("interval", Text, POOL),
];

const HTTP_SETTINGS: &[Field] = &[
    Field::missed("http1MaxPendingRequests", Integer, POOL),
    Field::missed("http2MaxRequests", Integer, POOL),
    Field::missed("maxRequestsPerConnection", Integer, POOL),
    Field::missed("maxRetries", Integer, POOL),
    Field::missed("idleTimeout", Text, POOL),
    Field::missed("h2UpgradePolicy", OneOf(&["DEFAULT", "DO_NOT_UPGRADE", "UPGRADE"]), POOL)
        .unless(&["DEFAULT", "DO_NOT_UPGRADE"]),
    Field::missed("useClientProtocol", Bool, POOL),
    Field::missed("maxConcurrentStreams", Integer, POOL),
    Field::inside("http2KeepAlive", "ConnectionPoolSettings.HTTPSettings.ConnectionKeepalive"),
];

const OUTLIER_DETECTION: &[Field] = &[
    Field::missed("consecutiveErrors", Integer, EJECTION),
    Field::missed("splitExternalLocalOriginErrors", Bool, EJECTION),
    Field::missed("consecutiveLocalOriginFailures", Integer, EJECTION),
    Field::missed("consecutiveGatewayErrors", Integer, EJECTION),
    Field::missed("consecutive5xxErrors", Integer, EJECTION),
    Field::missed("interval", Text, EJECTION),
    Field::missed("baseEjectionTime", Text, EJECTION),
    Field::missed("maxEjectionPercent", Integer, EJECTION),
    Field::missed("minHealthPercent", Integer, EJECTION),
    Field::missed("outlierDetectionHttpErrorCodes", Integer, EJECTION).list(),
];

const CLIENT_TLS: &[Field] = &[
    Field::missed("mode", OneOf(&["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"]), TLS)
        .unless(&["ISTIO_MUTUAL"]),
    Field::missed("clientCertificate", Text, TLS),
    Field::missed("privateKey", Text, TLS),
    Field::missed("caCertificates", Text, TLS),
    Field::missed("credentialName", Text, TLS),
    Field::missed("subjectAltNames", Text, TLS).list(),
    Field::missed("sni", Text, TLS),
    Field::missed("insecureSkipVerify", Bool, TLS),
    Field::missed("caCrl", Text, TLS),
];

const TUNNEL: &[Field] = &[
    Field::missed("protocol", Text, TUNNELS),
    Field::missed("targetHost", Text, TUNNELS),
    Field::missed("targetPort", Integer, TUNNELS),
];

const TUNNELS: &str = "endpoints are reached by the mesh's own tunnels only";

const RETRY_BUDGET: &[Field] = &[
    Field::missed("percent", Number, RETRIES),
    Field::missed("minRetryConcurrency", Integer, RETRIES),
    Field::missed("budgetInterval", Text, RETRIES),
];

pub(super) const HEAD: &str = "
## DestinationRule

Subsets are served: `destination.subset` of a VirtualService chooses among the endpoints of the Service by their labels. Traffic policies are
not yet; each of their fields is named where it is given, and traffic passes.

- The rules of the Service's own namespace count; where it has none, those of the root namespace (`istio-system`). Those of other namespaces
  have no effect.
- Several of them for one host are read together; of two subsets with one name the older stays, and the other is named.
- A subset without labels is every endpoint. One that no endpoint belongs to is there, and empty: 503.
";
