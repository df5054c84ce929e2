"""A checkout: `passes/` stands beside `lorafx/` there, and is `lorafx.passes` within only where that is installed.

Who starts Python in a checkout gets this package, installed or not; it finds its passes where they stand.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).parent

if not (_HERE / "passes").is_dir():
    sys.modules[__name__.rpartition(".")[0]].__path__.append(str(_HERE.parent))
