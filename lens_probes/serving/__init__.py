"""The server: the page of `python -m lens_probes`, with boxes for texts of one's own.

    question --Questions--> answering, one at a time --packed--> data --browser--> the same page

`answering` knows probes and no HTTP, `questions` the queue and neither, `application` HTTP and no probes. It listens on
this machine only, and answers its own page only.
"""

from lens_probes.serving.answering import Answering
from lens_probes.serving.application import listen, serve
from lens_probes.serving.questions import Questions

__all__ = ["Answering", "Questions", "listen", "serve"]
