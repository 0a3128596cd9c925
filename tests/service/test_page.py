"""The page in a real browser, against the gateway over a scripted engine. No outside host is reached."""

from __future__ import annotations

import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from fake_engine import DONE, ERROR_EVENT, FakeEngine, Step, chunk, json_response, usage
from lenvm_service.app import build_app
from lenvm_service.config import GatewayConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

WORDS = (
    "A lighthouse keeper counts the waves at dusk. Each one arrives a little later than the last, and he writes "
    "the times in a ledger that nobody reads. When the lamp is lit the numbers stop mattering: there is only the "
    "beam, the dark water, and the patient work of turning. By morning the ledger is closed, the brass is polished, "
    "and the sea has forgotten all about him."
)
GAMMA = 0.997


def story(ended: str = "natural", applied: dict | None = None) -> list[Step]:
    """A stream of this story: values from a remaining length that is predicted too long at first."""
    words = [word + " " for word in WORDS.split(" ")]
    steps: list[Step] = []
    for i, word in enumerate(words):
        remaining = (len(words) - i) * (1.35 - 0.35 * i / len(words) + 0.1 * math.sin(i / 4))
        numbers = {"values": [GAMMA**remaining - 1], "remaining": [remaining]}
        if i == 0:
            numbers["prediction"] = {"expected": 92.4, "interval": [41, 160]}
        steps.append(chunk(word, **numbers))
    steps += [chunk("", values=[-0.0005], remaining=[0.2]), chunk("", finish="stop", applied=applied, ended=ended)]
    return [*steps, usage(12, len(words) + 1), DONE]


class Site:
    """A gateway on a free port, its engine, and where screenshots go when they are asked for."""

    def __init__(self, engine: FakeEngine, url: str) -> None:
        self.engine = engine
        self.url = url

    def shoot(self, page, name: str) -> None:
        if folder := os.environ.get("LENVM_TEST_SCREENSHOTS"):
            page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.fixture
