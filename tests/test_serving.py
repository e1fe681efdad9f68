"""The server: whom it answers, how questions wait, end and are forgotten, and the page that asks them."""

import base64
import gc
import json
import os
import shutil
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Cell

import lens_probes as lp
from lens_probes import serving
from lens_probes.__main__ import _probes, main
from lens_probes.pages import packing
from lens_probes.serving import application
from lens_probes.serving.answering import Asked
from lens_probes.serving.questions import Full

TOPICS = {"animals": ["The cat sat.", "A dog ran away."], "food": ["The bread rose.", "A soup boiled."]}
TEXT = "Time flies like an arrow."


class Scripted:
    """Answers with the text; one that begins with "hold" is answered when it is let go, or its work ends at a step."""

    def __init__(self):
        self.started, self.let_go, self.answered = threading.Event(), threading.Event(), []

    def __call__(self, asked, step):
        text = asked.texts[0]
        step("thinking", 0, 2)
        if text.startswith("hold"):
            self.started.set()
            while not self.let_go.wait(0.005):
                step("holding", 1, 2)
        if text == "break":
            raise RuntimeError("a pipe burst")
        if text == "refuse":
            raise ValueError("a text must be another; got this one")
        self.answered.append(text)
        return json.dumps({"page": text, "without": []}).encode()


@contextmanager
def served(answer, about=None, **limits):
    """A client of a server on a free port."""
    questions, listening = serving.Questions(answer, **limits), serving.listen(0)
    server = application.server(questions, about or {"model": "scripted"})
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        port = listening.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.questions = questions
            yield client
    finally:
        server.should_exit = True
        thread.join()
        questions.close()
        listening.close()


@pytest.fixture(scope="module")
def client():
    with served(Scripted()) as client:
        yield client


@pytest.fixture
def answer():
    return Scripted()


def ask(client, *texts, **more):
    asked = client.post("/questions", json={"texts": list(texts), **more})
    assert asked.status_code == 202, asked.text
    return asked.json()["id"]


