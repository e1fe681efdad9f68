# Two commands set everything up: `make demo` and `make test`. All of them may be repeated.
PYTHON ?= python3
INSTALL = bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-4 test-3 check notebooks bench clean
.DELETE_ON_ERROR:

demo: .venv/demo
	.venv/bin/python -m lens_probes

test: test-4 test-3

# Two processes of one thread: tiny models gain nothing from a second.
TESTS = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist worksteal

test-4: .venv/dev
	$(call TESTS,.venv)
	$(MAKE) notebooks

test-3: .venv-3/dev
	$(call TESTS,.venv-3)

notebooks: .venv/dev
	.venv/bin/python -m pytest -o addopts="" --nbmake --nbmake-timeout=600 notebooks

check: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

bench: .venv/dev
	.venv/bin/python benchmarks/rank_shift.py
	.venv/bin/python benchmarks/logit_lens.py
	.venv/bin/python benchmarks/topics.py
	.venv/bin/python benchmarks/reconstruction.py

# TransformerLens 4 (TransformerBridge) in .venv, TransformerLens 3 (HookedTransformer too) in .venv-3.
# torch comes first: an open range would bring gigabytes that nothing here needs.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/$(INSTALL) torch
	.venv/$(INSTALL) -e ".[demo]" "transformer-lens==4.3.*"
	touch $@

.venv/dev: .venv/demo
	.venv/$(INSTALL) -e ".[dev]" "transformer-lens==4.3.*"
	touch $@

.venv-3/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-3
	.venv-3/$(INSTALL) torch
	.venv-3/$(INSTALL) -e ".[dev]" "transformer-lens==3.9.*"
	touch $@

clean:
	rm -rf .venv .venv-3 demo.html
