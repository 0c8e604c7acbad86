"""What looks for torch's norms by class finds the exchanging ones, and does the right thing or refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion
from torch.optim.swa_utils import AveragedModel, update_bn

from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, make_multimodal
from cen_ext.modules import ExchangeNorm
from tests.helpers import vision
from tests.helpers.same import assert_same

KINDS = [(ExchangeBatchNorm2d, nn.BatchNorm2d), (ExchangeInstanceNorm2d, nn.InstanceNorm2d)]
LAYERS = [layer for layer, _ in KINDS]
TRACKED = [(layer, tracked) for layer in LAYERS for tracked in (False, True)]
M = 3


def network() -> nn.Sequential:
    """Of one modality, in float64."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.ReLU(),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Conv2d(4, 3, 1),
        nn.BatchNorm2d(3),
    ).double()


def parts(rows: int) -> Tensor:
    """Images of each modality ``[M, rows, 2, 4, 3]``."""
    return torch.randn(M, rows, 2, 4, 3, dtype=torch.float64) * 2 + 1


def assert_private_statistics(ours: nn.Module, theirs: list[nn.Module]) -> None:
    """Each modality of ``ours`` has the running statistics of its own network."""
    buffers = dict(ours.named_buffers())
    for m, net in enumerate(theirs):
        for name, value in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                torch.testing.assert_close(buffers[name][m], value)


def test_update_bn_averages_the_batches_statistics():
    net = network()
    ours, theirs = make_multimodal(net, M, threshold=0), [copy.deepcopy(net) for _ in range(M)]
    ours(parts(2).flatten(0, 1))  # to be forgotten
    instance = copy.deepcopy(ours[3].running_mean)
    loader = [parts(2), parts(3)]
    update_bn([x.flatten(0, 1) for x in loader], ours.eval())
    for m, single in enumerate(theirs):
        update_bn([x[m] for x in loader], single)
    assert_private_statistics(ours[:2], [single[:2] for single in theirs])
    assert_private_statistics(ours[4:], [single[4:] for single in theirs])
    assert not torch.equal(ours[3].running_mean, instance)  # as in torch, by its own momentum
    assert (ours[1].momentum, ours[5].num_batches_tracked, ours.training) == (0.3, 2, False)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_averages_the_tables(use_buffers):
    ours = make_multimodal(network(), M, threshold=0.02)
    averaged = AveragedModel(ours, use_buffers=use_buffers)
    states = []
    for _ in range(2):
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
        ours(parts(2).flatten(0, 1))
        averaged.update_parameters(ours)
        states.append(copy.deepcopy(ours[1].state_dict()))
    result = averaged.module[1].state_dict()
    for name in ("weight", "bias", "running_mean"):
        mean = (states[0][name] + states[1][name]) / 2
        averages = use_buffers or name != "running_mean"
        torch.testing.assert_close(result[name], mean if averages else states[1][name])


def test_replace_all_batch_norm_modules_leaves_the_statistics_of_the_batch():
    net = network()
    ours = torch.func.replace_all_batch_norm_modules_(make_multimodal(net, M, threshold=0))
    single = torch.func.replace_all_batch_norm_modules_(net)
    assert {name for name, _ in ours.named_buffers()} == {name for name, _ in single.named_buffers()}
    x = parts(2)
    for training in (True, False):
        y = copy.deepcopy(ours).train(training)(x.flatten(0, 1))
        expected = torch.cat([copy.deepcopy(single).train(training)(part) for part in x])
        torch.testing.assert_close(y, expected)


def test_loops_by_class_freeze_the_statistics():
    ours = make_multimodal(network(), M)
    before = copy.deepcopy(ours.state_dict())
    frozen = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    for module in ours.train().modules():
        if isinstance(module, frozen):
            module.eval()
    ours(parts(2).flatten(0, 1))
    assert_same(ours.state_dict(), before)


def test_torchvision_splits_the_norms_from_the_weight_decay():
    vision.torchvision()
    from torchvision.ops._utils import split_normalization_params

    ours = make_multimodal(network(), M)
    norms, others = split_normalization_params(ours)
    assert list(map(id, norms)) == [id(p) for i in (1, 3, 5) for p in ours[i].parameters()]
    assert list(map(id, others)) == [id(p) for i in (0, 4) for p in ours[i].parameters()]


def to_mkldnn(net: nn.Sequential) -> nn.Module:
    from torch.utils import mkldnn  # warns when imported

    return mkldnn.to_mkldnn(net.float())


