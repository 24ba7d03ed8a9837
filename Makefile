# The two commands: `make dev` runs three regions on this machine, `make test` checks everything.
# Servers and tools are installed into $SPILLWAY_TOOLS (default .tools), which may be kept between runs.

export SPILLWAY_TOOLS ?= $(CURDIR)/.tools
TOOLS := $(SPILLWAY_TOOLS)/bin
SPILLWAY := target/debug/spillway
# What is deployed and tested has, beyond what `make dev` needs.
FEATURES := --features spillway/route53

# What is deployed. By the profile the compiler knows what runs often. It was counted without values (sizes of copies, targets
# of calls), which continuous counting cannot have: looking for them (vp) would warn at each function.
DIST := RUSTFLAGS="-Cprofile-use=$(CURDIR)/cli/dist.profdata -Cllvm-args=-disable-vp $$RUSTFLAGS" cargo
DIST_OPTIONS := --locked --profile dist
# What ran lies together: around each page of code that a process touches the kernel maps 15 more. rustc links with lld, which
# can do that, on x86-64 alone. The file's name says of which profile it is, so that cargo links anew after another.
ORDER = target/dist/order-$(firstword $(shell cksum cli/dist.profdata))
ifeq ($(shell uname -m),x86_64)
ORDERED = -Clink-arg=-Wl,--symbol-ordering-file=$(CURDIR)/$(ORDER) -Clink-arg=-Wl,--no-warn-symbol-ordering
endif

# Tests build the whole workspace each time: with another choice of packages cargo would build dependencies anew.

.PHONY: help dev dev-servers build test lint unit scenarios clean-clone dist bench bench-smoke profile figures format

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

dev: build ## three regions on this machine, until Ctrl-C
	@exec $(SPILLWAY) dev $(DEV_ARGS)

dev-servers: build ## the same with real Redis, Cassandra and Triton
	@exec $(SPILLWAY) dev --with-servers $(DEV_ARGS)

build:
	@test -x $(SPILLWAY) || tests/servers/install.sh build
	@test -x $(SPILLWAY) || echo "Building Spillway and its 430 dependencies: about 5 minutes on 2 cores, once. cargo says how far it is."
	@cargo build --locked -p spillway

test: ## lints, unit tests and scenario tests on real servers; installs what is missing
	@tests/measured.sh path.make_test $(MAKE) --no-print-directory lint unit scenarios

lint: ## formatting, clippy, licences and bans
	@tests/servers/install.sh build tools
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets $(FEATURES) -- -D warnings
	PATH="$(TOOLS):$$PATH" cargo deny --locked check bans licenses sources

unit: ## the tests beside the code
	@tests/servers/install.sh
	PATH="$(TOOLS):$$PATH" cargo nextest run --locked --workspace $(FEATURES) -E 'not package(spillway-tests)'

scenarios: ## real processes and real servers
	@tests/servers/install.sh
	cargo build --locked --workspace --all-targets $(FEATURES)
	PATH="$(TOOLS):$$PATH" cargo nextest run --locked --workspace $(FEATURES) -E 'package(spillway-tests)'

clean-clone: ## `make dev` as a new user meets it: from a clone with nothing built to the first prediction
	@tests/clean_clone.sh

dist: ## what is deployed: target/dist/spillway
	@tests/servers/install.sh build
	@mkdir -p $(dir $(ORDER))
	@rustup component add llvm-tools
	@"$$(rustc --print sysroot)"/lib/rustlib/*/bin/llvm-profdata show --all-functions cli/dist.profdata | \
		sed -n 's/^  \([^ ].*\):$$/\1/p' | LC_ALL=C sort | sed 's/.*;//' >$(ORDER)
	@test -s $(ORDER) || { echo "there are no functions in cli/dist.profdata" >&2; exit 1; }
	$(DIST) rustc $(DIST_OPTIONS) -p spillway --bin spillway $(FEATURES) -- $(ORDERED)
	@hot=$$(readelf -SW target/dist/spillway | sed -n 's/.* \.text\.hot *PROGBITS *[0-9a-f]* [0-9a-f]* \([0-9a-f]*\) .*/\1/p'); \
	test $$((0x$${hot:-0})) -ge 1000000 || { echo "cli/dist.profdata fits little of this build: make profile" >&2; exit 1; }

bench: dist ## what everything costs, beside Envoy, HAProxy, nginx and Feast; writes tests/bench/RESULTS.md
	@tests/servers/install.sh build tools envoy haproxy nginx redis cassandra feast
	$(DIST) build $(DIST_OPTIONS) -p spillway-tests --bins
	target/dist/bench

bench-smoke: ## every work of the bench for a moment, to see that it runs; `make test` has it too
	@tests/servers/install.sh build tools envoy haproxy nginx redis cassandra feast
	cargo build --locked --workspace --all-targets $(FEATURES)
	PATH="$(TOOLS):$$PATH" cargo nextest run --locked --workspace $(FEATURES) -E 'package(spillway-tests) and test(every_work_of_the_bench)'

profile: ## cli/dist.profdata anew, from a run of the bench: half an hour
	@tests/servers/install.sh build tools envoy haproxy nginx redis grpcurl curl dns
	$(DIST) build $(DIST_OPTIONS) -p spillway-tests --bins
	@tests/bench/profile.sh

figures: ## everything that tests and benches measured, as a table
	@cargo run --quiet --locked -p spillway-figures

format: ## write what `lint` checks
	cargo fmt --all
