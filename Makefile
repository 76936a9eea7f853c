# Everything on a fresh machine: `make demo` to see it work, `make test` for the whole suite, `make check` for style.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
VLLM_VENV ?= .venv-vllm
RAY_VENV ?= .venv-ray
DOCS_VENV ?= .venv-docs
# one process per core, a file's tests in one of them: they share compiled code; in the order of tests/conftest.py
PYTEST ?= -n 2 --dist loadfile --no-loadscope-reorder
export LLMSCHED_DATA_DIR ?= $(abspath ../shared)

.PHONY: demo test check coverage install format paper docs docs-version libraries ray vllm clean

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
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[agents,real,serve,dev]"
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

# Lines of llmsched_gym/engine, env and evaluation that tests run. Coverage does not see compiled code, so kernels count as
# plain Python, a thousand times as slow, in tests of COVERED_INTERPRETED, which are cut off after 30 s then; all other
# lines count in COVERED_COMPILED. Half an hour of two cores with Python 3.12 or later (PYTHON=python3.13), whose
# sys.monitoring costs next to nothing, and not in CI, whose time is used up. The lines count of a test that fails, too: some
# have seconds for something, and measured everything takes longer.
COVERED_COMPILED = $(addprefix tests/test_,arena*.py bench.py cli*.py cluster*.py columns.py capacities.py compiling.py docs.py env_*.py \
	engine_determinism.py evaluation*.py hostile_files.py interrupts.py long_run.py metrics*.py out_folders.py policies.py \
	record*.py render.py replay.py robustness.py route_policy.py sessions.py spread.py stateful_env.py suites.py \
	terminals.py workers.py)
COVERED_INTERPRETED = $(addprefix tests/test_,cluster.py cluster_reports.py cluster_routers.py cluster_transfers.py \
	engine_[a-l]*.py engine_prefix.py engine_[q-s]*.py env_[abmop]*.py env_infos.py env_route.py env_states.py env_threads.py \
	mixing_feature.py route_policy.py schedulers_on_time.py schedulers_slai.py stateful_found.py surface.py)
# parts of the names of tests that are not worth their time as plain Python
SLOW_INTERPRETED = compiled or interpreted or rules_hold or crowded or drains or random_legal or random_knob \
	or tree_stays or promises_are or noise_goes or accounted or closed_form or never_come or learns or example_runs \
	or checker or library_finds or stable_baselines or gymnasium or single_engine or side_by_side or every_block \
	or without_prefix_caching or than_a_block or outside_an_array or as_it_acts or together_equals \
	or is_the_scheduler or vector_of_them or held_throughout or whatever_the_number or aging or beats_what \
	or can_be_promised or plan_as_knobs or run_of_the_cluster or after_evictions or surface_says \
	or knows_the_price or additive or other_actions_have_them or is_the_router or reward_threshold
COVERAGE = $(VENV)/bin/python -m coverage

coverage: install
	$(COVERAGE) erase
	-$(COVERAGE) run -m pytest $(PYTEST) $(COVERED_COMPILED)
	-NUMBA_DISABLE_JIT=1 $(COVERAGE) run -m pytest -n 2 --timeout 30 $(COVERED_INTERPRETED) -k "not ($(SLOW_INTERPRETED))"
	$(COVERAGE) combine -q
	$(COVERAGE) report --fail-under=95

# other libraries on our environments, each in a virtual environment of its own, torch first and alone; then how fast they are
PEERS ?= .venv-peers
WRAPPERS = 1.2.2 1.3.0 1.4.0

libraries: $(WRAPPERS:%=$(PEERS)/gymnasium-%/.run) $(PEERS)/rllib/.run $(PEERS)/torchrl/.run $(PEERS)/learners/.run \
		$(PEERS)/d3rlpy/.run install
	$(VENV)/bin/python -m benchmarks.libraries --environments $(PEERS)

$(PEERS)/gymnasium-%/.run:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -e . gymnasium==$*
	$(@D)/bin/python benchmarks/peers/gymnasium_wrappers.py

