"""examples/deploy.py on a tiny network of random weights that exchanges channels."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

import models
from tests.helpers.exported import Exported
from tests.helpers.scripts import command, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("made"))


def test_the_program_says_what_the_network_says(
    made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: made.rooms / kind / "000013.png" for kind in ("rgb", "depth")}
    words = [command("deploy.py")[0], str(made.network), *(f"{kind}={path}" for kind, path in files.items())]
    capsys.readouterr()
    assert run(monkeypatch, tmp_path, words) is None
    printed = capsys.readouterr().out
    kept = re.findall(r"^\S+: ([\d, ]+) of (\d+) channels are computed$", printed, re.M)
    assert kept
    assert all(0 < int(count) <= int(most) for counts, most in kept for count in counts.split(", "))
    assert any(int(count) < int(most) for counts, most in kept for count in counts.split(", "))
    folder = tmp_path / "runs/deployed"
    sizes = dict(re.findall(r"deployed/(\S+): ([\d.]+) MiB$", printed, re.M))
    assert set(sizes) == {"labels.png", "net.onnx", "net.safetensors"}
    for name, size in sizes.items():
        assert float(size) == pytest.approx((folder / name).stat().st_size / 2**20, abs=0.006)
    ((difference, largest),) = re.findall(r"^largest difference of logits (\S+) of (\S+)$", printed, re.M)
    assert float(difference) < 1e-4 * max(1, float(largest))
    (same,) = re.findall(r"^same class on (\S+) % of pixels$", printed, re.M)
    assert float(same) > 99.9
    # As the toolkit labels the same files, when it enlarges logits likewise.
    trained = models.load(made.network, ["eval.interpolation=bilinear"])
    labels = cv2.imread(str(folder / "labels.png"), cv2.IMREAD_UNCHANGED)
    assert (labels == trained.predict(**files)["ensemble"]).mean() > 0.999
    assert len(np.unique(labels)) > 1


def test_what_is_not_there_is_named(made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = command("deploy.py")[0]
    assert "RUN [MODALITY=PICTURE ...]" in run(monkeypatch, tmp_path, [script])
    assert run(monkeypatch, tmp_path, [script, "nowhere"]).startswith(
        "error: checkpoint: nowhere does not exist"
    )
    words = [script, str(made.network), f"rgb={made.rooms / 'rgb/000013.png'}"]
    assert re.match(r"error: .*depth", run(monkeypatch, tmp_path, words))
    assert run(monkeypatch, tmp_path, [script, str(made.generator)]).endswith("name a segmentation network")
