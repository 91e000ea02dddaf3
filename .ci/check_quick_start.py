"""Fails unless the quick start reached what the README promises."""

import json
import sys

FLOORS = {1.0: 0.95, 0.75: 0.95, 0.6: 0.95, 0.5: 0.95, 0.4: 0.85}

with open(sys.argv[1]) as file:
    grid = json.load(file)
if grid["dataset"] != "digits" or grid["split"] != "test":
    sys.exit(f"expected the digits test split, got {grid['dataset']} {grid['split']}")
found = {row["width_ratio"]: row["accuracy"] for row in grid["rows"]}
low = {ratio: found.get(ratio) for ratio, floor in FLOORS.items() if found.get(ratio, 0) < floor}
if low:
    sys.exit(f"test accuracy below {FLOORS}: {low}")
print("quick start: every width reached its floor")
