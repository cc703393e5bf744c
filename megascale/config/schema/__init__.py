"""The config: eight frozen sections of plain data, checked key by key.

Which keys can be combined is decided in `support.py`. Nothing in this package imports torch, so that launchers, planners and
`--dry-run` on a login node start at once.
"""

from megascale.config.schema.averages import Ema
from megascale.config.schema.config import Config, GrowAt, PhaseAt, Run
from megascale.config.schema.evaluate import EvaluateAt
from megascale.config.schema.kinds import Kind, MoeOfKind
from megascale.config.schema.model import AHEAD_NORMS, BLOCK_NORMS, OUTER_NORMS, Model
from megascale.config.schema.model_parts import Delta, InitBase, Latent, Matformer, Moe, Moeut, RopeScaling, Spacetime, Tokenformer
from megascale.config.schema.parallel import Parallel
from megascale.config.schema.section import Section
from megascale.config.schema.train import (
    Checkpoint,
    Data,
    DataSource,
    Group,
    Multiplier,
    Muon,
    Optim,
    Precision,
    Train,
    Transfer,
    any_layer,
)

__all__ = [
    "AHEAD_NORMS",
    "BLOCK_NORMS",
    "OUTER_NORMS",
    "Checkpoint",
    "Config",
    "Data",
    "DataSource",
    "Delta",
    "Ema",
    "EvaluateAt",
    "Group",
    "GrowAt",
    "InitBase",
    "Kind",
    "Latent",
    "Matformer",
    "Model",
    "Moe",
    "MoeOfKind",
    "Moeut",
    "Multiplier",
    "Muon",
    "Optim",
    "Parallel",
    "PhaseAt",
    "Precision",
    "RopeScaling",
    "Run",
    "Section",
    "Spacetime",
    "Tokenformer",
    "Train",
    "Transfer",
    "any_layer",
]
