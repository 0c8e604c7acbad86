"""torch's checks of modules, on the layers here: nothing fails that passes for torch's own norms.

torch's layer is asked first. What it fails is not asked of ours; so no list of exceptions is kept by hand.
"""

from __future__ import annotations

import pytest

from tests.peers.checks import CHECKS, run
from tests.peers.infos import KINDS, VARIANTS, pairs

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",  # of vmap
    "ignore:input's size at dim=1 does not match num_features",  # torch's instance norm does not refuse it
    "ignore:`torch.jit.script` is deprecated",  # in torch's own tests
)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("torch_class", KINDS)
def test_nothing_fails_that_passes_for_torchs_layer(torch_class, variant, name):
    excused, asked = [], 0
    for theirs, ours in pairs(torch_class, variant):
        try:
            CHECKS[name](theirs)
        except Exception as error:
            excused.append(f"{theirs.description}: {error}")
            continue
        asked += 1
        try:
            CHECKS[name](ours)
        except Exception as error:
            raise AssertionError(f"{name} with the input {ours.description}") from error
    if not asked:
        pytest.skip(f"torch's own layer fails: {excused[0]}")


@pytest.mark.parametrize("torch_class", KINDS)
def test_modes_differ_where_torchs_do(torch_class):
    """torch's test of train_and_eval_differ: whether ``training`` changes what is returned."""
    for theirs, ours in pairs(torch_class, "three"):
        differ = []
        for case in (theirs, ours):
            module = case.make()
            y = [run(module.train(mode), case.input())["y"] for mode in (True, False)]
            differ.append(not y[0].allclose(y[1]))
        assert differ[0] == differ[1], ours.description


def test_every_check_is_asked_of_some_layer():
    """A check that fails torch's layers always would ask nothing."""
    cases = [theirs for kind in KINDS for theirs, _ in pairs(kind, "one")]
    assert {case.module_class for case in cases} == KINDS.keys()
    for name, check in CHECKS.items():
        passed = 0
        for case in cases:
            try:
                check(case)
            except Exception:
                continue
            passed += 1
        assert passed, name
