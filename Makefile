# Two commands: `make demo` and `make test`. Both install into .venv first, and again when pyproject.toml changes.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs
DONE   := $(RUNS)/.demo
CORES  := $(shell nproc 2>/dev/null || echo 1)
ARGS   ?=
PORT   ?= 8000
BIN    := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process $(CORES) -m
SUM    := $(shell cksum pyproject.toml | cut -d' ' -f1)
READY  := $(VENV)/.demo-$(SUM)
TESTS  := $(VENV)/.dev-$(SUM)
GPU    := $(VENV)/.gpu-$(SUM)
SUPPLY := build/supply/.made
UV     := build/supply/bin/uv
NOTEBOOKS := $(patsubst docs/notebooks/%.py,build/notebooks/%.ipynb,$(wildcard docs/notebooks/[1-9]_*.py))

.PHONY: demo test slow gpu notebooks docs site check floors lock audit sbom wheel help

help:
	@echo "make demo   install, train on digits, generate, evaluate (about 4 minutes on two cores, and the installation)"
	@echo "make test   install, ruff, mypy, pytest"
	@echo "make slow   the measurements that take longer"
	@echo "make gpu    checks and measures on this machine's GPU, and writes the table into docs/results.md"
	@echo "make docs   builds these pages, the reference and the notebooks as a site in build/site (5 minutes the first time)"
	@echo "make site   the same, served at http://127.0.0.1:8000; PORT=9000 changes the port"
	@echo "make notebooks executes all of docs/notebooks into build/notebooks (15 minutes)"
	@echo "make floors the tests with the lowest versions of pyproject.toml, then with the newest"
	@echo "make lock   brings uv.lock up to date with pyproject.toml; ARGS=--upgrade takes newer versions"
	@echo "make audit  asks the advisories of PyPI about every version in uv.lock, and about the lowest ones"
	@echo "make sbom   writes what is locked as build/sbom.cdx.json (CycloneDX)"
	@echo "make wheel  builds a wheel and a source archive of the commit into build/dist"

demo: $(DONE)/evaluation
	@cat $(RUNS)/gpt_digits/evaluation/evaluation.txt
	@printf '%s\n' '' 'samples          $(RUNS)/gpt_digits/evaluation/samples.png' \
	  'reconstructions  $(RUNS)/gpt_digits/evaluation/reconstructions.png' \
	  'pipeline         $(RUNS)/gpt_digits/pipeline' '' 'Load it with $(BIN)/python:' '' \
	  '  from pipelines import ImagePipeline' \
	  '  pipe = ImagePipeline.from_pretrained("$(RUNS)/gpt_digits/pipeline")' \
	  '  pipe(num_images=4, labels=[3, 3, 8, 8], seed=0).images[0].save("three.png")'

# Each stage is a real command, and is not run again once it ended well. The stamps that say so lie in a folder of their
# own: what a stage has written is one thing, and nobody else's files belong into it.
$(DONE)/vqvae_digits: | $(READY)
	$(LAUNCH) pipelines.train_tokenizer --config configs/tokenizer/vqvae_digits.yaml out=$(RUNS)/vqvae_digits
	@mkdir -p $(@D) && touch $@

$(DONE)/digits_tokens: $(DONE)/vqvae_digits
	$(LAUNCH) pipelines.encode tokenizer=$(RUNS)/vqvae_digits/tokenizer out=$(RUNS)/digits_tokens augmentations=4
	@touch $@

$(DONE)/gpt_digits: $(DONE)/digits_tokens
	$(LAUNCH) pipelines.train_prior --config configs/prior/gpt_digits.yaml tokens=$(RUNS)/digits_tokens out=$(RUNS)/gpt_digits
	@touch $@

$(DONE)/evaluation: $(DONE)/gpt_digits
	$(BIN)/smalti generate pipeline=$(RUNS)/gpt_digits/pipeline num_images=100 overwrite=true out=$(RUNS)/gpt_digits/grid.png
	$(BIN)/smalti evaluate pipeline=$(RUNS)/gpt_digits/pipeline overwrite=true > /dev/null
	@touch $@

test: $(TESTS) check
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile $(ARGS)