def wait(client, id):
    """How the question ended."""
    deadline = time.monotonic() + 120
    while (told := client.get(f"/questions/{id}").json())["state"] in ("waiting", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return told


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Whom it answers


def test_the_page_may_ask_this_server_and_nobody_may_frame_or_read_it(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.text and 'id="data">null</script>' in page.text and "questions" in page.text
    for answer in (page, client.get("/model"), client.get("/nowhere"), client.get("/", headers={"Host": "evil.com"})):
        headers = answer.headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert not [name for name in headers if name.startswith("access-control")] and "server" not in headers


def test_a_page_that_is_written_to_a_file_has_no_boxes_and_no_network():
    written = lp.pages.document(None)
    assert "connect-src 'none'" in written and "ask-text" not in written


@pytest.mark.parametrize(
    "host",
    ["evil.com", "127.0.0.1.evil.com", "localhost.evil.com:80", "evil.com:80", "0.0.0.0", "localhost:", "localhost:a",
     "localhost:80@evil.com", "", "localhost:٣"],
)  # fmt: skip
def test_another_host_is_refused_before_anything_is_read(client, host):
    answer = client.post("/questions", json={"texts": [TEXT]}, headers={"Host": host.encode()})
    assert answer.status_code == 421
    assert answer.json()["error"].startswith("the host must be 127.0.0.1 or localhost; got ")
    assert len(client.questions) == 0


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8000"])
def test_this_machine_may_have_any_of_its_names_and_a_forwarded_port(client, host):
    assert client.get("/model", headers={"Host": host}).status_code == 200
    own = {"Host": host, "Origin": f"http://{host}"}
    assert client.get("/model", headers=own).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "null", "https://localhost:8000", "http://localhost:8001", "http://localhost", ""]
)
def test_another_origin_is_refused_even_on_this_machine(client, origin):
    headers = {"Host": "localhost:8000", "Origin": origin}
    answer = client.post("/questions", json={"texts": [TEXT]}, headers=headers)
    assert answer.status_code == 403 and "must come from the page of this server" in answer.json()["error"]


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_what_a_browser_says_comes_from_another_site_is_refused_but_for_a_link_to_the_page(client, site):
    assert client.get("/model", headers={"Sec-Fetch-Site": site}).status_code == 403
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.post("/questions", json={"texts": [TEXT]}, headers=link).status_code == 403
    assert client.get("/model", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "application/jsonp", None]
)
def test_a_form_of_another_site_cannot_ask(client, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post("/questions", content=json.dumps({"texts": [TEXT]}), headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"].startswith("a question must be application/json; got ")


def test_no_other_site_gets_leave_to_ask(client):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = client.options("/questions", headers=asked)
    assert answer.status_code == 405 and answer.json() == {"error": "Method Not Allowed"}


# What it reads


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"texts": ["a"]} x'])
def test_what_is_no_json_is_refused_in_a_sentence(client, body):
    answer = client.post("/questions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json() == {"error": "a question must be JSON in UTF-8; got something else"}


def test_a_huge_question_is_refused_whether_or_not_it_says_its_size(client):
    body = json.dumps({"texts": ["a" * 10_000_000]}).encode()
    parts = (body[start : start + 65536] for start in range(0, len(body), 65536))
    for content in (body, parts):
        try:
            answer = client.post("/questions", content=content, headers={"Content-Type": "application/json"})
        except (httpx.WriteError, httpx.ReadError):  # the server has closed the connection before all was sent
            continue
        assert answer.status_code == 413 and "at most 131,072 bytes; got more" in answer.json()["error"]
    assert len(client.questions) == 0


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([], "a question must be an object; got []"),
        ({}, "a question must have a text or topics; got neither"),
        ({"texts": []}, "must have a text or topics"),
        ({"texts": "a"}, "texts must be a list of one or two; got 'a'"),
        ({"texts": ["a", "b", "c"]}, "texts must be a list of one or two"),
        ({"texts": [1]}, "a text must be text; got 1"),
        ({"texts": ["a" * 8001]}, "a text must have at most 8,000 characters; got 8,001: shorten it"),
        ({"texts": ["\ud800"]}, "a text must be whole characters; got half of one"),
        ({"texts": ["a"], "target": ["b"]}, "a target must be text; got ['b']"),
        ({"texts": ["a"], "target": True}, "a target must be text; got True"),
        ({"texts": ["a"], "layer": "1"}, "layer must be a whole number; got '1'"),
        ({"texts": ["a"], "layer": True}, "layer must be a whole number; got True"),
        ({"texts": ["a"], "head": "H1", "layer": 1}, "head must be a whole number; got 'H1'"),
        ({"texts": ["a"], "head": 1}, "a head must be one of a layer and of a text; got it without"),
        ({"topics": {"a": ["b"]}, "head": 1, "layer": 1}, "a head must be one of a layer and of a text"),
        ({"texts": ["a"], "metric": "far"}, "metric must be one of cosine, euclidean, dot; got 'far'"),
        ({"texts": ["a"], "reference": ["embed"]}, "reference must be one of embed, embed_pos, unembed; got ['embed']"),
        ({"texts": ["a"], "model": "b"}, "may have texts, target, layer, head, metric, reference, topics; got 'model'"),
        ({"topics": ["a"]}, "topics must be an object"),
        ({"topics": {"a": "b"}}, "topics must be an object, topic -> list of texts; got {'a': 'b'}"),
        ({"topics": {"a": [None]}}, "a text of a topic must be text; got None"),
        ({"topics": {"a" * 501: ["b"]}}, "a topic must have at most 500 characters; got 501"),
        ({"topics": {"a": ["b"] * 201}}, "topics must have at most 200 texts; got 201: leave some out"),
    ],
)
def test_what_is_no_question_is_refused_in_a_sentence(client, question, message):
    body = json.dumps(question)
    answer = client.post("/questions", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.status_code == 400 and message in answer.json()["error"]


# How questions wait, end and are forgotten


def test_an_answer_is_given_once_and_then_forgotten(client):
    id = ask(client, TEXT)
    assert wait(client, id)["state"] == "done"
    assert client.get(f"/questions/{id}/answer").json() == {"page": TEXT, "without": []}
    for path in (f"/questions/{id}", f"/questions/{id}/answer", "/questions/unknown"):
        answer = client.get(path)
        assert answer.status_code == 404 and "not known (any more): ask it again" in answer.json()["error"]
    assert client.delete(f"/questions/{id}").status_code == 204
    assert len(client.questions) == 0


def test_ids_cannot_be_guessed(client):
    ids = {ask(client, TEXT) for _ in range(3)}
    assert len(ids) == 3 and min(map(len, ids)) >= 22  # 128 bits
    for id in ids:
        client.delete(f"/questions/{id}")


def test_a_refused_text_reaches_the_page_as_its_sentence_and_a_failure_does_not_end_the_server(client, caplog):
    refused, broken, after = (ask(client, text) for text in ("refuse", "break", TEXT))
    assert wait(client, refused)["error"] == "a text must be another; got this one"
    told = wait(client, broken)
    assert told["state"] == "failed"
    assert told["error"] == "the question failed (RuntimeError): the terminal of the server says where"
    assert "a pipe burst" in caplog.text and "a pipe burst" not in told["error"]
    assert wait(client, after)["state"] == "done" and client.questions.take(after)
    assert len(client.questions) == 0


def test_a_full_queue_is_refused_and_takes_more_once_one_is_cancelled(answer):
    with served(answer, waiting=2) as client:
        running, first, second = ask(client, "hold"), *(None, None)
        assert answer.started.wait(60)
        first, second = ask(client, "first"), ask(client, "second")
        refused = client.post("/questions", json={"texts": [TEXT]})
        assert refused.status_code == 503
        assert refused.json()["error"] == "at most 2 questions may wait; got one more: ask again in a moment"
        assert [client.get(f"/questions/{id}").json()["ahead"] for id in (running, first, second)] == [0, 1, 2]
        assert client.delete(f"/questions/{first}").status_code == 204
        assert client.get(f"/questions/{first}").status_code == 404
        third = ask(client, "third")
        assert client.get(f"/questions/{third}").json()["ahead"] == 2
        answer.let_go.set()
        assert {wait(client, id)["state"] for id in (running, second, third)} == {"done"}
        assert answer.answered == ["hold", "second", "third"]


def test_a_running_question_is_cancelled_at_its_next_step_and_the_next_one_begins(answer):
    with served(answer) as client:
        running, after = ask(client, "hold"), ask(client, TEXT)
        assert answer.started.wait(60)
        told = client.get(f"/questions/{running}").json()
        assert told["state"] == "running" and told["doing"] in ("thinking", "holding") and told["parts"] == 2
        client.delete(f"/questions/{running}")
        assert wait(client, after)["state"] == "done"
        assert answer.answered == [TEXT]


def test_questions_of_a_closed_tab_are_dropped_whether_they_wait_run_or_are_done(answer):
    questions = serving.Questions(answer, patience=1.0)  # longer than a busy machine lets the thread wait
    done = questions.ask(Asked((TEXT,)))
    until(lambda: (questions.look(done) or {"state": "done"})["state"] == "done")
    for text in ("hold", "waits"):
        questions.ask(Asked((text,)))
    assert answer.started.wait(60)
    until(lambda: len(questions) == 0)
    assert answer.answered == [TEXT]
    assert questions.look(done) is None
    questions.close()


def test_of_answers_that_nobody_fetches_the_last_are_kept(answer):
    questions = serving.Questions(answer, kept=3)
    ids = []
    for n in range(8):
        ids.append(questions.ask(Asked((str(n),))))
        until(lambda n=n: len(answer.answered) == n + 1)
    until(lambda: len(questions) == 3 and (questions.look(ids[-1]) or {})["state"] == "done")
    assert [questions.look(id) is None for id in ids] == [True] * 5 + [False] * 3
    questions.close()


def test_closing_ends_the_thread_and_the_question_in_work(answer):
    questions = serving.Questions(answer)
    questions.ask(Asked(("hold",)))
    assert answer.started.wait(60)
    questions.close()
    assert not questions._worker.is_alive() and len(questions) == 0 and answer.answered == []


def test_a_question_is_put_in_no_full_queue(answer):
    questions = serving.Questions(answer, waiting=0)
    with pytest.raises(Full, match="at most 0 questions may wait"):
        questions.ask(Asked((TEXT,)))
    questions.close()


# What a model answers


@pytest.fixture(scope="module")
def answering():
    model = Cell("bridge", "llama", False).build()
    return serving.Answering(model, _probes(lp.ModelView(model), []))


def steps_of(answering, **question):
    """The answer, and the steps on the way."""
    steps = []
    answer = json.loads(answering(Asked.read(question), lambda *step: steps.append(step)))
    return answer, steps


def names(answer):
    return [each["name"] for each in answer["page"]["results"]]


def test_two_texts_are_answered_by_the_probes_that_fit_them_with_the_numbers_of_run(answering):
    texts = [TEXT, "Fruit flies like a banana."]
    answer, steps = steps_of(answering, texts=texts)
    assert {"RankShift", "LogitLens", "DirectLogitAttribution", "SourceAttribution"} <= set(names(answer))
    assert {"AttentionPatterns", "ResidualUpdate"} <= set(names(answer)) and answer["without"] == []
    assert not {"HeadTopicSimilarity", "TopicActivity", "KeyValueOverlap", "ResidualMean"} & set(names(answer))
    apart = [name for name, _ in groupby(steps[1:])]  # a step is told again inside a probe
    assert steps[0][0] == "reading the text"
    assert [step[0] for step in apart] == ["forward pass", *names(answer), "drawing"]
    assert [step[1] for step in apart] == list(range(len(apart)))
    alone = lp.packed(lp.LogitLens().run(answering.view.model, texts))["results"][0]
    (own,) = [each for each in answer["page"]["results"] if each["name"] == "LogitLens"]
    assert own["quantities"] == alone["quantities"]
    (attention,) = [each for each in answer["page"]["results"] if each["name"] == "AttentionPatterns"]
    assert "attention" in [each["name"] for each in attention["quantities"]]


def asked_of(answering, **question):
    """The probes by name, as they would be run."""
    return [(type(probe).__name__, probe, prompts) for probe, prompts in answering.runs(Asked.read(question))]


def test_any_token_of_the_vocabulary_is_followed_by_its_text_or_id(answering):
    id = 300
    (text,) = answering.view.token_texts([id])
    for target in (text, id):
        runs = asked_of(answering, texts=[TEXT], target=target)
        followed = [(name, probe.target) for name, probe, _ in runs if hasattr(probe, "target")]
        assert followed == [
            ("DirectLogitAttribution", target),
            ("LogitLens", "next"),
            ("LogitLens", target),
            ("SourceAttribution", target),
        ]


def test_the_nearest_entries_are_found_by_the_measure_and_the_vectors_asked_for(answering, gpt2):
    (_, shift, _), *_ = asked_of(answering, texts=[TEXT])
    assert (shift.metric, shift.reference, shift.neighbours) == ("cosine", "embed", 8)
    answer, _ = steps_of(answering, texts=[TEXT], metric="euclidean", reference="unembed")
    own = lp.RankShift(neighbours=8, metric="euclidean", reference="unembed").run(answering.view.model, TEXT)
    (sent,) = lp.packed(own)["results"]
    assert answer["page"]["results"][0]["quantities"] == sent["quantities"]
    assert answer["page"]["results"][0]["conditions"] == "resid_mid against unembed, euclidean"
    assert answering.about()["positions"] is False
    with_positions = serving.Answering(gpt2, _probes(lp.ModelView(gpt2), []))
    assert with_positions.about()["positions"] is True
    (_, shift, _), *_ = asked_of(with_positions, texts=[TEXT], reference="embed_pos", metric="dot")
    assert (shift.metric, shift.reference) == ("dot", "embed_pos")


def test_topics_are_compared_beside_a_text_or_alone(answering):
    alone = asked_of(answering, topics=TOPICS)
    assert [name for name, _, _ in alone] == ["HeadTopicSimilarity", "TopicActivity"]
    assert alone[0][2] == {topic: tuple(texts) for topic, texts in TOPICS.items()}
    both = asked_of(answering, texts=[TEXT], topics=TOPICS)
    assert both[-2:] == alone and both[0][::2] == ("RankShift", [TEXT])


def test_a_text_that_is_too_long_for_all_heads_is_answered_for_one_layer(answering, monkeypatch):
    def layers(**question):
        runs = asked_of(answering, texts=[TEXT], **question)
        return {name: probe.layers for name, probe, _ in runs if hasattr(probe, "layers")}

    everything = layers()
    assert everything["AttentionPatterns"] is everything["SourceAttribution"] is everything["LogitLens"] is None
    assert everything["UnitActivation"] == [1]  # the middle one: all have too many units
    chosen = layers(layer=0)
    assert chosen["UnitActivation"] == [0]
    assert chosen["AttentionPatterns"] == chosen["SourceAttribution"] == [0] and chosen["LogitLens"] is None
    n = len(lp.text.prompts.tokenize(TEXT, answering.view))
    room = answering.view.n_layers * answering.view.n_heads * n * (n + 1) // 2
    monkeypatch.setattr(serving.answering, "MOST_PAIRS", room)
    assert layers() == everything
    monkeypatch.setattr(serving.answering, "MOST_PAIRS", room - 1)
    middle = layers()
    assert middle["AttentionPatterns"] == middle["SourceAttribution"] == [1] and middle["LogitLens"] is None


def test_of_a_long_text_the_vocabulary_is_asked_in_some_layers_evenly_spaced(answering, monkeypatch):
    n = len(lp.text.prompts.tokenize(TEXT, answering.view))
    for states, expected in ((3 * n, None), (3 * n - 1, [0, 2]), (1, [0, 2])):
        monkeypatch.setattr(serving.answering, "STATES", states)
        layers = {
            name: probe.layers for name, probe, _ in asked_of(answering, texts=[TEXT]) if hasattr(probe, "layers")
        }
        assert layers["LogitLens"] == layers["RankShift"] == expected and layers["ResidualUpdate"] is None
    answer, _ = steps_of(answering, texts=[TEXT])
    (lens,) = [each for each in answer["page"]["results"] if each["name"] == "LogitLens"]
    assert lens["labels"]["layer"] == ["0_pre", "0_post", "2_post"]


def test_of_a_long_text_patterns_are_summed_up_in_some_layers(answering, monkeypatch):
    n = len(lp.text.prompts.tokenize(TEXT, answering.view))
    room = answering.view.n_heads * n * (n + 1) // 2
    for patterns, expected in ((3 * room, None), (3 * room - 1, [0, 2])):
        monkeypatch.setattr(serving.answering, "PATTERNS", patterns)
        layers = {
            name: probe.layers for name, probe, _ in asked_of(answering, texts=[TEXT]) if hasattr(probe, "layers")
        }
        assert layers["MassiveActivations"] == expected and layers["LogitLens"] is layers["AttentionPatterns"] is None


def test_all_probes_of_a_text_read_one_forward_pass(answering, monkeypatch):
    passes = []
    monkeypatch.setattr(
        lp.probe, "_read", lambda *args, _read=lp.probe._read, **kw: passes.append(1) or _read(*args, **kw)
    )
    steps_of(answering, texts=[TEXT], topics=TOPICS)
    assert len(passes) == 2  # one of the text, one of the topics


def test_one_head_is_asked_for_by_itself(answering, monkeypatch):
    runs = asked_of(answering, texts=[TEXT], layer=2, head=3, topics=TOPICS)
    assert [(name, probe.layers) for name, probe, _ in runs] == [("AttentionPatterns", [2]), ("SourceAttribution", [2])]
    n = len(lp.text.prompts.tokenize(TEXT, answering.view))
    monkeypatch.setattr(packing, "MOST_PAIRS", n * (n + 1) // 2)  # room for one head
    answer, _ = steps_of(answering, texts=[TEXT], layer=2, head=3)
    whole = lp.AttentionPatterns(layers=[2], keep_patterns=True).run(answering.view.model, TEXT)
    for each in answer["page"]["results"]:
        assert each["cells"] == [[0, 3]] and each["labels"]["layer"] == ["2"]
    (attention,) = [each for each in answer["page"]["results"][0]["quantities"] if each["name"] == "attention"]
    codes = np.frombuffer(zlib.decompress(base64.b64decode(attention["values"]["data"])), np.uint8)
    (low,), (step,) = attention["values"]["low"], attention["values"]["step"]
    assert low + step * codes == pytest.approx(whole.attention[0, 3].numpy(), abs=1 / 500)


def test_a_question_is_stopped_inside_a_probe_and_leaves_the_model_as_it_was(answering, monkeypatch):
    class Stopped(Exception):
        pass

    model, told = answering.view.model, []
    before = [(name, module.training) for name, module in model.named_modules()]
    hooks = sum(len(module._forward_hooks) for module in model.modules())

    def stopping(at, times):
        def step(doing, part, parts):
            told.append(doing)
            if told.count(at) == times:
                raise Stopped

        return step

    for doing in ("forward pass", "LogitLens"):  # between layers, and between blocks of the vocabulary
        told.clear()
        with pytest.raises(Stopped):
            answering(Asked.read({"texts": [TEXT]}), stopping(doing, 2))
        assert told[-2:] == [doing, doing] and "SourceAttribution" not in told
    assert [(name, module.training) for name, module in model.named_modules()] == before
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert names(steps_of(answering, texts=[TEXT])[0])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"texts": [""]}, "prompt 0 must not be empty; got ''"),
        ({"texts": ["word " * 400]}, "must have at most 64 tokens; got"),
        ({"texts": [TEXT], "target": " no such word"}, "must be the text of one token of tiny-llama; got ' no such"),
        ({"texts": [TEXT], "target": 10**9}, "must be ids of tiny-llama, 0 to"),
        ({"texts": [TEXT], "layer": 3}, "layer 3 is out of range"),
        ({"texts": [TEXT], "reference": "embed_pos"}, "'embed_pos' needs learned absolute positions; got tiny-llama"),
        ({"topics": {"chess": ["one"], "law": ["two", "three"]}}, "every topic must have two prompts or more"),
        ({"topics": {"chess": []}, "texts": []}, "must have a text or topics"),
    ],
)
def test_what_the_package_refuses_is_told_in_its_own_words(answering, question, message):
    with pytest.raises(ValueError) as refused:
        steps_of(answering, **question)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_text_is_limited_in_tokens_where_the_model_has_no_limit(answering, monkeypatch):
    monkeypatch.setattr(serving.answering, "TOKENS", 5)
    with pytest.raises(ValueError, match="a text must have at most 5 tokens; got"):
        steps_of(answering, texts=[TEXT])


