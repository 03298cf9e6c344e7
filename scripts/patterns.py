"""Writes the graphs of the kernels' forms to autopart/passes/patterns.json, as this release of torch traces them.

python scripts/patterns.py          renews the file
python scripts/patterns.py --check  ends with status 1 where it is not as it would be written
"""

from __future__ import annotations

import argparse
import json
import sys

from autopart.kernels.forms import FORMS
from autopart.kernels.table import KERNELS
from autopart.passes.pattern import pattern_of
from autopart.passes.stored_patterns import FILE, RELEASE, to_data


def text() -> str:
    """What the file is to say: a line for each form."""
    kernels = []
    for name, kernel in KERNELS.items():
        patterns = [pattern_of(kernel.reference, form.arguments) for form in FORMS[name]]
        lines = ",\n".join(f"    {json.dumps(to_data(pattern.outputs[0].graph))}" for pattern in patterns)
        kernels.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    content = f'{{"torch": {json.dumps(RELEASE)}, "graphs": {{\n' + ",\n".join(kernels) + "\n}}\n"
    json.loads(content)
    return content


def main() -> int:
    """Renew the file, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the file, and write nothing")
    if not parser.parse_args().check:
        FILE.write_text(text())
    elif FILE.read_text() != text():
        print(f"{FILE.name} is not what this release of torch traces: python scripts/patterns.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
