"""The page: results as one HTML file to look at, click through and send to somebody; it needs no network.

    results --packed--> data --document--> HTML

`packed` knows results and no HTML; `document` puts any such data into the template; the scripts in `browser/` draw it.
A panel follows from the axes of a quantity, so a probe of your own has its panels too. What a result shows beside its
declared quantities it says in `Result.shown`, and its findings in `Result.findings`.
"""

from lens_probes.pages.packing import packed
from lens_probes.pages.writing import Page, document, page

__all__ = ["Page", "document", "packed", "page"]
