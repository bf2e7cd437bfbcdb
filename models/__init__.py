"""Architectures, the registry of experiments, and the reading of checkpoints."""

from models import experiments
from models.factory import create_model, load_checkpoint

__all__ = ["create_model", "experiments", "load_checkpoint"]
