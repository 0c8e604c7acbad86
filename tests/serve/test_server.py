"""The command as a process of its own: under load, at its end, and in a browser."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models.__main__ import main
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.paths import ROOT

pytest.importorskip("starlette", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx", reason="the client of this test is not installed")

CLIENTS, REQUESTS = 16, 200


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    command = [sys.executable, "-m", "models", "serve", str(run), "--port", "0", *options, "run.device=cpu"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"serving {re.escape(str(run))} at (http://\S+:\d+/)\n", line)
        assert found is not None, (line, process.communicate(timeout=60)[1] if not line else "")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> str:
    """What a process that ends well leaves on stderr."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def ask_many(url: str, files: dict[str, Path], count: int, started: threading.Event) -> list[Any]:
    """As many answers, to so many clients at once; None where a connection is refused."""
    content = {kind: path.read_bytes() for kind, path in files.items()}
    local = threading.local()

    def ask(number: int) -> Any:
        if not hasattr(local, "client"):
            local.client = httpx.Client(timeout=300)
        theta = {"theta": f"{0.01 * (number % 4)}"}
        try:
            found = local.client.post(f"{url}api/predict?images=false", files=content, data=theta)
        except httpx.ConnectError:
            return number, None
        started.set()
        return number, found

    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(ask, range(count)))


def counted(url: str) -> dict[int, int]:
    text = httpx.get(f"{url}metrics").text
    found = re.findall(r'^cen_requests_total\{path="/api/predict",status="(\d+)"\} (\d+)$', text, re.M)
    return {int(status): int(number) for status, number in found}


def test_no_request_of_many_is_lost_or_mixed_up(run: Path, files: dict[str, Path]) -> None:
    with serving(run) as (process, url):
        answers = ask_many(url, files, REQUESTS, threading.Event())
        assert [answer.status_code for _, answer in answers] == REQUESTS * [200]
        by_theta: dict[float, str] = {}
        for number, answer in answers:
            found = answer.json()
            found.pop("seconds")
            theta = 0.01 * (number % 4)
            assert found["theta"] == pytest.approx(theta)
            assert by_theta.setdefault(theta, json.dumps(found)) == json.dumps(found)
        assert len(set(by_theta.values())) == 4
        assert counted(url) == {200: REQUESTS}
        process.send_signal(signal.SIGTERM)
        assert ended(process) == ""


def test_a_short_queue_refuses_and_loses_nothing(run: Path, files: dict[str, Path]) -> None:
    with serving(run, "--queue", "2") as (_, url):
        answers = ask_many(url, files, REQUESTS, threading.Event())
        statuses = Counter(answer.status_code for _, answer in answers)
        assert set(statuses) == {200, 503}
        assert all(
            int(answer.headers["retry-after"]) >= 1 for _, answer in answers if answer.status_code == 503
        )
        assert counted(url) == statuses
        assert statuses.total() == REQUESTS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_taken_before_a_signal_is_answered(
    run: Path, files: dict[str, Path], number: signal.Signals
) -> None:
    with serving(run) as (process, url):
        started = threading.Event()
        with ThreadPoolExecutor(1) as background:
            asked = background.submit(ask_many, url, files, CLIENTS, started)
            assert started.wait(120)
            process.send_signal(number)
            # A client that connects after the end is refused; one that was let in is answered.
            answers = [(number, answer) for number, answer in asked.result(120) if answer is not None]
        assert {answer.status_code for _, answer in answers} <= {200, 503}
        assert sum(answer.status_code == 200 for _, answer in answers) >= 1
        for _, answer in answers:
            if answer.status_code == 503:
                assert answer.json() == {"error": "the server is stopping"}
        assert ended(process) == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}healthz")


