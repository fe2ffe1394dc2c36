"""Classes of ``W`` that are well-posed by construction, one a file, on `torch.nn.utils.parametrize`."""

from verideq.parametrizations.base import Parametrization
from verideq.parametrizations.ibp_mondeq import IBPMonDEQ

__all__ = ["IBPMonDEQ", "Parametrization"]
