"""Prints the two commands of the README, so that what is tested is what is written there.

Usage: python .ci/readme_commands.py README.md "Run it"
"""

import re
import sys
from pathlib import Path

HEADINGS = ("Run it", "Test it")


def readme_command(text: str, heading: str) -> str:
  """The one command of a section.

  Args:
    text: a Markdown document.
    heading: title of a section of level two, `## Run it`.

  Returns:
    The line of the section's only ```bash block.

  Raises:
    ValueError: there is not exactly one such section, block or line.
  """
  sections = re.split(r"^## +", text, flags=re.MULTILINE)[1:]
  bodies = [body for title, _, body in (s.partition("\n") for s in sections) if title == heading]
  if len(bodies) != 1:
    raise ValueError(f"the README must have one section '## {heading}', found {len(bodies)}")
  blocks = re.findall(r"^```bash\n(.*?)^```$", bodies[0], flags=re.MULTILINE | re.DOTALL)
  lines = [line for block in blocks for line in block.splitlines() if line.strip()]
  if len(lines) != 1:
    raise ValueError(f"'## {heading}' must have one command in a bash block, found {len(lines)}")
  return lines[0]


if __name__ == "__main__":
  print(readme_command(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2]))
