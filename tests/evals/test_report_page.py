"""The report's page: what it holds, and that a browser shows it without a network."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.report.page import main
from evals.report.pictures import Pictures
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory
from tests.helpers.browser import needs_chromium, seen_in_a_browser
from tests.helpers.nasty_names import random_names
from tests.helpers.report_runs import grid_of_seeds, rows
from tests.helpers.scaling_runs import run_directory


@pytest.fixture
def runs(tmp_path):
    return grid_of_seeds(tmp_path)


def test_blocks_are_drawn_where_a_run_has_their_statistics(tmp_path, capsys):
    for name, level in (("with", 3.0), ("without", 3.5)):
        run_directory(tmp_path, rows(level), name, optimizer={"lr": level * 1e-3})
    lines = [
        {
            "step": step,
            "tokens": step * 128,
            "blocks": [
                {"block": "embedding", "weight_rms": 0.1},
                {"block": 0, "mixer": "attn", "weight_rms": 0.2, "logit_max": None},
            ],
        }
        for step in (50, 100, 150)
    ]
    RunDirectory(tmp_path / "with").write_blocks(lines)
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--no-fits"]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("Statistics of the blocks of") == 1
    assert "Statistics of the blocks of with" in page
    assert [p.name for p in (tmp_path / "out").glob("blocks-*.png")] == ["blocks-1.png"]


def test_names_are_text_on_the_page_and_in_pictures(tmp_path):
    folder = tmp_path / "<i>$grid$[red]"
    folder.mkdir()
    names = random_names(12)
    for number, name in enumerate(names):
        config: dict[str, Any] = {"data": {"path": f"data/{name}"}}
        directory = run_directory(folder, rows(3.0 + number), name, **config)
        (directory / "evals").mkdir()
        result = {"task": name, "score": 0.5, "step": 200}
        (directory / "evals/a.json").write_text(json.dumps(result))
    out = tmp_path / "$out$"
    assert main([str(folder), "--out", str(out), "--title", names[0]]) == 0
    page = (out / "report.html").read_text()
    cells = re.findall(r"<(?:td|th|title|h1)\b[^>]*>(.*?)</(?:td|th|title|h1)>", page, re.DOTALL)
    texts = [html.unescape(re.sub(r"</?button[^>]*>", "", cell)) for cell in cells]
    assert not [cell for cell in cells if re.search(r"<(?!/?button)", cell)]
    for name in names:
        assert f"data/{name}" in texts
        assert f"{name} score" in texts
    assert texts.count(names[0]) == 2
    assert page.count("<script>") == 1


def test_the_page_holds_all_of_it(runs, tmp_path):
    out = tmp_path / "out"
    assert main([str(runs), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    for text in (
        "grid: members are matched in flops",
        "± 0.0200",
        "step 50 of 200",
        "training loss",
        "perplexity bits per byte",
        "25.0",
        "5 runs, 3 settings",
    ):
        assert text in html.unescape(page), text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page), "nothing is loaded from elsewhere"
    assert "http" not in page.replace("http-equiv", "")
    for name in ("loss-by-tokens", "loss-by-flops", "loss-by-seconds", "speed"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_thirty_runs_fit_in_three_megabytes(tmp_path):
    """With 2,000 logged losses each, and maps of 48 blocks."""
    rng = np.random.default_rng(0)
    names = (
        "activation_rms",
        "gradient_rms",
        "weight_rms",
        "update_ratio",
        "horizon",
        "state_norm",
    )
    for number in range(30):
        lines = rows(3.0 + 0.01 * number, steps=2000, every=1)
        for row in lines[:-1]:
            row["loss"] += 0.05 * rng.normal()
        lines[-1]["valid_loss"] += 0.01 * rng.normal()
        train = {"steps": 2000, "seq_len": 16, "global_batch_tokens": 128}
        config = {"optimizer": {"lr": 1e-4 * (number + 1)}, "train": train}
        directory = run_directory(tmp_path, lines, f"run-{number:02}", **config)
        watched = [
            {
                "step": step,
                "tokens": step * 128,
                "blocks": [
                    {"block": i, "mixer": "attn", **{name: float(rng.random()) for name in names}}
                    for i in range(48)
                ],
            }
            for step in range(20, 2001, 20)
        ]
        RunDirectory(directory).write_blocks(watched)
    out = tmp_path / "out"
    assert main([str(tmp_path), "--out", str(out), "--no-fits"]) == 0
    page = out / "report.html"
    assert page.stat().st_size < 3e6
    assert page.read_text().count("Statistics of the blocks of") == 6


def test_pictures_beyond_a_pages_room_lie_beside_it(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    size = len(Pictures().embed("one", tmp_path / "red.png")["data"])
    pictures = Pictures(most_bytes=size)
    first, second = (pictures.embed(name, tmp_path / "red.png") for name in ("one", "two"))
    assert first["data"].startswith("data:image/png;base64,")
    assert second == {"heading": "two", "data": "", "name": "red.png"}


# What a reader does: sort by the final loss, twice; point at the curves, zoom, smooth, change axes,
# hide an arm; then say what is seen, to the page that this one is in.
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message || "a file"), true);
addEventListener("load", () => {
  const column = [...document.querySelectorAll("#runs th")]
    .findIndex((head) => head.textContent === "final loss");
  const values = () => [...document.querySelectorAll("#runs tbody tr")]
    .map((row) => Number(row.cells[column].dataset.sort));
  const head = document.querySelectorAll("#runs th")[column];
  head.querySelector("button").click();
  const up = values();
  head.querySelector("button").click();
  const down = values();
  const canvas = document.querySelector("#chart canvas"), box = canvas.getBoundingClientRect();
  const get = (name) => document.getElementById("chart-" + name);
  const point = (kind, x, y) => canvas.dispatchEvent(new PointerEvent(kind, {
    clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
  const set = (name, value) => {
    get(name).value = value;
    get(name).dispatchEvent(new Event(name === "smooth" ? "input" : "change"));
  };
  const check = (name) => get(name).click();
  const legend = () => [...document.querySelectorAll("#legend button")].map((b) => b.textContent);
  const pictures = { plain: canvas.toDataURL() }, told = { ends: legend() };
  const keep = (name) => { pictures[name] = canvas.toDataURL(); };
  for (let y = 0.05; y < 0.9 && document.querySelector(".tip").hidden; y += 0.05)
    point("pointermove", 0.5, y);
  told.tip = document.querySelector(".tip").innerText;
  told.where = get("where").textContent;
  told.label = canvas.getAttribute("aria-label");
  told.middle = legend();
  point("pointerleave", 0, 0);
  point("pointerdown", 0.4, 0.5); point("pointermove", 0.7, 0.5); point("pointerup", 0.7, 0.5);
  point("pointerleave", 0, 0);
  keep("zoomed");
  told.zoomed = !get("out").disabled;
  get("out").click();
  keep("again");
  told.out = get("out").disabled;
  set("smooth", 80); keep("smooth"); told.smooth = get("smooth-text").textContent;
  set("smooth", 0);
  for (const name of ["log-x", "log-y", "seeds"]) { check(name); keep(name); check(name); }
  told.x = [...get("x").options].map((option) => option.value);
  told.y = [...get("y").options].map((option) => option.value);
  for (const name of told.x.slice(1)) { set("x", name); keep(name); }
  set("x", "tokens");
  for (const name of told.y.slice(1)) { set("y", name); keep(name); }
  set("y", "training loss");
  document.querySelector("#legend button").click();
  keep("hidden"); told.hidden = legend();
  parent.postMessage({
    errors, up, down, told, width: innerWidth, wide: document.documentElement.scrollWidth,
    differing: new Set(Object.values(pictures)).size, same: pictures.plain === pictures.again,
    pictures: Object.keys(pictures).length, loss: head.getBoundingClientRect().right,
    overflows: [...document.querySelectorAll(".scroll")]
      .filter((part) => part.scrollWidth > part.clientWidth).length,
  }, "*");
});
</script>"""
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


