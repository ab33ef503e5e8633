"""Make the pictures of docs/observing.md from the runs of the page's commands.

    python benchmarks/observing_pictures.py [FOLDER]

Run where the page's commands were run. Maps and memory are taken as they were drawn; the two pages
are photographed in Chromium, 1280 and 390 pixels wide, and left out where there is none. FOLDER,
docs/pictures if it is not given, gets PNGs of few colours.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PAGES = {"watch": "runs/followed.html", "report": "runs/observed-report/report.html"}
DRAWN = {
    "blocks": "runs/observed-report/blocks-*.png",
    "memory": "runs/profiled/profiles/*-memory.png",
}
WINDOWS = {"": (1280, 900), "-narrow": (390, 800)}
WIDEST, COLOURS = 1280, 64


def main() -> None:
    """Make them, and print which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/pictures"))
    folder = parser.parse_args().folder
    made = {f"observing-{name}.png": the_one(pattern) for name, pattern in DRAWN.items()}
    pages = {name: the_one(pattern) for name, pattern in PAGES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in made.items():
        shrink(path, folder / name)
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        print("no Chromium is installed: the pictures of pages are left out")
    else:
        for name, page in pages.items():
            for suffix, window in WINDOWS.items():
                photograph(browser, page, window, folder / f"observing-{name}{suffix}.png")
    for path in sorted(folder.glob("observing-*.png")):
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def the_one(pattern: str) -> Path:
    """Return the file of a pattern, which must be there."""
    found = sorted(Path().glob(pattern))
    if not found:
        sys.exit(f"{pattern} is not here; expected the runs of docs/observing.md's commands")
    return found[-1]


def photograph(browser: str, page: Path, window: tuple[int, int], out: Path) -> None:
    """Take a picture of a page as a browser of that size shows it."""
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "page.png"
        subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--no-first-run", "--disable-background-networking", "--disable-sync"),
                f"--user-data-dir={scratch}/profile",
                "--virtual-time-budget=8000",
                f"--window-size={window[0]},{window[1]}",
                f"--screenshot={picture}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=240,
        )
        shrink(picture, out)


def shrink(picture: Path, out: Path) -> None:
    """Write a picture with few colours, at most so wide, and without the empty rows at its end."""
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    if image.width > WIDEST:
        image = image.resize(
            (WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS
        )
    background = Image.new("RGB", (image.width, 1), image.getpixel((0, image.height - 1)))
    height = image.height
    while height > 1 and image.crop((0, height - 1, image.width, height)).tobytes() == (
        background.tobytes()
    ):
        height -= 1
    image = image.crop((0, 0, image.width, min(height + 12, image.height)))
    image.quantize(COLOURS).save(out, optimize=True)


if __name__ == "__main__":
    main()
