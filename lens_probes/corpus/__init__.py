"""A corpus instead of a handful of sentences: runs in shards that can be killed and go on.

texts.py      texts of any source, grouped into shards      measuring.py  what is done with a shard
folder.py     files, lock, and the tree of results          running.py    a run in this process, and what is done so far
"""

from lens_probes.corpus.running import Run, delete_run, open_run, run_corpus

__all__ = ["Run", "delete_run", "open_run", "run_corpus"]