def test_addresses_that_others_reach_are_noted(run: Path) -> None:
    with serving(run, "--host", "0.0.0.0") as (process, url):
        assert url.startswith("http://0.0.0.0:")
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (
            "note: --host 0.0.0.0: whoever reaches this machine can use the network, without a password\n"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queue", "-1"], "--queue must be at least 0, got -1"),
        (["--max-upload-mb", "0"], "--max-upload-mb must be positive, got 0"),
        (["--max-megapixels", "nan"], "--max-megapixels must be positive, got nan"),
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000: cannot listen there"),
        (["data.root=nowhere"], "data.root: nowhere does not exist"),
    ],
)
def test_arguments_that_are_refused(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(run), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_port_that_is_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(run), "--port", port]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(run)]) == 2
    assert capsys.readouterr().err == "error: serve needs uvicorn: pip install 'cen_ext[serve]'\n"


# ---- in a browser

SHARES = "[...document.querySelectorAll('#exchange td:nth-child(3)')].map(cell => cell.textContent)"
DONE = "document.querySelector('#status').textContent.startsWith('Done')"
SAID = "document.querySelector('#status').textContent"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; Debian's package is named so")
def test_the_page(run: Path, files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("websockets", reason="the browser's protocol needs websockets")
    content = {kind: path.read_bytes() for kind, path in files.items()}
    with serving(run) as (_, url), browser(tmp_path / "profile") as page:
        page.look(1400)
        page.open(url)
        page.wait_for("document.querySelectorAll('.example').length === 3")
        assert page.evaluate(
            "[...document.querySelectorAll('.drop strong')].map(each => each.textContent)"
        ) == [*files]
        page.evaluate("document.querySelector('#run').click()")
        assert page.evaluate(SAID) == "Choose a file first."
        # Two files, and the button by the keyboard.
        for kind, path in files.items():
            page.choose_file(f"#file-{kind}", path)
        page.evaluate("document.querySelector('#run').focus()")
        page.press("Enter", 13)
        page.wait_for(DONE)
        expected = httpx.post(f"{url}api/predict", files=content).json()
        assert (
            page.evaluate("document.querySelector('#layer').src") == expected["images"]["labels"]["ensemble"]
        )
        assert page.evaluate("document.querySelector('#base').src") == expected["images"]["inputs"]["rgb"]
        assert page.evaluate("document.querySelectorAll('#maps img').length") == 5
        assert page.evaluate(SHARES) == [
            f"{100 * layer['shares']['rgb']:.1f} %" for layer in expected["exchanged"]
        ]
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        # The slider to its left end: nothing is exchanged.
        page.evaluate(
            "theta.value = 0; theta.dispatchEvent(new Event('input')); state.answer = {...state.answer}"
        )
        page.evaluate("theta.dispatchEvent(new Event('change'))")
        page.wait_for(f"state.answer.theta === 0 && {DONE}")
        assert set(page.evaluate(SHARES)) == {"0.0 %"}
        # Back to the trained one, without depth.
        page.evaluate("document.querySelector('#theta-reset').click()")
        page.wait_for(f"state.answer.theta === 0.02 && {DONE}")
        page.evaluate("document.querySelector('[name=plug][value=depth]').click()")
        page.wait_for(f"state.answer.present.length === 1 && {DONE}")
        alone = httpx.post(f"{url}api/predict", files=content, data={"unplug": "depth"}).json()
        assert page.evaluate("document.querySelector('#layer').src") == alone["images"]["labels"]["ensemble"]
        assert "one modality is left" in page.evaluate("document.querySelector('#relied').textContent")
        # A name is text, whatever is in it.
        named = tmp_path / "<img src=x onerror=document.title=1>.png"
        named.write_bytes(b"no image")
        page.choose_file("#file-rgb", named)
        page.evaluate("document.querySelector('#run').click()")
        page.wait_for(f"{SAID}.includes('found none of them')")
        assert "<img src=x" in page.evaluate(SAID)
        assert page.evaluate("document.title") == "cen serve"
        # An example takes the place of files.
        page.evaluate("document.querySelectorAll('.example')[1].click()")
        page.wait_for(DONE)
        assert page.evaluate("document.querySelector('.example[aria-pressed=true]').textContent") == "000014"
        for width in (1400, 390):
            for dark in (False, True):
                page.look(width, dark=dark)
                assert page.evaluate("document.documentElement.scrollWidth") == width
        refusals = [error for error in page.errors if "422" not in error and "415" not in error]
        assert refusals == []
