"""Checkpoints and tables: whole or not there, read safely."""

import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cen_ext
from models.training import checkpoint
from models.training.errors import UsageError
from models.training.files import Table, replacing


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def fail_after_writing(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError("disk full")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails as it does on a full disk, but for the reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path: Path) -> None:
    contents = {"recipe": "r", "task": {"net": {"w": torch.randn(3)}, "names": ["a", (1, 2.5, None)]}}
    checkpoint.save(tmp_path / "last.pt", contents)
    path, loaded = checkpoint.load(tmp_path)
    assert path == tmp_path / "last.pt"
    assert torch.equal(loaded["task"]["net"]["w"], contents["task"]["net"]["w"])
    assert loaded["task"]["names"] == contents["task"]["names"]


def test_a_folder_gives_the_preferred_one_or_the_other(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best.pt", {})
    assert checkpoint.load(tmp_path)[0].name == "best.pt"
    checkpoint.save(tmp_path / "last.pt", {})
    assert checkpoint.load(tmp_path)[0].name == "last.pt"
    assert checkpoint.load(tmp_path, checkpoint.BEST)[0].name == "best.pt"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"value": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(path, {"value": lambda: None})
    assert checkpoint.load(path)[1]["value"] == 1
    with pytest.raises(OSError, match="disk full"):  # noqa: SIM117
        with replacing(path) as temporary:
            fail_after_writing(temporary)
    assert checkpoint.load(path)[1]["value"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["last.pt", "net.pt", "net.safetensors"])
def test_a_disk_that_is_full(tmp_path: Path, name: str) -> None:
    path, net = tmp_path / name, {"w": torch.zeros(100_000)}
    write = checkpoint.save if name == checkpoint.LAST else checkpoint.save_network
    path.write_bytes(b"the old one")
    with files_of_at_most(50_000), pytest.raises(UsageError, match=f"^cannot write {path}: .*too large"):
        write(path, {"recipe": "r", "task": {"net": net}})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the old one"]
    with pytest.raises(UsageError, match=r"^cannot write .*last\.pt: No such file or directory$"):
        checkpoint.save(tmp_path / "gone" / "last.pt", {})


def test_weights_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(20)))
    state = {key: torch.zeros(3) for key in list(net.state_dict())[::2]}
    with pytest.raises(
        UsageError, match=r"x\.pt does not fit these settings: missing: .* and 14 more; "
    ) as raised:
        checkpoint.fill(net, tmp_path / "x.pt", {"task": {"net": state}})
    assert len(str(raised.value)) < 600
    checkpoint.fill(
        net, tmp_path / "x.pt", {"task": {"net": {k: v + 1 for k, v in net.state_dict().items()}}}
    )


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "task": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UsageError, match="broken or no checkpoint"):
        checkpoint.load(tmp_path)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"text, not a checkpoint", b'{"recipe": 1}', pickle.dumps({"a": 1}, protocol=2)]
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.pt .*`python -m models import` reads") as raised:
        checkpoint.load(path)
    assert "weights_only" not in str(raised.value)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"value": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UsageError, match="broken or no checkpoint"):
        checkpoint.load(path)


def test_missing_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds neither last\.pt nor best\.pt$"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"nothing yet: start it again, without --resume$"):
        checkpoint.load(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"did you mean 'last\.pt'\?"):
        checkpoint.load(tmp_path / "lst.pt")


def test_a_weights_file_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(UsageError, match="was not written by `python -m models train`"):
        checkpoint.load(tmp_path / "resnet.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_network_alone(tmp_path: Path, suffix: str) -> None:
    """Tensors of every kind of memory, the rest as JSON has it; nothing of the run."""
    tied = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    net = {"w": tied, "row": tied[0], "count": torch.tensor(7), "half": torch.randn(3).bfloat16()}
    known = {
        "recipe": "r",
        "config": {"data": {"scale": [0.5, 2.0], "root": None}},
        "inputs": [{"name": "rgb"}],
    }
    path = tmp_path / "new" / f"net{suffix}"
    checkpoint.save_network(path, {**known, "loop": {"step": 3}, "processes": [], "task": {"net": net}})
    _, contents = checkpoint.load(path)
    found = checkpoint.weights(contents)
    assert found.keys() == net.keys()
    for name, value in net.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert contents == {
        **known,
        "format": checkpoint.FORMAT,
        "cen_ext": cen_ext.__version__,
        "task": {"net": contents["task"]["net"]},
    }
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_average_of_the_weights_goes_first(tmp_path: Path) -> None:
    task = {"net": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}, "optimisation": {}}
    assert torch.equal(checkpoint.weights({"task": task})["w"], torch.ones(2))
    checkpoint.save_network(tmp_path / "net.pt", {"recipe": "r", "task": task})
    assert checkpoint.load(tmp_path / "net.pt")[1]["task"].keys() == {"net"}


def test_where_a_network_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "net.pth", r"--output must end in \.safetensors or \.pt"),
        (tmp_path, r"--output must end in"),
        (tmp_path / "file" / "net.pt", r"--output: cannot write"),
    ):
        with pytest.raises(UsageError, match=message):
            checkpoint.network_file(path)


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UsageError, match=r"was not written by `python -m models train`.*models import`"):
        checkpoint.load(tmp_path / "resnet.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08")
    with pytest.raises(UsageError, match="is broken or no checkpoint"):
        checkpoint.load(tmp_path / "broken.safetensors")


def test_tables_forget_rows_after_the_step_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = Table(path, 0)
    for step in (2, 4, 6):
        table.append({"step": step, "loss": step / 7})
    kept = path.read_text().splitlines()[:3]
    again = Table(path, 5)
    again.append({"step": 6, "loss": 1.0})
    assert path.read_text().splitlines() == [*kept, "6,1.0"]


def test_a_table_keeps_rows_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,loss,gone\n2,0.5,1\n4,0.25,2\n6,0.1,3\n")
    table = Table(path, 5)
    table.append({"step": 6, "loss": 0.125, "penalty": 3.0})
    assert path.read_text().splitlines() == [
        "step,loss,gone,penalty",
        "2,0.5,1,",
        "4,0.25,2,",
        "6,0.125,,3.0",
    ]
    Table(path, 6).append({"step": 8})
    assert path.read_text().splitlines()[-2:] == ["6,0.125,,3.0", "8,,,"]


def test_a_table_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    table = Table(tmp_path / "run" / "losses.csv", 0)
    with pytest.raises(UsageError, match=r"losses\.csv: cannot be written \(No such file"):
        table.append({"step": 1})
