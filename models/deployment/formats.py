"""The formats that networks are exported to: how a file of each is written, and how it is run.

Each file holds, beside the program, what to feed it, as JSON under the name ``METADATA``.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from models.deployment import operators
from models.deployment.interface import Interface
from models.training.errors import UsageError

METADATA = "cen_ext.json"
OPSET = 18
_EXCEPTION = re.compile(r"\.size\(\)\[0\][^!=<>]* != \d+$")

Run = Callable[[Sequence[Tensor]], list[Tensor]]


class Format(NamedTuple):
    """A format.

    Attributes:
        suffix: of its files.
        write: writes a program, its interface and its metadata to a path.
        load: reads a file back, and returns how to run it.
        metadata: reads a file's metadata.
        needs: modules that it takes, and the extra that brings them.
    """

    suffix: str
    write: Callable[[ExportedProgram, Interface, dict[str, Any], Path], None]
    load: Callable[[Path], Run]
    metadata: Callable[[Path], dict[str, Any]]
    needs: tuple[str, ...] = ()


def check_needs(name: str) -> None:
    """Refuse a format whose libraries are missing.

    Raises:
        UsageError: one cannot be imported; the message names the extra.
    """
    for module in FORMATS[name].needs:
        try:
            importlib.import_module(module)
        except ImportError:
            raise UsageError(
                f"--format {name} needs {', '.join(FORMATS[name].needs)}: pip install 'cen_ext[onnx]'"
            ) from None


def _write_onnx(program: ExportedProgram, interface: Interface, metadata: dict[str, Any], path: Path) -> None:
    with _quiet():
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=interface.input_names,
            output_names=interface.output_names,
            verbose=False,
        )
    assert made is not None  # as with dynamo=True
    made.model.metadata_props[METADATA] = json.dumps(metadata)
    made.save(path)


def _load_onnx(path: Path) -> Run:
    session = _session(path)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        names = [each.name for each in session.get_inputs()]
        fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(y)) for y in session.run(None, fed)]

    return run


def _onnx_metadata(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_session(path).get_modelmeta().custom_metadata_map[METADATA])
    return found


def _session(path: Path) -> Any:
    runtime = importlib.import_module("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _write_program(
    program: ExportedProgram, interface: Interface, metadata: dict[str, Any], path: Path
) -> None:
    # Of a stack of one sample torch holds that it is a case of its own, which it is not here: the comparison
    # with the network has single scenes. The guards are an attribute of torch's own, which may be missing.
    guards: list[str] = getattr(program, "_guards_code", [])
    program._guards_code = [guard for guard in guards if not _EXCEPTION.search(guard)]
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def _load_program(path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(module(*inputs))

    return run


def _program_metadata(path: Path) -> dict[str, Any]:
    files = {METADATA: ""}
    torch.export.load(path, extra_files=files)
    found: dict[str, Any] = json.loads(files[METADATA])
    return found


def _write_package(
    program: ExportedProgram, interface: Interface, metadata: dict[str, Any], path: Path
) -> None:
    settings = {"aot_inductor.metadata": {METADATA: json.dumps(metadata)}}
    with _quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    if operators.names(program):
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as package:
            folder, _, _ = package.namelist()[0].partition("/")
            package.write(operators.library(), f"{folder}/{operators.LIBRARY}")


def _load_package(path: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(path))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(package(*inputs))

    return run


def _package_metadata(path: Path) -> dict[str, Any]:
    stored: Mapping[str, str] = torch._inductor.aoti_load_package(str(path)).get_metadata()
    found: dict[str, Any] = json.loads(stored[METADATA])
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print of their progress and of their own old functions."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _load_onnx, _onnx_metadata, ("onnx", "onnxscript", "onnxruntime")),
    "torch": Format(".pt2", _write_program, _load_program, _program_metadata),
    "aot": Format(".pt2", _write_package, _load_package, _package_metadata),
}
