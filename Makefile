# What CI leaves out because it takes minutes. PYTHON is any environment with '.[dev]'.
PYTHON ?= .venv/bin/python

.PHONY: soak scale locks

soak: ## Long forms of the tests: thousands of damaged images, many seeds of a faulty store, many kills.
	$(PYTHON) -m pytest -m soak --timeout=7200 -s

scale: ## What a run costs its driver, up to a million inputs: see docs/scale.md.
	$(PYTHON) -m benchmarks.plan_scale

# PyTorch's CPU build is not on PyPI. Where its own index cannot be reached, TORCH_CPU='--find-links FOLDER' takes the wheel from a folder.
UV ?= uv
TORCH_CPU ?= --torch-backend cpu
LOCK = $(UV) pip compile -q pyproject.toml --extra train -c constraints.txt --generate-hashes --custom-compile-command 'make locks' \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28

locks: ## What the container images install, with hashes: from pyproject.toml and constraints.txt, by uv. UPGRADE=-U takes newer ones.
	$(LOCK) $(TORCH_CPU) $(UPGRADE) -o cluster/lock/cpu.txt
	$(LOCK) $(UPGRADE) -o cluster/lock/cuda.txt
