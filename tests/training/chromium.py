"""Opens a page in a headless Chromium and measures it, with the standard library only."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MARK = "measured-by-the-test"

_MEASURE = """
<script>
addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect();
    return {name: e.tagName + " " + (e.id || e.textContent.trim().slice(0, 40)),
            left: r.left, top: r.top, right: r.right, bottom: r.bottom,
            width: r.width, height: r.height}; };
  const all = selector => [...document.querySelectorAll(selector)];
  // The scale of an overlap: labels may touch, but not by more than 2 pixels.
  const cross = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
                          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
  const overlaps = [], outside = [];
  for (const svg of all("svg")) {
    const frame = box(svg), texts = [...svg.querySelectorAll("text")].map(box);
    texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
      if (cross(a, b)) overlaps.push([a.name, b.name]); }));
    outside.push(...texts.filter(t => t.left < frame.left - 2 || t.right > frame.right + 2 ||
      t.top < frame.top - 2 || t.bottom > frame.bottom + 2).map(t => t.name));
  }
  const ids = all("[id]").map(e => e.id);
  const result = {
    innerWidth, scrollWidth: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ink: getComputedStyle(document.body).color,
    textFills: [...new Set(all("svg text").map(e => getComputedStyle(e).fill))],
    shown: all("figure, svg, table, dl, figcaption, h1, h2").map(box),
    // What lies in a box that scrolls may be wider than the page.
    wide: all("body *").filter(e => !e.parentElement.closest(".scroll")).map(box)
      .filter(b => b.left < -0.5 || b.right > innerWidth + 0.5),
    count: {svg: all("svg").length, table: all("table").length, dl: all("dl").length},
    duplicateIds: ids.filter((id, i) => ids.indexOf(id) !== i),
    deadReferences: all("svg use").map(e => e.getAttribute("href") || "missing")
      .filter(h => !ids.includes(h.slice(1))),
    overlaps, outside,
  };
  console.log("MARK");
  parent.document.documentElement.setAttribute("data-measured", JSON.stringify(result));
});
</script></body>""".replace("MARK", MARK)


def measure(page, folder, *, width, dark=False):
  """What a browser makes of the page; `console` holds its messages but for the script's mark.

  Args:
    page: path of an HTML page; it is copied, not changed.
    folder: scratch folder.
    width: of the window, CSS pixels.
    dark: whether the reader prefers dark colours.
  """
  browser = next(filter(None, map(shutil.which, BROWSERS)), None)
  if browser is None:
    pytest.skip(f"no browser on PATH: looked for {', '.join(BROWSERS)}")
  # In a frame, since a window has a least width that is larger than a phone's.
  inner = html.escape(page.read_text(encoding="utf-8").replace("</body>", _MEASURE))
  copy = folder / "copy.html"
  copy.write_text(
    '<!DOCTYPE html><meta charset="utf-8"><body style="margin: 0">'
    f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{inner}"></iframe>',
    encoding="utf-8",
  )
  flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
  flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --dump-dom"
  flags += " --enable-logging=stderr --hide-scrollbars" + " --force-dark-mode" * dark
  command = [browser, *flags.split(), "--window-size=1400,900"]
  command += [f"--user-data-dir={folder / 'profile'}", copy.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  result = re.search(r'data-measured="([^"]*)"', done.stdout)
  assert result, f"the measuring script did not run: {done.stderr[-2000:]}"
  console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  # Proves that a message would have been seen.
  assert any(MARK in line for line in console)
  return json.loads(html.unescape(result[1])) | {"console": [x for x in console if MARK not in x]}
