# shellcheck shell=bash
# What the scripts here share. The caller stands in the root of the clone.
AMBIT_CACHE="${AMBIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ambit}"
CLUSTER="$AMBIT_CACHE/cluster"
# Programs of ours that go into images; cargo's own way to say where they are.
PROGRAMS="${CARGO_TARGET_DIR:-target}/debug"
KIND_CLUSTER=ambit

# The kubectl that fits the cluster; a given cluster may come with one of its own.
if [[ -z ${KUBECTL:-} ]]; then
  KUBECTL=kubectl
  [[ ! -x $CLUSTER/bin/kubectl ]] || KUBECTL=$CLUSTER/bin/kubectl
fi
export KUBECTL