$(PEERS)/rllib/.run:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q torch==2.13.0
	$(@D)/bin/pip install -q -e . "ray[rllib]==2.60.0"
	$(@D)/bin/python benchmarks/peers/rllib_runner.py

$(PEERS)/torchrl/.run:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q torch==2.13.0
	$(@D)/bin/pip install -q -e . "torchrl==0.14.*"
	$(@D)/bin/python benchmarks/peers/torchrl_envs.py

$(PEERS)/learners/.run:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q torch==2.13.0
	$(@D)/bin/pip install -q -e . "stable-baselines3==2.9.*" "sb3-contrib==2.9.*" "skrl==2.1.*" "tianshou==2.0.*" \
		"evotorch==0.6.*" "cma==4.*" "minari[hdf5,create]==0.5.*"
	$(@D)/bin/python benchmarks/peers/minari_collector.py

# it asks for gymnasium 1.0.0, and needs of it what later ones have
$(PEERS)/d3rlpy/.run:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q torch==2.13.0
	$(@D)/bin/pip install -q -e . click h5py structlog colorama dataclasses-json scikit-learn gym
	$(@D)/bin/pip install -q --no-deps "d3rlpy==2.8.*"

# The map over cells on two workers of a local Ray, in an environment of its own: 9 minutes and 1 GB. Not in CI, whose
# time is used up, as starting Ray alone takes as long as many tests. The ordinary suite has what needs no Ray.
ray: $(RAY_VENV)/.installed
	$(RAY_VENV)/bin/python -m benchmarks.ray_map

$(RAY_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/pip install -q -e ".[ray]"
	touch $@

# the site, offline, into out/site; a warning is an error
docs: $(DOCS_VENV)/.installed
	$(DOCS_VENV)/bin/mkdocs build

# the site of this version beside those of earlier ones, as a commit of the local branch gh-pages; push it to publish
docs-version: $(DOCS_VENV)/.installed
	PATH="$(abspath $(DOCS_VENV))/bin:$$PATH" DOCS_VERSIONS=mike $(DOCS_VENV)/bin/mike deploy --update-aliases \
		$$($(PYTHON) -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])') latest
	PATH="$(abspath $(DOCS_VENV))/bin:$$PATH" $(DOCS_VENV)/bin/mike set-default latest

$(DOCS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install -q "mkdocs-material==9.8.*" "mkdocstrings[python]==1.*" "mike==2.2.*" ruff
	touch $@

paper: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/llmsched reproduce

# vLLM's own scheduler against ours, and ours inside vLLM, in an environment of its own: 25 minutes and 2 GB
vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m benchmarks.conformance_vllm --cells
	$(VLLM_VENV)/bin/python -m benchmarks.conformance_vllm --cells --reserve false
	$(VLLM_VENV)/bin/python -m benchmarks.conformance_vllm --async --cells --requests 150
	$(VLLM_VENV)/bin/python -m benchmarks.conformance_vllm --async --cells --requests 150 --stop-share 0.5
	$(VLLM_VENV)/bin/python -m benchmarks.vllm_decisions
	$(VLLM_VENV)/bin/python -m benchmarks.vllm_tokens --seeds 1
	$(VLLM_VENV)/bin/python -m benchmarks.vllm_step_cost
	$(VLLM_VENV)/bin/python -m benchmarks.vllm_live --seeds 1 --num-requests 60 --servers $(VLLM_VENV)/bin/python
	$(VLLM_VENV)/bin/python -m pytest -q --noconftest tests/test_vllm_plugin.py tests/test_vllm_backend.py

$(VLLM_VENV)/.installed: benchmarks/vllm_env.sh pyproject.toml
	PYTHON=$(PYTHON) benchmarks/vllm_env.sh $(VLLM_VENV)
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(VLLM_VENV) $(RAY_VENV) $(DOCS_VENV) $(PEERS) build dist out *.egg-info
