"""The page of python -m launch watch: its server, and what a browser shows."""

from __future__ import annotations

import gzip
import html
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.watch import server as module
from launch.watch.server import WatchServer
from launch.watch.watched import Watched
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory
from tests.helpers.browser import needs_chromium, seen_in_a_browser
from tests.helpers.watched_runs import add_rows, make_run, rows


def serve(watched):
    server = WatchServer(watched, 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    return server


@pytest.fixture
def server(tmp_path):
    make_run(tmp_path / "runs")
    server = serve(Watched([str(tmp_path / "runs")]))
    yield server
    server.shutdown()
    server.server_close()


def get(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_server_answers_with_the_page_and_the_state(server):
    answer, content = get(server, "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b'id="state">null</script>' in content
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    answer, content = get(server, "/state?since=", **{"Accept-Encoding": "gzip"})
    state = json.loads(gzip.decompress(content))
    assert [run["name"] for run in state["runs"]] == ["run"]
    _, content = get(server, f"/state?since={state['version']}")
    assert json.loads(content)["runs"] == []
    assert get(server, "/config.yaml")[0].status == 404
    assert get(server, "/../run/config.yaml")[0].status == 404
    assert get(server, "/state", method="POST")[0].status == 501


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    # A site whose name leads here reads nothing.
    assert get(server, "/state", Host="example.com")[0].status == 403
    for host in ("localhost:1", "127.0.0.1"):
        assert get(server, "/state", Host=host)[0].status == 200


def test_a_port_that_is_taken(server, tmp_path):
    port = server.server_address[1]
    with pytest.raises(UserError, match=f"--port is {port}, which another program uses; expected"):
        main(["watch", str(tmp_path / "runs"), "--port", str(port)])


def test_it_ends_with_ctrl_c(tmp_path):
    make_run(tmp_path / "runs")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "watch", "runs", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.fullmatch(r"http://127.0.0.1:\d+ follows 1 run in runs; Ctrl-C ends it\n", line)
    with socket.create_connection(("127.0.0.1", int(re.findall(r":(\d+) ", line)[0])), timeout=30):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert process.communicate() == ("", "")


# What someone does who watches: sort by loss, look at a curve, hide runs; then say what is seen.
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message || "a file"), true);
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
const inked = (canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] && Math.max(data[i], data[i + 1], data[i + 2])
        - Math.min(data[i], data[i + 1], data[i + 2]) > 60) count++;
  return count;
};
const texts = (css) => [...document.querySelectorAll(css)].map((each) => each.textContent);
setInterval(() => {
  if (!document.querySelector("tr.run")) return;
  const canvas = document.getElementById("loss"), box = canvas.getBoundingClientRect();
  for (let y = 20; y < box.height - 30; y += 20) {
    if (document.querySelector(".plot output").textContent) break;
    canvas.dispatchEvent(new PointerEvent("pointermove",
      { clientX: box.left + box.width / 2, clientY: box.top + y }));
  }
  const pointed = document.querySelector(".plot output").textContent;
  const before = texts("td.name");
  const button = [...document.querySelectorAll("th button")].find((b) => b.textContent === "loss");
  button.click();
  const sorted = texts("td.name");
  button.click();
  const down = texts("td.name");
  button.click();
  const inks = [...document.querySelectorAll("canvas")].map(inked);
  const click = () => document.querySelectorAll("td.name button").forEach((each) => each.click());
  click();
  const hidden = inked(canvas);
  click();
  const wide = [...document.querySelectorAll("body *")].filter((each) => each.tagName !== "OPTION"
    && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.tagName + each.id);
  parent.document.body.dataset.seen = JSON.stringify({
    errors, before, sorted, down, pointed, inks, hidden, wide, screen: innerWidth,
    steps: texts("tr.run td:nth-child(3)"), alerts: texts("#alerts li"),
    counts: texts("#counts span"), groups: texts("tr.group b"),
    scripts: document.scripts.length, trouble: texts("#trouble"),
  });
}, 500);
</script>"""


class Growing(Watched):
    """A run grows, and another appears, after the first look."""

    def state(self, since=""):
        found = super().state(since)
        folder = Path(self.title)
        if not (folder / "later").exists():
            add_rows(folder / "g/good", rows(30, 21))
            make_run(folder, "later", started=False)
        self._refreshed = self._search_again = 0.0
        return found


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_follows_runs(width, tmp_path, monkeypatch):
    folder, whole = tmp_path / "runs", module.page()
    nasty = "<b>&amp;<img src=x onerror=alert(1)>"
    valid = {"step": 20, "tokens": 2560, "valid_loss": 4.0, "valid_bits_per_byte": 1.5}
    add_rows(make_run(folder / "g", "good", ["stopped by SIGINT"]), [valid])
    bad = make_run(folder / "g", nasty, ["warning: <i>x</i> " + "long" * 60])
    RunDirectory(bad).write_metrics(rows(20, loss=lambda step: 2.0 + step / 10))
    # Chromium makes no window of less than 500 pixels, but a frame in it.
    inner = html.escape(whole.replace("<body>", "<body>" + PROBE))
    frame = f'<body><iframe srcdoc="{inner}" style="width:{width}px;height:1200px;border:0">'
    monkeypatch.setattr(module, "page", lambda: frame)
    server = serve(Growing([str(folder)]))
    try:
        found = seen_in_a_browser(
            server.url, tmp_path / "profile", window="1400,1300", milliseconds=9000
        )
    finally:
        server.shutdown()
        server.server_close()
    assert found["errors"] == []
    assert found["screen"] == width
    assert found["wide"] == [], "nothing is cut off, no sideways scrolling"
    # What came after the page was opened.
    assert found["before"] == ["later", f"g/{nasty}", "g/good"]
    assert found["steps"] == ["20 / 200", "20 / 200", "30 / 200"]
    assert found["counts"] == ["3 stopped"]
    assert found["groups"] == [str(folder), str(folder / "g")]
    assert found["sorted"] == ["later", "g/good", f"g/{nasty}"], "within each group"
    assert found["down"] == ["later", f"g/{nasty}", "g/good"]
    assert re.search(r": \d\.\d{4} at step \d+", found["pointed"])
    assert min(found["inks"][0], found["inks"][2]) > 200
    assert found["inks"][1] > 5
    assert found["hidden"] < 5, "letters have colours at their edges"
    assert found["scripts"] == 3
    assert found["trouble"] == [""]
    assert any("the loss diverges" in text for text in found["alerts"])
    assert any("<i>x</i> long" in text for text in found["alerts"])