def test_a_probe_that_refuses_the_text_is_left_out_and_named(answering, monkeypatch):
    def refuse(probe, reading):
        raise ValueError("a text must rhyme; got prose")

    monkeypatch.setattr(lp.RankShift, "measure", refuse)
    answer, _ = steps_of(answering, texts=[TEXT])
    assert answer["without"] == ["RankShift: a text must rhyme; got prose"] and "RankShift" not in names(answer)


def test_an_encoder_answers_what_it_can():
    model = Cell("bridge", "bert", False).build()
    runs = asked_of(serving.Answering(model, _probes(lp.ModelView(model), [])), texts=[TEXT], topics=TOPICS)
    assert {"AttentionPatterns", "RankShift", "TopicActivity"} <= {name for name, _, _ in runs}
    assert "DirectLogitAttribution" not in [name for name, _, _ in runs]
    assert [probe.target for name, probe, _ in runs if name == "LogitLens"] == ["own"]


def test_eight_at_once_get_the_answers_to_their_own_questions(answering):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]

    def answer(asked, step):
        step("reading", 0, 1)
        lens = lp.LogitLens(target="own", layers=[-1]).run(answering.view.model, list(asked.texts))
        return json.dumps("".join(lens.token.text)).encode()

    with served(answer) as client, ThreadPoolExecutor(8) as tabs:

        def asked_by(word):
            id = ask(client, f"{word} flies")
            assert wait(client, id)["state"] == "done"
            return client.get(f"/questions/{id}/answer").json()

        assert [each.removeprefix("<|bos|>") for each in tabs.map(asked_by, words)] == [
            f"{each} flies" for each in words
        ]
        assert len(client.questions) == 0


