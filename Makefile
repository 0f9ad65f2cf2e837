# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
BIN = .venv/bin
APP = .venv-app/bin
# Processes that test at the same time, of one thread each.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist worksteal

.PHONY: demo app test test-slow test-online test-browser test-processors parity docs notebooks

demo: .venv/run.done  ## demo data, a small CRIS that learns to read, its scores and overlays
	$(BIN)/python prepare.py demo --out data/demo
	$(BIN)/python benchmarks/demo.py --data data/demo --out runs/demo

app: .venv-app/app.done  ## the page in a browser: make app ARGS="--weights runs/demo"
	$(APP)/python app.py $(ARGS)

test: .venv/dev.done  ## every test that is quick and needs no connection
	$(BIN)/python -m pytest tests -q $(PARALLEL) -m "not slow and not online and not browser"

test-slow: .venv/dev.done  ## minutes each
	$(BIN)/python -m pytest tests -q -m slow

test-browser: .venv-app/app.done  ## the page, driven in chromium
	$(APP)/python -m pytest tests/test_browser.py -q -rs

# Stand-ins for other processors: with everything at its lowest and one thread, and with AVX2 at most.
LOWEST = MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1
AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
NUMERIC = $(BIN)/python -m pytest tests -q $(PARALLEL) -m "numeric and not slow and not online"

test-processors: .venv/dev.done  ## the tests that compare numbers, twice: see above
	$(LOWEST) $(NUMERIC)
	$(AVX2) $(NUMERIC)

parity: .venv/dev.done  ## measure the deviations from the official code anew, for the docs
	$(BIN)/python -m pytest tests -q -m parity --record-parity

docs: .venv/dev.done  ## fill the generated tables of README.md and docs/
	$(BIN)/python docs/generate.py

notebooks: .venv/dev.done  ## make the notebooks of notebooks/*.py and run them
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py
	$(BIN)/jupyter-nbconvert --to notebook --inplace --log-level WARN \
	  --CoalesceStreamsPreprocessor.enabled=True notebooks/*.ipynb

test-online: .venv/dev.done  ## real weights from the hub, published numbers
	$(BIN)/python -m pytest tests -q -rs -m online

.venv/run.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/dev.done: .venv/run.done requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

.venv-app/app.done: requirements.txt requirements-app.txt
	$(PYTHON) -m venv .venv-app
	$(APP)/python -m pip install -q -r requirements-app.txt
	touch $@
