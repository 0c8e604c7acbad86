"""A step of adversarial training: each network with its loss as one module, and the two networks' updates.

The released code runs the generator twice per step, once for each optimizer. Here the discriminator learns
from the detached images of the same pass whose gradients the generator needs afterwards, as in pix2pix; with
``optim.passes=2`` there are two passes, which differ in what dropout draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.networks.branches import of_all, running_with
from models.networks.fusion import FusionStage
from models.networks.systems.output import TranslationOutput
from models.networks.systems.patchgan import PatchGAN, discriminate
from models.networks.systems.unet import UNet
from models.training import distributed, graphs
from models.training.absence import check_changing, dropped_modality
from models.training.ema import Ema
from models.training.optimization import Optimization, fused, steps_in_backward
from models.training.precision import at_least_float32, autocast, loss_scaler
from models.training.schedules import check_schedule
from models.translation.holes import filled, measured
from models.translation.losses import discriminator_loss, generator_loss
from models.translation.settings import TranslationRecipe, TranslationStage


class Generated(NamedTuple):
    """A ``TranslationOutput``, and what the pass adds to the loss.

    Attributes:
        branches, ensemble, alpha: as there.
        fusion: 0-d, the fusion's own loss with its weight; 0 where it has none.
    """

    branches: Tensor
    ensemble: Tensor
    alpha: Tensor
    fusion: Tensor


class GeneratorForward(nn.Module):
    """The generator's pass: images ``[M*N, C, H, W]`` to what is ``Generated``, in float32.

    Args:
        generator: runs in the precision of ``run.precision``.
        recipe: the settings.
        device: the network's.
    """

    def __init__(self, generator: UNet, recipe: TranslationRecipe, device: torch.device) -> None:
        super().__init__()
        self.generator = generator
        self.precision = recipe.run.precision
        self.device = device

    def forward(self, images: Tensor) -> Generated:
        with autocast(self.precision, self.device):
            output: TranslationOutput = self.generator(images)
        fusion = self.generator.fusion.loss(self.generator)
        own = output.alpha.new_zeros(()) if fusion is None else fusion
        return at_least_float32(Generated(*output, own))


class DiscriminatorObjective(nn.Module):
    """The discriminator's loss on real and on generated images.

    Args:
        discriminator: runs in the precision of ``run.precision``; the loss is float32.
        recipe, device: as in ``GeneratorForward``.
        hole: the value of the target's pixels that do not count, as in ``holes``.
    """

    def __init__(
        self,
        discriminator: PatchGAN,
        recipe: TranslationRecipe,
        device: torch.device,
        hole: float | None = None,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.recipe = recipe
        self.device = device
        self.hole = hole

    def forward(self, images: Tensor, target: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """Compute the ``discriminator_loss``.

        Args:
            images, target: ``[M*N, C, H, W]`` and ``[N, C', H, W]``.
            branches: ``[M, N, C', H, W]`` the generator's, detached.
        """
        branches = filled(branches, target, self.hole)
        with autocast(self.recipe.run.precision, self.device):
            real, fake = discriminate(self.discriminator, images, target, branches)
        return discriminator_loss(real, fake, adversarial=self.recipe.loss.gan)


class GeneratorObjective(nn.Module):
    """The generator's loss on what it made; the discriminator scores it, and should be ``frozen`` meanwhile.

    Args:
        generator: whose scales are penalized; it does not run here.
        discriminator, recipe, device, hole: as in ``DiscriminatorObjective``.
    """

    def __init__(
        self,
        generator: UNet,
        discriminator: PatchGAN,
        recipe: TranslationRecipe,
        device: torch.device,
        hole: float | None = None,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.recipe = recipe
        self.device = device
        self.hole = hole

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        branches: Tensor,
        ensemble: Tensor,
        alpha: Tensor,
        fusion: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute the ``generator_loss``; ``GeneratorForward`` returns the last four arguments."""
        settings = self.recipe.loss
        branches, ensemble = (filled(each, target, self.hole) for each in (branches, ensemble))
        with autocast(self.recipe.run.precision, self.device):
            (logits,) = discriminate(self.discriminator, images, branches)
        return generator_loss(
            TranslationOutput(branches, ensemble, alpha),
            logits,
            target,
            self.generator.fusion.penalty_on_scales(self.generator),
            fusion,
            None if self.hole is None else measured(target, self.hole).float().mean(),
            l1=settings.l1,
            sparsity=settings.sparsity,
            per_output=settings.per_output,
            adversarial=settings.gan,
        )


class GANTrainer:
    """Generator and discriminator in training; ``start_stage``, then a ``step`` a batch.

    Args:
        generator, discriminator: on the device of ``device``.
        recipe: the settings.
        device: the networks'.
        hole: the value of the target's pixels that do not count, as in ``holes``; None: all do.

    Attributes:
        ema: the generator's average, or None.

    Raises:
        UsageError: ``run.compile``, ``run.cuda_graphs`` or ``data.drop_modality`` cannot work here.
    """

    def __init__(
        self,
        generator: UNet,
        discriminator: PatchGAN,
        recipe: TranslationRecipe,
        device: torch.device,
        hole: float | None = None,
    ) -> None:
        graphs.check(recipe.run, device)
        check_schedule(recipe.optim)
        if recipe.data.drop_modality > 0:
            check_changing(recipe, recipe.run, "data.drop_modality")
        self.in_backward = steps_in_backward(recipe.optim, recipe.run, device)
        self.generator, self.discriminator = generator, discriminator
        self.recipe, self.device = recipe, device
        chosen = recipe.run.channels_last
        # On a CPU a U-Net-256's step takes 0.87 of the time if contiguous: oneDNN's transposed convolutions.
        channels_last = device.type != "cpu" if chosen is None else chosen
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        for net in (generator, discriminator):
            net.train().to(memory_format=self.layout)  # type: ignore[call-overload]  # torch's own types leave it out
        self.ema = None if recipe.optim.ema is None else Ema(generator, recipe.optim.ema)

        def prepared(module: nn.Module) -> nn.Module:
            return graphs.compiled(module, recipe.run)

        self.generate = distributed.parallel(prepared(GeneratorForward(generator, recipe, device)), device)
        self.discriminator_objective = distributed.parallel(
            prepared(DiscriminatorObjective(discriminator, recipe, device, hole)), device
        )
        # The processes' gradients meet in ``generate``, through which all but the penalty's flow: that is
        # the same in all of them.
        objective = GeneratorObjective(generator, discriminator, recipe, device, hole)
        self.generator_objective = prepared(objective)
        self.has_stages = any(isinstance(module, FusionStage) for module in generator.modules())
        self.optimizations: dict[str, Optimization] = {}
        self.kept: tuple[Tensor, ...] = ()  # between a step's two parts: images, target, generated

    def start_stage(self, stage: TranslationStage, begin: int, steps: int) -> None:
        """Make the fresh optimizers of a stage of so many steps, whose first is ``begin``."""
        groups = parameter_groups(self.generator, self.discriminator, stage)
        precision = self.recipe.run.precision
        nets = {"generator": self.generator, "discriminator": self.discriminator}
        averages = {} if self.ema is None else {"generator": (self.ema, self.generator)}
        self.optimizations = {
            name: Optimization(
                torch.optim.Adam(own, betas=self.recipe.optim.betas, fused=fused(nets[name], precision)),
                self.recipe.optim,
                begin,
                steps,
                loss_scaler(self.recipe.run.precision, self.device),
                averages.get(name),
                self.in_backward,
            )
            for name, own in groups.items()
        }
        first: graphs.Recordable = self._discriminator_gradients
        second: graphs.Recordable = self._generator_gradients
        if self.recipe.run.cuda_graphs:
            # Recorded graphs belong to the last stage's loss scales.
            both = nn.ModuleList([self.generator, self.discriminator])
            recorded = graphs.GraphedStep(first, both, second)
            first, second = recorded, recorded.finish
        self.parts = first, second

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """The generator's loss on a batch, 0-d and differentiable, with the discriminator as it is.

        Args:
            images, target: as of ``step``.
        """
        images, target = (x.contiguous(memory_format=self.layout) for x in (images, target))
        with frozen(self.discriminator):
            total: Tensor = self.generator_objective(images, target, *self.generate(images))[0]
        return total

    def step(self, images: Tensor, target: Tensor, step: int) -> dict[str, Tensor]:
        """Train both networks on a batch, in the run's step counted from 0; nothing waits for the device.

        Args:
            images, target: ``[M*N, C, H, W]`` and ``[N, C', H, W]`` in [-1, 1].
            step: for the schedule and the average.

        Returns:
            Detached: ``loss`` and ``discriminator``, 0-d totals; ``penalty``, 0-d, the part of ``loss`` that
            the scales make; ``fusion``, likewise, where one acts after levels; ``adversarial``, ``real`` and
            ``fake``, ``[M]``; ``l1``, ``[M+1]``; 0 for a domain that ``data.drop_modality`` left out.
        """
        discriminator_gradients, generator_gradients = self.parts
        present = self._present(step)
        if present is not None:
            domains = images.split(len(target))
            images = torch.cat([domains[m] for m in present])
        images, target = (x.contiguous(memory_format=self.layout) for x in (images, target))
        for optimization in self.optimizations.values():
            optimization.start(step)
        with running_with(self.generator, present):
            loss, real, fake = discriminator_gradients(images, target)
            self.optimizations["discriminator"].step()
            total, adversarial, l1, penalty, fusion = generator_gradients()
        # Instance norms need no other process in the pass; their running statistics are to be the whole
        # batch's, before the average follows them.
        distributed.average_buffers(self.generator, self.discriminator)
        self.optimizations["generator"].step()
        totals = {"loss": total, "penalty": penalty, "discriminator": loss}
        if self.has_stages:
            totals["fusion"] = fusion
        branches = {"adversarial": adversarial, "l1": l1, "real": real, "fake": fake}
        count = self.generator.num_modalities
        return {**totals, **{name: of_all(each, present, count) for name, each in branches.items()}}

    def _present(self, step: int) -> tuple[int, ...] | None:
        """The domains that ``data.drop_modality`` leaves of a step; None: all."""
        count = self.generator.num_modalities
        dropped = dropped_modality(self.recipe.data.drop_modality, count, self.recipe.run.seed, step)
        return tuple(m for m in range(count) if m not in dropped) if dropped else None

    def _discriminator_gradients(self, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Generate, and set the discriminator's gradients; the generator's own are still to come."""
        with torch.set_grad_enabled(self.recipe.optim.passes == 1):
            output = self.generate(images)
        self.kept = (images, target, *output)
        return self.optimizations["discriminator"].gradients(
            self.discriminator_objective, [(images, target, output.branches.detach())]
        )

    def _generator_gradients(self) -> tuple[Tensor, ...]:
        """Set the generator's gradients, with the logits of the discriminator as it is now."""
        images, target, *output = self.kept
        if self.recipe.optim.passes > 1:
            output = self.generate(images)
        with frozen(self.discriminator):
            losses = self.optimizations["generator"].gradients(
                self.generator_objective, [(images, target, *output)]
            )
        self.kept = ()
        return losses

    def learning_rates(self) -> dict[str, float]:
        """The rates of the last step: ``generator``, ``ensemble`` and ``discriminator``."""
        rates = (each.learning_rates() for each in self.optimizations.values())
        return {name: rate for each in rates for name, rate in each.items()}

    def networks(self) -> dict[str, Any]:
        """The state of ``net``, ``discriminator`` and, where there is an average, ``ema``."""
        state: dict[str, Any] = {
            "net": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.net.state_dict()
        return state

    def state_dict(self) -> dict[str, Any]:
        """The networks and, in a stage, ``optimisations``."""
        return self.networks() | {  # the old spelling, so that runs of every version resume
            "optimisations": {name: each.state_dict() for name, each in self.optimizations.items()}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``; the stage has been started."""
        self.generator.load_state_dict(state["net"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.ema is not None:
            self.ema.net.load_state_dict(state["ema"])
        for name, each in self.optimizations.items():
            each.load_state_dict(state["optimisations"][name])


def parameter_groups(
    generator: UNet, discriminator: PatchGAN, stage: TranslationStage
) -> dict[str, list[dict[str, Any]]]:
    """Parameter groups of each network's optimizer, with their learning rates."""
    rest = [parameter for name, parameter in generator.named_parameters() if name != "alpha"]
    ensemble_lr = stage.generator_lr if stage.ensemble_lr is None else stage.ensemble_lr
    parameters = list(discriminator.parameters())
    return {
        "generator": [
            {"name": "generator", "params": rest, "lr": stage.generator_lr},
            {"name": "ensemble", "params": [generator.alpha], "lr": ensemble_lr},
        ],
        "discriminator": [{"name": "discriminator", "params": parameters, "lr": stage.discriminator_lr}],
    }


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Compute no gradients of the network's parameters in this context; those it has stay."""
    net.requires_grad_(False)
    try:
        yield
    finally:
        net.requires_grad_(True)