@pytest.mark.matrix
def test_two_hundred_questions_in_a_row_leave_nothing_behind(answering):
    def state():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        found = Counter(f"{type(each).__module__}.{type(each).__name__}" for each in gc.get_objects())
        return found, pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    some = [lp.AttentionPatterns(keep_patterns=True), lp.LogitLens(top_k=3)]
    with served(serving.Answering(answering.view.model, some)) as client:
        objects, megabytes = state()
        for n in range(220):
            if n == 20:  # what is made once is there now
                objects, megabytes = state()
            id = ask(client, f"{TEXT} {n}")
            assert wait(client, id)["state"] == "done"
            assert client.get(f"/questions/{id}/answer").status_code == 200
            assert len(client.questions) == 0
        objects_after, megabytes_after = state()
    more = {kind: n - objects[kind] for kind, n in objects_after.items() if n - objects[kind] > 100}
    assert megabytes_after - megabytes < 30, more
    # 200 questions would leave 200 of something. Checks of types, which only tests have, keep some of Python's own.
    assert [kind for kind in more if kind.startswith(("lens_probes", "starlette", "uvicorn", "asyncio", "torch"))] == []


# The command


def test_a_port_that_is_taken_or_none_is_refused_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(lp, "load_model", None)  # would fail with another message
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
    assert capsys.readouterr().err == (
        f"lens_probes: --port {port} cannot be used (Address already in use): name another, or 0 for one that is free\n"
    )
    assert main(["serve", "--port", "65536"]) == 2
    assert "--port must be a number from 0 to 65535; got 65536" in capsys.readouterr().err


