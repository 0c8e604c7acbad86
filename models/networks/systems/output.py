"""The output of a translation network: every branch's image and their ensemble."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class TranslationOutput(NamedTuple):
    """Images of the M branches and of their ensemble, values in [-1, 1].

    Attributes:
        branches: ``[M, N, C, H, W]`` every modality's translation.
        ensemble: ``[N, C, H, W]`` their sum weighted by ``alpha``. The branches are detached in it: its loss
            trains alpha alone (Wang et al. 2020, Eq. 4).
        alpha: ``[M]`` the weights, positive and of sum 1.
    """

    branches: Tensor
    ensemble: Tensor
    alpha: Tensor


# Saved programs (``torch.export.save``, AOTInductor's packages) name the class of what they return.
pytree._register_namedtuple(TranslationOutput, serialized_type_name="models.TranslationOutput")
