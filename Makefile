# Every target sets up first (deploy/setup.sh); a fresh Debian-like machine needs nothing else.
#   make demo          render the demo conversation into out/demo
#   make serve         run the HTTP service on port 8000, with SQLite, a folder and one worker
#   make test          lint, then the tests of CI: at most 20 minutes on two idle cores
#   make test-fast     the tests that need no server of another program: at most 3 minutes
#   make test-long     soak tests, fault matrices, vLLM servers, training on several processes: at most 75 minutes
#   make test-clients  other programs, in environments of their own, against our service
#   make test-gpu      the tests in tests/gpu, which need an NVIDIA GPU
#   make test-deploy   build the images and run the whole stack, on a Docker engine that it starts (needs root)
#   make lint          ruff and mypy
#   make docs          build the documentation site into out/site
#   make release       build wheel, sdist and software bill of materials into dist/, and try the wheel
#   make clean         remove what the other targets made
# WORKERS=0 runs the tests in one process; ARGS='-k sampling' selects some of them.

WORKERS ?= 2
ARGS ?=
# In the order of the folders, the vLLM test begins early: it installs vLLM first, which takes minutes.
PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

FAST_TIER := not slow and not long and not clients and not gpu and not deploy
MAIN_TIER := not long and not clients and not gpu and not deploy
LONG_TIER := long
CLIENTS_TIER := clients
GPU_TIER := gpu
DEPLOY_TIER := deploy

.PHONY: demo serve test test-fast test-long test-clients test-gpu test-deploy lint docs release clean

demo:
	@bash deploy/setup.sh
	.venv/bin/python -m omnivideo.cli.demo out/demo
	@echo "To use it in this shell: source .venv/bin/activate"

serve:
	@bash deploy/setup.sh serve
	.venv/bin/python -m omnivideo.cli serve

test: lint
	$(PYTEST) -m "$(MAIN_TIER)" $(ARGS)

test-fast:
	@bash deploy/setup.sh dev
	$(PYTEST) -m "$(FAST_TIER)" $(ARGS)

test-long:
	@bash deploy/setup.sh dev
	$(PYTEST) -m "$(LONG_TIER)" $(ARGS)

test-clients:
	@bash deploy/setup.sh dev
	$(PYTEST) -m "$(CLIENTS_TIER)" $(ARGS)

test-gpu:
	@bash deploy/setup.sh dev
	.venv/bin/python -m pytest -n 0 -m "$(GPU_TIER)" $(ARGS)

test-deploy:
	@bash deploy/setup.sh dev
	.venv/bin/python -m pytest -n 0 -m "$(DEPLOY_TIER)" --timeout 1800 $(ARGS)

lint:
	@bash deploy/setup.sh dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs:
	@bash deploy/setup.sh docs
	.venv/bin/mkdocs build --strict --site-dir out/site

release:
	@bash deploy/setup.sh release
	bash deploy/release.sh

clean:
	rm -rf .venv .venv-vllm* out/demo out/site build dist .pytest_cache .ruff_cache .mypy_cache
	find omnivideo tests -name __pycache__ -type d -prune -exec rm -rf {} +
