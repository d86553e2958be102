# `make help` lists the targets. Each is thin: what it does is one or two commands that can be typed by hand.

CARGO ?= cargo
CACHE := $(or $(AMBIT_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ambit)
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Pinned: a new release of the checker must not turn an unchanged tree red.
DENY_VERSION := 0.20.2
DENY := $(CACHE)/tools/bin/cargo-deny
DENY_STAMP := $(CACHE)/tools/cargo-deny-$(DENY_VERSION)

# Ours, and what the demo and the tour of the README need. Tests and benches build more.
PROGRAMS := ztunnel waypoint istiod-lite meshctl meshload meshprobe ambit-demo echo-server echo-client

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build what users run, optimized
	$(CARGO) build --release --locked $(addprefix --bin ,$(PROGRAMS))

test: programs ## install what the tests need where that is allowed, then run the whole suite
	.ci/tests

unit: ## the tests that need no namespaces and no other programs
	$(CARGO) test --locked -p model -p engine -p compile -p xds -p sim -p echo -p tidy

SEEDS ?= 0..200000

sim: ## the simulation on more seeds than the tests run: SEEDS=FROM..TO
	AMBIT_SIM_SEEDS=$(SEEDS) $(CARGO) test --release --locked -p sim --test seeds hold -- --nocapture

e2e: programs ## real programs through the mesh, in network namespaces
	.ci/tests 3 e2e

demo: build ## two nodes and a small shop: see who talks to whom, and a policy stop it; no root needed
	$(TARGET)/release/ambit-demo

bench: ## the paired benchmark; writes benches/RESULTS.md (about 20 minutes, on a quiet machine)
	$(CARGO) build --profile dist --locked --bins
	$(TARGET)/dist/meshbench full

bench-http: programs ## HTTP through the waypoint beside the real Envoy; writes benches/HTTP.md (about 20 minutes, on a quiet machine)
	$(CARGO) build --profile dist --locked --bins
	$(TARGET)/dist/meshbench full --parts http

bench-quick: ## a look at the numbers in two minutes; writes nothing into the repository
	$(CARGO) build --release --locked --bins
	$(TARGET)/release/meshbench quick

# The page is for a machine that does nothing else meanwhile.
routes-soak: programs ## a route rewritten five times a second under load, ten minutes twice; writes benches/ROUTES.md
	$(CARGO) build --release --locked --bins
	@printf '# Route changes under load\n\nWritten by `make routes-soak` on %s, commit %s: an HTTPRoute is rewritten every 200 ms, %s\n\n' \
		"$$(date -u +%F)" "$$(git describe --always --dirty=+)" \
		"under 400 requests a second. From the save to the first answer by the new route, as a client sees it; bars: p99 30 ms, 40 MB." \
		>benches/ROUTES.md
	AMBIT_BIN_DIR=$(abspath $(TARGET))/release AMBIT_ROUTE_SECONDS=600 AMBIT_ROUTE_STRICT=1 \
		AMBIT_ROUTE_REPORT=$(CURDIR)/benches/ROUTES.md $(CARGO) test -p e2e --locked --test route_changes

profile: ## where the proxies' CPU goes under each kind of load; needs perf and python3 (benches/PROFILE.md)
	$(CARGO) build --release --locked --bins
	benches/profile $(TARGET)/release

# Not called SECONDS in the shell: bash counts in a variable of that name.
SECONDS ?= 60

fuzz: ## every parser of foreign bytes under libFuzzer, SECONDS each (60), two at a time
	fuzz/run $(SECONDS)

# A target ends when it has found its bug: seconds, as a rule.
fuzz-planted: ## the same with a bug planted in each target: each must be found, within 5 minutes
	fuzz/run planted 300

fuzz-merge: ## fuzz, then keep in fuzz/corpus what adds coverage, and write the table in fuzz/README.md
	fuzz/run merge $(SECONDS)

cluster-up: ## a real Kubernetes of two nodes on this machine, as root; the first build takes a quarter of an hour
	@echo "export KUBECONFIG=$$(e2e/cluster/up)"

cluster-down: ## stop it, and remove what it wrote
	@e2e/cluster/down

cluster-test: ## start it, look whether it is a cluster and can do what a cluster can, stop it, look whether anything is left
	@e2e/cluster/test

clean-cluster: ## the same as cluster-down, and remove the programs that were built for it
	@e2e/cluster/down --clean

conformance-baseline: ## the official Gateway API suite against the cluster without any mesh: what must be green and red
	@e2e/conformance/baseline

lint: ## clippy on everything, warnings are errors
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

fmt: ## format the source
	$(CARGO) fmt --all
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml

deny: $(DENY_STAMP) ## check licences, sources, bans and (where the database can be reached) advisories
	PATH="$(dir $(DENY)):$$PATH" $(CARGO) deny --locked check bans licenses sources
	PATH="$(dir $(DENY)):$$PATH" $(CARGO) deny --locked --manifest-path fuzz/Cargo.toml check bans licenses sources
	@if $(DENY) fetch db; then PATH="$(dir $(DENY)):$$PATH" $(CARGO) deny --locked check advisories; \
	else echo "advisories NOT checked: their database cannot be reached from here"; fi

docs: ## write docs/reasons.md anew from the list in the source
	TIDY_WRITE=1 $(CARGO) test --locked -p tidy --test docs reasons_page_is_current

clean: ## remove what was built
	$(CARGO) clean

programs:
	@.ci/programs

# Unoptimized: it builds in half the time and runs for a second.
$(DENY_STAMP):
	CARGO_PROFILE_DEV_DEBUG=false CARGO_TARGET_DIR="$(CACHE)/tools/target" $(CARGO) install --debug --locked cargo-deny --version $(DENY_VERSION) --root "$(CACHE)/tools"
	rm -rf "$(CACHE)/tools/target"
	touch $@

.PHONY: help build test unit sim e2e demo bench bench-http bench-quick routes-soak profile fuzz fuzz-planted fuzz-merge lint fmt deny docs clean programs \
	cluster-up cluster-down cluster-test clean-cluster conformance-baseline
