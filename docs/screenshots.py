"""A run's page as a browser shows it: `python docs/screenshots.py results/reference` writes screenshots/ there.

Wants chromium. A headless window is no narrower than 500 pixels, so the page stands in a frame of its width.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

SIZES = {"desktop": (1280, 1600), "phone": (390, 844)}  # width, height in pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def take(page: Path, width: int, height: int, target: Path) -> None:
    """One picture of the top of `page`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ValueError(f"None of {', '.join(BROWSERS)} is installed: install one of them.")
    with tempfile.TemporaryDirectory() as folder:
        frame, shot = Path(folder) / "frame.html", Path(folder) / "shot.png"
        style = f"border: 0; width: {width}px; height: {height}px"
        frame.write_text(f'<body style="margin: 0"><iframe src="{page.resolve().as_uri()}" style="{style}"></iframe>')
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
        size = f"--window-size={max(width, 500)},{height + 200}"  # the window's frame takes some of it
        wait = "--virtual-time-budget=5000"
        command = [browser, *options, size, wait, f"--screenshot={shot}", frame.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        target.parent.mkdir(exist_ok=True)
        with Image.open(shot) as picture:
            picture.crop((0, 0, width, height)).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)


def main() -> None:
    run = Path(sys.argv[1])
    for name, (width, height) in SIZES.items():
        take(run / "index.html", width, height, run / "screenshots" / f"{name}.png")
        print(f"{run}/screenshots/{name}.png")


if __name__ == "__main__":
    main()