def test_it_listens_on_this_machine_only():
    with serving.listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_the_command_says_the_address_and_ends_well_when_interrupted(capsys, monkeypatch, gpt2):
    def interrupted(server, sockets):
        (own,) = sockets
        assert f"http://127.0.0.1:{own.getsockname()[1]}/" in capsys.readouterr().err
        raise KeyboardInterrupt

    monkeypatch.setattr(lp, "load_model", lambda name: gpt2)
    monkeypatch.setattr(application.uvicorn.Server, "run", interrupted)
    before = threading.active_count()
    assert main(["serve", "--port", "0"]) == 0
    assert threading.active_count() == before


def test_without_its_packages_it_says_what_to_install(capsys, monkeypatch):
    for name in [each for each in sys.modules if each.startswith("lens_probes.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(lp, "serving")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(["serve", "--port", "0"]) == 2
    expected = 'lens_probes: serving a page needs starlette and uvicorn: pip install "lens-probes[serve]"\n'
    assert capsys.readouterr().err == expected


# The page in a browser


@pytest.fixture(scope="module")
def tab(answering):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[dev]'")
    path = os.environ.get("BROWSER_PATH") or shutil.which("chromium")
    if path is None:
        pytest.skip("needs a browser: install chromium, or name one in BROWSER_PATH")
    few = [lp.RankShift(neighbours=2), lp.LogitLens(), lp.AttentionPatterns(keep_patterns=True)]
    few += [lp.HeadTopicSimilarity(), lp.TopicActivity()]
    answering = Slow(serving.Answering(answering.view.model, few))
    with served(answering, answering.answer.about()) as client, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 360, "height": 800}, reduced_motion="reduce")
        tab.set_default_timeout(60_000)
        tab.client, tab.address, tab.wrong = client, str(client.base_url), []
        tab.answering = answering.answer
        tab.on(
            "console",
            lambda message: tab.wrong.append(f"{message.text} {message.location}") if message.type == "error" else None,
        )
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        yield tab
        browser.close()


