"""From states to a head folder on a tiny model: states are transformers' own, training learns, figures are right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lenvm_kernels import decoder_layer, torchvision_schema
from lenvm_kernels.checkpoint import Head, load_head, save_head
from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead, join_features
from lenvm_kernels.length_distribution import expected_length, quantile_length
from lenvm_kernels.length_value import bin_edges, bin_index, bin_lengths, length_from_value

torchvision_schema.declare_if_missing()

from huggingface_hub import ModelCard  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from lenvm_training import features as features_module  # noqa: E402
from lenvm_training.evaluation import (  # noqa: E402
    _distribution_boundary_figures,
    _remaining_errors,
    evaluate_head,
    token_limits,
)
from lenvm_training.features import StateTable, _kept_positions, _stored_rows, extract_states  # noqa: E402
from lenvm_training.head_losses import length_nll  # noqa: E402
from lenvm_training.head_settings import HeadsSettings  # noqa: E402
from lenvm_training.head_trainer import recorded_settings, train_head  # noqa: E402
from lenvm_training.heads_run import shared_sampling, train_heads  # noqa: E402
from lenvm_training.model_card import add_evaluation, described_data, front_matter, write_model_card  # noqa: E402
from processes import run_processes  # noqa: E402

LAYERS = (0,)
CONFIG = HeadConfig("tiny", 32, 50, 0.97, 12, 128, 16, LAYERS, (2,))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def rollouts(num_prompts: int, seed: int) -> list[dict[str, Any]]:
    """The tokens tell the kind of length: a head can learn it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(num_prompts):
        kind = prompt % 4
        for sample in range(5):
            length = (3, 8, 20, 50)[kind] + int(torch.randint(0, 3, (1,), generator=generator))
            output = torch.randint(5 + 10 * kind, 15 + 10 * kind, (length,), generator=generator).tolist()
            rows.append(
                {
                    "prompt_id": f"{seed}-{prompt}",
                    "domain": "math",
                    "sample": sample,
                    "prompt_token_ids": [5 + kind, 9, 10 + kind, 4],
                    "output_token_ids": output,
                    "finish_reason": "length" if kind == 3 and sample == 0 else "stop",
                    "sampling": {"temperature": 1.0},
                }
            )
    return rows


