"""examples/robot_loop.py, for a second with a small network; its synchronizer and its queue."""

import queue
from pathlib import Path

import numpy as np
import pytest

import models
from examples.robot_loop import SIZE, TOLERANCE, Message, Synchronizer, keep_newest, main, room
from tests.helpers.clips import save_narrow


def test_the_loop_labels_what_the_sensors_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = save_narrow(tmp_path / "net.pt")
    published: list[Message] = []
    count = main(str(net), 1.0, published.append)
    assert count == len(published) >= 1
    assert capsys.readouterr().out.startswith(f"{count} pairs labeled; capture to labels: median ")
    stamps = [message.stamp for message in published]
    assert stamps == sorted(set(stamps))
    for message in published:
        assert (message.data.shape, message.data.dtype) == (SIZE, np.uint8)


def test_ctrl_c_ends_the_loop(tmp_path: Path) -> None:
    def interrupt(_: Message) -> None:
        raise KeyboardInterrupt

    assert main(str(save_narrow(tmp_path / "net.pt")), labeled=interrupt) == 0


def test_the_network_takes_what_the_sensors_send(tmp_path: Path) -> None:
    trained = models.load(save_narrow(tmp_path / "net.pt"))
    images = trained.read(**{kind: room(kind, 0.0) for kind in ("rgb", "depth")})
    assert sorted(np.unique(images[1].numpy())) == [1.5, 3.0]


def test_stamps_are_paired_once_and_within_the_tolerance() -> None:
    pairs: list[dict[str, int]] = []
    synchronizer = Synchronizer(lambda pair: pairs.append({kind: each.data for kind, each in pair.items()}))
    for kind, stamp, data in (
        ("rgb", 0.0, 0),
        ("rgb", 0.033, 1),
        ("depth", 0.03, 10),  # nearer to 1 than to 0, which is then too old
        ("depth", 0.031, 11),
        ("rgb", 0.033 + 2 * TOLERANCE, 2),  # too far from 11
        ("depth", 0.033 + 2 * TOLERANCE, 12),
    ):
        synchronizer.add(kind, Message(stamp, data))
    assert pairs == [{"depth": 10, "rgb": 1}, {"depth": 12, "rgb": 2}]


def test_the_queue_keeps_the_newest() -> None:
    pairs: queue.Queue[dict[str, Message]] = queue.Queue(1)
    for index in range(3):
        keep_newest(pairs, {"rgb": Message(index, None)})
    assert pairs.get_nowait()["rgb"].stamp == 2
    assert pairs.empty()
