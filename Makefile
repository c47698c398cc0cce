# The only entrance.  `make` lists what there is; V=1 shows the commands.

.DEFAULT_GOAL := help
ifeq ($(V),)
.SILENT:
endif

PYTHON ?= python3
CLANG ?= clang
VENV := .venv
BIN := $(VENV)/bin
ARCH_INCLUDE := /usr/include/$(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("MULTIARCH"))')

LISTEN ?= :443
ARGS ?=

C_FILES := $(wildcard bpfprog/*.bpf.c bpfprog/*.h bpfprog/steps.c controller/router/native/*.[ch])

.PHONY: help
help: ## Show this list
	sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

# --- building ---

# one file that says which system packages are there; tools/system does nothing twice
$(VENV)/.system: tests/system
	tests/system run
	mkdir -p $(VENV) && touch $@

bpf: bpfprog/splice.bpf.o ## Compile the BPF program
bpfprog/splice.bpf.o: bpfprog/splice.bpf.c bpfprog/abi.h
	$(CLANG) -O2 -g -Wall -Werror -mcpu=v3 -target bpf -I$(ARCH_INCLUDE) -c $< -o $@
