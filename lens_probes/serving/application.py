"""The server's HTTP: the page, and questions as JSON from that page alone.

    GET /                        the page                        GET /model             what the boxes say of the model
    POST /questions              {"texts": [...]} -> {"id": ...} GET /questions/ID      how far it is
    GET /questions/ID/answer     the data, once                  DELETE /questions/ID   cancels it

A browser runs other sites' scripts on this machine too, so nothing here trusts the connection: a request must name this
machine as its host (against DNS rebinding), come from this page (against other sites and other servers of this
machine), and bring JSON (which a form cannot). There are no cookies, and no other origin is allowed to read.
"""

import json
import os
import re
import socket
import sys
from typing import Any

from lens_probes.pages import document
from lens_probes.serving.answering import Answering, Asked
from lens_probes.serving.questions import Full, Questions

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError('serving a page needs starlette and uvicorn: pip install "lens-probes[serve]"') from error

BODY = 2**17  # bytes of a question
CONNECTIONS = 64
HOST = "127.0.0.1"
OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",  # beside the page's own
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def application(questions: Questions, about: dict[str, Any]) -> ASGIApp:
    """The application: `about` is what the page says of the model."""
    html = document(None, connect="'self'", more=("asking",))

    async def page(request: Request) -> Response:
        return HTMLResponse(html)

    async def model(request: Request) -> Response:
        return JSONResponse(about)

    async def ask(request: Request) -> Response:
        try:
            asked = Asked.read(await _json(request))
            return JSONResponse({"id": questions.ask(asked)}, status_code=202)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except Full as error:
            raise HTTPException(503, str(error)) from error

    async def look(request: Request) -> Response:
        told = questions.look(request.path_params["id"])
        return JSONResponse(_found(told))

    async def answer(request: Request) -> Response:
        return Response(_found(questions.take(request.path_params["id"])), media_type="application/json")

    async def cancel(request: Request) -> Response:
        questions.cancel(request.path_params["id"])
        return Response(status_code=204)

    routes = [
        Route("/", page),
        Route("/model", model),
        Route("/questions", ask, methods=["POST"]),
        Route("/questions/{id}", look),
        Route("/questions/{id}", cancel, methods=["DELETE"]),
        Route("/questions/{id}/answer", answer),
    ]
    return OwnPageOnly(Starlette(routes=routes, exception_handlers={HTTPException: _sentence, Exception: _broken}))


class OwnPageOnly:
    """Refuses requests to another host or from another page, and adds the headers that browsers obey."""

    def __init__(self, served: ASGIApp) -> None:
        self.served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.served(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        refused = _refused(Headers(scope=scope), scope["method"])
        return await (refused or self.served)(scope, receive, with_headers)


def _refused(headers: Headers, method: str) -> Response | None:
    """The answer to a request that is not of this page; None if it is."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    host = hosts[0] if len(hosts) == 1 else ""
    if not OWN_HOST.fullmatch(host):
        return _error(421, f"the host must be {HOST} or localhost; got {host!r:.80}: open the address of this machine")
    if any(origin != f"http://{host}" for origin in origins):
        return _error(403, f"questions must come from the page of this server; got the origin {origins[0]!r:.80}")
    site, opens = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode") == "navigate"
    if site not in ("none", "same-origin") and not (opens and method == "GET"):
        return _error(403, f"questions must come from the page of this server; got one that is {site!r:.80}")
    return None


async def _json(request: Request) -> Any:
    """The JSON of a request that says it is JSON and is not too long."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, f"a question must be application/json; got {kind!r:.80}")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY:
            raise HTTPException(413, f"a question must have at most {BODY:,} bytes; got more: shorten its texts")
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "a question must be JSON in UTF-8; got something else") from error


def _found(answer: Any) -> Any:
    if answer is None:
        raise HTTPException(404, "this question is not known (any more): ask it again")
    return answer


def _error(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status_code=status)


async def _sentence(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    return _error(500, f"the server failed ({type(error).__name__}): its terminal says where")


def listen(port: int) -> socket.socket:
    """A socket on this machine only; 0 is any free port."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be a number from 0 to 65535; got {port}")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = os.strerror(error.errno or 0)  # strerror says the address again
        raise ValueError(f"--port {port} cannot be used ({why}): name another, or 0 for one that is free") from error


def server(questions: Questions, about: dict[str, Any]) -> uvicorn.Server:
    """Uvicorn with this application and nothing that it need not do."""
    config = uvicorn.Config(
        application(questions, about),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def serve(answering: Answering, listening: socket.socket) -> None:
    """Answer questions until it is interrupted."""
    questions = Questions(answering)
    port = listening.getsockname()[1]
    print(f"Open http://{HOST}:{port}/ in a browser on this machine. Ctrl+C ends it.", file=sys.stderr, flush=True)
    try:
        server(questions, answering.about()).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        questions.close()
        listening.close()
