"""The gateway's Prometheus metrics. Every label has few values: route templates, model names, modes, kinds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_LATENCY_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 2.0, 10.0)
_ERROR = (-0.75, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
_DEVIATION = (-0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """One registry with all series of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="lenvm_gateway", registry=self.registry)
        self.requests = self._counter("requests", "Requests answered; status 499: the client left.", "route", "status")
        self.in_flight = Gauge("lenvm_requests_in_flight", "Requests being served.", ["route"], registry=self.registry)
        self.errors = self._counter("errors", "Failed requests by kind, in-stream failures included.", "kind")
        self.aborts = self._counter("aborts", "Requests given up because of the client.", "route", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.", "model")
        self.generation_tokens = self._counter("generation_tokens", "Completion tokens of all requests.", "model")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the whole request read to the first streamed event.",
            _LATENCY_S,
            "model",
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Time between a choice's chunks over the later one's tokens.",
            _TOKEN_S,
            "model",
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From the whole request read to its end, finished ones.", _LATENCY_S, "model"
        )
        self.prediction_error = self._histogram(
            "length_prediction_relative_error",
            "(predicted - actual) / actual completion tokens, of natural ends without control.",
            _ERROR,
            "model",
        )
        self.prediction_interval = self._counter(
            "length_prediction_interval", "Natural ends without control, by inside the 80% interval.", "model", "inside"
        )
        self.control_outcomes = self._counter(
            "control_outcomes", "Ends of choices under length control.", "mode", "ended"
        )
        self.control_deviation = self._histogram(
            "control_relative_deviation", "(actual - target) / target completion tokens, of ends.", _DEVIATION, "mode"
        )
        self.engine_up = Gauge("lenvm_engine_up", "Whether the engine was usable last time.", registry=self.registry)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lenvm_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"lenvm_{name}", text, labels, registry=self.registry, buckets=buckets)
