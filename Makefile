# `make demo` and `make test` install into .venv first, and again when pyproject.toml changes.
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
	@echo "make demo   install, train on digits, generate, evaluate (about 4 minutes on two cores, plus installation)"
	@echo "make test   install, ruff, mypy, pytest"
	@echo "make slow   run the slow tests"
	@echo "make gpu    test and measure on this machine's GPU, and update the table in docs/results.md"
	@echo "make docs   build the site into build/site: pages, reference, executed notebooks 1 and 2; dead links are errors"
	@echo "make site   build the site and serve it at http://127.0.0.1:8000; PORT=9000 changes the port"
	@echo "make notebooks  execute docs/notebooks into build/notebooks (15 minutes)"
	@echo "make floors run the tests with the lowest versions in pyproject.toml, then with the newest"
	@echo "make lock   update uv.lock from pyproject.toml; ARGS=--upgrade upgrades the versions"
	@echo "make audit  check uv.lock and the lowest versions against PyPI's security advisories"
	@echo "make sbom   write the locked packages as build/sbom.cdx.json (CycloneDX)"
	@echo "make wheel  build a wheel and a source archive of the commit into build/dist"

demo: $(DONE)/evaluation
	@cat $(RUNS)/gpt_digits/evaluation/evaluation.txt
	@printf '%s\n' '' 'samples          $(RUNS)/gpt_digits/evaluation/samples.png' \
	  'reconstructions  $(RUNS)/gpt_digits/evaluation/reconstructions.png' \
	  'pipeline         $(RUNS)/gpt_digits/pipeline' '' 'Load it with $(BIN)/python:' '' \
	  '  from pipelines import ImagePipeline' \
	  '  pipe = ImagePipeline.from_pretrained("$(RUNS)/gpt_digits/pipeline")' \
	  '  pipe(num_images=4, labels=[3, 3, 8, 8], seed=0).images[0].save("three.png")'

# A stage that succeeded does not run again. Stamp files live outside the output folders, which may hold only their own
# files.
$(DONE)/vqvae_digits: | $(READY)
	@$(BIN)/python -m benchmarks.speed.demo threads=$(CORES)
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
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/site/*.py
	$(BIN)/mypy tests/project/user_script.py

slow: $(TESTS)
	$(BIN)/python -m pytest -m slow $(ARGS)

# Without a GPU, print the CUDA version of torch and the driver, which may be too old. Timeouts use a thread, as a signal
# does not interrupt a hanging CUDA call. The benchmark runs even if tests fail, but then leaves the page as it is.
SEES := import sys, torch; sys.exit(None if torch.cuda.is_available() else \
  f"make gpu: torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU. The torch of PyPI needs a \
driver for CUDA 13 (580 or newer); with an older one: rm -r $(VENV), $(PYTHON) -m venv $(VENV), $(BIN)/pip install \
torch torchvision --index-url https://download.pytorch.org/whl/cu126, make gpu")
COMPILES := import sys; from prior.compiling import compiler_problem; problem = compiler_problem(); \
  sys.exit(f"make gpu: torch.compile does not work: {problem}" if problem else None)
gpu: $(GPU)
	@$(BIN)/python -c '$(SEES)' || { nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || \
	  echo "make gpu: no driver (nvidia-smi)"; exit 1; } >&2
	@$(BIN)/python -c '$(COMPILES)'
	$(BIN)/python -m pytest -m gpu --timeout=900 --timeout-method=thread tests/gpu $(ARGS); checked=$$?; \
	  test $$checked = 0 && page=docs=docs/results.md; $(BIN)/python -m benchmarks.speed.gpu $$page && exit $$checked

# Notebooks 1 and 2 are executed; the others have outputs after `make notebooks`.
docs: build/notebooks/1_chain_rule.ipynb build/notebooks/2_two_stages.ipynb
	$(BIN)/python docs/site/build.py

site: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site $(PORT)

notebooks: $(NOTEBOOKS)

# Execute in an empty folder, and again when the text changes. A failing cell stops the execution.
build/notebooks/%.ipynb: docs/notebooks/%.py | $(TESTS)
	@rm -rf build/notebooks/$* && mkdir -p build/notebooks/$*
	PYTHONPATH=$(CURDIR) $(BIN)/jupytext --to ipynb --execute --run-path build/notebooks/$* --output $@ $<

# The lowest versions on the oldest Python, then the newest versions, each in an environment below build/. The second
# run does not depend on the first.
suite = $(UV) venv --quiet --clear --python '$(2)' build/floors-$(1) && . build/floors-$(1)/bin/activate && \
  $(UV) pip install --quiet $(3) -r pyproject.toml --extra dev && $(UV) pip install --quiet --no-deps -e . && \
  python -m pytest $(ARGS)
floors: $(SUPPLY)
	($(call suite,lowest,3.11,--resolution lowest-direct)); lowest=$$?; ($(call suite,newest,>=3.11,)) && exit $$lowest

lock: $(SUPPLY)
	$(UV) lock $(ARGS)

# --strict: a package that cannot be checked is an error. ARGS="-s osv" asks OSV instead. The lowest torch has two
# advisories: on loading files of torch.export, which we only do with our own, and on torch.jit.script, which we do not
# call.
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

# From the committed files, with the commit's time, so that the wheel is reproducible byte for byte.
wheel: $(SUPPLY)
	@rm -rf build/dist build/source && mkdir build/source
	umask 022 && git archive HEAD | tar -x --no-same-permissions -C build/source && \
	  SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(UV) build --quiet --out-dir build/dist build/source

# The tools have a separate environment, so that their dependencies do not mix with ours.
$(SUPPLY):
	@$(PYTHON) -m venv --clear build/supply
	@build/supply/bin/python -m pip install --quiet --disable-pip-version-check uv pip-audit
	@touch $@

# The stamp is written last, so that a failed installation is repeated.
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
