"""The scripts under launch/ import their siblings by name, as they do when they run."""

import sys
from pathlib import Path

# at the end: tests/ has modules of the same names
sys.path.append(str(Path(__file__).parents[2] / "launch"))
