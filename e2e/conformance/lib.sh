# shellcheck shell=bash
# How the suite is built and called. The caller stands in the root of the clone and has read e2e/cluster/lib.sh.
CONFORMANCE="$AMBIT_CACHE/cluster/bin/conformance.test"

# Every feature of the mesh profiles. Named, since without a GatewayClass and a Mesh object none can be inferred.
FEATURES=Mesh,HTTPRoute,GRPCRoute,MeshClusterIPMatching,MeshConsumerRoute,MeshHTTPRouteRewritePath,\
MeshHTTPRouteSchemeRedirect,MeshHTTPRouteRedirectPort,MeshHTTPRouteRedirectPath,\
MeshHTTPRouteBackendRequestHeaderModification,MeshHTTPRouteQueryParamMatching,MeshHTTPRouteNamedRouteRule,\
HTTPRouteResponseHeaderModification,HTTPRouteParentRefPort,HTTPRoute303RedirectStatusCode,\
HTTPRoute307RedirectStatusCode,HTTPRoute308RedirectStatusCode

conformance_build() {
  mkdir -p "$(dirname "$CONFORMANCE")"
  CGO_ENABLED=0 go -C e2e/conformance test -c -trimpath -buildvcs=false -o "$CONFORMANCE" . >&2
}

# conformance_prepare CHANNEL: what the suite wants to find. It refuses to run with kinds of another release or of mixed
# channels.
conformance_prepare() {
  local module crd=crd/httproutes.gateway.networking.k8s.io have
  have=$("$KUBECTL" get "$crd" --ignore-not-found \
    -o jsonpath='{.metadata.annotations.gateway\.networking\.k8s\.io/channel}')
  if [[ -n $have && $have != "$1" ]]; then
    echo "This cluster has Gateway API's $have channel, and $1 is wanted: Gateway API itself forbids the change in place." >&2
    echo "Use a fresh cluster (make cluster-down for the lab's), or remove its CRDs and all their objects." >&2
    return 1
  fi
  module=$(go -C e2e/conformance list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)
  local files=() file
  for file in "$module/config/crd/$1"/gateway.*.yaml; do
    files+=(-f "$file")
  done
  "$KUBECTL" apply --server-side "${files[@]}" >&2
  "$KUBECTL" wait --for=condition=Established --timeout=60s "$crd" >&2
  "$KUBECTL" apply -f e2e/conformance/bystanders.yaml >&2
  # Left by a run that was interrupted.
  "$KUBECTL" delete namespace gateway-conformance-mesh gateway-conformance-mesh-consumer --ignore-not-found --timeout=120s >&2
}

# conformance_run FLAGS...: an empty --gateway-class, since there is no Gateway here, only a mesh.
conformance_run() {
  "$CONFORMANCE" -test.v -test.timeout 40m -test.run TestConformance \
    --conformance-profiles=MESH-HTTP,MESH-GRPC --gateway-class= --supported-features="$FEATURES" \
    --cleanup-base-resources=true "$@"
}
