"""The values of the metrics after known requests, and the bounds of their labels."""

from __future__ import annotations

import re

import pytest

from fake_engine import DONE, PREDICTION, answer_events, chunk, completion, json_response, usage
from gateway_client import GatewayClient

CHAT = "/v1/chat/completions"
M = 'model="smol/model"'


def buckets_reached(samples: dict[str, float], name: str, label: str) -> dict[str, float]:
    """How many observations fell into each bucket, by its upper bound; empty buckets left out."""
    before, reached = 0.0, {}
    for sample, count in samples.items():
        if sample.startswith(f"{name}_bucket{{") and label in sample and count > before:
            reached[re.search(r'le="([^"]+)"', sample)[1]] = count - before
            before = count
    return reached


async def test_one_stream(engine, gateway):
    engine.play(*answer_events())
    await gateway.chat(stream=True)
    samples = await gateway.samples()
    assert samples[f'lenvm_requests_total{{route="{CHAT}",status="200"}}'] == 1
    assert samples[f'lenvm_requests_in_flight{{route="{CHAT}"}}'] == 0
    assert samples[f"lenvm_prompt_tokens_total{{{M}}}"] == 7
    assert samples[f"lenvm_generation_tokens_total{{{M}}}"] == 4
    assert samples[f"lenvm_time_to_first_token_seconds_count{{{M}}}"] == 1
    assert samples[f"lenvm_inter_token_latency_seconds_count{{{M}}}"] == 2
    assert samples[f"lenvm_e2e_request_latency_seconds_count{{{M}}}"] == 1
    assert buckets_reached(samples, "lenvm_length_prediction_relative_error", M) == {"-0.25": 1}  # (3 - 4) / 4
    assert samples[f'lenvm_length_prediction_interval_total{{inside="true",{M}}}'] == 1
    assert not [name for name in samples if "control" in name or "errors" in name or "aborts" in name]


async def test_one_answer(engine, gateway):
    await gateway.chat(length_control={"mode": "equal", "target": 4})
    samples = await gateway.samples()
    assert samples[f"lenvm_generation_tokens_total{{{M}}}"] == 2
    assert samples['lenvm_control_outcomes_total{ended="natural",mode="equal"}'] == 1
    assert buckets_reached(samples, "lenvm_control_relative_deviation", 'mode="equal"') == {"-0.5": 1}  # (2 - 4) / 4
    assert f"lenvm_length_prediction_relative_error_count{{{M}}}" not in samples
    assert f"lenvm_time_to_first_token_seconds_count{{{M}}}" not in samples


@pytest.mark.parametrize(
    ("control", "ended", "deviation"),
    [
        ({"mode": "at_most", "target": 8}, "natural", "-0.5"),
        ({"mode": "at_least", "target": 2}, "cap", "1.0"),
        ({"mode": "scale", "factor": 0.5}, "natural", "+Inf"),  # (4 - 1.5) / 1.5
        ({"mode": "scale", "factor": 1.25}, "natural", "0.1"),  # (4 - 3.75) / 3.75
        ({"mode": "tilt", "beta": 3}, "natural", None),
        ({"mode": "equal", "target": 4}, "abort", None),
        ({"mode": "equal", "target": 4}, "invented", None),
    ],
)
async def test_control_outcomes(engine, gateway, control, ended, deviation):
    engine.play(*answer_events(applied=control, ended=ended))
    await gateway.chat(stream=True, length_control=control)
    samples = await gateway.samples()
    seen = "abort" if ended == "invented" else ended
    assert samples[f'lenvm_control_outcomes_total{{ended="{seen}",mode="{control["mode"]}"}}'] == 1
    reached = buckets_reached(samples, "lenvm_control_relative_deviation", f'mode="{control["mode"]}"')
    assert reached == ({deviation: 1} if deviation else {})


async def test_each_choice_counts(engine, gateway):
    events = [
        chunk("a", 0, values=[-0.5], prediction=PREDICTION),
        chunk("b", 1, values=[-0.5], prediction=PREDICTION),
        chunk("c", 1, values=[-0.5, -0.5]),
        chunk("", 0, "stop", ended="natural", applied=None),
        chunk("", 1, "stop", ended="natural", applied=None),
        usage(7, 4),
        DONE,
    ]
    engine.play(*events)
    await gateway.chat(stream=True, n=2)
    samples = await gateway.samples()
    assert samples[f"lenvm_generation_tokens_total{{{M}}}"] == 4
    assert samples[f"lenvm_inter_token_latency_seconds_count{{{M}}}"] == 1
    reached = buckets_reached(samples, "lenvm_length_prediction_relative_error", M)
    assert reached == {"0.0": 1, "2.0": 1}  # (3 - 3) / 3 and (3 - 1) / 1
    assert samples[f'lenvm_length_prediction_interval_total{{inside="false",{M}}}'] == 1


async def test_without_values_tokens_come_from_usage(engine, gateway):
    events = [chunk("a"), chunk("b"), chunk("", finish="stop", ended="natural", applied=None), usage(7, 3), DONE]
    engine.play(*events)
    await gateway.chat(stream=True, length_values=False, max_length_hint=6)
    samples = await gateway.samples()
    assert samples[f"lenvm_generation_tokens_total{{{M}}}"] == 3
    assert samples[f"lenvm_inter_token_latency_seconds_count{{{M}}}"] == 1
    assert buckets_reached(samples, "lenvm_control_relative_deviation", 'mode="at_most"') == {"-0.5": 1}  # (3 - 6) / 6


async def test_cut_answers_say_nothing_about_predictions(engine, gateway):
    engine.answer = lambda body: json_response(completion(ended="cap"))
    await gateway.chat()
    samples = await gateway.samples()
    assert f"lenvm_length_prediction_relative_error_count{{{M}}}" not in samples


async def test_aborted_streams_count_the_tokens_that_were_made(engine, gateway):
    engine.play(chunk("a", values=[-0.5]), chunk("b", values=[-0.5, -0.4]), 60.0)
    exchange = gateway.exchange(stream=True)
    for _ in range(3):
        await exchange.next()
    exchange.leave()
    await exchange.task
    samples = await gateway.samples()
    assert samples[f"lenvm_generation_tokens_total{{{M}}}"] == 3
    assert f"lenvm_e2e_request_latency_seconds_count{{{M}}}" not in samples


async def test_labels_stay_few_whatever_clients_send(engine):
    gateway = GatewayClient(engine)
    for i in range(20):
        await gateway.http.get(f"/nowhere/{i}")
        await gateway.http.get(f"/v1/models/{i}")
        await gateway.http.get(f"/page/{i}")
        await gateway.chat(model=f"model-{i}")
    samples = await gateway.samples()
    assert len([name for name in samples if name.startswith("lenvm_requests_total")]) == 4
    assert len([name for name in samples if name.startswith("lenvm_errors_total")]) == 2


async def test_refusals_are_counted_by_kind(engine, gateway):
    await gateway.chat(n=0)
    await gateway.chat(model="x")
    engine.down = True
    gateway2 = GatewayClient(engine)
    await gateway2.chat()
    assert (await gateway.samples())['lenvm_errors_total{kind="invalid_request"}'] == 1
    assert (await gateway.samples())['lenvm_errors_total{kind="model_not_found"}'] == 1
    assert (await gateway2.samples())['lenvm_errors_total{kind="engine_unavailable"}'] == 1
