# A fresh machine needs two commands: `make demo` and `make test`. Both need Python 3.11 or later, and make.

PYTHON ?= python3
VENV := .venv
# If a Python already has torch with CUDA, `make gpu VENV= PYTHON=python3` uses it and installs nothing.
# WHEELS=FOLDER adds the wheels in that folder, without a network (docs/gpu.md).
ifdef WHEELS
VENV :=
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
# $(call install,EXTRAS,TORCH): exactly what requirements.lock lists for these extras, by digest, then the checkout itself.
# Nothing is resolved or built on the way, so nothing else can come in. TORCH is cpu or cuda. A build of torch for the CPU
# is taken where pip finds one, such as in a folder of PIP_FIND_LINKS, and else the one of the index. torch is installed
# beside the rest, because one pip uses one core.
LOCKED := $(BIN)/python app/chunkmill/system/locked.py
BY_DIGEST := $(PIP) --require-hashes --no-deps --only-binary :all: -r
define install
	@$(LOCKED) build,$(1) > $(VENV)/requirements.txt
	@$(LOCKED) --torch $(2) $(1) > $(VENV)/torch.txt
	@$(BY_DIGEST) $(VENV)/requirements.txt & others=$$!; \
		$(BY_DIGEST) $(VENV)/torch.txt $(if $(filter cpu,$(2)),2> /dev/null || { \
		echo "== pip finds no build of torch for the CPU. It takes that with CUDA: 3 GB more"; \
		echo "   and some minutes. docs/running.md (One machine) says how to do without."; \
		$(LOCKED) --torch cuda $(1) > $(VENV)/torch.txt && $(BY_DIGEST) $(VENV)/torch.txt; }); torch=$$?; \
		wait $$others; exit $$(($$? | torch))
	@$(PIP) --no-deps --no-build-isolation -e .
endef
comma := ,
# pip compiles with one core. Some packages have files for other versions of Python, which cannot be compiled. Of what
# is left out, few files are ever imported.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests?|transformers/models|pip|debugpy|networkx)/' $(VENV)/lib || true

# If it is set, each process that a test starts compiles our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint types unit servers wheel release lock bench bench-search chaos mutants busy fuzz aimock realservers conformance gpu audit floors docs clean

help:
	@echo "make demo          install, then run one whole job on real documents, in under"
	@echo "                   two minutes"
	@echo "make test          install, then run everything that CI runs"
	@echo "make wheel         build the wheel that the scripts in deploy install, into"
	@echo "                   dist, and print its digest"
	@echo "make release       the same, with a list of its parts (SBOM, CycloneDX), their"
	@echo "                   licences, and the digests of all of it"
	@echo "make lock          write requirements.lock again, after a change of"
	@echo "                   constraints.txt or of the dependencies"
	@echo "make bench         run every benchmark, beside other libraries; results in"
	@echo "                   benchmarks/results, plots in docs/images"
	@echo "make bench-search  search a collection of a million rows, beside exact search;"
	@echo "                   an hour and a half on two cores"
	@echo "make chaos         kill, freeze and cut everything while a job runs, and prove"
	@echo "                   that nothing is lost; it also runs the slow tests"
	@echo "make mutants       change the code in small wrong ways, one at a time, and see"
	@echo "                   which the tests notice; run it before a release"
	@echo "make busy          run the tests beside fifteen busy processes; they take five"
	@echo "                   times as long and must pass too"
	@echo "make fuzz          send 10,000 random messages to the door and to a worker, and"
	@echo "                   read 2,000 random folders; from fixed seeds"
	@echo "make servers       run the tests of everything that asks Postgres on the server"
	@echo "                   of TEST_DATABASE_URL, such as a Postgres 15"
	@echo "make aimock        test the paid routes against an independent mock of OpenAI's"
	@echo "                   API; needs Node 20 and npm"
	@echo "make realservers   test the paid routes against Infinity, LiteLLM's proxy and"
	@echo "                   ogx (1.5 GB; ogx needs PYTHON312)"
	@echo "make conformance   test the gateway with the clients that others wrote and with"
	@echo "                   OpenAI's own spec; needs Node 20 and npm"
	@echo "make audit         list known vulnerabilities of the installed packages;"
	@echo "                   without a network it only says so"
	@echo "make floors        test a producer with the lowest versions that pyproject.toml"
	@echo "                   allows"
	@echo "make docs          write docs/api.md, docs/settings.md and the list of"
	@echo "                   decisions again"
	@echo "make gpu           run the GPU tests and benchmarks on a machine with an NVIDIA"
	@echo "                   GPU, in under ten minutes; see docs/gpu.md"
	@echo "make clean         remove .venv and caches"

