"""The HTML page: self-contained, safe, and alive in a browser where there is one."""

import html
import json
import re
import shutil
import subprocess

import pytest
from faults.cases import faulty, ours, reference

from scarlet_jax.tools.parity import page
from scarlet_jax.tools.parity.compare import Comparison
from scarlet_jax.tools.parity.terminal import sentence

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def render(pair):
    comparison = Comparison(*pair)
    report = comparison.report()
    return report, page.render(report, comparison)


@pytest.fixture(scope="module")
def broken():
    return render(faulty("kv-heads-tiled"))


def test_nothing_is_loaded_from_elsewhere(broken):
    _, text = broken
    links = re.findall(r"(?:src|href)\s*=|url\(|@import|fetch\(|https?://[^\s\"']+", text)
    assert set(links) <= {"http://www.w3.org/2000/svg"}  # a name space, not an address to load


def test_data_survives_the_page(broken):
    report, text = broken
    payload = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL).group(1)
    data = json.loads(payload)
    assert data["report"]["first"] == report["first"]
    assert set(data["curves"]) == {tap["name"] for tap in report["taps"]}
    assert html.escape(sentence(report)) in text


def test_a_name_with_markup_stays_text():
    comparison = Comparison(ours(), reference())
    report = comparison.report() | {"model": "</script><script>alert(1)</script>"}
    text = page.render(report, comparison)
    assert "<script>alert" not in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_it_runs_in_a_browser(tmp_path, broken):
    report, text = broken
    path = tmp_path / "report.html"
    # What the page draws is added to its title's element, so that a dump of the document shows it.
    probe = """<script>{
    const cells = document.querySelectorAll("#map td[data-tap]").length;
    document.querySelector('#map td[data-tap="ffn_up-1"]').click();
    const curves = document.querySelectorAll("#detail svg polyline").length;
    document.querySelector("input[value=whole]").click();
    const first = document.querySelector("#map td.first").dataset.tap;
    document.title = ["drawn", cells, curves, first, document.getElementById("tapname").textContent].join("|");
    }</script></body>"""
    path.write_text(text.replace("</body>", probe))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    word, cells, curves, first, chosen = title.split("|")
    assert word == "drawn"
    assert int(cells) == len(report["taps"])
    assert int(curves) >= 2
    assert (first, chosen) == (report["first"]["tap"], "ffn_up-1")
