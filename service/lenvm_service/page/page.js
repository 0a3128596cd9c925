// The page: reads the form, streams the answer, keeps the figures beside it up to date.

import { Answer } from "./answer.js";
import { Chart } from "./chart.js";
import { fetchJson, RequestError, streamChat } from "./stream.js";

const byId = (id) => document.getElementById(id);
const form = byId("ask");
const answer = new Answer(byId("answer"), byId("tip"), (index) => chart.mark(index));
const chart = new Chart(byId("chart"), (index) => answer.showToken(index));

// For each mode: the name and range of its number, what it means, and how a request says it.
const tokens = { label: "Tokens", min: 1, max: 1000000, step: 1, value: 100, parameter: "target" };
const MODES = {
  none: null,
  at_most: { ...tokens, hint: "Ends by itself within about this many tokens. Max tokens stays the hard cap." },
  equal: { ...tokens, hint: "Ends by itself close to this many tokens." },
  at_least: { ...tokens, hint: "Ends by itself after at least about this many tokens." },
  tilt: {
    label: "Beta", min: -10000, max: 10000, step: "any", value: 5, parameter: "beta",
    hint: "Favours tokens by their value: above 0 shortens, below 0 lengthens.",
  },
  scale: {
    label: "Factor", min: 0.01, max: 100, step: "any", value: 0.5, parameter: "factor",
    hint: "Ends close to this factor times the length predicted for the question.",
  },
};

let model = null;
let running = null; // the AbortController of the answer under way

function showMode() {
  const mode = MODES[byId("mode").value];
  byId("amount-field").hidden = !mode;
  byId("amount-hint").textContent = mode?.hint ?? "";
  byId("amount").required = Boolean(mode);
  if (!mode) return;
  const { label, min, max, step, value, parameter } = mode;
  byId("amount-label").textContent = label;
  const input = byId("amount");
  const keeps = input.dataset.parameter === parameter;
  Object.assign(input, { min, max, step, value: keeps ? input.value : value });
  input.dataset.parameter = parameter;
}

function readControl() {
  const name = byId("mode").value;
  return name === "none" ? null : { mode: name, [MODES[name].parameter]: byId("amount").valueAsNumber };
}

function readRequest() {
  const control = readControl();
  return {
    model,
    messages: [{ role: "user", content: byId("question").value }],
    temperature: byId("temperature").valueAsNumber,
    max_completion_tokens: byId("max-tokens").valueAsNumber,
    ...(control && { length_control: control }),
  };
}

function show(figures) {
  for (const [id, text] of Object.entries(figures)) byId(id).textContent = text;
}

function showError(error) {
  byId("error").hidden = !error;
  byId("error").textContent = error instanceof RequestError ? error.message : "The connection to the server broke.";
  if (error?.status === 401) byId("key-field").hidden = false;
}

function setRunning(controller) {
  running = controller;
  byId("send").disabled = Boolean(controller) || !model;
  byId("stop").disabled = !controller;
  byId("answer").classList.toggle("streaming", Boolean(controller));
  byId("answer").setAttribute("aria-busy", String(Boolean(controller)));
}

function formatSeconds(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

function formatControl(applied) {
  if (!applied) return "no control";
  const { mode, target, beta, factor } = applied;
  return `${mode.replace("_", " ")} ${target ?? beta ?? `${factor} ×`}`;
}

// Follows one answer: what has come so far, and how fast.
class Progress {
  count = 0;
  #startedAt = 0;
  #ended = "";

  get ended() {
    return this.#ended;
  }

  take(choice) {
    const { values = [], remaining = [], prediction, applied, ended } = choice.lenvm ?? {};
    answer.add(choice.delta?.content, values, remaining);
    if (prediction) this.#showPrediction(prediction);
    for (const one of remaining) chart.add(this.count++, one);
    if (values.length) this.#showProgress(remaining.at(-1), values.length);
    if (!ended) return;
    this.#ended = ended;
    show({ ended: `${ended} (${choice.finish_reason})`, applied: formatControl(applied), remaining: "0", "time-left": "–" });
  }

  #showPrediction({ expected, interval }) {
    chart.interval = interval;
    show({ expected: `${Math.round(expected)}`, interval: `${Math.round(interval[0])} to ${Math.round(interval[1])}` });
  }

  #showProgress(remaining, numNew) {
    this.#startedAt ||= performance.now() - 1;
    const made = this.count - numNew;
    const speed = made ? (1000 * made) / (performance.now() - this.#startedAt) : null;
    show({ tokens: this.count, remaining: `about ${Math.round(remaining)}` });
    if (speed) show({ speed: `${speed.toFixed(1)} tok/s`, "time-left": formatSeconds(remaining / speed) });
  }
}

function clearAnswer(control) {
  showError(null);
  answer.clear();
  chart.clear(control?.target ?? null);
  byId("goal-key").hidden = !control?.target;
  const ids = ["expected", "interval", "tokens", "remaining", "time-left", "speed", "ended", "applied", "live"];
  show(Object.fromEntries(ids.map((id) => [id, id === "live" ? "" : "–"])));
}

async function ask() {
  const request = readRequest();
  const controller = new AbortController();
  clearAnswer(request.length_control);
  setRunning(controller);
  const progress = new Progress();
  try {
    for await (const chunk of streamChat(request, byId("key").value, controller.signal)) {
      for (const choice of chunk.choices) progress.take(choice);
    }
    show({ live: `Answer finished after ${progress.count} tokens, ended ${progress.ended}.` });
  } catch (error) {
    if (controller.signal.aborted) show({ ended: "stopped", "time-left": "–", live: "Stopped." });
    else {
      showError(error);
      show({ ended: "failed", "time-left": "–" });
    }
  } finally {
    answer.finish();
    setRunning(null);
  }
}

async function connect() {
  const status = byId("model");
  try {
    const { data } = await fetchJson("/v1/models", byId("key").value);
    model = data[0].id;
    status.textContent = model;
    status.dataset.state = "ready";
    showError(null);
    setRunning(running);
  } catch (error) {
    status.textContent = error.status === 401 ? "needs an API key" : "engine not ready, trying again…";
    if (error.status === 401) byId("key-field").hidden = false;
    else setTimeout(connect, 3000);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && model) ask();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("mode").addEventListener("change", showMode);
byId("key").addEventListener("change", connect);

setRunning(null);
showMode();
connect();
