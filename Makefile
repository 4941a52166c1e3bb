# The two commands of a newcomer: `make demo` and `make test`. Everything runs in .venv.

PYTHON ?= python3
UV_VERSION = 0.13.9
BIN = .venv/bin
RUN = $(BIN)/mlflow run . --env-manager local
export PATH := $(CURDIR)/$(BIN):$(PATH)
# MLflow starts a step in bash -c "python ...": that python must be the one of .venv.

STORE = $(if $(MLFLOW_TRACKING_URI),,mlflow.db)
MODEL ?= cnn
CPU_MINUTES ?= 10

.PHONY: demo cluster-demo test venv sweep ui lint lock

demo: venv
	$(RUN) -P dataset=strokes -P n_train=8000 -P cpu_minutes=2

# PostgreSQL's server must be installed; all else comes from the locks.
cluster-demo: $(BIN)/.dev
	$(BIN)/python -m benchmarks.cluster_demo

sweep: venv
	$(RUN) -e sweep -P model=$(MODEL) -P cpu_minutes=$(CPU_MINUTES)

# Jobs are those of language models: eight processes more.
ui: venv
	@echo "open http://127.0.0.1:5000/#/experiments/0/runs?workflowType=machine_learning&viewStateShareKey=sweeps"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui

test: $(BIN)/.dev
	$(BIN)/python -m pytest

lint: $(BIN)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

venv: $(BIN)/.installed $(STORE)

# `mlflow run` makes the tracking store without a lock: two at once on a fresh clone would break it.
mlflow.db: | $(BIN)/.installed
	$(BIN)/python -c 'from pipeline import tracking; tracking.connect()'

# uv installs the lock in a tenth of pip's time, and is what `--env-manager uv` needs.
$(BIN)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	"error: Python 3.11 to 3.13 is needed, but this is %d.%d: pass PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt
	touch $@

$(BIN)/.dev: $(BIN)/.installed tests/requirements.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r tests/requirements.txt
	touch $@

# One lock for all platforms and Pythons; the tools' lock takes shared versions from it.
COMPILE = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-emit-index-url --custom-compile-command "make lock"
lock: venv
	$(COMPILE) pyproject.toml --output-file requirements.txt
	$(COMPILE) --group cluster --constraints requirements.txt --output-file sweeps/requirements.txt
	$(COMPILE) --group dev --constraints requirements.txt --output-file tests/requirements.txt
