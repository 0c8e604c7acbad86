"""The predict command: images of several domains in, images of the target's domain out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.networks.messages import suggest
from models.sources import check_inputs, is_video, match_files, note_absent, why_all
from models.training.errors import UsageError
from models.translation.build import output_names
from models.translation.load import TrainedGenerator, load
from models.visualize import contact_sheet, save_image
from models.watching import Watch, watched_folders


def predict_files(
    checkpoint: Path, inputs: Mapping[str, Path], output: Path, which: str | None, overrides: Sequence[str]
) -> list[str]:
    """Translate images; write ``<output>/<view>`` for every output and view, as the target stores it.

    Of every view the middle square is taken, at ``data.crop`` pixels, as in evaluation; with
    ``eval.size=full`` all of it, in its own size. Files are PNG, or TIFF or ``.npy`` where the target has
    numbers that PNG cannot hold. ``sheet.png`` shows the inputs and what every output says, of ``eval.sheet``
    views spread evenly.

    Args:
        checkpoint: run folder or checkpoint.
        inputs: by domain an image, a pattern of images (``models.patterns``), or a folder of images that are
            matched by their names without suffix,
            in which the domain's own may stand: ``point_0_view_0_domain_normal`` goes with
            ``point_0_view_0_domain_reshading``, and of pairs what ``layout.json`` has behind ``{name}``.
            Domains that are not given are absent.
        output: folder to write to.
        which: write this output only: ``ensemble``, or a domain whose branch to take; None: all of them.
        overrides: ``field=value`` assignments.

    Returns:
        The names of the views.

    Raises:
        UsageError: a path, domain or output that does not exist; images that do not pair up; a domain that is
            absent where the fusion needs all.
        DataError: a broken image, or domains of different size; the message names the file.
    """
    trained = load(checkpoint, overrides)
    recipe = trained.recipe
    paths = check_inputs(inputs, trained.reader.files(), why_all(recipe.fusion))
    written = _chosen_outputs(trained, paths, which)
    for path in paths.values():
        if is_video(path):
            raise UsageError(f"{path} is a video: translation takes images, or folders of them")
    views = match_files(paths, trained.reader.endings())
    _make_folders(output, written)
    count = min(recipe.eval.sheet, len(views))
    chosen = np.linspace(0, len(views) - 1, count).astype(int).tolist()
    shown = {}
    for index, (view, files) in enumerate(tqdm(views.items(), desc="predict", disable=None)):
        prediction = trained.predict_some(files, view)
        for name in written:
            prediction.write(output, view, name)
        if index in chosen:
            shown[view] = prediction.thumbnails()
    if shown:
        save_image(output / "sheet.png", contact_sheet(shown))
    return list(views)


def watch_folder(
    checkpoint: Path,
    folder: Path,
    inputs: Mapping[str, Path],
    output: Path,
    which: str | None,
    overrides: Sequence[str],
) -> None:
    """Translate views as their files appear, until Ctrl-C or SIGTERM; write what ``predict_files`` does.

    Args:
        checkpoint: run folder or checkpoint.
        folder: holds a folder of images for each domain, of its name (``watching.watched_folders``).
        inputs: by domain another folder.
        output, which, overrides: as for ``predict_files``.

    Raises:
        UsageError: as ``predict_files``, before any view is translated.
    """
    trained = load(checkpoint, overrides)
    folders = watched_folders(folder, inputs, trained.reader.files(), why_all(trained.recipe.fusion))
    written = _chosen_outputs(trained, folders, which)
    _make_folders(output, written)

    def translate(name: str, files: Mapping[str, Path]) -> None:
        prediction = trained.predict_some(files, name)
        for each in written:
            prediction.write(output, name, each)

    def results(name: str) -> list[Path]:
        return [output / each / f"{name}{trained.target.suffix}" for each in written]

    Watch(folders, results, trained.reader.endings()).run(translate)


def predict_cameras(*_: object) -> None:
    """Refuse cameras.

    Raises:
        UsageError: always.
    """
    raise UsageError("--camera: translation takes images, or folders of them; only segmentation takes video")


def _chosen_outputs(trained: TrainedGenerator, given: Collection[str], which: str | None) -> tuple[str, ...]:
    """The outputs to write, all that there are of the given domains by default; what is absent is noted."""
    absent = [trained.recipe.data.domains[m] for m in trained.reader.absent(given)]
    names = tuple(name for name in output_names(trained.recipe) if name not in absent)
    if which is not None and which not in names:
        raise UsageError(f"--which must be one of {', '.join(names)}, got {which!r}{suggest(which, names)}")
    note_absent(absent, names)
    return names if which is None else (which,)


def _make_folders(output: Path, outputs: Sequence[str]) -> None:
    try:
        for name in outputs:
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot make {output}: {error.strerror}") from None