class Slow:
    """Holds the questions that say so, so that a browser can be seen waiting."""

    def __init__(self, answer):
        self.answer, self.let_go = answer, threading.Event()

    def __call__(self, asked, step):
        while asked.texts[0].startswith("hold") and not self.let_go.wait(0.01):
            step("Holding", 1, 4)
        return self.answer(asked, step)


def ask_anew(tab, text):
    """The page loaded again, and asked about a text."""
    tab.goto("about:blank")
    tab.goto(tab.address)
    tab.get_by_text("tiny-llama (TransformerBridge, 3 layers)").wait_for()
    tab.get_by_label("Text", exact=True).fill(text)
    tab.get_by_role("button", name="Ask", exact=True).click()


def address(tab):
    """As the page has it, once it has written it; `tab.url` is told later."""
    tab.locator("body:not([data-writing])").wait_for()
    return tab.evaluate("location.href")


@pytest.mark.matrix
def test_a_text_is_typed_asked_and_clicked_through_with_the_keyboard_on_a_phone(tab):
    tab.goto(tab.address)
    tab.get_by_text("tiny-llama (TransformerBridge, 3 layers)").wait_for()
    text = tab.get_by_label("Text", exact=True)
    assert not tab.get_by_label("Second text").is_visible()  # on a phone
    tab.get_by_text("Second text, target, topics").click()
    text.fill("hold <b>this</b> text")
    tab.get_by_label("Second text").fill("hold another")
    text.press("Control+Enter")
    tab.get_by_text("Holding (2 of 4)").wait_for()
    assert tab.get_by_role("button", name="Ask").is_disabled()
    tab.get_by_role("button", name="Cancel").press("Enter")
    tab.get_by_text("Cancelled.").wait_for()
    until(lambda: len(tab.client.questions) == 0)

    text.fill(f"{TEXT} </script><img src=x onerror=alert(1)>"[:40])
    tab.get_by_label("Second text").fill("Fruit flies like a banana.")
    tab.get_by_role("button", name="Ask").press("Enter")
    tab.get_by_text("Answered in").wait_for()
    tokens = tab.locator("#strip .token")
    tokens.nth(3).click()
    assert tokens.nth(3).get_attribute("aria-selected") == "true"
    assert tab.get_by_label("compare with").input_value() == "1"
    link = address(tab)
    assert "token=3" in link and "ask.text=Time" in link and "other=1" in link
    until(lambda: tab.evaluate("document.documentElement.scrollWidth") == 360)
    assert tab.locator(".without li").count() == 0

    # The same view comes back from its address, once it is asked again.
    tab.goto("about:blank")
    tab.goto(link)
    tab.get_by_text("press Ask to see its answer").wait_for()
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("Answered in").wait_for()
    assert tokens.nth(3).get_attribute("aria-selected") == "true" and address(tab) == link

    axe = files(pytest.importorskip("axe_playwright_python")).joinpath("axe.min.js").read_text(encoding="utf-8")
    tab.evaluate(axe)
    found = tab.evaluate("axe.run('.asking').then((found) => found.violations)")
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []

    text.fill("")
    tab.get_by_label("Second text").fill("")
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_role("alert").get_by_text("a question must have a text or topics; got neither: write a text").wait_for()
    text.fill(TEXT)
    tab.get_by_label("Target word").fill("#300")
    tab.get_by_label("Topics", exact=True).fill("no colon here")
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("Each line of the topics must be topic: text; got no·colon·here").wait_for()
    tab.get_by_label("Topics", exact=True).fill("\n".join(f"{t}: {p}" for t, texts in TOPICS.items() for p in texts))
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_role("heading", name="TopicActivity").wait_for()
    tab.get_by_role("heading", name="LogitLens 2").wait_for()
    assert [each for each in tab.wrong if "400" not in each] == []  # the browser reports refused questions itself


