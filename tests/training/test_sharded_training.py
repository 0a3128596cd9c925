"""FSDP on two CPU processes: one device's weights, exact resume.

accelerate keeps FSDP to accelerators. The scripts here open that gate alone: torch's `fully_shard`, accelerate's
preparation, the gathering of a checkpoint and its loading are theirs, over gloo.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lenvm_training.lenvm_trainer import train_lenvm
from processes import run_processes
from test_lenvm_trainer import make_run, weights

SHARDED = """
import os, sys
from pathlib import Path
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from lenvm_training.lenvm_trainer import LenVMTrainer, train_lenvm
from test_lenvm_trainer import make_run

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *arguments: ("gloo", DistributedType.MULTI_GPU)
evaluate = LenVMTrainer.evaluate


def evaluate_sharded(trainer, *arguments, **options):
    parameters = list(trainer.model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    whole, mine = (sum(p.numel() for p in each) for each in (parameters, [p.to_local() for p in parameters]))
    assert 0.4 < mine / whole < 0.6
    return evaluate(trainer, *arguments, **options)


LenVMTrainer.evaluate = evaluate_sharded
folder = Path(sys.argv[1])
settings = {"fsdp": True, "use_cpu": False, "per_device_train_batch_size": 2, "save_steps": 2}
for kind in sys.argv[2:]:
    resumed = make_run(folder, kind, f"{kind}-resumed", dropout=0, **settings)
    train_lenvm(make_run(folder, kind, f"{kind}-sharded", dropout=0, **settings))
    train_lenvm(resumed)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        (folder / f"{kind}-resumed" / "checkpoint-4" / "trainer_state.json").unlink()  # as a full disk leaves it
    PartialState().wait_for_everyone()
    train_lenvm(resumed)
"""
KINDS = ("full", "lora", "head")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        train_lenvm(make_run(folder, kind, f"{kind}-whole", dropout=0, save_strategy="no"))
    run_processes(SHARDED, folder, KINDS, 2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_the_weights_of_one_device(runs: Path, kind: str) -> None:
    one, sharded = (weights(runs / f"{kind}-{name}" / "lenvm") for name in ("whole", "sharded"))
    assert one.keys() == sharded.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(sharded[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_resumes_bit_by_bit(runs: Path, kind: str) -> None:
    sharded, resumed = (weights(runs / f"{kind}-{name}" / "lenvm") for name in ("sharded", "resumed"))
    assert all(torch.equal(sharded[name], tensor) for name, tensor in resumed.items())
