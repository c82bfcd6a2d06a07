# What CI leaves out because it takes minutes. PYTHON is any environment with '.[dev]'.
PYTHON ?= .venv/bin/python

.PHONY: soak scale

soak: ## Long forms of the tests: thousands of damaged images, many seeds of a faulty store, many kills.
	$(PYTHON) -m pytest -m soak --timeout=7200 -s

scale: ## What a run costs its driver, up to a million inputs: see docs/scale.md.
	$(PYTHON) -m benchmarks.plan_scale
