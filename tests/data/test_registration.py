"""Depth that another camera measured, against rays that meet planes and boxes in float64."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.data.geometry import Camera, surface_normals
from models.data.images import read_depth
from models.data.layouts import KINECT
from models.data.registration import is_rigid, register
from tests.helpers.planes import (
    CAMERA,
    COLOR,
    FLOOR,
    FRONT,
    LARGE,
    NOWHERE,
    RIG,
    SIDE,
    SIZE,
    SLANTED,
    WALL,
    Rectangle,
    inverse_of,
    measured,
    pose_of,
    rays_of,
    seen,
)


@pytest.mark.parametrize("plane", [WALL, FLOOR, SLANTED], ids=["wall", "floor", "slanted"])
@pytest.mark.parametrize("size", [LARGE, SIZE, (24, 32)], ids=["up", "same", "down"])
@pytest.mark.parametrize("pose", [NOWHERE, RIG, pose_of((0.1, 0.2, -0.3), (-0.2, 0.1, -0.1))])
def test_planes_stay_planes_at_any_resolution(plane: Rectangle, size: tuple[int, int], pose: tuple) -> None:
    reference = COLOR._replace(size=LARGE[::-1]).scaled(*size)._replace(size=None)
    found = register(measured([plane]), CAMERA, pose, reference, size).depth
    expected = seen([plane], reference, size, pose)[0]
    near = expected < 3.6  # farther floors change by a tenth from row to row, as steps do
    known = found > 0
    np.testing.assert_allclose(found[known & near], expected[known & near], rtol=2e-5)
    # Every pixel whose point lies well inside the depth camera's view has a value.
    origin, turn = inverse_of(pose)
    with np.errstate(invalid="ignore"):
        points = origin + expected[..., None] * (rays_of(reference, size) @ turn.T)
        x = points[..., 0] / points[..., 2] * CAMERA.fx + CAMERA.cx
        y = points[..., 1] / points[..., 2] * CAMERA.fy + CAMERA.cy
        inside = (x > 0.5) & (x < SIZE[1] - 1.5) & (y > 0.5) & (y < SIZE[0] - 1.5) & (points[..., 2] > 0)
    inside &= near
    assert inside.mean() > 0.1
    assert known[inside].all()


@pytest.mark.parametrize("size", [LARGE, (96, 128), SIZE])
def test_no_value_is_of_two_surfaces(size: tuple[int, int]) -> None:
    """A box before a wall, from the side: each value is the depth of the box's front or of the wall."""
    reference = COLOR._replace(size=LARGE[::-1]).scaled(*size)._replace(size=None)
    scene = [FRONT, WALL]
    found = register(measured(scene), CAMERA, RIG, reference, size).depth
    pixel = 1.4 / CAMERA.fx  # meters: a pixel of depth is box or wall as a whole
    expected = seen(scene, reference, size, RIG, margin=2 * pixel)
    known = found > 0
    off = np.abs(found / expected - 1).min(axis=0)
    assert off[known].max() < 2e-5
    # What both cameras see is right: within the box's outline, but for the pixels of its rim, the box.
    within = np.isfinite(seen([FRONT], reference, size, RIG, margin=-pixel)[0])
    assert within.sum() > 0.04 * within.size
    np.testing.assert_allclose(found[within], expected[0][within], rtol=2e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_the_nearest_of_several_points_is_seen(order: int) -> None:
    """In the other view a board stands before wall that the depth camera sees past it, in any order."""
    board = Rectangle((0.1, -9, 1.0), (9, 0, 0), (0, 18, 0))
    depth = measured([board, WALL])[::order, ::order]
    camera = CAMERA._replace(cy=SIZE[0] - 1 - CAMERA.cy, cx=SIZE[1] - 1 - CAMERA.cx) if order < 0 else CAMERA
    pose = pose_of((0, 0, 0), (order * -0.3, 0, 0))  # the color camera is 30 cm to the board's side
    of_board, of_wall, of_both = (
        register(np.where(chosen, depth, np.float32(0)), camera, pose, COLOR, LARGE).depth
        for chosen in (depth < 2, depth > 2, depth > 0)
    )
    meet = (of_board > 0) & (of_wall > 0)
    assert meet.sum() > 1000
    np.testing.assert_allclose(of_both[meet], 1.0, rtol=1e-5)
    np.testing.assert_allclose(of_wall[meet], 3.0, rtol=1e-5)
    alone = (of_wall > 0) & (of_board == 0)
    assert alone.sum() > 1000
    np.testing.assert_allclose(of_both[alone], 3.0, rtol=1e-5)


def test_edges_of_a_box_are_right_to_a_pixel() -> None:
    """Its side, two pixels of depth wide, is as steep as a step: right to half of one, all else exact."""
    found = register(measured([FRONT, SIDE, WALL]), CAMERA, RIG, COLOR, LARGE).depth
    # Along the side a pixel of depth is more than 0.2 m long.
    expected = np.concatenate(
        [
            seen(those, COLOR, LARGE, RIG, margin)
            for those, margin in (([FRONT], 0.06), ([WALL], 0), ([SIDE], 0.3))
        ]
    )
    off = np.abs(found / expected - 1).min(axis=0)[found > 0]
    assert (off < 2e-5).mean() > 0.98
    assert off.max() < 0.12


def test_what_only_the_other_camera_sees_is_missing() -> None:
    """Beside a box the wall that was hidden from the depth camera stays without a value."""
    pose = pose_of((0, 0, 0), (-0.4, 0, 0))
    found = register(measured([FRONT, WALL]), CAMERA, pose, COLOR, LARGE).depth
    # Points of the wall that the depth camera's rays reach only through the box, two pixels in from its rim.
    origin, _ = inverse_of(pose)
    wall = seen([WALL], COLOR, LARGE, pose)[0]
    points = origin + wall[..., None] * rays_of(COLOR, LARGE)
    hidden = np.isfinite(FRONT.meet(np.zeros(3), points / points[..., 2:], margin=-2 * 1.4 / CAMERA.fx))
    hidden &= np.isinf(seen([FRONT], COLOR, LARGE, pose, margin=2 * 1.4 / CAMERA.fx)[0])
    assert hidden.sum() > 100
    assert (found[hidden] == 0).all()


@given(seed=st.integers(0, 10**6), missing=st.floats(0, 0.9))
@settings(max_examples=30, deadline=None)
def test_a_pose_of_nothing_returns_the_same_depth(seed: int, missing: float) -> None:
    """Whatever it is, noise included; what is missing is, and no other pixel."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.3, 8, (17, 23)).astype(np.float32)
    depth[rng.random(depth.shape) < missing] = 0
    camera = Camera(20.0, 21.0, 11.3, 7.9)
    found = register(depth, camera, NOWHERE, camera, depth.shape)
    np.testing.assert_allclose(found.depth, depth, rtol=2e-6)
    np.testing.assert_array_equal(
        found.source, np.where(depth > 0, np.arange(depth.size).reshape(depth.shape), -1)
    )


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_a_camera_of_more_pixels_in_the_same_place(factor: int) -> None:
    """Each pixel becomes a block of pixels, of values on its own surface; a hole a block without."""
    depth = measured([FRONT, WALL])
    depth[20:22, 30] = 0
    size = (SIZE[0] * factor, SIZE[1] * factor)
    reference = CAMERA._replace(size=SIZE[::-1]).scaled(*size)
    found = register(depth, CAMERA, NOWHERE, reference, size)
    blocks = np.kron(np.arange(depth.size).reshape(SIZE), np.ones((factor, factor), int))
    blocks[np.kron(depth, np.ones((factor, factor))) == 0] = -1
    np.testing.assert_array_equal(found.source, blocks)
    np.testing.assert_allclose(found.depth, np.kron(depth, np.ones((factor, factor))), rtol=1e-5)


def test_noise_leaves_no_gaps_within_a_surface() -> None:
    rng = np.random.default_rng(0)
    depth = (measured([SLANTED]) * rng.normal(1, 0.003, SIZE)).astype(np.float32)
    found = register(depth, CAMERA, RIG, COLOR, LARGE).depth
    rows, columns = np.nonzero(found)
    inside = found[rows.min() + 6 : rows.max() - 6, columns.min() + 6 : columns.max() - 6]
    assert (inside == 0).mean() < 1e-3


def test_normals_of_registered_planes_are_the_planes() -> None:
    found = register(measured([SLANTED]), CAMERA, RIG, COLOR, LARGE).depth
    normals = surface_normals(found, COLOR)
    turn = np.array(RIG).reshape(3, 4)[:, :3]
    expected = np.cross(SLANTED.down, SLANTED.right)
    expected = turn @ (expected / np.linalg.norm(expected))
    known = normals.any(axis=-1)
    assert known.mean() > 0.5
    angles = np.degrees(np.arccos((normals[known] @ (expected * -np.sign(expected[2]))).clip(-1, 1)))
    assert angles.max() < 0.1


def test_real_depth_survives_the_way_there_and_back(shared: Path) -> None:
    """NYUDv2's of 640x480 into the view of 1920x1440 and back: all but what hides behind edges."""
    path = shared / "data" / "nyudv2_sample"
    if not path.is_dir():
        pytest.skip("needs the real images nyudv2_sample beside the checkout")
    depth = read_depth(sorted((path / "depth").iterdir())[0], 5000.0)[:, :, 0]
    camera = KINECT._replace(size=None)
    color = KINECT.scaled(1440, 1920)._replace(size=None)
    pose = pose_of((0.01, -0.02, 0.005), (0.025, -0.01, 0.003))
    back = np.linalg.inv(np.vstack([np.array(pose).reshape(3, 4), (0, 0, 0, 1)]))[:3]
    there = register(depth, camera, pose, color, (1440, 1920)).depth
    found = register(there, color, tuple(back.ravel()), camera, depth.shape).depth
    both = (found > 0) & (depth > 0)
    assert both.sum() > 0.95 * (depth > 0).sum()
    off = np.abs(found[both] / depth[both] - 1)
    assert (off < 1e-3).mean() > 0.99
    assert np.median(off) < 1e-6


def test_other_images_of_the_sensor_are_carried_with_the_depth() -> None:
    depth = measured([FRONT, WALL])
    found = register(depth, CAMERA, RIG, COLOR, LARGE)
    image = np.random.default_rng(0).normal(size=(*SIZE, 2)).astype(np.float32)
    carried = found.carried(image)
    assert carried.shape == (*LARGE, 2)
    assert (carried[found.depth == 0] == 0).all()
    box = depth < 2  # of the image as of the depth: no pixel of the wall's is on the box
    is_box = found.carried(box[:, :, None].astype(np.float32))[:, :, 0]
    np.testing.assert_array_equal(is_box[found.depth > 0] > 0, found.depth[found.depth > 0] < 2)
    values = set(map(tuple, image.reshape(-1, 2)))
    assert set(map(tuple, carried[found.depth > 0])) <= values


def test_what_is_behind_the_camera_or_beside_its_image_is_left_out() -> None:
    depth = measured([WALL])
    for pose in (
        pose_of((0, np.pi, 0), (0, 0, 0)),
        pose_of((0, 0, 0), (0, 0, -4)),
        pose_of((0, 0, 0), (90, 0, 0)),
    ):
        found = register(depth, CAMERA, pose, COLOR, LARGE)
        assert not found.depth.any()
        assert (found.source == -1).all()
    assert not register(np.zeros(SIZE, np.float32), CAMERA, RIG, COLOR, LARGE).depth.any()


def test_depth_in_a_wrong_unit_takes_no_more_memory_or_time() -> None:
    """Millimeters read as kilometers: every point lies at the camera, where a footprint covers it all."""
    depth = np.random.default_rng(0).uniform(0, 0.001, SIZE).astype(np.float32)
    start = time.thread_time()
    register(depth, CAMERA, pose_of((0, 0, 0), (0, 0, 1e-6)), COLOR, LARGE)
    assert time.thread_time() - start < 1


def test_rotations() -> None:
    assert is_rigid(NOWHERE)
    assert is_rigid(RIG)
    assert is_rigid([round(value, 4) for value in RIG])
    for row in range(3):
        mirrored = np.array(RIG).reshape(3, 4)
        mirrored[row] *= -1
        assert not is_rigid(mirrored.ravel())
    assert not is_rigid(1.01 * np.array(RIG))
    assert not is_rigid((*RIG[:1], RIG[1] + 0.01, *RIG[2:]))
    assert not is_rigid([0.0] * 12)
