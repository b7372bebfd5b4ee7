# One target a task. `make help` lists them.

.DEFAULT_GOAL := help
.PHONY: list-test-packages help build lint test demo bench completions vendor deb repo lintian e2e clean

CARGO ?= cargo
export CARGO
# What building needs beside Rust, what the tests and the demonstration run, and what the benchmark compares tng with.
BUILD_PACKAGES := gcc libc6-dev make cmake
TEST_PACKAGES  := $(BUILD_PACKAGES) nftables iproute2 util-linux procps conntrack curl nginx-light redis-server redis-tools tcpdump python3 python3-prometheus-client man-db swtpm
# What `make deb`, `make repo` and `make lintian` run.
DEB_PACKAGES   := $(BUILD_PACKAGES) debhelper dpkg-dev git util-linux
REPO_PACKAGES  := apt-utils gnupg
E2E_PACKAGES   := $(DEB_PACKAGES) $(REPO_PACKAGES) lintian systemd-container mmdebstrap iproute2
BENCH_PACKAGES := $(BUILD_PACKAGES) stunnel4 haproxy nginx-light libnginx-mod-stream

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

build: ## build tngd and tngctl for use, and say where they are
	@packaging/install-packages $(BUILD_PACKAGES)
	@packaging/build --release --locked --bins

lint: ## rustfmt, clippy without warnings, manual pages without warnings
	@packaging/install-packages $(BUILD_PACKAGES) man-db
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --features failpoints -- -D warnings
	@for page in man/*.[1-8]; do \
		warnings=$$(man -l --warnings -E UTF-8 $$page 2>&1 >/dev/null); \
		[ -z "$$warnings" ] || { echo "$$page: $$warnings"; exit 1; }; \
	done

test: ## all tests; needs root for network namespaces and containers
	@packaging/install-packages $(TEST_PACKAGES)
	@[ "$$(id -u)" = 0 ] || { echo "make test: needs root for network namespaces: sudo make test" >&2; exit 1; }
	packaging/test-all $(CARGO) test --locked --no-fail-fast --features failpoints

list-test-packages:
	@echo $(TEST_PACKAGES)

demo: ## two hosts, a real web server, the tunnel between them, and what happens when things break
	@packaging/install-packages $(TEST_PACKAGES)
	@[ "$$(id -u)" = 0 ] || { echo "make demo: needs root for network namespaces: sudo make demo" >&2; exit 1; }
	binaries=$$(packaging/build --release --locked --bins --example fake_aa) && packaging/demo "$$binaries"

bench: ## measure tng beside stunnel, haproxy, nginx and plain mutual TLS (TNG_BENCH_ROUNDS=5, TNG_BENCH_HANDSHAKE_ROUNDS=41, TNG_BENCH_QUICK=1)
	@packaging/install-packages $(BENCH_PACKAGES)
	$(CARGO) bench --locked --no-fail-fast --bench tunnel --bench handshake

completions: ## shell completions into target/completions
	@mkdir -p target/completions
	binaries=$$(packaging/build --locked --bins) || exit 1; \
	for shell in bash zsh fish; do for bin in tngd tngctl; do \
		"$$binaries/$$bin" completions $$shell > target/completions/$$bin.$$shell || exit 1; done; done

vendor: ## sources of all crates into vendor/, for a build without a network
	@packaging/install-packages $(BUILD_PACKAGES)
	packaging/vendor

deb: ## Debian package and source package into target/deb, offline (DEB_BUILD_OPTIONS=noopt: quick to build)
	@packaging/install-packages $(DEB_PACKAGES)
	packaging/make-deb target/deb

repo: deb ## signed apt repository of the package into target/repo
	@packaging/install-packages $(REPO_PACKAGES)
	packaging/make-repo target/repo target/deb/tng_*.deb

lintian: deb ## Debian's checks of the package; errors and warnings fail
	@packaging/install-packages lintian
	packaging/check-deb

e2e: ## the package on booted Debian 12 and 13: apt, systemctl, faults, upgrade, purge
	@packaging/install-packages $(E2E_PACKAGES)
	@[ "$$(id -u)" = 0 ] || { echo "make e2e: boots containers, which needs root: sudo make e2e" >&2; exit 1; }
	TNG_DEB_BUILD=binary packaging/make-deb target/deb
	packaging/check-deb target/deb/tng_*.deb
	packaging/appliance-repository target/deb/tng_*.deb target/repository
	$(CARGO) build --locked --features failpoints --example fake_aa
	packaging/count-tests $(CARGO) test --locked --features failpoints --test appliance

clean: ## remove what was built
	$(CARGO) clean
	rm -rf target
