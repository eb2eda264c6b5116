# Every verb has one line after `##`; `make` shows them all.
PYTHON ?= python3
PIP := DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --constraint constraints.txt
TRAIN_READY := .venv/.ready-to-train
TEST_READY := .venv/.ready-to-test
TOOLS_READY := .venv-tools/.ready
TOOLS := atheris==3.0.0 mutmut==3.8.1 pip-audit==2.10.1 pip-licenses==5.5.5 cyclonedx-bom==7.5.0 uv
GPL := quadprog # by way of TorchJD's projectors, only in the extras surgery and dev; any other is refused
BROWSER_READY := .venv/.ready-to-browse

.PHONY: help train test test-again test-long check bench papers search clean slurm-up slurm-down test-slurm test-browser soak fuzz mutants audit

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(TRAIN_READY) ## train on two nodes (local without Slurm): make train ARGS="--config configs/cs224n.yaml"
	@.venv/bin/python launch/submit.py --nodes 2 $(ARGS)

test: $(TEST_READY) ## run every test, and hold the core to its coverage: make test; a part: make test ARGS="-k schedule"
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(or $(ARGS),--cov)

test-again: $(TEST_READY) ## make test until it fails, or TIMES=20, with a record: docs/reliability.md
	@.venv/bin/python tests/faults/again.py --times $(or $(TIMES),20)

test-long: $(TEST_READY) ## the property tests on thousands of examples, others each time
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --hypothesis-profile long -m hypothesis $(ARGS)

check: $(TEST_READY) ## lint, formatting, types and the import rules
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest --quiet tests/test_imports.py

clean: ## remove .venv, caches and build products; runs/ stays
	@rm -rf .venv .venv-tools .fuzz .mutants audit build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
	@find mtbert launch tune tests -name __pycache__ -type d -prune -exec rm -rf {} +

bench: $(TEST_READY) ## what docs/performance.md says, measured anew (40 minutes; leave the machine alone)
	@.venv/bin/python -m benchmarks $(ARGS)

papers: $(TEST_READY) ## every system of the four papers that benchmarks/papers.jsonl lacks, hours: make papers ARGS="--budget 60 --data DIR --encoder DIR"
	@.venv/bin/python -m benchmarks.papers $(ARGS)

search: $(TEST_READY) ## 8 trials of the quick start, then best.yaml and report.md: make search ARGS="--trials 16"
	@.venv/bin/python -m tune --trials 8 $(ARGS)

slurm-up: ## a real two-node Slurm on this box, for tests (Debian, root)
	@slurm/cluster.sh up

slurm-down: ## stop it and undo what slurm-up did
	@slurm/cluster.sh down

test-slurm: $(TEST_READY) ## the tests on a real Slurm, brought up and taken down (Debian, root)
	@MTBERT_SLURM=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/slurm $(ARGS)

soak: $(TEST_READY) ## 500 faults into real jobs, hours, resumable (all kinds: root, strace): make soak ARGS="--faults 50 --seed 1"
	@.venv/bin/python tests/faults/soak.py $(ARGS)

fuzz: $(TOOLS_READY) ## coverage-guided fuzzing of every reader: make fuzz SECONDS=600
	@.venv-tools/bin/python tests/faults/fuzz_readers.py --seconds $(or $(SECONDS),60) $(ARGS)

mutants: $(TOOLS_READY) ## do the tests notice a wrong line? hours; a taste: make mutants ARGS="--modules schedule --sample 20"
	@.venv-tools/bin/python tests/faults/mutants.py $(ARGS)

audit: $(TOOLS_READY) ## known vulnerabilities, licences and an SBOM of what was tested, into audit/ (asks the index for advisories)
	@mkdir -p audit
	@.venv-tools/bin/pip-licenses --python=.venv/bin/python --from=mixed --format=markdown --output-file=audit/licences.md
	@.venv-tools/bin/pip-licenses --python=.venv/bin/python --from=mixed --ignore-packages $(GPL) --partial-match \
		--fail-on="GNU General Public;GPL-;Affero;AGPL;UNKNOWN" >/dev/null
	@.venv-tools/bin/cyclonedx-py environment .venv/bin/python --output-reproducible --output-file audit/sbom.json
	@.venv-tools/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

requirements.lock: constraints.txt $(TOOLS_READY) ## the tested versions with the hashes of their files
	@.venv-tools/bin/uv pip compile --quiet --no-deps --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-header --output-file $@ constraints.txt

test-browser: ## TensorBoard and our pages in a browser, pictures into docs/ (Debian: chromium); RUN=runs/NAME takes that run
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
		echo "test-browser needs Chromium; on Debian: apt-get install chromium" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(BROWSER_READY)
	@MTBERT_BROWSER=1 RUN=$(RUN) .venv/bin/python -m pytest tests/browser $(ARGS)

# A stamp is older than what it was made from only when something has to be installed.
$(TRAIN_READY): setup.py constraints.txt
	$(call install,.)
	@touch $@

$(TEST_READY): setup.py constraints.txt
	$(call install,.[dev])
	@touch $@ $(TRAIN_READY)

$(BROWSER_READY): setup.py constraints.txt
	$(call install,.[browser])
	@touch $@ $(TEST_READY) $(TRAIN_READY)

# What looks at the project from outside stays out of its environment, whose packages it only sees.
$(TOOLS_READY): setup.py $(TEST_READY)
	@$(PYTHON) -m venv .venv-tools
	@.venv/bin/python -c 'import site; print(site.getsitepackages()[0])' \
		> "$$(.venv-tools/bin/python -c 'import site; print(site.getsitepackages()[0])')/tested.pth"
	@.venv-tools/bin/python -m pip install --quiet $(TOOLS)
	@touch $@

# torch first and alone: later requirements then find the wheel the index has for this machine (a CPU one where offered).
# DeepSpeed compiles nothing (DS_BUILD_OPS=0): the engine uses none of its operators.
define install
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	echo "mtbert needs Python 3.10-3.13, $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing); name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
	exit 1; }
@echo "installing into .venv, once (a minute or more)"
@$(PYTHON) -m venv .venv
@$(PIP) torch==2.13.0
@$(PIP) --editable '$(1)'
endef
