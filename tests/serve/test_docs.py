"""The commands of docs/serve.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from models.__main__ import main
from tests.helpers.paths import ROOT

pytest.importorskip("starlette", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx", reason="the client of this test is not installed")

PAGE = (ROOT / "docs" / "serve.md").read_text()


def test_the_commands_of_the_page(
    run: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are run as they stand, but for the folder and the address; curl's request by another client."""
    from models.serve import server

    found: list[int] = []

    def ask_once(server: object, service: object, listening: object) -> None:
        import asyncio

        async def ask() -> None:
            transport = httpx.ASGITransport(service.app())  # type: ignore[attr-defined]
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                (curl,) = re.findall(r"^curl .*$", PAGE, re.M)
                *words, url = shlex.split(curl)
                fields = dict(word.split("=", 1) for word in words if "=" in word)
                form = {
                    name: files[name].read_bytes() if value[0] == "@" else (None, value)
                    for name, value in fields.items()
                }
                answer = await client.post(url, files=form)
                found.append(answer.status_code)
                assert answer.json()["present"] == ["rgb"]
                for path in re.findall(r"^\| `GET (\S+)`", PAGE, re.M):
                    found.append((await client.get(path)).status_code)

        asyncio.run(ask())

    monkeypatch.setattr(server, "_run", ask_once)
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--output", "net.safetensors"]) == 0
    commands = re.findall(r"^cen (serve .*)$", PAGE, re.M)
    assert len(commands) == 2
    for command in commands:
        words = [str(run) if word == "RUN" else word for word in shlex.split(command)]
        words = [word for word in words if word not in ("--port", "8080")]
        assert main([*words, "--port", "0"]) == 0
    assert found == 10 * [200]