def site() -> Iterator[Site]:
    engine = FakeEngine()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = build_app(GatewayConfig(api_keys=()), engine)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Site(engine, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(site, browser):
    """The page, ready to ask. Fails on script errors, CSP violations and requests to other hosts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if "Content Security" in message.text else None)
    page.on(
        "request", lambda request: None if request.url.startswith((site.url, "data:")) else troubles.append(request.url)
    )
    page.goto(site.url)
    page.wait_for_selector('#model[data-state="ready"]')
    yield page
    page.close()
    assert troubles == []


def ask(page, question: str = "Tell me about a lighthouse") -> None:
    page.fill("#question", question)
    page.click("#send")


def wait_end(page) -> None:
    page.wait_for_selector("#stop[disabled]")


def test_answer_streams_shaded_with_its_figures(site, page):
    seen, events = threading.Event(), story()
    site.engine.play(*events[:30], seen, *events[30:])
    ask(page)
    page.wait_for_selector(".token >> nth=25")
    assert page.is_disabled("#send")
    assert page.is_enabled("#stop")
    assert page.text_content("#remaining").startswith("about ")
    assert page.text_content("#time-left").endswith("s")
    site.shoot(page, "streaming")
    seen.set()
    wait_end(page)
    assert page.text_content("#answer").strip().removesuffix("end").strip() == WORDS
    num_tokens = len(WORDS.split(" ")) + 1
    assert page.text_content("#tokens") == str(num_tokens)
    assert page.text_content("#expected") == "92"
    assert page.text_content("#interval") == "41 to 160"
    assert page.text_content("#ended") == "natural (stop)"
    assert page.text_content("#applied") == "no control"
    shade = "nodes => nodes.map((node) => parseFloat(node.style.getPropertyValue('--far')))"
    shades = page.eval_on_selector_all(".token", shade)
    assert len(shades) == num_tokens
    assert shades[0] == pytest.approx(math.sqrt(1 - GAMMA ** (1.35 * (num_tokens - 1))), abs=0.001)
    assert shades[-1] < 0.03
    colours = page.eval_on_selector_all(".token", "nodes => nodes.map((n) => getComputedStyle(n).backgroundColor)")
    assert colours[0] != colours[-2]
    assert page.eval_on_selector("#chart .curve", "node => node.getTotalLength()") > 100
    assert "Answer finished" in page.text_content("#live")
    site.shoot(page, "finished")


def test_hover_and_keys_show_value_and_remaining(site, page):
    site.engine.play(*story())
    ask(page)
    wait_end(page)
    page.hover(".token >> nth=10")
    assert "token 11\nvalue -0." in page.text_content("#tip")
    assert "remaining" in page.text_content("#tip")
    site.shoot(page, "hover")
    page.hover("h1")
    assert page.is_hidden("#tip")
    page.focus("#answer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#tip").startswith("token 2\n")
    page.keyboard.press("End")
    assert page.text_content(".token.active") == "end"
    page.hover("#chart", position={"x": 200, "y": 60})
    assert page.locator(".token.active").count() == 1


@pytest.mark.parametrize(
    ("mode", "amount", "control"),
    [
        ("none", None, None),
        ("at_most", "80", {"mode": "at_most", "target": 80}),
        ("equal", "80", {"mode": "equal", "target": 80}),
        ("at_least", "80", {"mode": "at_least", "target": 80}),
        ("tilt", "-2.5", {"mode": "tilt", "beta": -2.5}),
        ("scale", "0.5", {"mode": "scale", "factor": 0.5}),
    ],
)
def test_every_control_reaches_the_engine(site, page, mode, amount, control):
    applied = None if control is None else {**control, "strategy": "natural"}
    site.engine.play(*story(applied=applied))
    page.select_option("#mode", mode)
    assert page.is_visible("#amount") == (amount is not None)
    if amount:
        page.fill("#amount", amount)
    page.fill("#temperature", "0.3")
    page.fill("#max-tokens", "200")
    ask(page)
    wait_end(page)
    body = site.engine.bodies[0]
    sent = {name: value for name, value in body["custom_params"]["lenvm"].items() if name not in ("values", "strategy")}
    assert sent == (control or {})
    assert (body["temperature"], body["max_completion_tokens"]) == (0.3, 200)
    assert (page.text_content("#applied") == "no control") == (control is None)
    assert page.locator("#chart .goal").count() == (1 if control and "target" in control else 0)
    site.shoot(page, f"mode-{mode}")


def test_several_tokens_and_late_text_share_a_piece(site, page):
    chunks = [
        chunk("", values=[-0.5], remaining=[230.0]),
        chunk("né", values=[-0.4], remaining=[170.0]),
        chunk(" plus ultra", values=[-0.2, -0.1, -0.1], remaining=[74.0, 35.0, 34.0]),
        chunk("", finish="length", applied=None, ended="cap"),
        DONE,
    ]
    site.engine.play(*chunks)
    ask(page)
    wait_end(page)
    assert page.locator(".token").all_text_contents() == ["né", " plus ultra"]
    page.hover(".token >> nth=0")
    assert page.text_content("#tip") == "tokens 1 to 2\nvalue -0.500, -0.400\nremaining 230, 170 tokens"
    assert page.text_content("#ended") == "cap (length)"


def test_stop_aborts_the_engines_request(site, page):
    site.engine.play(*story()[:40], 60.0)
    ask(page)
    page.wait_for_selector(".token >> nth=19")
    page.click("#stop")
    wait_end(page)
    assert page.text_content("#ended") == "stopped"
    assert page.is_hidden("#error")
    deadline = time.monotonic() + 3
    while not site.engine.script.closed.is_set() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert site.engine.script.closed.is_set()


def test_errors_are_shown_and_the_next_question_works(site, page):
    site.engine.play(chunk("So", values=[-0.5], remaining=[230.0]), ERROR_EVENT, DONE)
    ask(page)
    page.wait_for_selector("#error:not([hidden])")
    assert "out of memory" in page.text_content("#error")
    site.shoot(page, "error")
    page.select_option("#mode", "equal")
    page.fill("#amount", "600")
    ask(page)
    page.wait_for_selector("#error:has-text('length_control.target')")
    site.engine.answer = lambda body: json_response({"message": "no"}, 500)
    page.select_option("#mode", "none")
    ask(page)
    page.wait_for_selector("#error:has-text('failed')")
    site.engine.play(*story())
    ask(page)
    wait_end(page)
    assert page.is_hidden("#error")


def test_keyboard_only(site, page):
    site.engine.play(*story(), 0.01)
    page.focus("#question")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".token.end")
    site.engine.play(*story()[:20], 60.0)
    page.focus("#question")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:not([disabled])")
    page.keyboard.press("Escape")
    wait_end(page)
    assert page.text_content("#ended") == "stopped"


def test_controls_have_labels_and_nothing_overflows_when_narrow(site, page):
    for control in page.locator("input:visible, select, textarea, button").all():
        assert control.evaluate("node => Boolean(node.labels?.length || node.textContent.trim())")
    site.engine.play(*story())
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": 360, "height": 780})
        ask(page)
        wait_end(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        site.shoot(page, f"narrow-{scheme}")
    page.set_viewport_size({"width": 1280, "height": 900})
    site.shoot(page, "dark")


def test_needs_no_outside_host_by_its_own_headers(site):
    response = httpx.get(site.url)
    assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    for name in ("page.js", "chart.js", "answer.js", "stream.js", "page.css"):
        asset = httpx.get(f"{site.url}page/{name}")
        assert asset.status_code == 200
        assert "http://" not in asset.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in asset.text
