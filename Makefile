# Two commands set everything up: `make demo` and `make test`. `make test-all` and `make check` are what CI adds.
# All of them may be repeated.
PYTHON ?= python3
INSTALL = bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-rest test-3 test-newest newest check notebooks docs compatibility bench rehearse clean
.DELETE_ON_ERROR:

demo: .venv/demo
	.venv/bin/python -m lens_probes

# Two processes of one thread: tiny models gain nothing from a second.
TESTS = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n 2 --dist worksteal

# For everybody, after each change: one environment, a Bridge of each architecture family, each probe and experiment with
# one setting, and all tests that need no model. Some five minutes on two cores.
test: .venv/dev
	$(call TESTS,.venv)

# Before a merge: what `make test` runs, then what it leaves out: other settings and weights, simulations of chance,
# TransformerLens 3 (HookedTransformer too), the newest releases, and the notebooks. Its time as a whole was
# not measured since it grew.
test-all: test test-rest test-3 test-newest notebooks

test-rest: .venv/dev
	$(call TESTS,.venv) -ra -m "matrix or trials"

# Files that ask nothing of TransformerLens, and simulations of chance, have run above.
WITHOUT_MODEL = ascent claims comparison docs figures inference package release result saved schema settings similarity \
	token_search topics toy tree vocabulary words
# Which architectures an old release reads no longer changes.
OLD = compatibility
test-3: .venv-3/dev
	$(call TESTS,.venv-3) -ra -m "not trials" $(WITHOUT_MODEL:%=--ignore=tests/test_%.py) $(OLD:%=--ignore=tests/test_%.py)

# What a new release may break. Left out are statistics and packaging, where a release has no part.
test-newest: newest
	$(call TESTS,.venv-newest) -ra -m "not trials" --ignore=tests/test_inference.py --ignore=tests/test_package.py \
		--ignore=tests/test_release.py

# The limit is for a cell that hangs: on a busy machine one may take ten times as long.
notebooks: .venv/dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -o addopts="" -n 2 --nbmake --nbmake-timeout=3600 notebooks

check: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

# The site, in docs/_build/html: it opens without a server. Warnings are errors, and all links are checked.
docs: .venv/docs
	.venv/bin/python docs/make.py

# Which probes are right on which architectures, by release; docs/compatibility.json, which the site shows.
compatibility: .venv/dev .venv-3/dev newest
	.venv-3/bin/python benchmarks/compatibility.py
	.venv/bin/python benchmarks/compatibility.py
	.venv-newest/bin/python benchmarks/compatibility.py

# All tables of README's chapter on speed, in one run: three quarters of an hour of two quiet cores.
bench: .venv/dev
	.venv/bin/python benchmarks/one_sentence.py
	.venv/bin/python benchmarks/rank_shift.py
	.venv/bin/python benchmarks/logit_lens.py
	.venv/bin/python benchmarks/topics.py
	.venv/bin/python benchmarks/reconstruction.py
	.venv/bin/python benchmarks/seeds.py
	.venv/bin/python benchmarks/corpus.py run --tokens 20480 --rounds 1
	.venv/bin/python benchmarks/corpus.py examples --tokens 20480
	.venv/bin/python benchmarks/corpus.py sorted growth
	.venv/bin/python benchmarks/corpus.py workers --tokens 6144
	.venv/bin/python benchmarks/page.py

# What a release goes through before it is tagged, in environments of its own: about 15 minutes.
rehearse:
	PYTHON=$(PYTHON) .ci/rehearse

# TransformerLens 4 (TransformerBridge) in .venv, TransformerLens 3 (HookedTransformer too) in .venv-3, the newest
# releases of everything in .venv-newest.
# torch comes first: an open range would bring gigabytes that nothing here needs.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/$(INSTALL) torch
	.venv/$(INSTALL) -e ".[demo]" "transformer-lens==4.3.*"
	touch $@

.venv/dev: .venv/demo
	.venv/$(INSTALL) -e ".[dev]" "transformer-lens==4.3.*"
	touch $@

.venv/docs: .venv/dev
	.venv/$(INSTALL) -e ".[dev,docs]" "transformer-lens==4.3.*"
	touch $@

.venv-3/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-3
	.venv-3/$(INSTALL) torch
	.venv-3/$(INSTALL) -e ".[dev]" "transformer-lens==3.9.*"
	touch $@

# What pip gives today of everything but torch, without constraints: every time, for a stamp would keep yesterday's.
newest:
	test -d .venv-newest || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check \
		--upgrade --upgrade-strategy eager torch==2.13.0 -e ".[dev]"

clean:
	rm -rf .venv .venv-3 .venv-newest demo.html docs/_build
