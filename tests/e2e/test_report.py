"""A real federation's page in a real browser: it reads well in every scheme and width, and asks nobody for anything."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from maskdm.run.processes import free_port
from maskdm.run.runfolder import append_line
from maskdm.training.checkpoint import load_checkpoint

from .conftest import Started, processes_with, wait_until, write_faces

pytestmark = pytest.mark.slow

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
SCHEMES = ("light", "dark")

# Every piece of text that is seen: what it is, its colour, the colour behind it, and whether it is large.
TEXTS = """
const visible = (element) => {
  const style = getComputedStyle(element), box = element.getBoundingClientRect();
  return style.visibility !== 'hidden' && style.display !== 'none' && box.width > 1 && box.height > 1;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!/rgba\\(.*, 0\\)|transparent/.test(colour)) return colour;
  }
  return 'rgb(255, 255, 255)';
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
  if (!text || !visible(element)) continue;
  const style = getComputedStyle(element), size = parseFloat(style.fontSize);
  const front = element.closest('svg') ? style.fill : style.color;
  found.push([text.slice(0, 60), front, behind(element), size >= 24 || (size >= 18.66 && style.fontWeight >= 700)]);
}
return found;
"""


class Browser:
    """Chromium with nothing of anybody's in it."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def show(self, address: str, scheme: str, width: int) -> None:
        """Load a page anew."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get(address)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def picture(self, path: Path) -> None:
        """All of the page, as PNG."""
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(found["data"]))

    def paper(self, path: Path) -> None:
        """As it is printed, A4."""
        options = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", options)["data"]))

    def asked_for(self) -> set[str]:
        """Addresses that were loaded since the last call, without what lies inside the page."""
        logged = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        sent = [about["params"]["request"]["url"] for about in logged if about["method"] == "Network.requestWillBeSent"]
        return {address for address in sent if not address.startswith(("data:", "about:"))}

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


def channels(colour: str) -> tuple[float, float, float]:
    red, green, blue = (float(number) for number in re.findall(r"[\d.]+", colour)[:3])
    return red, green, blue


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [(c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio (WCAG 2.2), 1 to 21."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def assert_reads_well(browser: Browser, address: str, out: Path, name: str) -> None:
    """In both schemes, on a phone and on a desk; screenshots are left in `out`."""
    browser.asked_for()
    browser.complaints()
    for scheme in SCHEMES:
        for width in (1200, 360):
            browser.show(address, scheme, width)
            browser.picture(out / f"{name}-{scheme}-{width}.png")
            assert browser.run("return document.documentElement.scrollWidth") <= width
            texts = browser.run(TEXTS)
            assert len(texts) > 50
            poor = [text for text in texts if contrast(text[1], text[2]) < (3 if text[3] else 4.5)]
            assert not poor, f"{scheme}, {width}: {poor}"
            paper = luminance(browser.run("return getComputedStyle(document.body).backgroundColor"))
            assert paper > 0.9 if scheme == "light" else paper < 0.05
    browser.paper(out / f"{name}.pdf")
    images = browser.run("return [...document.images].map(i => [i.alt, i.complete && i.naturalWidth])")
    assert images
    assert all(alt and width for alt, width in images)
    assert browser.asked_for() <= {address}
    assert browser.complaints() == []
    print(f"screenshots: {out}")


@pytest.fixture(scope="module")
def federation(prior: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds with two real clients; afterwards something went wrong."""
    folder = tmp_path_factory.mktemp("report")
    for name, domain in (("a", "clinic"), ("b", "workshop")):
        write_faces(folder / name, 90, domain, "face")  # type: ignore[arg-type]
    command = ["maskdm-server", "simulate", "--prior", str(prior), "--data", "a", "--data", "b", "--clients", "2"]
    run = Started([*command, "--out", "fed", "--rounds", "3", "--sample-every", "1"], folder, "simulate")
    assert run.wait() == 0, run.output()
    for kind in ("rejected", "silent"):
        event = {
            "event": kind,
            "round": 2,
            "site": "<b>evil</b>",
            "reason": "its norm 9 is too long <script>x</script>",
        }
        append_line(folder / "fed" / "events.jsonl", {"time": 1.8e9, **event})
    return folder / "fed"


def test_the_page_of_a_federation_reads_well_everywhere_and_asks_nobody(
    federation: Path, browser: Browser, tmp_path: Path
) -> None:
    report = Started(["maskdm-server", "report", str(federation)], tmp_path, "report")
    assert report.wait() == 0, report.output()
    page = federation / "report.html"
    assert report.output().splitlines() == [str(page)]
    assert page.stat().st_size < 3_000_000
    assert_reads_well(browser, page.as_uri(), tmp_path, "federation")
    assert browser.run("return document.images.length") == len(list((federation / "samples").iterdir()))
    said = browser.run("return document.body.innerText")
    assert "3 of 3 rounds are done" in said
    assert "<script>x</script>" in said
    assert "whole" in said


def test_grids_of_the_rounds_are_drawn_while_they_run(federation: Path) -> None:
    names = {path.name for path in (federation / "samples").iterdir()}
    assert {"before.png", "after.png"} < names
    assert names - {"before.png", "after.png"} <= {"round-000001.png", "round-000002.png"}
    assert names & {"round-000001.png", "round-000002.png"}


def test_the_page_of_a_run_reads_well_everywhere(prior: Path, browser: Browser, tmp_path: Path) -> None:
    run = prior.parent
    report = Started(["maskdm-server", "report", str(run)], tmp_path, "report")
    assert report.wait() == 0, report.output()
    assert_reads_well(browser, (run / "report.html").as_uri(), tmp_path, "run")
    assert "The run is finished." in browser.run("return document.body.innerText")
    assert len(list((run / "samples").glob("*.png"))) == 8


def test_the_dashboard_follows_a_federation_in_the_browser(workplace: Path, prior: Path, browser: Browser) -> None:
    write_faces(workplace / "local", 90, "clinic", "face")
    port, look = free_port(), free_port()
    serve = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--min-clients", "1", "--insecure"]
    server = Started([*serve, "--port", str(port), "--dashboard", str(look), "--rounds", "40"], workplace, "serve")
    server.until(f"dashboard: http://127.0.0.1:{look}/")
    server.until("listening on")
    (address,) = re.findall(rf"dashboard: (http://127\.0\.0\.1:{look}/[\w-]+/) ", server.output())

    def says(text: str) -> bool:
        browser.show(address, "light", 1200)
        return text in browser.run("return document.body.innerText")

    wait_until(lambda: says("waiting for clients"), server.output)
    client = Started(
        ["maskdm-client", "--data", "./local", "--server", f"127.0.0.1:{port}", "--out", "site"], workplace, "client"
    )
    wait_until(lambda: says("2 of 40 rounds are done"), server.output)
    assert_reads_well(browser, address, workplace, "dashboard")
    assert server.interrupt() == 130, server.output()
    assert client.interrupt() == 130, client.output()
    wait_until(lambda: not processes_with(str(workplace)), lambda: str(processes_with(str(workplace))))
    assert load_checkpoint(workplace / "fed" / "model.safetensors")[1].rounds >= 2