REBUILDERS: dict[str, Callable[[nn.Sequential], object]] = {
    "torch's convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm's convert_sync_batchnorm": lambda net: vision.timm().layers.convert_sync_batchnorm(net),
    "timm's convert_splitbn_model": lambda net: vision.timm().layers.convert_splitbn_model(net),
    "timm's freeze": lambda net: vision.timm().utils.freeze(net),
    "fuse_conv_bn_eval": lambda net: fusion.fuse_conv_bn_eval(net[0], net[1]),
    "fuse_linear_bn_eval": lambda net: fusion.fuse_linear_bn_eval(nn.Linear(2, 4).eval(), net[1]),
    "to_mkldnn": to_mkldnn,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("num_modalities", [1, M])
@pytest.mark.parametrize("rebuild", REBUILDERS)
def test_what_would_make_a_norm_of_one_modality_is_refused(rebuild, num_modalities):
    ours = make_multimodal(network(), num_modalities).eval()
    with pytest.raises(TypeError, match=r"cannot turn ExchangeBatchNorm2d.*cen_ext\.synchronize_statistics"):
        REBUILDERS[rebuild](ours)
    assert ours[1].eps == 1e-5  # anyone else may read it


def test_conversion_to_synchronized_norms_leaves_instance_norms_as_they_are():
    ours = nn.Sequential(ExchangeInstanceNorm2d(4, 2))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(ours)[0] is ours[0]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(("layer_class", "torch_class"), KINDS)
def test_tracking_turned_off_at_run_time_leaves_the_running_statistics(layer_class, torch_class, converted):
    single = torch_class(4, affine=True, track_running_stats=True, dtype=torch.float64)
    nn.init.normal_(single.running_mean)
    single.track_running_stats = False
    if converted:
        ours = make_multimodal(single, M, threshold=0)
    else:
        ours = layer_class(4, M, track_running_stats=True, dtype=torch.float64)
        ours.load_state_dict(single.state_dict())
        ours.track_running_stats = False
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(M, 2, 4, 3, 3, dtype=torch.float64) + 1
    for training in (True, False):
        theirs = copy.deepcopy(single).train(training)
        y = ours.train(training)(x.flatten(0, 1))
        torch.testing.assert_close(y, torch.cat([theirs(part) for part in x]))
    # torch's instance norm uses the statistics of x without tracking, too, but then updates its own by them.
    assert_same(ours.state_dict(), before)
    ours.track_running_stats = True
    ours.train()(x.flatten(0, 1))
    assert ours.num_batches_tracked == 1
    expected = 0.9 * before["running_mean"] + 0.1 * x.mean((1, 3, 4))
    torch.testing.assert_close(ours.running_mean, expected)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(("layer_class", "torch_class"), KINDS)
def test_without_affine_it_is_one_torch_layer_a_modality(layer_class, torch_class, tracked):
    options = {"affine": False, "track_running_stats": tracked}
    ours = layer_class(4, M, dtype=torch.float64, **options)
    theirs = [torch_class(4, dtype=torch.float64, **options) for _ in range(M)]
    assert set(ours.state_dict()) == set(theirs[0].state_dict())
    for training in (True, False):
        x = torch.randn(M, 2, 4, 3, 3, dtype=torch.float64) + 1
        expected = torch.cat([layer.train(training)(x[m]) for m, layer in enumerate(theirs)])
        torch.testing.assert_close(ours.train(training)(x.flatten(0, 1)), expected)
    assert_private_statistics(ours, theirs)
    assert ours.half()(x.flatten(0, 1).half()).dtype == torch.float16
    assert not ours.replaced().any()
    assert "affine=False" in repr(ours)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_without_affine_a_mask_exchanges_and_a_threshold_is_refused(layer_class):
    mask = torch.tensor([[True, False, False], [False, False, True]])
    layer = layer_class(3, 2, affine=False, replaced=mask)
    x = torch.randn(4, 3, 5, 5)
    plain = layer_class(3, 2, affine=False)(x).unflatten(0, (2, 2))
    expected = torch.where(mask[:, None, :, None, None], plain.flip(0), plain)
    torch.testing.assert_close(layer(x).unflatten(0, (2, 2)), expected)
    with pytest.raises(ValueError, match=r"threshold=0\.1 compares scales, .* affine=False has none"):
        layer_class(3, 2, affine=False, threshold=0.1)
    later = layer_class(3, 2, affine=False)
    later.threshold = 0.1
    for use in (later.replaced, lambda: later(x)):
        with pytest.raises(ValueError, match=r"threshold=0\.1 compares scales"):
            use()


@pytest.mark.parametrize(("layer_class", "tracked"), TRACKED)
def test_resets_restore_a_new_layers_state(layer_class, tracked):
    layer = layer_class(4, 2, threshold=0.02, track_running_stats=tracked)
    new = copy.deepcopy(layer.state_dict())
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer(torch.randn(4, 4, 3, 3))
    trained = copy.deepcopy(layer.state_dict())
    layer.reset_running_stats()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, (trained if name in ("weight", "bias") else new)[name])
    layer.reset_parameters()
    assert_same(layer.state_dict(), new)


@pytest.mark.parametrize(("layer_class", "tracked"), TRACKED)
def test_layers_pickled_before_they_were_torchs_load(layer_class, tracked):
    layer = layer_class(4, 2, threshold=0.02, track_running_stats=tracked)
    state = layer.__getstate__()
    for name in ("affine", "track_running_stats"):
        del state[name]
    old: ExchangeNorm = layer_class.__new__(layer_class)
    old.__setstate__(state)
    x = torch.randn(4, 4, 3, 3)
    for net in (pickle.loads(pickle.dumps(old)), copy.deepcopy(old)):
        assert (net.affine, net.track_running_stats, repr(net)) == (True, tracked, repr(layer))
        assert torch.equal(net(x), copy.deepcopy(layer)(x))
