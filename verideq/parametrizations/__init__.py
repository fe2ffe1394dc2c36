"""Classes of ``W`` that are well-posed by construction, one a file, on `torch.nn.utils.parametrize`."""

from verideq.parametrizations.base import Contraction, Parametrization, annealed_m, set_m
from verideq.parametrizations.cerdeq import CerDEQ, initialise_extractor
from verideq.parametrizations.feedback import FeedbackGauge, scaled_couplings
from verideq.parametrizations.ibp_mondeq import IBPMonDEQ
from verideq.parametrizations.lben import LBEN
from verideq.parametrizations.mondeq import MonDEQ
from verideq.parametrizations.nemon import NEMON
from verideq.parametrizations.row_gauge import RowGauge
from verideq.parametrizations.spectral_norm import SpectralNorm
from verideq.parametrizations.weight_norm import WeightNorm

__all__ = [
    "LBEN",
    "NEMON",
    "CerDEQ",
    "Contraction",
    "FeedbackGauge",
    "IBPMonDEQ",
    "MonDEQ",
    "Parametrization",
    "RowGauge",
    "SpectralNorm",
    "WeightNorm",
    "annealed_m",
    "initialise_extractor",
    "scaled_couplings",
    "set_m",
]
