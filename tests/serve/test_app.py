"""Requests and their answers, in this process: what is taken, what is refused, and how."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.data.images import read_stored
from tests.helpers.pages import Page

pytest.importorskip("starlette", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx", reason="the client of this test is not installed")

Files = dict[str, Path]
Form = dict[str, Any]


def form_of(files: Files) -> Form:
    return {kind: (path.name, path.read_bytes()) for kind, path in files.items()}


def talk(service: Any, conversation: Callable[[Any], Awaitable[Any]]) -> Any:
    """Have a conversation with the service's application."""

    async def run() -> Any:
        transport = httpx.ASGITransport(service.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await conversation(client)

    return asyncio.run(run())


def post(service: Any, form: Form, path: str = "/api/predict", **options: Any) -> Any:
    return talk(service, lambda client: client.post(path, files=form, **options))


def get(service: Any, path: str) -> Any:
    return talk(service, lambda client: client.get(path))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def refused(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return str(answer.json()["error"])


# ---- what is answered


def test_predict_answers_as_the_network_does(service: Any, files: Files) -> None:
    from models.serve.scenes import Question

    expected = service.scenes.answer(
        Question({kind: (path.name, path.read_bytes()) for kind, path in files.items()}, theta=0.05)
    )
    answer = post(service, form_of(files), data={"theta": "0.05", "unplug": ""})
    assert answer.status_code == 200
    found = answer.json()
    assert list(found.pop("seconds")) == ["upload", "queue", "decode", "network", "images"]
    expected.pop("seconds")
    assert found == expected


def test_without_images(service: Any, files: Files) -> None:
    found = post(service, form_of(files), "/api/predict?images=false").json()
    assert "images" not in found
    assert sum(each["shares"]["ensemble"] for each in found["classes"]) == pytest.approx(1)
    assert "images must be true or false, got '1'" in refused(
        post(service, form_of(files), "/api/predict?images=1"), 422
    )


def test_an_example_takes_the_place_of_files(service: Any) -> None:
    listed = get(service, "/api/examples").json()
    assert [each["name"] for each in listed] == ["000013", "000014", "000015"]
    found = post(service, {"example": (None, "0"), "unplug": (None, "rgb")}).json()
    assert found["present"] == ["depth"]
    assert "example must be a number, got 'x'" in refused(post(service, {"example": (None, "x")}), 422)


def test_the_model_is_described(service: Any) -> None:
    found = get(service, "/api/model").json()
    assert found["recipe"] == "synthetic_demo"
    assert found["files"] == found["modalities"] == ["rgb", "depth"]
    assert found["theta"]["trained"] == 0.02
    assert 0.09 < found["theta"]["largest"] <= 0.1
    assert {layer["threshold"] for layer in found["layers"]} == {0.02}
    assert found["alpha"]["rgb"] == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert [each["name"] for each in found["classes"]] == list(service.scenes.trained.class_names)


@pytest.mark.parametrize("path", ["/", "/style.css", "/script.js", "/healthz", "/metrics", "/nothing"])
def test_answers_forbid_what_is_not_needed(service: Any, path: str) -> None:
    answer = get(service, path)
    assert answer.status_code == (404 if path == "/nothing" else 200)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere(service: Any) -> None:
    page = Page(get(service, "/").text)
    assert page.faults == []
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if link != "data:,"} == {"style.css", "script.js"}
    for path in ("/style.css", "/script.js"):
        text = get(service, path).text
        assert not re.search(r"https?://|@import|url\(|innerHTML|eval\(", text)


# ---- what is refused


def test_only_forms_are_read(service: Any) -> None:
    def send(client: Any) -> Any:
        return client.post("/api/predict", json={"theta": 1})

    assert refused(talk(service, send), 415) == "expected multipart/form-data, got application/json"


@pytest.mark.parametrize(
    "body", [b"", b"--b\r\nnothing", b'--b\r\nContent-Disposition: form-data; name="rgb"\r\n\r\nx']
)
def test_broken_forms(service: Any, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = talk(service, lambda client: client.post("/api/predict", content=body, headers=headers))
    assert refused(answer, 400) == "a multipart form that is broken or ends early"


def test_too_many_fields(service: Any) -> None:
    assert "more than 64 fields" in refused(post(service, {f"f{n}": (None, "") for n in range(65)}), 400)


def test_the_size_of_uploads_is_limited_while_they_are_read(service: Any) -> None:
    """A body whose length nobody tells is not read to its end."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="rgb"; filename="a"\r\n\r\n'
        while True:
            sent += 1
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = talk(service, lambda client: client.post("/api/predict", content=endless(), headers=headers))
    assert refused(answer, 413) == "larger than the 1 MB that this server takes"
    assert sent < 40  # 16 fill the limit, as many again are thrown away


def test_pixels_are_counted_before_they_are_decoded(
    service: Any, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serve.scenes.frame_of", None)  # nothing is decoded
    bomb = png(np.zeros((1001, 1000), np.uint8))
    assert len(bomb) < 10_000
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    for data in (bomb, array.getvalue()):
        message = refused(post(service, {"rgb": ("<b>.png", data)}), 413)
        assert message.startswith("rgb (<b>.png): 1000")
        assert message.endswith("pixels are more than the 1,000,000 that are taken")


@pytest.mark.parametrize(
    "data", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"GIF89a", b"RIFF1234WAVE"]
)
def test_types_are_told_by_content(service: Any, data: bytes) -> None:
    message = refused(post(service, {"rgb": ("a.png", data, "image/png")}), 415)
    assert message == "rgb (a.png): expected PNG, JPEG, WebP, BMP, TIFF or .npy, found none of them"


def test_names_are_shortened_and_printable(service: Any) -> None:
    message = refused(post(service, {"rgb": ("a\r\n\x1b[31m" + 300 * "b", b"x")}), 415)
    assert message.isprintable()
    assert len(message) < 200


def test_images_are_refused_as_predict_refuses_them(service: Any, files: Files) -> None:
    form = form_of(files)
    gray = png(np.zeros((40, 48), np.uint8))
    message = refused(post(service, form | {"rgb": ("gray.png", gray)}), 422)
    assert (
        message
        == "rgb (gray.png): expected a color image of 8 bits and 3 channels, found 8 bits and 1 channel"
    )
    message = refused(post(service, form | {"depth": ("d.png", gray)}), 422)
    assert message.startswith("depth (d.png): expected depth of 16 bits and 1 channel, found 8 bits")
    cut = form["rgb"][1][:-200]
    message = refused(post(service, form | {"rgb": ("cut.png", cut)}), 422)
    assert message.startswith("rgb (cut.png): broken or truncated image")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(read_stored(files["rgb"])).save(turned, "JPEG", exif=exif)
    message = refused(post(service, form | {"rgb": ("turned.jpg", turned.getvalue())}), 422)
    assert "its EXIF data asks viewers to turn or mirror it (orientation 6)" in message
    small = png(np.full((20, 24), 2000, np.uint16))
    message = refused(post(service, form | {"depth": ("small.png", small)}), 422)
    assert message.startswith("depth (small.png) is 24x20, but rgb (000002.png) is 48x40: ")


def test_what_predict_warns_of_is_part_of_the_answer(service: Any, files: Files) -> None:
    form = form_of(files)
    assert post(service, form).json()["warnings"] == []
    larger = np.pad(read_stored(files["rgb"]), [(5, 5), (6, 6), (0, 0)])
    (warning,) = post(service, form | {"rgb": ("larger.png", png(larger))}).json()["warnings"]
    assert warning.startswith("images of 48x40 are taken for the middle of images of 60x50")


def test_fields_that_are_refused(service: Any, files: Files) -> None:
    form = form_of(files)
    assert "unknown field 'dept'" in refused(post(service, {"dept": form["depth"]}), 422)
    twice = [("rgb", form["rgb"]), ("rgb", form["rgb"])]
    assert refused(post(service, twice), 422) == "rgb is given twice"
    assert (
        refused(post(service, form | {"theta": (None, "much")}), 422) == "theta must be a number, got 'much'"
    )
    assert "expected one of rgb" in refused(post(service, {"rgb": ("", b"")}), 422)
    assert post(service, {"rgb": form["rgb"], "depth": ("", b"")}).json()["present"] == ["rgb"]


# ---- what goes wrong


def test_a_failure_is_told_without_details_and_logged(
    service: Any, files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(service.scenes.trained.net, "forward", fail)
        message = refused(post(service, form_of(files)), 500)
    assert message == "the server failed at this request; its log says how"
    assert "RuntimeError: a secret" in caplog.text
    assert post(service, form_of(files)).status_code == 200


def test_nothing_is_written_to_disk(service: Any, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file")

    for name in (
        "_TemporaryFileWrapper",
        "TemporaryFile",
        "NamedTemporaryFile",
        "SpooledTemporaryFile",
        "mkstemp",
    ):
        monkeypatch.setattr(tempfile, name, refuse)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    big = np.random.default_rng(0).integers(0, 255, (500, 600, 3), dtype=np.uint8)
    form = {"rgb": ("big.png", png(big)), "unplug": (None, "depth")}
    assert len(form["rgb"][1]) > 800_000  # web frameworks spool at 2**20 bytes of a file at most
    assert post(service, form).status_code == 200


class Gate:
    """Holds the network until it is opened."""

    def __init__(self, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self._opened = 0, threading.Event()
        answer = service.scenes.answer

        def wait(question: Any) -> Any:
            self.calls += 1
            assert self._opened.wait(60)
            return answer(question)

        monkeypatch.setattr(service.scenes, "answer", wait)

    def open(self) -> None:
        self._opened.set()


async def until(is_true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if is_true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def test_a_full_queue_says_when_to_come_again(
    service: Any, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, form = Gate(service, monkeypatch), form_of(files)

    async def conversation(client: Any) -> None:
        asked = [asyncio.create_task(client.post("/api/predict", files=form)) for _ in range(5)]
        await until(lambda: service.worker.waiting == 4 and gate.calls == 1)
        text = (await client.get("/metrics")).text
        assert "\ncen_queue_length 4\n" in text
        assert "\ncen_requests_in_flight 5\n" in text
        answer = await client.post("/api/predict", files=form)
        assert refused(answer, 503) == "the queue of 4 is full"
        assert int(answer.headers["retry-after"]) >= 1
        gate.open()
        assert [(await each).status_code for each in asked] == 5 * [200]
        text = (await client.get("/metrics")).text
        assert 'cen_requests_total{path="/api/predict",status="200"} 5\n' in text
        assert 'cen_requests_total{path="/api/predict",status="503"} 1\n' in text
        assert 'cen_predict_seconds_bucket{le="+Inf"} 5\n' in text
        assert "\ncen_predict_seconds_count 5\n" in text
        assert "\ncen_queue_length 0\n" in text

    talk(service, conversation)


def test_clients_that_left_are_not_worked_for(
    service: Any, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, form = Gate(service, monkeypatch), form_of(files)
    request = httpx.Request("POST", "http://test/api/predict", files=form)
    body, headers = request.read(), [(key.lower(), value) for key, value in request.headers.raw]
    left = asyncio.Event()

    async def ask_and_leave() -> list[Any]:
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/predict",
            "query_string": b"",
            "headers": headers,
        }
        await service.app()(
            {**scope, "asgi": {"version": "3.0"}, "http_version": "1.1", "root_path": ""}, receive, send
        )
        return sent

    async def conversation(client: Any) -> None:
        first = asyncio.create_task(client.post("/api/predict", files=form))
        await until(lambda: gate.calls == 1)
        leaving = asyncio.create_task(ask_and_leave())
        await until(lambda: service.worker.waiting == 1)
        left.set()
        assert (await leaving)[0]["status"] == 499
        assert service.worker.waiting == 0
        gate.open()
        assert (await first).status_code == 200

    talk(service, conversation)
    assert gate.calls == 1


def test_stopping_answers_what_was_asked_before(
    service: Any, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, form, idle = Gate(service, monkeypatch), form_of(files), []
    service.on_idle = lambda: idle.append(True)

    async def conversation(client: Any) -> None:
        assert (await client.get("/healthz")).json() == {"status": "ready"}
        asked = [asyncio.create_task(client.post("/api/predict", files=form)) for _ in range(3)]
        await until(lambda: service.worker.waiting == 2)
        service.stop()
        health = await client.get("/healthz")
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
        assert refused(await client.post("/api/predict", files=form), 503) == "the server is stopping"
        assert idle == []
        gate.open()
        assert [(await each).status_code for each in asked] == 3 * [200]
        assert idle == [True]

    talk(service, conversation)