def test_states_are_those_of_a_plain_forward(model: Any, tmp_path: Path) -> None:
    rows = rollouts(8, 1)
    states = extract_states(model, rows, LAYERS, 0.3, tmp_path)
    assert torch.equal(states.censored, torch.tensor([rows[i]["finish_reason"] == "length" for i in states.rollout]))
    for state in range(0, len(states.position), 17):
        row = rows[int(states.rollout[state])]
        position, prompt_len = int(states.position[state]), len(row["prompt_token_ids"])
        prefix = torch.tensor([row["prompt_token_ids"] + row["output_token_ids"][:position]])
        with torch.inference_mode():
            plain = model.model(prefix, output_hidden_states=True)
        torch.testing.assert_close(states.final[state], plain.last_hidden_state[0, -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states.layers[state, 0], plain.hidden_states[1][0, -1], atol=1e-5, rtol=1e-4)
        assert states.next_token[state] == row["output_token_ids"][position]
        assert states.remaining[state] == len(row["output_token_ids"]) - position
        assert prefix.shape[1] == prompt_len + position


@pytest.mark.skipif(not decoder_layer.available(), reason="needs a C++ compiler and AVX-512")
def test_states_in_bf16_are_those_of_torchs_products(model: Any, tmp_path: Path) -> None:
    rows, rounded = rollouts(4, seed=1), copy.deepcopy(model).bfloat16()
    before = rounded(torch.tensor([[5, 9, 10]])).logits
    packed: list[torch.Size] = []

    class Product(decoder_layer.PackedLinear):
        def __init__(self, weight: torch.Tensor) -> None:
            packed.append(weight.shape)
            super().__init__(weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_layer, "PackedLinear", Product)
        found = extract_states(rounded, rows, LAYERS, 1.0, tmp_path)
        patch.setattr(decoder_layer, "available", lambda: False)
        expected = extract_states(rounded, rows, LAYERS, 1.0, tmp_path / "torch")
    for name in ("final", "layers"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2**-5, atol=2**-5)
    assert len(packed) == 14
    assert torch.equal(rounded(torch.tensor([[5, 9, 10]])).logits, before)


def test_a_state_is_kept_whatever_comes_after_it() -> None:
    """Else the values learned would be those of answers that are over soon."""
    for length in (3, 60):
        kept = torch.cat([_kept_positions(length, 0.25, seed) for seed in range(4000)]).bincount(minlength=length)
        assert kept[0] == 4000
        torch.testing.assert_close(kept[1:] / 4000, torch.full((length - 1,), 0.25), atol=0.035, rtol=0)


def test_errors_at_a_place_count_each_completion_once() -> None:
    """Halfway, two completions of 100 and 10 tokens; the long one has eleven states there, the short one has one."""
    position, length = torch.cat([torch.arange(45, 56), torch.tensor([5])]), torch.tensor([100] * 11 + [10])
    rollout, remaining = torch.tensor([0] * 11 + [7]), length - position
    zeros, none = torch.zeros(12, 1), torch.zeros(12, dtype=torch.int64)
    states = StateTable(zeros, zeros[:, None], none, position, remaining, none.bool(), rollout)
    errors = _remaining_errors(states, remaining * torch.tensor([1.5] * 11 + [1.1]))
    assert errors["remaining_mre_50"] == pytest.approx(0.1)


@contextmanager
def counted_rows(model: Any) -> Iterator[list[int]]:
    """How many completions each forward runs."""
    counts: list[int] = []
    hook = model.base_model.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    yield counts
    hook.remove()


def assert_same(states: StateTable, expected: StateTable) -> None:
    for name, tensor in vars(expected).items():
        torch.testing.assert_close(getattr(states, name), tensor, atol=1e-6, rtol=1e-5)


def test_states_that_are_there_are_not_computed_again(model: Any, tmp_path: Path) -> None:
    rows = rollouts(4, 1)
    first = extract_states(model, rows, LAYERS, 0.3, tmp_path)
    with counted_rows(model) as counts:
        assert_same(extract_states(model, rows, LAYERS, 0.3, tmp_path), first)
    assert counts == []


def test_only_the_rows_that_are_missing_are_computed(model: Any, tmp_path: Path) -> None:
    rows = rollouts(8, 1)
    few = rows[25:3:-1]
    with counted_rows(model) as counts:
        for part in (few, rows, few):
            assert_same(
                extract_states(model, part, LAYERS, 0.3, tmp_path / "shared"),
                extract_states(model, part, LAYERS, 0.3, tmp_path / f"own-{len(part)}"),
            )
    shared, own = len(rows), len(few) + len(rows)
    assert sum(counts) == shared + own


def test_a_run_that_is_stopped_loses_one_forward(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rollouts(8, 1)
    monkeypatch.setattr(features_module, "MAX_BATCH_TOKENS", 400)
    with counted_rows(model) as counts:
        hook = model.base_model.register_forward_hook(lambda *_: interrupt() if len(counts) == 3 else None)
        with pytest.raises(KeyboardInterrupt):
            extract_states(model, rows, LAYERS, 0.3, tmp_path / "stopped")
    hook.remove()
    with counted_rows(model) as again:
        assert_same(
            extract_states(model, rows, LAYERS, 0.3, tmp_path / "stopped"),
            extract_states(model, rows, LAYERS, 0.3, tmp_path / "whole"),
        )
    assert sum(counts[:2]) + sum(again) == 2 * len(rows)


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["layers", "share", "seed", "weights", "config", "tokens", "finish_reason"])
def test_states_of_something_else_are_never_reused(model: Any, tmp_path: Path, change: str) -> None:
    rows = rollouts(4, 1)
    extract_states(model, rows, LAYERS, 0.3, tmp_path / "shared")
    other, layers, share, seed = copy.deepcopy(model), LAYERS, 0.3, 0
    if change == "layers":
        layers = (1,)
    elif change == "share":
        share = 0.4
    elif change == "seed":
        seed = 1
    elif change == "weights":
        other.model.layers[1].mlp.down_proj.weight.data *= 1.1
    elif change == "config":
        other.config.rms_norm_eps = other.model.norm.variance_epsilon = 0.1
    elif change == "tokens":
        rows = [row | {"output_token_ids": [3, *row["output_token_ids"][1:]]} for row in rows]
    else:
        rows = [row | {"finish_reason": "length"} for row in rows]
    assert_same(
        extract_states(other, rows, layers, share, tmp_path / "shared", seed),
        extract_states(other, rows, layers, share, tmp_path / "own", seed),
    )


def test_cut_completions_count_where_their_return_is_known() -> None:
    """Limit 8, gamma 0.5: states before position 2 of all completions; a value head of zeros says -0.5."""
    head = Head(replace(CONFIG, gamma=0.5), ValueHead(CONFIG.hidden_size).eval(), CandidateHead(CONFIG).eval())
    for parameter in head.value_head.parameters():
        torch.nn.init.zeros_(parameter)
    position, remaining = torch.tensor([0, 0, 0, 0, 1, 2, 5]), torch.tensor([8, 2, 4, 3, 1, 6, 1])
    censored = torch.tensor([True, False, False, False, False, True, False])
    zeros, none = torch.zeros(7, CONFIG.hidden_size), torch.zeros(7, dtype=torch.int64)
    held = StateTable(zeros, zeros[:, None].repeat(1, len(LAYERS), 1), none, position, remaining, censored, none)
    rows = [{"prompt_id": "a"}]
    figures = evaluate_head(head, held, held, LAYERS, rows)
    returns = [-(1 - 0.5**8 / 2), *(-(1 - 0.5**length) for length in (2, 4, 3, 1))]
    assert figures["early_mse"] == pytest.approx(sum((-0.5 - value) ** 2 for value in returns) / 5)
    mean = sum(returns) / 5
    assert figures["early_mse_constant"] == pytest.approx(sum((mean - value) ** 2 for value in returns) / 5)
    unknown = 0.5**8 / 2  # a cut one's return lies in (-1, -(1 - 0.5^8)]
    assert figures["early_mse_unknown"] == pytest.approx(unknown**2 / 5)
    actual = length_from_value(torch.tensor(-(1 - 0.5**8) + sum(returns[1:4])) / 4, 0.5)
    assert figures["boundary_mre"] == pytest.approx(abs(1 - actual.item()) / actual.item())


def test_each_completion_counts_at_the_limit_that_it_was_sampled_with() -> None:
    """A distribution that has all of its mass at 30 tokens, right for prompts sampled at most 8 and 16 tokens long."""
    head = Head(CONFIG, ValueHead(CONFIG.hidden_size).eval(), CandidateHead(CONFIG).eval())
    with torch.no_grad():
        head.candidate_head.out.weight.zero_()
        head.candidate_head.out.bias.copy_(20.0 * (torch.arange(12) == bin_index(torch.tensor(30), edges_of(CONFIG))))
    rows = [{"prompt_id": str(i // 4), "sampling": {"max_new_tokens": (8, 16)[i // 4]}} for i in range(8)]
    remaining = torch.tensor([8] * 4 + [16] * 3 + [5])
    zeros, none = torch.zeros(8, CONFIG.hidden_size), torch.zeros(8, dtype=torch.int64)
    layers, cut = zeros[:, None].repeat(1, len(LAYERS), 1), torch.tensor([True] * 7 + [False])
    states = StateTable(zeros, layers, none, none, remaining, cut, torch.arange(8))
    assert token_limits(states, rows).tolist() == [8.0] * 4 + [16.0] * 4
    assert token_limits(states, [{}] * 8).tolist() == [16.0] * 8
    figures = _distribution_boundary_figures(head, states, LAYERS, rows)
    mean = (3 * 16 + 5) / 4
    assert figures["boundary_mre_expected"] == pytest.approx((16 - mean) / mean / 2, abs=1e-4)
    assert figures["interval_coverage"] == pytest.approx(7 / 8), "the interval reaches all cuts; 5 lies below it"


def edges_of(config: HeadConfig) -> torch.Tensor:
    return bin_edges(config.num_bins, config.max_length)


def embeddings_of(model: Any) -> torch.Tensor:
    embeddings: torch.Tensor = model.get_input_embeddings().weight.detach()
    return embeddings


def test_training_learns_and_the_folder_round_trips(model: Any, tmp_path: Path) -> None:
    train_rows, held_rows = rollouts(40, 2), rollouts(12, 3)
    train = extract_states(model, train_rows, LAYERS, 0.6, tmp_path / "train")
    held = extract_states(model, held_rows, LAYERS, 0.6, tmp_path / "held")
    training = {"per_device_train_batch_size": 64, "learning_rate": 5e-3, "disable_tqdm": True}
    settings = HeadsSettings(str(tmp_path / "work"), "", LAYERS, epochs=8, training=training)
    head, logs = train_head(CONFIG, train, held, embeddings_of(model), settings)
    for name, log in logs.items():
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        assert len(losses) == 8
        assert min(losses) < losses[0]
        assert list((tmp_path / "work" / name).rglob("events.out.tfevents.*"))
    figures = evaluate_head(head, train, held, LAYERS, held_rows)
    assert figures["value_mse_over_constant"] < 0.5
    assert figures["boundary_tau"] > 0.7
    assert 0 <= figures["interval_coverage"] <= 1
    folder = tmp_path / "head"
    save_head(head, folder)
    recorded = {"censored": "bound", **recorded_settings(settings)}
    write_model_card(folder, CONFIG, recorded, train_rows, held_rows, figures, tmp_path)
    card = ModelCard.load(folder / "README.md")
    expected = {"library_name": "lenvm", "license": "unknown", "tags": ["lenvm", "length-prediction"]}
    assert card.data.to_dict() == expected
    assert card.text.strip().startswith("# LenVM head for tiny")
    assert described_data(folder / "README.md").startswith("190 finished of 200 completions of 40 prompts")
    assert json.loads((folder / "figures.json").read_text()) == figures
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "who may read the card may read the weights"
    loaded = load_head(folder)
    assert loaded.config == CONFIG
    features = torch.randn(3, CONFIG.num_features)
    assert torch.equal(loaded.value_head(features[:, :32]), head.value_head(features[:, :32]))
    assert torch.equal(loaded.candidate_head.state_logprobs(features), head.candidate_head.state_logprobs(features))
    size = (folder / "value_head.safetensors").stat().st_size
    save_head(head, folder, torch.bfloat16)
    rounded = load_head(folder).value_head
    assert (folder / "value_head.safetensors").stat().st_size < 0.7 * size
    assert rounded.fc.weight.dtype == torch.float32
    torch.testing.assert_close(rounded(features[:, :32]), head.value_head(features[:, :32]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("kind", "base_model", "library", "named"),
    [
        ("full", "org/base", "transformers", True),
        ("lora", "org/base", "peft", True),
        ("head", "./base", "lenvm", False),
        ("lora", "data/base", "peft", False),
        ("lora", "~/models/base", "peft", False),
        ("full", "base", "transformers", False),
    ],
)
def test_front_matter_is_what_the_hub_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, base_model: str, library: str, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = tmp_path / "data" / "base"
    backbone.mkdir(parents=True)
    (backbone / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    data = ModelCard(front_matter(kind, base_model, backbone) + "# Card").data
    assert data.license == "apache-2.0"
    assert data.library_name == library
    assert data.base_model == (base_model if named else None)


@pytest.mark.parametrize("text", ["# Without front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n"])
def test_a_base_model_of_unknown_license(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert ModelCard(front_matter("full", "org/base", tmp_path)).data.license == "unknown"


def test_an_evaluation_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Card\n\nText\n")
    for figure in ("0.1", "0.2"):
        add_evaluation(tmp_path, f"# Evaluation\n\n## Boundary\n\n{figure}\n")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    body = "# Card\n\nText\n\n<!-- lenvm evaluate -->\n## Evaluation\n\n### Boundary\n\n0.2\n"
    assert card.text.strip() == body.strip()


def test_the_value_head_is_in_the_published_format(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_head(Head(CONFIG, ValueHead(32), CandidateHead(CONFIG)), tmp_path)
    tensors = load_file(tmp_path / "value_head.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "v_head.fc.weight": (32, 32),
        "v_head.fc.bias": (32,),
        "v_head.summary.weight": (1, 32),
        "v_head.summary.bias": (1,),
    }
    hidden = torch.randn(4, 32)
    fc = torch.nn.functional.silu(hidden @ tensors["v_head.fc.weight"].T + tensors["v_head.fc.bias"])
    raw = fc @ tensors["v_head.summary.weight"].T + tensors["v_head.summary.bias"]
    torch.testing.assert_close(load_head(tmp_path).value_head(hidden), -torch.sigmoid(raw).squeeze(-1))


def test_an_unusable_folder_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lenvm_config"):
        load_head(tmp_path)
    save_head(Head(CONFIG, ValueHead(32), CandidateHead(CONFIG)), tmp_path)
    (tmp_path / "candidate_head.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="candidate_head"):
        load_head(tmp_path)


def test_censored_completions_count_as_at_least_this_long() -> None:
    edges = bin_edges(6, 64)
    logprobs = torch.log_softmax(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    remaining = torch.tensor([10, 10])
    nll = length_nll(logprobs, remaining, torch.tensor([False, True]), edges)
    index = int(bin_index(remaining, edges)[0])
    assert nll[0] == pytest.approx(-logprobs[0, index].item())
    assert nll[1] == pytest.approx(-logprobs[1, index:].exp().sum().log().item(), rel=1e-5)


def test_mean_and_quantiles_of_a_distribution() -> None:
    lengths = bin_lengths(24, 1024)
    point = torch.full((24,), -torch.inf)
    point[9] = 0.0
    assert expected_length(point, lengths) == lengths[9]
    uniform = torch.full((24,), 1 / 24).log()
    quantiles = torch.stack([quantile_length(uniform, lengths, level) for level in (0.1, 0.5, 0.9)])
    assert (quantiles.diff() > 0).all()
    samples = torch.distributions.Categorical(logits=uniform).sample((20_000,))
    below = (lengths[samples] <= quantiles[1]).float().mean()
    assert 0.4 < below < 0.6


def test_a_quantile_in_the_open_last_bin_is_that_bins_length() -> None:
    lengths = bin_lengths(32, 1024)
    probs = torch.zeros(3, 32)
    probs[:, 10], probs[:, -1] = torch.tensor([0.8, 0.95, 0.0]), torch.tensor([0.2, 0.05, 1.0])
    low, high = (quantile_length(probs.log(), lengths, level) for level in (0.1, 0.9))
    assert high[0] == lengths[-1]  # a fifth of such answers is longer than any length between the last two bins
    assert lengths[9] < low[0] <= lengths[11]
    assert lengths[9] < high[1] <= lengths[11]
    assert lengths[-2] < low[2] < high[2] == lengths[-1]


def test_middle_layers_are_scaled_to_unit_root_mean_square() -> None:
    features = join_features(torch.zeros(3, 4), [100 * torch.randn(3, 4)])
    assert features.shape == (3, 8)
    torch.testing.assert_close(features[:, 4:].square().mean(-1), torch.ones(3), atol=1e-3, rtol=1e-3)


def test_a_head_says_how_its_answers_were_sampled() -> None:
    rows = [{"sampling": {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": cap}} for cap in (512, 512, 640)]
    assert shared_sampling(rows) == {"temperature": 1.0, "top_p": 0.9}
    assert shared_sampling(rows[:2]) == {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 512}


def cut(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"finish_reason": "length"} for row in rows]


@pytest.mark.parametrize(
    ("rows", "held", "layers", "message"),
    [
        ([], rollouts(4, 3), LAYERS, "data.rollouts: no completion is left"),
        (cut(rollouts(4, 2)), rollouts(4, 3), LAYERS, "data.rollouts: no completion that ended"),
        (rollouts(4, 2), cut(rollouts(4, 3)), LAYERS, "data.eval_rollouts: no completion that ended"),
        ([rollouts(1, 2)[0] | {"images": ["a.png"]}], rollouts(4, 3), LAYERS, "prompt 2-0: has images"),
        (rollouts(4, 2), rollouts(4, 3)[::2], LAYERS, "data.eval_rollouts: no prompt has 4 completions"),
        (rollouts(4, 2), rollouts(4, 3), (2,), "heads.layers: must be of 0 to 1, got 2"),
    ],
)
def test_rollouts_and_layers_that_cannot_be_used(
    model: Any, tmp_path: Path, rows: Any, held: Any, layers: tuple[int, ...], message: str
) -> None:
    model.save_pretrained(tmp_path / "model")
    settings = HeadsSettings(str(tmp_path / "work"), str(tmp_path / "head"), layers)
    with pytest.raises(ValueError, match=message):
        train_heads(settings, tmp_path / "model", "tiny", 0.97, rows, held)
    assert not (tmp_path / "work" / "train").exists()


HEADS_IN_A_PROCESS = """
import sys
from pathlib import Path
import torch
from test_heads import CONFIG, LAYERS, rollouts
from lenvm_training.head_settings import HeadsSettings
from lenvm_training.heads_run import train_heads
folder, per_device = Path(sys.argv[1]), int(sys.argv[2])
training = {"per_device_train_batch_size": per_device, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
settings = HeadsSettings(str(folder / "work"), str(folder / "head"), LAYERS, rank=16, epochs=2, state_share=0.2,
                         num_bins=12, max_length=128, dropout=0.0, training=training)
rows = [row | {"finish_reason": "stop"} for row in rollouts(280, 2)]
figures = train_heads(settings, folder.parent / "model", "tiny", 0.97, rows, rollouts(4, 3))
print(sorted(figures))
"""


def test_two_processes_share_the_states_and_train_the_heads_of_one(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    outputs = run_processes(HEADS_IN_A_PROCESS, tmp_path / "two", ["32"], 2)
    assert outputs[0].strip() != "[]"
    assert outputs[1].strip() == "[]"
    (alone,) = run_processes(HEADS_IN_A_PROCESS, tmp_path / "one", ["64"], 1)
    assert alone == outputs[0]
    for part in ("train", "eval"):
        stored = [set(_stored_rows(path)) for path in (tmp_path / "two" / "work" / part).glob("*.safetensors")]
        assert len(stored) > 1
        assert sum(map(len, stored)) == len(set.union(*stored)) == (280 * 5 if part == "train" else 20)
    two, one = (load_head(tmp_path / name / "head").value_head for name in ("two", "one"))
    features = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two(features), one(features), atol=2e-3, rtol=0)