# Two picks in the moment when the answer arrives: the address has the first only.
PICK_AS_IT_ARRIVES = """() => {
  const own = globalThis.fetch;
  globalThis.fetch = async (...asked) => {
    const answer = await own(...asked), read = answer.json.bind(answer);
    if (String(asked[0]).endsWith("/answer")) answer.json = async () => {
      const found = await read();
      for (const token of [2, 3]) document.getElementById(`token-${token}`).click();
      return found;
    };
    return answer;
  };
}"""


def test_the_picked_head_of_a_text_that_is_too_long_for_all_is_asked_for_with_a_button(tab, monkeypatch):
    view = tab.answering.view
    tab.wrong.clear()
    n = len(lp.text.prompts.tokenize(TEXT, view))
    for module in (packing, serving.answering):
        monkeypatch.setattr(module, "MOST_PAIRS", n * (n + 1) // 2)  # room for one head
    ask_anew(tab, TEXT)
    tab.get_by_text("Answered in").wait_for()
    tab.locator("#token-3").click()
    tab.get_by_label("layer", exact=True).select_option("2_post")
    tab.get_by_label("head", exact=True).select_option("H3")
    found = tab.get_by_role("article", name="AttentionPatterns: From token to token, in the picked head")
    found.scroll_into_view_if_needed()
    tab.evaluate(PICK_AS_IT_ARRIVES)
    found.get_by_role("button", name="Ask for L2H3").click()
    found.get_by_text("in L2H3").wait_for()
    found.get_by_role("button", name="Ask for").wait_for(state="detached")
    assert tab.locator("#token-3").get_attribute("aria-selected") == "true"
    found.get_by_text("Table").click()
    found.locator("details tbody tr").last.wait_for()  # it is drawn after the click
    rows = found.locator("details tbody tr").evaluate_all("rows => rows.map(row => Number(row.cells[2].textContent))")
    own = lp.AttentionPatterns(layers=[2], keep_patterns=True).run(view.model, TEXT).pattern(0)[0, 3]
    assert rows == pytest.approx(own[np.tril_indices(n)].tolist(), abs=1 / 254)
    tab.get_by_label("head", exact=True).select_option("H0")
    found.scroll_into_view_if_needed()
    found.get_by_text("The page does not hold L2H0. It holds:").wait_for()
    assert tab.wrong == []


def test_another_measure_of_nearness_is_asked_for_and_the_picked_token_stays(tab):
    tab.wrong.clear()
    ask_anew(tab, TEXT)
    tab.get_by_text("Answered in").wait_for()
    tab.locator("#token-3").click()
    tab.get_by_text("Second text, target, topics").click()
    assert tab.get_by_label("Nearest among").locator("[value=embed_pos]").is_disabled()  # it has rotary positions
    tab.get_by_label("Nearest by").select_option("dot")
    tab.get_by_label("Nearest among").select_option("unembed")
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("resid_mid against unembed, dot", exact=True).wait_for()
    tab.get_by_text("Answered in").wait_for()
    assert tab.locator("#token-3").get_attribute("aria-selected") == "true"
    link = address(tab)
    assert "ask.metric=dot" in link and "ask.reference=unembed" in link
    found = tab.get_by_role("article", name="RankShift: Entries at the picked token, by layer")
    found.scroll_into_view_if_needed()
    found.locator("td.own").first.wait_for()
    own = lp.RankShift(neighbours=2, metric="dot", reference="unembed").run(tab.answering.view.model, TEXT)
    ranks = found.locator("table.entries tbody tr").evaluate_all("rows => rows.map((row) => row.cells[1].textContent)")
    assert [int(rank.replace(",", "")) for rank in ranks] == own.rank[:, 3].tolist()
    tab.goto("about:blank")
    tab.goto(link)
    tab.get_by_text("press Ask to see its answer").wait_for()
    assert tab.get_by_label("Nearest by").input_value() == "dot"
    assert tab.wrong == []


def test_a_closed_tab_cancels_its_question_at_once(tab):
    ask_anew(tab, "hold it")
    tab.get_by_text("Holding (2 of 4)").wait_for()
    assert len(tab.client.questions) == 1
    tab.goto("about:blank")
    until(lambda: len(tab.client.questions) == 0)


def test_a_server_that_ended_is_told_in_a_sentence(tab):
    tab.goto(tab.address)
    tab.get_by_text("tiny-llama (TransformerBridge, 3 layers)").wait_for()
    tab.context.set_offline(True)
    tab.get_by_label("Text", exact=True).fill(TEXT)
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_role("alert").get_by_text("The server does not answer: see its terminal").wait_for()
    tab.context.set_offline(False)
