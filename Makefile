# Every target sets up first (deploy/setup.sh): on a fresh Debian-like machine nothing else is needed.
#   make demo     prompts in, clips out: out/demo
#   make serve    the HTTP service on port 8000, alone: SQLite, a folder, a worker of its own
#   make test     lint, then the tests; WORKERS=0 runs them in one process, ARGS='-k sampling' chooses
#   make lint     ruff and mypy
#   make clean    removes what the other targets made

WORKERS ?= 2
ARGS ?=

.PHONY: demo serve test lint clean

demo:
	@bash deploy/setup.sh
	.venv/bin/python -m omnivideo.cli.demo out/demo

serve:
	@bash deploy/setup.sh serve
	.venv/bin/python -m omnivideo.cli serve

test: lint
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint:
	@bash deploy/setup.sh dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-vllm* out/demo build dist .pytest_cache .ruff_cache .mypy_cache
	find omnivideo tests -name __pycache__ -type d -prune -exec rm -rf {} +
