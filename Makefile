# make demo    train a small MoE, fine-tune it by LoRA on 4 processes, hand it to Hugging Face
# make test    lint, types and all tests on the CPU
# make test-full  the readers of others' files under very many changed files, for a minute or two
# make lint    format, lint and types only
# make bench   the benchmarks behind README's numbers
# make parity  the table of parallel layouts with their errors against an unsharded model
# make gpu-kit what a GPU machine without a package index lacks, for benchmarks/gpu_check.py
# make servers the source of vLLM's and SGLang's readers of adapters, which tests then run (375 MB, once)
# make figures the experiments of "LoRA Without Regret" at toy size (20 minutes on two cores)

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
# One thread for each process: ranks share the cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# A file of tests to each core in turn (tests/conftest.py); every worker needs about 2 GB.
WORKERS ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-full lint style bench parity figures gpu-kit servers clean

demo: .venv/built
	$(BIN)/python examples/demo.py --output demo

# The types are checked by one of the tests (tests/test_types.py), beside the others.
test: style
	$(BIN)/python -m pytest $(WORKERS)

test-full: style
	FUZZ_EXAMPLES=300 $(BIN)/python -m pytest $(WORKERS) tests/test_fuzz.py

lint: style
	$(BIN)/pyright

style: .venv/built
	$(BIN)/ruff format --check
	$(BIN)/ruff check

bench: .venv/built
	$(BIN)/python benchmarks/bench_linear.py
	$(BIN)/python benchmarks/bench_experts.py
	$(BIN)/python benchmarks/bench_model.py
	$(BIN)/python benchmarks/bench_host.py
	$(BIN)/python benchmarks/bench_padding.py
	$(BIN)/python benchmarks/bench_exchange.py
	$(BIN)/python benchmarks/bench_sync.py
	$(BIN)/python benchmarks/bench_startup.py

parity: .venv/built
	$(BIN)/python benchmarks/parity.py

figures: .venv/built
	$(BIN)/python benchmarks/figures.py

gpu-kit: .venv/built
	$(BIN)/python benchmarks/gpu_kit.py $(GPU_KIT)

servers: .venv/built
	$(BIN)/python tests/scripts/fetch_servers.py .servers

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "megalora needs Python 3.12, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/torch: constraints.txt .venv/bin/python
	$(BIN)/pip install --progress-bar off -c constraints.txt torch setuptools wheel ninja
	touch $@

.venv/built: .venv/torch setup.py pyproject.toml constraints.txt $(SOURCES)
	$(BIN)/pip install --progress-bar off -c constraints.txt --no-build-isolation -e '.[hf,dev]'
	touch $@

clean:
	rm -rf build demo *.egg-info megalora/*.so