demo: $(VENV)/.demo
	@$(BIN)/chunkmill demo

# pip-audit waits for the network, and mypy takes one core for a minute or two.
test: lint
	@echo "== pytest, on real Postgres, Redis and Celery workers, with mypy --strict and pip-audit beside it"
	@$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & mypy=$$!; \
		$(BIN)/python -m tests.support.audit --warn > $(VENV)/audit.log 2>&1 & audit=$$!; \
		$(BIN)/python -m pytest -n 5 --dist loadfile --no-loadscope-reorder -m "not slow" --durations=15; tests=$$?; \
		wait $$audit; unsafe=$$?; echo "== pip-audit"; cat $(VENV)/audit.log; \
		wait $$mypy; types=$$?; echo "== mypy --strict"; cat $(VENV)/mypy.log; exit $$((tests | types | unsafe))

lint: $(VENV)/.dev
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== import-linter"
	@$(BIN)/lint-imports

types: $(VENV)/.dev
	@echo "== mypy --strict"
	@$(BIN)/mypy

wheel: | $(BIN)/python
	@$(LOCKED) build > $(VENV)/build.txt
	@$(BY_DIGEST) $(VENV)/build.txt
	@$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@for wheel in dist/*.whl; do \
		echo "CHUNKMILL_WHEEL=$(CURDIR)/$$wheel CHUNKMILL_WHEEL_SHA256=$$(sha256sum < $$wheel | cut -d' ' -f1)"; done

# What goes with a release, all in dist: the wheel, its digest, its parts (CycloneDX) and their licences.
release: wheel $(VENV)/.dev
	@$(BIN)/python -m tests.support.parts dist
	@cd dist && sha256sum *.whl *.json *.txt > SHA256SUMS && cat SHA256SUMS

# uv asks the index for the digests of all files; it is in an environment of its own.
lock: $(VENV)/.dev
	@$(PYTHON) -m venv .uv && .uv/bin/python -m pip --disable-pip-version-check install --quiet uv
	@$(BIN)/python -m tests.support.make_lock .uv/bin/uv

# The lowest versions that pyproject.toml allows to a producer, in an environment of their own.
FLOOR_EXTRAS := flower metrics openai
floors:
	@$(PYTHON) -m venv .floors
	@$(PYTHON) -m tests.support.floors $(FLOOR_EXTRAS) > .floors/constraints.txt
	@.floors/bin/python -m pip --disable-pip-version-check install --quiet -c .floors/constraints.txt \
	    '.[flower,metrics,openai]' hypothesis pytest pytest-timeout
	@.floors/bin/python -m pytest -q tests/unit/chunkmill/test_broker.py tests/unit/chunkmill/settings \
	    tests/unit/chunkmill/telemetry/test_metrics.py tests/unit/chunkmill/openai/test_http.py \
	    tests/unit/chunkmill/cli/processes/test_flower.py

docs: $(VENV)/.dev
	@$(BIN)/python docs/make.py

audit: $(VENV)/.dev
	@$(BIN)/python -m tests.support.audit

# Some peers need package versions that conflict with ours: `chunkmill bench --install-peers` makes environments for
# them (3 GB).
bench: $(VENV)/.bench
	@$(BIN)/python -m chunkmill_workers.benchmarks

# With a collection of a million rows, which takes an hour and a half on two cores.
bench-search: $(VENV)/.bench
	@$(BIN)/python -m chunkmill_workers.benchmarks search-million

# The second schedule runs even if the first one fails.
SEED ?= 1
chaos: $(VENV)/.dev
	@echo "== one fault at a time"
	@$(BIN)/python -m pytest -q -m slow tests/acceptance tests/engine tests/integration
	@echo "== a slow fake engine, which counts every text"
	@$(BIN)/python -m tests.chaos --seed $(SEED) --faults 54 --chunks 5000; fake=$$?; \
		echo "== the real engine, under chunkmill worker"; \
		$(BIN)/python -m tests.chaos --seed $(SEED) --faults 21 --chunks 1500 --engine real --supervised; real=$$?; \
		echo "== the paid routes, killed at every step, and the provider's bill"; \
		$(BIN)/python -m tests.openai_chaos --seeds 20 && exit $$((fake | real))

# ONLY="area-or-mutant ..." runs some of them; see tests/mutants/README.md.
mutants: $(VENV)/.dev
	@$(BIN)/python -m tests.mutants $(ONLY)

# ONLY="tests/acceptance/test_logs.py ..." runs a part of them.
busy: $(VENV)/.dev
	@$(BIN)/python -m tests.support.busy $(ONLY)

# `make test` sends 200 of them to the door.
fuzz: $(VENV)/.dev
	@FUZZ=10000 $(BIN)/python -m pytest -q tests/unit/chunkmill/messages/test_door.py \
		tests/acceptance/test_hostile_redis.py::test_ten_thousand_random_messages_change_nothing
	@$(BIN)/python -m pytest -q -m slow tests/engine/test_fuzzed_folders.py

# The files that cover a whole job, its SQL, the migrations and the roles; the other tests say nothing new of a server.
ON_A_SERVER := test_pipeline test_enqueue test_search test_store test_writers test_audit test_claims test_cancel test_prune \
	test_deletions test_money test_provider_work test_migrations test_downgrades test_upgrades test_encodings \
	test_shared_databases
servers: $(VENV)/.dev
	@test -n "$$TEST_DATABASE_URL" || { echo "Name a superuser's database: make servers TEST_DATABASE_URL=postgresql://postgres@/postgres?host=/tmp"; exit 1; }
	@TEST_DATABASE_URL="$$TEST_DATABASE_URL" $(BIN)/python -m pytest -q \
		$(ON_A_SERVER:%=tests/integration/%.py) tests/acceptance/test_least_privilege.py

# A mock of the API that others wrote; tests/openai_server is our own.
AIMOCK := .aimock
aimock: $(VENV)/.dev $(AIMOCK)/node_modules
	@$(BIN)/python -m pytest -q -rs tests/independent

# Servers of embeddings that others wrote, each in an environment of its own. Infinity also sees the packages of $(VENV), so
# that torch is not installed twice; ogx needs Python 3.12, and its tests are skipped without it.
REAL_SERVERS := .real-servers
PYTHON312 ?= python3.12
realservers: $(VENV)/.dev $(REAL_SERVERS)/.installed
	@$(BIN)/python -m pytest -q -rs tests/real_servers

$(REAL_SERVERS)/.installed: tests/real_servers/infinity.txt
	@echo "== installing servers of embeddings into $(REAL_SERVERS)"
	@$(PYTHON) -m venv $(REAL_SERVERS)/infinity
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(REAL_SERVERS)/infinity/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	@$(REAL_SERVERS)/infinity/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		-r tests/real_servers/infinity.txt
	@$(PYTHON) -m venv $(REAL_SERVERS)/litellm
	@$(REAL_SERVERS)/litellm/bin/python -m pip --disable-pip-version-check install --quiet 'litellm[proxy]==1.108.7'
	@if command -v $(PYTHON312) > /dev/null; then $(PYTHON312) -m venv $(REAL_SERVERS)/ogx && \
		$(REAL_SERVERS)/ogx/bin/python -m pip --disable-pip-version-check install --quiet ogx==1.5.0; fi
	@touch $@

$(AIMOCK)/node_modules:
	@echo "== installing @copilotkit/aimock into $(AIMOCK)"
	@npm install --silent --no-save --prefix $(AIMOCK) @copilotkit/aimock@1.43.0

# Clients of embeddings that others wrote. They do not resolve together, so each family has an environment of its own, whose
# packages are listed with their versions: FAMILY.txt is what `uv pip compile` makes of FAMILY.in.
CONFORMANCE := .conformance
FAMILIES := $(basename $(notdir $(wildcard tests/conformance/environments/*.txt)))
conformance: $(VENV)/.dev $(FAMILIES:%=$(CONFORMANCE)/%/.installed) $(CONFORMANCE)/javascript/.installed
	@$(BIN)/python -m pytest -q -rs tests/conformance

$(CONFORMANCE)/%/.installed: tests/conformance/environments/%.txt
	@echo "== installing clients of the gateway into $(CONFORMANCE)/$*"
	@$(PYTHON) -m venv --clear $(CONFORMANCE)/$*
	@$(CONFORMANCE)/$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --only-binary :all: -r $<
	@touch $@

$(CONFORMANCE)/javascript/.installed: tests/conformance/javascript/package-lock.json
	@echo "== installing clients of the gateway into $(CONFORMANCE)/javascript"
	@mkdir -p $(CONFORMANCE)/javascript
	@cp tests/conformance/javascript/package.json tests/conformance/javascript/package-lock.json $(CONFORMANCE)/javascript
	@npm ci --silent --prefix $(CONFORMANCE)/javascript
	@touch $@

RESULTS ?= benchmarks/results
GPU_SITE := .gpu-site
GPU_PYTHON = env PYTHONPATH=$(CURDIR)/app:$(CURDIR)/workers:$(CURDIR)$(if $(WHEELS),:$(CURDIR)/$(GPU_SITE)) $(if $(VENV),$(BIN)/python,$(PYTHON))
GPU_LIMIT = timeout --signal=INT --kill-after=30

# The benchmarks run even if tests fail, because a GPU is paid by the hour. Both stop in time and keep their results.
gpu: $(if $(VENV),$(VENV)/.gpu,$(if $(WHEELS),$(GPU_SITE)))
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
		f"torch {torch.__version__} sees no CUDA device: nvidia-smi names driver and devices, docs/gpu.md says more")'
	@echo "== pytest, on the GPU"
	@$(GPU_LIMIT) 210 $(GPU_PYTHON) -m pytest tests/gpu -q -rs $(if $(VENV),,-W default); \
		tests=$$?; \
		echo "== benchmarks, on the GPU; results in $(RESULTS)"; \
		$(GPU_LIMIT) 270 $(GPU_PYTHON) -m chunkmill_workers.benchmarks gpu gpu-pipeline --rounds 3 --out $(RESULTS) && exit $$tests

clean:
	rm -rf $(VENV) .floors .uv $(GPU_SITE) $(AIMOCK) $(REAL_SERVERS) $(CONFORMANCE) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Chunkmill needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 demo"; exit 1; }
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.demo: pyproject.toml requirements.lock app/chunkmill/system/locked.py | $(VENV)/bin/python
	@echo "== installing from requirements.lock (about 350 MB; a minute or two)"
	$(call install,worker$(comma)embedded$(comma)flower$(comma)parquet$(comma)documents,cpu)
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml requirements.lock app/chunkmill/system/locked.py | $(VENV)/bin/python
	@echo "== installing from requirements.lock (about 400 MB; a minute or two)"
	$(call install,dev,cpu)
	@$(COMPILE)
	@touch $(VENV)/.demo $@

$(VENV)/.bench: pyproject.toml requirements.lock app/chunkmill/system/locked.py | $(VENV)/.dev
	@echo "== installing the peers of the benchmark from requirements.lock (about 150 MB)"
	$(call install,dev$(comma)bench,cpu)
	@touch $@

$(VENV)/.gpu: pyproject.toml requirements.lock app/chunkmill/system/locked.py | $(VENV)/bin/python
	@echo "== installing from requirements.lock (about 3 GB with CUDA; two minutes or so)"
	$(call install,gpu,cuda)
	@touch $@

$(GPU_SITE): $(WHEELS)
	@echo "== unpacking the wheels in $(WHEELS)"
	@$(PYTHON) -m pip --disable-pip-version-check install --quiet --no-index --no-deps --upgrade --target $@ $(WHEELS)/*.whl
	@touch $@
