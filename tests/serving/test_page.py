"""The page for people in headless Chromium: streams, faults, small windows, dark mode, keyboard."""

import gc
import json
import os
import shutil
from pathlib import Path

import pytest

from mlx_afm.serving import ServeConfig, running
from serving_client import REQUESTS, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="needs the browser extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
PICTURES = os.environ.get("MLX_AFM_PICTURES")  # a folder for screenshots
PHONE = {"width": 390, "height": 780}


@pytest.fixture(autouse=True, scope="module")
def collect_what_was_left_open():
    """What foreign libraries never close is found here, and not by the collector in the middle of a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(model_folder, served_adapters):
    """A server of its own: the page answers with a system prompt that fits the bundled model."""
    adapters = {name: served_adapters[name] for name in ("small", "some")}
    with running(model_folder, adapters, ServeConfig(port=0, model_id="base", rows=4)) as server:
        yield server


@pytest.fixture
def open_page(browser, site):
    """A function that opens the page; whatever it asks another server for, or says in its console, is a fault."""
    contexts, faults = [], []

    def make(url=None, quiet=(), **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console", lambda m: None if m.type != "error" or any(q in m.text for q in quiet) else faults.append(m.text)
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((url or site.url, "data:")) else faults.append(r.url))
        page.goto(url or site.url)
        wait_until(
            page, "document.querySelectorAll('#left option').length > 0 || !document.getElementById('key-label').hidden"
        )
        return page

    yield make
    for context in contexts:
        context.close()
    assert faults == []


def wait_until(page, condition):
    """Waits until a JavaScript condition holds; the page's own policy forbids Playwright to do so within the page."""
    wait_for(lambda: page.evaluate(condition), seconds=30)


def picture(page, name):
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def ask(page, text):
    page.fill("#question", text)
    page.click("#send")


def finished(page, count=1):
    wait_until(page, f"document.querySelectorAll('article').length >= {count} && !document.querySelector('.running')")
    return [card.inner_text() for card in page.query_selector_all("article p:not(.error)")]


def test_two_answers_side_by_side(open_page, alone):
    page = open_page(viewport={"width": 1100, "height": 700})
    assert page.title() == "mlx-afm"
    assert page.input_value("#left") == "base"
    assert page.input_value("#right") == "small"
    page.click("summary")
    page.fill("#system", "Answer with one shell command.")
    page.fill("#limit", "24")
    ask(page, REQUESTS[0])
    texts = finished(page, 2)
    assert texts == [alone(model, REQUESTS[0], max_tokens=24) for model in ("base", "small")]
    left, right = (card.bounding_box() for card in page.query_selector_all("article"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert "tokens/s" in page.inner_text("article small")
    picture(page, "page")
    page.select_option("#right", "some")
    ask(page, REQUESTS[1])
    assert len(finished(page, 4)) == 4
    assert page.inner_text("article:nth-of-type(2) h2") == "small"
    assert [h.inner_text() for h in page.query_selector_all("h2")] == ["base", "small", "base", "some"]


def test_one_model_alone_and_a_conversation(open_page):
    page = open_page()
    page.select_option("#right", "")
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    page.fill("#limit", "6")
    ask(page, "first")
    (answer,) = finished(page, 1)
    ask(page, "second")
    finished(page, 2)
    assert [m["role"] for m in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert sent[1]["messages"][1]["content"] == answer
    page.click("#clear")
    assert page.is_visible("#empty")
    ask(page, "third")
    finished(page, 1)
    assert [m["content"] for m in sent[2]["messages"]] == ["third"]


def endless(route):
    """A request whose answer does not end by itself."""
    body = {**route.request.post_data_json, "logit_bias": {"2": -100, "4": -100}}
    route.continue_(post_data=json.dumps(body))


def test_answers_come_as_they_are_made_and_can_be_stopped(open_page, site):
    for stop in ("#stop", "Escape"):
        page = open_page()
        page.route("**/v1/chat/completions", endless)
        page.fill("#limit", "3000")
        ask(page, "go on")
        wait_until(page, "document.querySelector('article p').textContent.length > 40")
        assert page.is_visible("#stop")
        assert not page.is_visible("#send")
        if stop == "Escape":
            page.keyboard.press("Escape")
        else:
            page.click(stop)
        texts = finished(page, 2)
        assert all(texts)
        assert "stopped" in page.inner_text("article small")
        assert page.is_visible("#send")
        page.unroute("**/v1/chat/completions")
        page.fill("#limit", "4")
        ask(page, "again")
        finished(page, 4)


def test_faults_are_shown(open_page, site):
    page = open_page(quiet=("status of 400", "status of 500", "ERR_FAILED"))
    page.fill("#limit", "4096")
    ask(page, "too much")
    page.wait_for_selector(".error")
    assert "do not fit in the context" in page.inner_text(".error")
    picture(page, "page-error")
    page.fill("#limit", "4")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body="it broke"))
    ask(page, "broken")
    wait_until(page, "document.querySelectorAll('.error').length >= 4")
    assert "it broke" in page.query_selector_all(".error")[-1].inner_text()
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "gone")
    wait_until(page, "document.querySelectorAll('.error').length >= 6")
    page.unroute("**/v1/chat/completions")
    ask(page, "well")
    wait_until(page, "document.querySelectorAll('article').length >= 8 && !document.querySelector('.running')")
    assert len(page.query_selector_all(".error")) == 6


