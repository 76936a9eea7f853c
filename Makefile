# Everything on a fresh machine: `make demo` to see it work, `make test` for the whole suite, `make check` for style.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
VLLM_VENV ?= .venv-vllm
# one process per core, a file's tests in one of them: they share compiled code
PYTEST ?= -n 2 --dist loadfile
export LLMSCHED_DATA_DIR ?= $(abspath ../shared)

.PHONY: demo test check install format paper vllm clean

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/python -m benchmarks.demo --out out/demo

$(DEMO_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip install -q -c constraints.txt -e .
	touch $@

install: $(VENV)/.installed

# torch first and alone: asked for by another package, it would come with several GB of GPU libraries
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[agents,real,dev]"
	touch $@

test: install
	$(VENV)/bin/python -m pytest $(PYTEST)

check: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

paper: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/llmsched reproduce

# vLLM's own scheduler against ours, in an environment of its own: 10 minutes and 2 GB
vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m benchmarks.conformance_vllm --cells
	$(VLLM_VENV)/bin/python -m benchmarks.conformance_vllm --cells --reserve false

$(VLLM_VENV)/.installed: benchmarks/vllm_env.sh pyproject.toml
	PYTHON=$(PYTHON) benchmarks/vllm_env.sh $(VLLM_VENV)
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(VLLM_VENV) build dist out *.egg-info
