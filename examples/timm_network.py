"""Any timm network made multimodal: ``python examples/timm_network.py [NAME [STEPS]]``.

Classifies crops of RGB and depth, made here: a bar that lies or stands, in warm or in cold light. Depth shows
the bar alone and RGB the light alone, so that neither can tell more than half of the four classes. NAME, by
default timm's smallest residual network, is trained twice, with random weights: without exchange no branch
gets beyond 50 %; with it both do, given enough STEPS (80; larger networks may need more). Then come its
layers, and how many channels each modality takes from the other one. ``pip install timm`` brings networks.
"""

from __future__ import annotations

import sys

import timm
import torch
from torch import Tensor, nn

import cen_ext

MODALITIES = ("rgb", "depth")
CLASSES, SIDE = 4, 32


def crops(count: int, generator: torch.Generator, size: int = SIDE) -> tuple[Tensor, Tensor]:
    """Stacked crops ``[2*count, 3, size, size]`` of RGB, then depth; and their classes ``[count]``."""
    target = torch.randint(CLASSES, (count,), generator=generator)
    stands, warm = target // 2 == 1, target % 2 == 1
    rgb = torch.randn(count, 3, size, size, generator=generator)
    rgb[:, 0] += warm[:, None, None].float()
    depth = 0.3 * torch.randn(count, 1, size, size, generator=generator)
    starts = torch.randint(size // 8, size * 5 // 8, (count,), generator=generator).tolist()
    for image, start, upright in zip(depth, starts, stands.tolist(), strict=True):
        bar = slice(start, start + size // 4)
        image[(0, slice(None), bar) if upright else (0, bar)] += 2
    # Modalities of different channel counts get the same one: a single channel is repeated.
    return cen_ext.stack_modalities([rgb, depth.expand(-1, 3, -1, -1)]), target


def multimodal(name: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A timm network with shared weights and private norms, and its layers that exchange channels."""
    single = timm.create_model(name, num_classes=CLASSES, pretrained=False)
    example = torch.randn(
        2, 3, SIDE, SIDE
    )  # it is run on this, to see that nothing in it mixes the modalities
    net = cen_ext.make_multimodal(single, len(MODALITIES), threshold=0.02, example=example)
    layers = cen_ext.exchanging_layers(net)
    # Random weights have scales of 1 or 0, which a short training moves across no threshold. Pretrained ones
    # stay as they are, with a threshold to suit them: "0.05*median".
    for layer in layers.values():
        nn.init.constant_(layer.weight, 0.05)
    return net, layers


def logits_of(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By branch its logits ``[N, 4]``, and the mean of both, through which no gradient goes."""
    branches = cen_ext.unstack_modalities(net(x), len(MODALITIES))
    both = torch.stack(branches).detach().log_softmax(-1).mean(0)
    return dict(zip(MODALITIES, branches, strict=True)) | {"both": both}


def train(net: nn.Module, steps: int, penalty: float = 1e-4) -> None:
    """Train every branch to know the class, and drive scales that are of no use below the threshold."""
    optimizer = torch.optim.AdamW(net.train().parameters(), 2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, target = crops(32, generator)
        logits = logits_of(net, x)
        loss = sum(nn.functional.cross_entropy(logits[name], target) for name in MODALITIES)
        optimizer.zero_grad()
        (loss + penalty * cen_ext.sparsity_penalty(net)).backward()
        optimizer.step()


@torch.no_grad()
def accuracies(net: nn.Module) -> dict[str, float]:
    """The shares of 256 new crops that each branch and both together classify correctly."""
    x, target = crops(256, torch.Generator().manual_seed(2))
    logits = logits_of(net.eval(), x)
    return {name: (y.argmax(1) == target).float().mean().item() for name, y in logits.items()}


def main(name: str = "test_resnet", steps: int = 80) -> None:
    """Train without exchange and with it, and print what the branches know and what they exchange."""
    for how, threshold in (("no exchange", 0.0), ("exchange", 0.02)):
        torch.manual_seed(0)
        net, layers = multimodal(name)
        for layer in layers.values():
            layer.threshold = threshold
        train(net, steps)
        print(f"{how:12}", *(f"{which} {100 * share:5.1f} %" for which, share in accuracies(net).items()))
    print("channels that rgb and depth take from each other, and how many each may, half of all")
    for name, layer in layers.items():
        replaced = layer.replaced()
        print(f"  {name:32}", *map("{:5}".format, replaced.sum(1).tolist()), "of", replaced.shape[1] // 2)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
