# A fresh machine needs Python 3.11 to 3.13 and nothing else: every target makes .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow test-faults test-lab test-browser test-models lint docs install clean constraints docker docker-demo

run: .venv/.run
	$(BIN)/fed-diffusion run digits --engine flower

# a file on each core: one thread each, or they wait for one another
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow

test-faults: .venv/.test
	$(BIN)/python -m pytest -m slow tests/test_deployment.py tests/test_attacks.py tests/deploy/test_submit.py \
		tests/test_secure_deployment.py

# as root, with iproute2, nginx and curl: hosts in network namespaces of their own
test-lab: .venv/.test
	$(BIN)/python -m pytest -m lab

# networks of diffusers, data sets of datasets, adapters of peft; nothing comes from the Hub
test-models: .venv/.models
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m models

# with Chromium and Node; BROWSER_MODULES gets axe-core and playwright-core, outside the checkout
BROWSER_MODULES ?= $(or $(TMPDIR),/tmp)/fed-diffusion-browser
test-browser: .venv/.test
	npm install --silent --no-fund --no-audit --prefix $(BROWSER_MODULES) axe-core@4 playwright-core@1
	BROWSER_MODULES=$(BROWSER_MODULES) $(BIN)/python -m pytest -m browser

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site of docs/, into site/; any warning fails it
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: .venv/.test

.venv/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.test: pyproject.toml .venv/.run
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/.models: pyproject.toml .venv/.test
	$(BIN)/python -m pip install --quiet --editable '.[test,diffusers,text,hf,onnx]' peft onnxruntime
	touch $@

.venv/.docs: pyproject.toml .venv/.run
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# the versions that the images are built with, from what is installed here: after the tests passed
constraints: .venv/.test
	$(BIN)/python docker/constraints.py > docker/constraints.txt

# DOCKER_BUILD takes more options, as in DOCKER_BUILD='--build-arg TORCH_INDEX='
docker:
	docker build $(DOCKER_BUILD) --file docker/Dockerfile --tag fed-diffusion .
	docker build $(DOCKER_BUILD) --file docker/Dockerfile --target proxy --tag fed-diffusion-proxy .

# Containers run as this user, or as 10001 where that is root. A demo that is there runs again, as
# another run: make docker-demo RUN=digits-2
DEMO ?= $(CURDIR)/demo
RUN ?= digits
DEMO_UID := $(if $(filter 0,$(shell id -u)),10001,$(shell id -u))
COMPOSE = DEMO=$(DEMO) FED_UID=$(DEMO_UID) FED_GID=$(DEMO_UID) docker compose --file docker/compose.yaml

docker-demo:
	@test ! -e $(DEMO)/runs/$(RUN) || { echo "$(DEMO)/runs/$(RUN) is there already:" \
		"make docker-demo RUN=another-name, or remove $(DEMO)" >&2; exit 2; }
	$(MAKE) docker
	mkdir -p $(DEMO)/runs $(DEMO)/state/superlink
	chown -R $(DEMO_UID) $(DEMO)
	trap '$(COMPOSE) down' EXIT; \
		{ test -e $(DEMO)/deployment || $(COMPOSE) run --rm init; } \
		&& $(COMPOSE) up --detach superexec node-1 node-2 node-3 \
		&& RUN=$(RUN) $(COMPOSE) run --rm train
	@echo $(DEMO)/runs/$(RUN)

clean:
	rm -rf .venv build dist site
