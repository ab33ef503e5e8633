"""A decision between arms on a report's page: the verdict, what was believed, every step."""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict

import pytest

from evals.report.page import main
from evals.scaling.decide import LOSS, Campaign, Rule, Run, Target
from evals.scaling.decide.record import LOG, PLAN, TARGETS, VERDICT, hash_of, hash_of_plan
from launch.decisions.log import line_of
from tests.helpers.browser import needs_chromium, seen_in_a_browser
from tests.helpers.report_runs import rows
from tests.helpers.scaling_runs import run_directory

ARMS = ("<i>plain</i>", "hybrid")
TARGET = Target(1e9, 2e10)


@pytest.fixture(scope="module")
def decision(tmp_path_factory):
    """A decision that ended, with one of its runs."""
    folder = tmp_path_factory.mktemp("decision") / "which"
    folder.mkdir()
    possible = [
        Run(arm, size, 20 * size, 0, 2 + 10 * size**-0.3 + 0.05 * (arm == "hybrid"))
        for arm in ARMS
        for size in (20e6, 60e6, 150e6, 300e6)
    ]
    rule = Rule()
    content = {
        "decide": {
            "metric": "loss",
            "prior": "loss",
            "confidence": 0.95,
            "budget": 0.3,
            "cost": "flops",
        },
        "rule": asdict(rule),
        "prior": asdict(LOSS),
        "targets": {arm: asdict(TARGET) for arm in ARMS},
        "runs": [[r.arm, r.parameters, r.tokens, r.seed, r.cost] for r in possible],
        "left_out": {"odd": "no such layer"},
    }
    digest = hash_of_plan(json.loads(json.dumps(content)))
    run_directory(folder, rows(3.0), "one")
    (folder / PLAN).write_text(json.dumps({**content, "hash": digest}))
    campaign = Campaign(dict.fromkeys(ARMS, TARGET), LOSS, rule, nats=True)
    done: list[Run] = []
    lines: list[str] = []
    taken = True
    while taken:
        step = campaign.step(done, [run for run in possible if run not in done])
        lines.append(line_of(step, done, digest, hash_of(lines[-1]) if lines else ""))
        taken = step.taken is not None
        done += step.taken.runs if step.taken else ()
    assert step.reason == "verdict"
    (folder / LOG).write_text("".join(f"{line}\n" for line in lines))
    (folder / VERDICT).write_text(json.dumps({"said": "plain is better, P = 0.97."}))
    found = {"plan": digest, "said": ["plain: 2.0100", "the verdict held"]}
    (folder / TARGETS).write_text(json.dumps(found))
    return folder


def test_the_page_says_what_was_decided_and_how(decision, tmp_path):
    assert main([str(decision), "--out", str(tmp_path), "--no-fits"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<i>plain" not in page
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for words in (
        "Decision: which",
        "plain is better, P = 0.97.",
        "The target runs, made afterwards:",
        "the verdict held",
        "odd was left out: no such layer",
        "at confidence 0.95, for at most 30% of the target runs",
        "P(<i>plain</i> best)",
        "the two smallest sizes come first",
        "says most for its cost",
        "it is sure enough",
    ):
        assert words in text, words
    steps = len((decision / LOG).read_text().splitlines())
    (table,) = re.findall(r'<table class="steps">(.*?)</table>', page, re.DOTALL)
    assert table.count("<tr>") == steps + 1
    for name in ("differences", "beliefs"):
        assert (tmp_path / f"decision-1-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page), "nothing is loaded from elsewhere"


def test_a_changed_plan_is_a_note_and_the_runs_are_shown(decision, tmp_path):
    text = (decision / PLAN).read_text()
    try:
        (decision / PLAN).write_text(text.replace('"budget": 0.3', '"budget": 0.4', 1))
        assert main([str(decision), "--out", str(tmp_path), "--no-fits"]) == 0
    finally:
        (decision / PLAN).write_text(text)
    page = (tmp_path / "report.html").read_text()
    assert "it was changed" in page
    assert "Decision:" not in page


PROBE = """<script>addEventListener("load", () => parent.postMessage({
  width: innerWidth, wide: document.documentElement.scrollWidth,
  pictures: [...document.querySelectorAll(".pictures img")].map((i) => i.clientWidth),
  rows: document.querySelectorAll(".steps tbody tr").length }, "*"));</script>"""
FRAMES = """<body data-seen="">
<script>
const seen = [];
addEventListener("message", (event) => {
  seen.push(event.data);
  document.body.dataset.seen = JSON.stringify(seen);
});
</script>
<iframe src="report.html" style="border: 0; width: 1280px; height: 900px"></iframe>
<iframe src="report.html" style="border: 0; width: 390px; height: 800px"></iframe>"""


@needs_chromium
def test_a_browser_shows_both_pictures_without_scrolling_sideways(decision, tmp_path):
    main([str(decision), "--out", str(tmp_path / "out"), "--no-fits"])
    page = tmp_path / "out/report.html"
    page.write_text(page.read_text().replace("<body>", "<body>" + PROBE))
    frames = page.with_name("frames.html")
    frames.write_text(FRAMES)
    seen = seen_in_a_browser(
        frames.as_uri(), tmp_path / "profile", window="1800,1000", milliseconds=10_000
    )
    assert sorted(found["width"] for found in seen) == [390, 1280]
    for found in seen:
        assert found["wide"] <= found["width"]
        assert len(found["pictures"]) == 2
        assert min(found["pictures"]) > 300
        assert found["rows"] == len((decision / LOG).read_text().splitlines())
