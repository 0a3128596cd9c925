"""The ``heads`` section of an experiment: value head and candidate head on frozen states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

CENSORED = ("leave_out", "bound", "impute")
SAVE_DTYPES = ("float32", "bfloat16")
HEADS = ("candidate", "value")
"""In the order of their training."""


@dataclass(frozen=True)
class HeadsSettings:
    """Heads on frozen states. ``work`` keeps states and checkpoints (reused), ``out`` is the head folder to write.

    ``layers``: decoder layers read beside the final state; ``state_share``: share of a completion's states after the
    prompt boundary that are kept; ``num_bins``, ``max_length``: bins of remaining lengths;
    ``dropout``: share of the input features set to 0 in training; ``censored``: what completions cut by the token
    limit do in the value head's loss, see `head_losses.value_loss`; ``start``: a head folder of the same form whose
    weights the training starts from, fresh ones when it is empty; ``train``: which of the two are trained, the other
    one stays that of ``start``; ``save_dtype``: of the weights on disk (the figures are those of the head as saved);
    ``training``: transformers.TrainingArguments by their own names, over
    `head_trainer.DEFAULTS`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    work: str
    out: str
    layers: tuple[int, ...] = ()
    rank: int = 256
    epochs: int = 8
    state_share: float = 0.1
    num_bins: int = 32
    max_length: int = 1024
    dropout: float = 0.1
    censored: str = "leave_out"
    start: str = ""
    train: tuple[str, ...] = HEADS
    save_dtype: str = "float32"
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("rank", 1), ("num_bins", 2), ("max_length", self.num_bins)):
            if getattr(self, name) < least:
                raise ValueError(f"heads.{name}: must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.state_share <= 1:
            raise ValueError(f"heads.state_share: must be greater than 0 and at most 1, got {self.state_share}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"heads.dropout: must be at least 0 and less than 1, got {self.dropout}")
        if self.censored not in CENSORED:
            raise ValueError(f"heads.censored: must be one of {', '.join(CENSORED)}, got {self.censored!r}")
        if self.save_dtype not in SAVE_DTYPES:
            raise ValueError(f"heads.save_dtype: must be one of {', '.join(SAVE_DTYPES)}, got {self.save_dtype!r}")
        if not self.train or not set(self.train) <= set(HEADS):
            raise ValueError(f"heads.train: must name {' or '.join(HEADS)} or both, got {list(self.train)}")
        if set(self.train) != set(HEADS) and not self.start:
            raise ValueError("heads.train: the other head must come from heads.start")
        if "value" not in self.train and self.censored != "leave_out":
            raise ValueError("heads.censored: is of the value head, which heads.train leaves out")
