"""Fails unless what the README's commands print is what its tables claim.

    python .ci/check_claims.py DIR/grid.json OWN_NETWORK_OUTPUT

Counts must be equal. Accuracies may differ by points: another processor rounds differently, most of
all at widths that were never trained and in networks that were only cut.
"""

import json
import pathlib
import re
import sys

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
POINTS = {"trained": 2.5, "never trained": 12.0, "cut": 15.0, "refit": 4.0, "INR": 2.5}


def claimed(first_cell: str) -> list[list[str]]:
    """The rows of the README's table whose head begins with `first_cell`, each a list of cells."""
    text = README.read_text()
    table = text[text.index(f"| {first_cell}") :].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    return [rows[0], *rows[2:]]


def compare(name: str, claim: str, measured: float, points: float) -> None:
    number = float(re.sub("[,%* ]", "", claim))
    if abs(number - measured) > points:
        sys.exit(f"{name}: the README claims {claim}, measured {measured:.2f}")


def check_quick_start(path: str) -> None:
    grid = json.loads(pathlib.Path(path).read_text())
    rows = {row["width_ratio"]: row for row in grid["rows"]}
    head, params, accuracies = claimed("width ratio")
    for title, num_params, accuracy in zip(head[1:], params[1:], accuracies[1:], strict=True):
        row = rows[float(title.split()[0])]
        points = POINTS["never trained" if "never trained" in title else "trained"]
        compare(f"parameters at width {title}", num_params, row["num_params"], 0)
        compare(f"accuracy at width {title}", accuracy, 100 * row["accuracy"], points)


def check_own_network(path: str) -> None:
    line = r"^ *([\d.]+) +[\d,]+ +([\d,]+) +([\d.]+)% +([\d.]+)% +([\d.]+)%$"
    numbers = re.findall(line, pathlib.Path(path).read_text(), re.MULTILINE)
    (head, macs, *claims), names = claimed("digits, width of all channels"), ("cut", "refit", "INR")
    for n, (title, num_macs, found) in enumerate(zip(head[1:], macs[1:], numbers, strict=True)):
        compare("width", title, float(found[0]), 0)
        compare(f"multiply-adds at width {title}", num_macs, float(found[1].replace(",", "")), 0)
        for name, claim, accuracy in zip(names, claims, found[2:], strict=True):
            compare(f"{name} at width {title}", claim[n + 1], float(accuracy), POINTS[name])


if __name__ == "__main__":
    check_quick_start(sys.argv[1])
    check_own_network(sys.argv[2])
    print("what the README claims came out")
