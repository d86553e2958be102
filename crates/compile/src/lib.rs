//! Kubernetes and Istio objects to model, status and diagnostics.
