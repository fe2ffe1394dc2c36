"""A model as a small graph of supported operations, and its file."""

from verideq.graph.file import load_model, model_bytes, model_hash, refuse_pickle, save_model
from verideq.graph.graph import INPUT, Graph, Node
from verideq.graph.operations import OPERATIONS, Add, Embed, Normalize, Operation, evaluating
from verideq.graph.trace import trace, unsupported

__all__ = [
    "INPUT",
    "OPERATIONS",
    "Add",
    "Embed",
    "Graph",
    "Node",
    "Normalize",
    "Operation",
    "evaluating",
    "load_model",
    "model_bytes",
    "model_hash",
    "refuse_pickle",
    "save_model",
    "trace",
    "unsupported",
]
