"""Ablations and scaling curves: several trainings that differ in some keys, evaluated on the same prompts.

A sweep file names a ``base`` configuration, common ``set`` keys, and ``variants``: a name and the keys it sets.
Runs that are complete are not run again. Variants of heads share the states in the base's ``heads.work``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from lenvm_training import plots
from lenvm_training.config import ConfigError, Experiment, apply_overrides, build_experiment, expand_home, load_yaml
from lenvm_training.model_card import FIGURES_FILE
from lenvm_training.run_record import fill_defaults

SHOWN = ("tau", "mre", "mse")
STATE_FIGURES = ("mse", "mre_50", "tau_50")
HEAD_FIGURES = ("early_mse_over_position", "boundary_tau", "boundary_mre", "interval_coverage")
"""Of a head's own figures, those that count completions cut by the token limit too."""
SETTINGS_FILE = "experiment.json"
DECISIVE = {"model", "data", "target", "training", "heads", "evaluation"}
"""Sections of an experiment that its figures depend on."""


@dataclass(frozen=True)
class Sweep:
    """``name`` is what varies, for tables and plots; ``out`` the folder of the runs."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    base: str
    out: str
    variants: dict[str, dict[str, Any]]
    set: dict[str, Any] = field(default_factory=dict)


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file; ``base`` is relative to it. Raises ConfigError."""
    try:
        sweep: Sweep = TypeAdapter(Sweep).validate_python(expand_home(load_yaml(path)))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not sweep.variants:
        raise ConfigError(f"{path}: variants: must not be empty")
    for name in sweep.variants:
        if not name or Path(name).name != name or name == "..":
            raise ConfigError(f"{path}: variants: {name!r} is not the name of a folder")
    return sweep


def variant_experiments(sweep: Sweep, where: Path, overrides: list[str]) -> dict[str, Experiment]:
    """The experiment of each variant: base, common keys, command line, then the variant's own keys.

    Raises ConfigError, for an override that no variant would heed too.
    """
    _check_heeded(sweep, overrides)
    base = load_yaml(where.parent / sweep.base)
    experiments = {}
    for name, keys in sweep.variants.items():
        content = apply_overrides(base, _assignments(sweep.set) + overrides + _assignments(keys))
        own = _own_folders(f"{sweep.out}/{name}", content.get("heads") is not None)
        experiments[name] = build_experiment(apply_overrides(content, _assignments(own)), f"{where}: {name}")
    return experiments


def _check_heeded(sweep: Sweep, overrides: list[str]) -> None:
    """Raises ConfigError for keys that the sweep or every variant sets anew, and for those that decide no figure."""
    folders = {**_own_folders("", has_heads=True), **_own_folders("", has_heads=False)}
    by_all = set.intersection(*(set(keys) for keys in sweep.variants.values()))
    for override in overrides:
        key = override.partition("=")[0]
        if key.partition(".")[0] not in DECISIVE:
            raise ConfigError(f"{key}: does nothing in a sweep")
        for set_by, keys in (("the sweep", folders), ("every variant", by_all)):
            if any(f"{key}.".startswith(f"{other}.") for other in keys):
                raise ConfigError(f"{key}: is set by {set_by} of {sweep.name}")


def _own_folders(folder: str, has_heads: bool) -> dict[str, str]:
    result = {"heads.out": f"{folder}/head"} if has_heads else {"training.output_dir": folder}
    return result | {"evaluation.out": f"{folder}/evaluation"}


def run_sweep(
    sweep: Sweep, experiments: Mapping[str, Experiment], run: Callable[[Experiment], None], say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """``run`` (train and evaluate) what is not complete; writes table and plot, returns the figures by variant.

    Raises ConfigError for a folder that holds a run of other settings or rollouts, OSError for rollouts that cannot be
    read.
    """
    results = {}
    digest = cache(_file_digest)  # variants share their files
    for name, experiment in experiments.items():
        assert experiment.evaluation is not None
        path = Path(experiment.evaluation.out) / "evaluation.json"
        _claim(path, experiment, digest)
        if not path.exists():
            say(f"{sweep.name}: {name}")
            run(experiment)
        results[name] = _figures(json.loads(path.read_text())) | _head_figures(experiment)
    _write(sweep, results)
    return results


def _file_digest(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _claim(evaluation: Path, experiment: Experiment, digest: Callable[[str], str]) -> None:
    """Keep settings and the files' digests beside the evaluation to come; one that is there must be of the same."""
    path, data = evaluation.with_name(SETTINGS_FILE), experiment.data
    settings = TypeAdapter(Experiment).dump_python(experiment, mode="json", include=DECISIVE)
    files = {name: digest(name) for name in (*data.rollouts, *data.eval_rollouts)}
    record = json.dumps({**settings, "files": files}, indent=2) + "\n"
    if evaluation.exists() and not (path.exists() and fill_defaults(Experiment, path.read_text()) == record):
        raise ConfigError(
            f"{evaluation}: is of other settings or rollouts than the sweep's now ({path.name}); set another 'out'"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record)


def _figures(evaluation: dict[str, Any]) -> dict[str, float]:
    boundary = {f"boundary {name}": evaluation["boundary"]["lenvm"][name] for name in SHOWN}
    states = {f"states {name}": evaluation["states"][name] for name in STATE_FIGURES}
    served = {f"served {name}": value for name, value in evaluation["served"].get("all", {}).items()}
    return boundary | states | served


def _head_figures(experiment: Experiment) -> dict[str, float]:
    if experiment.heads is None:
        return {}
    figures = json.loads((Path(experiment.heads.out) / FIGURES_FILE).read_text())
    return {f"head {name}": figures[name] for name in HEAD_FIGURES if name in figures}


def _write(sweep: Sweep, results: dict[str, dict[str, float]]) -> None:
    out = Path(sweep.out)
    columns = [name for name in next(iter(results.values())) if all(name in row for row in results.values())]
    lines = [f"| {sweep.name} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[column]:.4g}' for column in columns)} |" for name, row in results.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.md").write_text("\n".join(lines) + "\n")
    curves = {column: [row[column] for row in results.values()] for column in columns}
    plots.plot_sweep(out / "sweep.png", sweep.name, list(results), curves)


def _assignments(keys: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
        for key, value in keys.items()
    ]