def test_an_error_in_the_middle_of_a_stream(open_page, model_folder):
    config = ServeConfig(port=0, model_id="base", request_seconds=0.7)
    with running(model_folder, {}, config) as quick:
        page = open_page(quick.url)
        page.route("**/v1/chat/completions", endless)
        page.fill("#limit", "3000")
        ask(page, "go on")
        page.wait_for_selector(".error")
        assert "took too long" in page.inner_text(".error")


def test_a_key_is_asked_for(open_page, model_folder):
    with running(model_folder, {}, ServeConfig(port=0, model_id="base", api_key="correct-horse")) as closed:
        page = open_page(closed.url, quiet=("status of 401",))
        assert page.is_visible("#key")
        page.fill("#key", "correct-horse")
        page.press("#key", "Tab")
        wait_until(page, "document.querySelectorAll('#left option').length > 0")
        page.fill("#limit", "4")
        ask(page, "hi")
        assert finished(page)


def test_text_is_no_markup(open_page):
    page = open_page()
    page.fill("#limit", "2")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body='data: {"choices":[{"delta":{"content":"<img src=x onerror=alert(1)>"},"finish_reason":"stop"}]}\n\n',
        ),
    )
    ask(page, "<b>bold</b>")
    assert finished(page, 2)[0] == "<img src=x onerror=alert(1)>"
    assert page.inner_text(".question") == "<b>bold</b>"
    assert page.query_selector_all("main img, main b") == []


def test_a_phone(open_page):
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    page.fill("#limit", "12")
    ask(page, REQUESTS[2])
    finished(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
    left, right = (card.bounding_box() for card in page.query_selector_all("article"))
    assert right["y"] >= left["y"] + left["height"], "one below the other"
    for button in ("#send", "#clear", "#question"):
        box = page.query_selector(button).bounding_box()
        assert box["y"] + box["height"] <= PHONE["height"]
        assert box["height"] >= 40
    picture(page, "page-phone")


def contrast(page, selector):
    """Ratio of the luminances of text and background, as WCAG has it."""
    return page.evaluate(
        """selector => {
          const found = document.querySelector(selector);
          const values = text => text.match(/[0-9.]+/g).map(Number);
          let behind = found;
          while (values(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
          const light = text => values(text).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const [a, b] = [light(getComputedStyle(found).color), light(getComputedStyle(behind).backgroundColor)];
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(scheme, open_page):
    page = open_page(color_scheme=scheme, quiet=("status of 400",), viewport={"width": 1100, "height": 700})
    page.fill("#limit", "4096")
    ask(page, "too much")
    page.wait_for_selector(".error")
    page.fill("#limit", "12")
    ask(page, REQUESTS[0])
    finished(page, 4)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0]")
    assert (light > 128) == (scheme == "light")
    for selector in (
        "body",
        "h1",
        "label",
        "select",
        ".question",
        "article p",
        "article h2",
        "article small",
        ".error",
        "#send",
    ):
        assert contrast(page, selector) >= 4.5, selector
    if scheme == "dark":
        picture(page, "page-dark")


def test_the_keyboard_alone(open_page):
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "question"
    page.fill("#limit", "6")
    page.focus("#question")
    page.keyboard.type("one line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("another")
    assert page.input_value("#question") == "one line\nanother"
    page.keyboard.press("Enter")
    finished(page, 2)
    assert page.inner_text(".question") == "one line\nanother"
    assert page.evaluate("document.activeElement.id") == "question", "the next question can be typed"
    assert page.inner_text("#status") == "Done"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "clear"
    page.keyboard.press("Enter")
    assert page.is_visible("#empty")
    page.focus("#left")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#left") != "base"
    for selector in ("#left", "#right", "#question", "#send", "#temperature", "#limit"):
        name = page.evaluate(
            "s => (e => e.ariaLabel || e.labels[0]?.textContent || e.textContent)(document.querySelector(s))",
            selector,
        )
        assert name.strip(), selector
