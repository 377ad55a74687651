# make run     the daemon on configs/quickstart.toml (STEPS=300 stops it after 300 steps, CONFIG=… runs another file)
# make test    the whole suite
# make check   ruff, mypy, import contracts, systemd unit
# make bench   the benchmarks, about an hour on a quiet machine
# make bench-anytime  one configuration against runs tuned for every horizon, the table and the first picture of the
#              README: two hours on two cores; stopped and started again it goes on
# make faults  every fault of the list at every point, with the list of what was injected; as root, with strace; an hour or two
# make fuzz    a hundred thousand hostile records and a thousand damaged shards, two minutes
# make longrun x after a million steps of every optimizer, about an hour on two cores
#
# PYTHON picks the interpreter of .venv, TORCH_INDEX=URL another wheel index for torch (see README: machines without a GPU).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.toml
TORCH_INDEX ?=
PIP_FLAGS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INPUTS := pyproject.toml constraints.txt
WORKERS ?= 2

.PHONY: run test faults fuzz check bench bench-anytime longrun clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	@$(BIN)/anytimed run $(CONFIG) $(if $(STEPS),--steps $(STEPS))

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

faults: $(VENV)/.installed-test
	FAULTS=full $(BIN)/python -m pytest -n $(WORKERS) --timeout 7200 tests/faults tests/crash $(ARGS)

fuzz: $(VENV)/.installed-test
	FUZZ=full $(BIN)/python -m pytest tests/adapters/test_fuzz.py -rP $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@command -v systemd-analyze >/dev/null || { echo "systemd-analyze is missing: apt-get install systemd"; exit 1; }
	systemd/verify

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/export_stall.py
	$(BIN)/python benchmarks/commit.py
	$(BIN)/python benchmarks/scrape.py
	$(BIN)/python benchmarks/store_faults.py
	$(BIN)/python benchmarks/pull.py
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/stream_growth.py

bench-anytime: $(VENV)/.installed-test
	$(BIN)/python benchmarks/anytime.py $(ARGS)

# torch first and alone: it is the large one, and the constraint names the exact version that every later resolve keeps.
$(VENV)/.installed: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	@touch $@

longrun: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/long/million_steps.py -n $(WORKERS) -rP $(ARGS)

# --no-deps: a peer must not replace torch (peers.txt says which would).
$(VENV)/.installed-bench: $(VENV)/.installed-test benchmarks/peers.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	@touch $@

clean:
	rm -rf $(VENV)