check: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/site/*.py
	$(BIN)/mypy tests/project/user_script.py

slow: $(TESTS)
	$(BIN)/python -m pytest -m slow $(ARGS)

# Without a GPU it says what torch was built for, and the driver: too old a driver is a GPU that torch does not see. A
# signal does not interrupt a call of CUDA that hangs, but a thread ends the process. Measurements are made even if tests
# fail, and a failure is the exit code.
SEES := import sys, torch; sys.exit(None if torch.cuda.is_available() else \
  f"make gpu: torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU here")
gpu: $(GPU)
	@$(BIN)/python -c '$(SEES)' || { nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || \
	  echo "make gpu: there is no driver (nvidia-smi)"; exit 1; } >&2
	$(BIN)/python -m pytest -m gpu --timeout=900 --timeout-method=thread tests/gpu $(ARGS); checked=$$?; \
	  $(BIN)/python -m benchmarks.speed.gpu docs=docs/results.md && exit $$checked

# The site, with notebooks 1 and 2 executed; the others have outputs after `make notebooks`.
docs: build/notebooks/1_chain_rule.ipynb build/notebooks/2_two_stages.ipynb
	$(BIN)/python docs/site/build.py

site: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site $(PORT)

notebooks: $(NOTEBOOKS)

# Executed in an empty folder, again when its text changes. A cell that fails ends it.
build/notebooks/%.ipynb: docs/notebooks/%.py | $(TESTS)
	@rm -rf build/notebooks/$* && mkdir -p build/notebooks/$*
	PYTHONPATH=$(CURDIR) $(BIN)/jupytext --to ipynb --execute --run-path build/notebooks/$* --output $@ $<

# With the lowest versions on the oldest Python, then with the newest versions, each in an environment below build/. The
# second runs whatever the first has shown.
suite = $(UV) venv --quiet --clear --python '$(2)' build/floors-$(1) && . build/floors-$(1)/bin/activate && \
  $(UV) pip install --quiet $(3) -r pyproject.toml --extra dev && $(UV) pip install --quiet --no-deps -e . && \
  python -m pytest $(ARGS)
floors: $(SUPPLY)
	($(call suite,lowest,3.11,--resolution lowest-direct)); lowest=$$?; ($(call suite,newest,>=3.11,)) && exit $$lowest

lock: $(SUPPLY)
	$(UV) lock $(ARGS)

# --strict: a version that nothing could be learned about is an error, not a pass. ARGS="-s osv" asks OSV instead.
# Of the lowest torch two are known: files of torch.export, of which we load none but our own, and torch.jit.script,
# which we do not call.
AUDIT := build/supply/bin/pip-audit --no-deps --disable-pip --strict --progress-spinner off
audit: $(SUPPLY)
	$(UV) export --quiet --frozen --all-extras --no-emit-project --no-hashes -o build/locked.txt > /dev/null
	$(UV) pip compile --quiet --resolution lowest-direct --python-version 3.11 --extra dev pyproject.toml \
	  -o build/lowest.txt > /dev/null
	$(AUDIT) -r build/locked.txt $(ARGS)
	$(AUDIT) -r build/lowest.txt --ignore-vuln CVE-2026-4538 --ignore-vuln CVE-2025-3000 $(ARGS)

sbom: $(SUPPLY)
	$(UV) export --frozen --quiet --all-extras --format cyclonedx1.5 -o build/sbom.cdx.json > /dev/null
	@echo "build/sbom.cdx.json: $$(grep -c '"purl"' build/sbom.cdx.json) packages"

# Of what git has, with the time of the commit: the same wheel, byte for byte, wherever it is built.
wheel: $(SUPPLY)
	@rm -rf build/dist build/source && mkdir build/source
	umask 022 && git archive HEAD | tar -x --no-same-permissions -C build/source && \
	  SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(UV) build --quiet --out-dir build/dist build/source

# The tools have an environment of their own: what they need is none of ours.
$(SUPPLY):
	@$(PYTHON) -m venv --clear build/supply
	@build/supply/bin/python -m pip install --quiet --disable-pip-version-check uv pip-audit
	@touch $@

# A stamp is made only after everything before it succeeded, so a half-failed install is repaired by the next call.
$(READY): pyproject.toml
	$(call install,digits)

$(TESTS): pyproject.toml
	$(call install,dev)

$(GPU): pyproject.toml
	$(call install,dev$(comma)benchmarks)

comma := ,

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Smalti needs Python 3.11 or newer")'
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-* $(VENV)/.gpu-*
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(1)]"
	@touch $@
endef
