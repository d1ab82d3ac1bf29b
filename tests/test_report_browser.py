"""The report in a real browser: figures are drawn, nothing is wider than a phone or a desk, nothing is complained of.

Chromium is looked for in `$CHROME` and on PATH; without one these tests are skipped. Measuring is done by a script that
only the copy under test has; it leaves what it found in the page's own text.
"""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from recover.report.evidence_figures import figures_of
from recover.report.html import to_html
from tests.finished_runs import CONFIG, RUNS, WHOLE, many, run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROME = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROME is None, reason="no Chromium: set CHROME to one, or put it on PATH")
FRAME = """<!doctype html><meta charset="utf-8">
<iframe id="page" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="told"></pre><script>
const page = document.getElementById("page");
const box = one => one.getBoundingClientRect();
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
page.srcdoc = {source};
page.onload = () => {{
  const inner = page.contentDocument, root = inner.documentElement, wide = [];
  root.getBoundingClientRect();
  for (const one of inner.querySelectorAll("details")) one.open = true;
  for (const one of inner.querySelectorAll("body *")) {{
    if (one.closest(".scroll, pre, title, desc")) continue;
    const {{left, right, width}} = box(one);
    if (width && (right > {width} + 0.5 || left < -0.5)) wide.push(one.outerHTML.slice(0, 99));
  }}
  const marks = [...inner.querySelectorAll("figure svg.plot")].map(plot => {{
    const place = box(plot), drawn = [...plot.querySelectorAll(".mark path, .dot, .fill")];
    const texts = [...plot.querySelectorAll("text")], boxes = texts.map(box);
    return {{
      id: plot.closest("figure").id, width: place.width, drawn: drawn.length,
      inside: drawn.map(box).every(b =>
        b.width && b.left > place.left - 9 && b.right < place.right + 9 && b.bottom < place.bottom),
      small: boxes.filter(b => b.height < 9).length,
      meeting: texts.filter((one, row) => boxes.slice(0, row).some(b => meet(b, boxes[row]))).map(t => t.textContent),
      colors: [...new Set(drawn.map(one => getComputedStyle(one).fill))],
    }};
  }});
  const ground = getComputedStyle(inner.body).backgroundColor;
  const told = {{wide, marks, ground}};
  told.scroll = root.scrollWidth;
  document.getElementById("told").textContent = JSON.stringify(told);
}};
</script>"""
DARK, LIGHT = ("--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1")


def seen(folder: Path, source: str, width: int, *flags: str) -> dict:
    """What the page looks like in a window of this width."""
    host = folder / "host.html"
    quoted = json.dumps(source).replace("</", "<\\/")
    host.write_text(FRAME.format(source=quoted, width=width))
    command = [str(CHROME), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
    ]
    command += [*flags, "--dump-dom", host.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None
    return json.loads(unescape(told[1]))


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["RECOVERABLE", "RECOVERABLE, several sites", "INVALID"])
def test_figures_are_drawn_and_nothing_overflows(tmp_path, name, width):
    verdict, records = RUNS[name]
    found = seen(tmp_path, to_html(verdict, CONFIG, records, [(3, 17)]), width)
    assert found["wide"] == []
    assert found["scroll"] <= width
    assert {one["id"] for one in found["marks"]} == set(figures_of(verdict, records))
    for one in found["marks"]:
        assert one["drawn"] > 0, one
        assert one["inside"], one
        assert one["width"] > 250, one
        assert one["small"] == 0, one  # letters keep their size on a phone
        assert one["meeting"] == [], one


def test_dark_mode_turns_page_and_figures_over(tmp_path):
    source = to_html(RUNS["RECOVERABLE"][0], CONFIG, RUNS["RECOVERABLE"][1])
    light, dark = (seen(tmp_path, source, 800, flag) for flag in (LIGHT, DARK))
    assert (light["ground"], dark["ground"]) == ("rgb(255, 255, 255)", "rgb(20, 24, 28)")
    for day, night in zip(light["marks"], dark["marks"], strict=True):
        assert day["colors"]
        assert not set(day["colors"]) & set(night["colors"])


def test_five_hundred_examples_are_drawn_and_nothing_overflows(tmp_path):
    verdict, records = run(*many(500), **WHOLE)
    found = seen(tmp_path, to_html(verdict, CONFIG, records), 1400)
    assert found["wide"] == []
    assert sum(one["drawn"] for one in found["marks"]) > 6 * 500