def seen_by_a_browser(page, profile):
    """Return what PROBE says of the page, by its width."""
    page.write_text(page.read_text().replace("<body>", "<body>" + PROBE))
    frames = page.with_name("frames.html")
    frames.write_text(FRAMES)
    seen = seen_in_a_browser(frames.as_uri(), profile, window="1800,1000", milliseconds=20_000)
    return {found["width"]: found for found in seen}


@needs_chromium
def test_a_browser_shows_it(runs, tmp_path):
    main([str(runs), "--out", str(tmp_path / "out"), "--no-fits"])
    seen = seen_by_a_browser(tmp_path / "out/report.html", tmp_path / "profile")
    assert sorted(seen) == [390, 1280]
    for width, found in seen.items():
        assert found["errors"] == []
        assert found["up"] == sorted(found["up"])
        assert found["down"] == found["up"][::-1]
        assert len(found["up"]) == 3
        assert found["wide"] <= width, "no sideways scrolling of the page itself"
        assert found["loss"] <= width, "the final loss is seen without scrolling"
        told = found["told"]
        assert found["same"] and found["differing"] == found["pictures"] - 1, "each is another"
        assert told["zoomed"] and told["out"]
        assert told["x"] == ["tokens", "flops", "seconds", "step"]
        assert told["y"] == ["training loss", "validation loss", "bits per byte"]
        assert re.match(r"lr=0\.\d+\n\d\.\d{4}( ± \d\.\d{4})?\nstep \d+\n", told["tip"]), told[
            "tip"
        ]
        assert told["where"].startswith("values at 1") and told["where"].endswith(" tokens")
        assert told["label"] == "training loss (nats per token) over tokens, 3 curves"
        assert told["smooth"].startswith("mean of up to")
        assert told["ends"][0].startswith("lr=0.0032.7") and told["hidden"][0] == "lr=0.003"
        assert re.fullmatch(r"lr=0\.001\d\.\d{4} ± 0\.0200", told["ends"][1])
        assert told["middle"][0] != told["ends"][0]
        assert told["middle"][2] == "lr=0.0001", "which has ended before"
    assert seen[1280]["overflows"] == 0, "nothing is cut off"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "none: no such run directory"),
        (lambda folder: folder, r"nothing to report: .* holds no run \(no metrics.jsonl\)"),
        (lambda folder: run_directory(folder, []), "has logged no loss yet"),
    ],
)
def test_bad_input_is_one_sentence(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([str(make(tmp_path)), "--out", str(tmp_path / "out")])
