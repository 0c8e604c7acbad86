"""The predict command: image files or video in, label maps, colored maps and overlays out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.data.missing import REMEDY
from models.networks.messages import suggest
from models.outputs import ENSEMBLE
from models.segmentation.build import output_names
from models.segmentation.load import TrainedNetwork, load
from models.segmentation.prediction import FOLDERS, OVERLAYS
from models.segmentation.visualize import contact_sheet
from models.sources import (
    Frames,
    check_inputs,
    is_needed,
    is_video,
    match_files,
    match_frames,
    note,
    note_absent,
    why_all,
)
from models.training.errors import UsageError
from models.video import Video, writing_video
from models.visualize import save_image
from models.watching import Watch, watched_folders


def predict_files(
    checkpoint: Path, inputs: Mapping[str, Path], output: Path, which: str | None, overrides: Sequence[str]
) -> list[str]:
    """Label images; write ``labels/``, ``coloured/`` and ``overlays/<name>.png`` for every scene.

    ``sheet.png`` shows the inputs and what every output says, of ``eval.sheet`` scenes spread evenly. Of
    video ``overlays/<name>.mp4`` is written and, with ``eval.frames``, ``<name>_<frame>.png`` as above of
    every frame, counted from 0.

    Args:
        checkpoint: run folder or checkpoint.
        inputs: by modality an image, a pattern of images (``models.patterns``), or a folder of images that
            are matched by their names without suffix;
            scenes may differ in size, the modalities of one as they might in training. Modalities that are
            not given are absent, and so, with ``data.missing=fill``, are those that a folder lacks files of.
            Or a video, of ``rgb`` or ``depth``, and for every other modality a video or a folder of frames in
            order of their names. Depth of 8 bits, as most video is, has a scale of its own,
            ``data.depth_scale=25.5`` where 255 is 10 meters.
        output: folder to write to.
        which: ``ensemble``, the default, or the modality whose branch to take.
        overrides: ``field=value`` assignments, such as another ``data.depth_scale``.

    Returns:
        The names of scenes, or of the video.

    Raises:
        UsageError: a path, modality or output that does not exist; images that do not pair up; a modality
            that is absent where the fusion needs all; videos of different length; a scale that is missing.
        DataError: a broken image or video, or one of a size that it may not have; the message names the file.
    """
    trained = load(checkpoint, overrides)
    paths = check_inputs(inputs, trained.reader.files(), why_all(trained.recipe.fusion))
    which = chosen_output(trained, paths, which)
    if any(map(is_video, paths.values())):
        frames = match_frames(paths)
        depth = frames.get("depth")
        if isinstance(depth, Video):
            check_depth_unit(trained, f"--depth: {depth.path}", depth.bits, overrides)
        make_folders(output)
        return [_predict_video(trained, frames, output, which)]
    scenes = _match_scenes(trained, paths, which)
    make_folders(output)
    _predict_scenes(trained, scenes, output, which)
    return list(scenes)


def watch_folder(
    checkpoint: Path,
    folder: Path,
    inputs: Mapping[str, Path],
    output: Path,
    which: str | None,
    overrides: Sequence[str],
) -> None:
    """Label scenes as their files appear, until Ctrl-C or SIGTERM; write what ``predict_files`` does.

    Args:
        checkpoint: run folder or checkpoint.
        folder: holds a folder of images for each modality, of its name (``watching.watched_folders``).
        inputs: by modality another folder.
        output, which, overrides: as for ``predict_files``.

    Raises:
        UsageError: as ``predict_files``, before any scene is labeled.
    """
    trained = load(checkpoint, overrides)
    folders = watched_folders(folder, inputs, trained.reader.files(), why_all(trained.recipe.fusion))
    which = chosen_output(trained, folders, which)
    make_folders(output)

    def label(name: str, files: Mapping[str, Path]) -> None:
        trained.predict_some(files).write(output, name, which)

    Watch(folders, lambda name: [output / kind / f"{name}.png" for kind in FOLDERS]).run(label)


def chosen_output(trained: TrainedNetwork, given: Collection[str], which: str | None) -> str:
    """The output that is wanted, the ensemble by default; what is absent is noted.

    Args:
        trained: the network.
        given: the kinds of files that there are.
        which: of the command line.

    Raises:
        UsageError: there is no such output of these files.
    """
    which = which or ENSEMBLE
    absent = trained.reader.absent(given)
    present = [m for m in range(len(trained.inputs)) if m not in absent]
    names = output_names(trained.recipe, present if absent else None)
    if which not in names:
        raise UsageError(f"--which must be one of {', '.join(names)}, got {which!r}{suggest(which, names)}")
    note_absent(_names_of(trained, absent), names)
    return which


def check_depth_unit(trained: TrainedNetwork, what: str, bits: int, overrides: Sequence[str]) -> None:
    """Refuse depth from video in unknown units.

    Args:
        trained: the network.
        what: the option and the video, for messages.
        bits: of the video.
        overrides: which may give ``data.depth_scale`` for it.

    Raises:
        UsageError: it has 8 bits without a scale, though the network was trained on meters.
    """
    metric = trained.reader.layout.depth_scale is not None
    scaled = any(assignment.startswith("data.depth_scale=") for assignment in overrides)
    if bits == 8 and metric and not scaled:
        raise UsageError(
            f"{what} has 8 bits, whose unit is not that of training: give data.depth_scale, "
            "units per meter (25.5 where 255 is 10 meters), or a folder of frames stored as in training"
        )


def _match_scenes(
    trained: TrainedNetwork, paths: Mapping[str, Path], which: str
) -> dict[str, dict[str, Path]]:
    """The files of every scene, by ``data.missing`` of those that lack some as well.

    Raises:
        UsageError: as ``match_files``; a scene lacks the modality whose branch is wanted, or its camera's
            file; the fusion needs all modalities; no scene is left.
    """
    missing = trained.recipe.data.missing
    if missing == "refuse":
        return match_files(paths, remedy=REMEDY)
    scenes = match_files(paths, partial=True)
    lacking = {name: [kind for kind in paths if kind not in files] for name, files in scenes.items()}
    lacking = {name: kinds for name, kinds in lacking.items() if kinds}
    if not lacking:
        return scenes
    name, kinds = next(iter(lacking.items()))
    told = f"{len(lacking)} of {len(scenes)} scenes lack files, the first, {name}, one of {', '.join(kinds)}"
    if missing == "skip":
        note(f"{told}: these are left out")
        scenes = {name: files for name, files in scenes.items() if name not in lacking}
        if not scenes:
            raise UsageError(f"{told}: data.missing=skip leaves none")
        return scenes
    if (why := why_all(trained.recipe.fusion)) is not None:
        raise UsageError(f"{told}{why}; data.missing=skip leaves such scenes out")
    for name, files in scenes.items():
        absent = trained.reader.absent(files)
        useless = [kind for kind in paths if kind not in files and is_needed(kind, files)]
        if useless or which in _names_of(trained, absent):
            need = useless[0] if useless else which
            raise UsageError(f"scene {name} has no file of {need}; data.missing=skip leaves such scenes out")
    note(f"{told}: there the outputs are those of the branches that are left")
    return scenes


def _names_of(trained: TrainedNetwork, modalities: Sequence[int]) -> list[str]:
    return [trained.recipe.data.modalities[m] for m in modalities]


def _predict_scenes(
    trained: TrainedNetwork, scenes: Mapping[str, Mapping[str, Path]], output: Path, which: str
) -> None:
    """Write the label maps, colored maps, overlays and the sheet."""
    count = min(trained.recipe.eval.sheet, len(scenes))
    chosen = np.linspace(0, len(scenes) - 1, count).astype(int).tolist()
    shown = {}
    for index, (name, files) in enumerate(tqdm(scenes.items(), desc="predict", disable=None)):
        prediction = trained.predict_some(files)
        prediction.write(output, name, which)
        if index in chosen:
            shown[name] = prediction.thumbnails()
    if shown:
        save_image(output / "sheet.png", contact_sheet(shown, trained.class_names, trained.palette))


def _predict_video(trained: TrainedNetwork, sources: Mapping[str, Frames], output: Path, which: str) -> str:
    """Write the overlays, and the frames if ``eval.frames``; the video's name."""
    video = next(frames for frames in sources.values() if isinstance(frames, Video))
    name = video.path.stem
    frames = tqdm(zip(*sources.values(), strict=True), desc="predict", total=len(video), disable=None)
    with writing_video(output / OVERLAYS / f"{name}.mp4", video.fps) as write:
        for index, files in enumerate(frames):
            prediction = trained.predict_some(dict(zip(sources, files, strict=True)))
            write(prediction.overlay(which))
            if trained.recipe.eval.frames:
                prediction.write(output, f"{name}_{index:06d}", which)
    return name


def make_folders(output: Path) -> None:
    """Make the output's folders.

    Raises:
        UsageError: they cannot be made.
    """
    try:
        for folder in FOLDERS:
            (output / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot make {output}: {error.strerror}") from None
