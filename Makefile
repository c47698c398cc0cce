# The only entrance.  `make` lists what there is; V=1 shows the commands.
.DEFAULT_GOAL := help
ifeq ($(V),)
.SILENT:
endif

PYTHON ?= python3
CLANG ?= clang
LISTEN ?= :443
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# root does what it must by itself; everyone else is asked once
ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

BUILD_PACKAGES := clang gcc libbpf-dev libc6-dev libnftables1 libseccomp-dev libssl-dev linux-libc-dev \
	python3-dev python3-venv
DEMO_PACKAGES := ca-certificates containerd docker.io iproute2 iptables util-linux
TEST_PACKAGES := $(DEMO_PACKAGES) aardvark-dns bpftool clang-format curl debootstrap haproxy netavark nftables nginx \
	libnginx-mod-stream openssl podman procps runc slirp4netns strace uidmap
BENCH_PACKAGES := iperf3 nghttp2-client sniproxy wrk

# an engine that is named need not be here
FIND_ENGINE = $(BIN)/python -c 'import sys; from controller.runtime import find_engines; \
	sys.exit(not any(engine.present for engine in find_engines(["auto"])))'

NATIVE_C := $(filter-out %/_ffi.c,$(wildcard bpfprog/*.[ch] controller/router/native/*.[ch]))
C_FILES := $(NATIVE_C) $(wildcard tests/bench/*.[ch] tests/harness/*.c)
NATIVE := $(NATIVE_C) bpfprog/build_ffi.py controller/router/build_native.py setup.py pyproject.toml

# $(call packages,NAMES): see that they are installed
packages = for p in $(1); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; \
	done; \
	[ -z "$$missing" ] || { \
		echo "installing:$$missing"; \
		$(ROOT) apt-get update -q && \
		$(ROOT) env DEBIAN_FRONTEND=noninteractive \
			apt-get install -q -y --no-install-recommends $$missing; \
	}

.PHONY: help
help: ## Show this list
	sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# --- build ---

.PHONY: bpf dev
bpf: bpfprog/splice.bpf.o bpfprog/packet.bpf.o ## Compile the BPF programs

bpfprog/splice.bpf.o: bpfprog/abi.h
bpfprog/packet.bpf.o: bpfprog/packet.h

bpfprog/%.bpf.o: bpfprog/%.bpf.c
	$(CLANG) -O2 -g -Wall -Werror -mcpu=v3 -target bpf \
		-I/usr/include/$$($(CC) -print-multiarch) -c $< -o $@

dev: $(VENV)/.dev ## Build everything into .venv

$(VENV)/.dev: $(NATIVE)
	command -v dpkg-query >/dev/null && { $(call packages,$(BUILD_PACKAGES)); }
	$(MAKE) --no-print-directory bpf
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade 'pip>=25.1'
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.test: $(VENV)/.dev
	$(call packages,$(TEST_PACKAGES))
	$(BIN)/pip install -q --group test --group check
	touch $@

# --- run ---

.PHONY: run demo
run: dev ## Route to this machine's labelled containers (LISTEN=:443 ARGS=...)
	$(if $(findstring --engine,$(ARGS)),:,$(FIND_ENGINE)) || { \
		echo "no Docker or Podman socket found; see sniroute at work with: make demo"; exit 1; }
	$(ROOT) $(BIN)/sniroute run --listen $(LISTEN) $(ARGS)

demo: dev ## See it work: two containers, one moves, all cleaned up after
	$(call packages,$(DEMO_PACKAGES))
	$(BIN)/pip install -q --group demo
	$(ROOT) $(BIN)/python tests/demo.py

# --- prove ---

.PHONY: check test test-unit test-loopback test-kernel test-e2e bench-quick bench-check bench
check: $(VENV)/.test ## Style and types
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	clang-format --dry-run --Werror $(C_FILES)

test: $(VENV)/.test ## Everything: unit, loopback, kernel, e2e on Docker and Podman
	$(ROOT) $(BIN)/pytest $(ARGS)

test-unit test-loopback test-kernel test-e2e: test-%: $(VENV)/.test ## One kind of tests
	$(ROOT) $(BIN)/pytest tests/$* $(ARGS)

bench-quick: $(VENV)/.test ## Ratios to direct, HAProxy and nginx, in one run
	$(ROOT) env PYTHONPATH=tests $(BIN)/python -m bench.quick $(ARGS)

bench-check: $(VENV)/.test ## Fail where those ratios fall below their floors (what CI runs of it)
	$(ROOT) env PYTHONPATH=tests $(BIN)/python -m bench.quick --floors-only --check $(ARGS)

bench: $(VENV)/.test ## The same beside every peer, under every load (WHAT=... for one; about 30 minutes)
	$(call packages,$(BENCH_PACKAGES))
	$(BIN)/pip install -q --group bench
	$(ROOT) env PYTHONPATH=tests $(BIN)/python -m bench $(WHAT) $(ARGS)
