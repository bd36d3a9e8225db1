"""Python imports this before any program, where this folder is on its path: plants the bug that `PLANTED_BUG` names."""

import os

if os.environ.get("PLANTED_BUG"):
    from plants import PLANTS

    PLANTS[os.environ["PLANTED_BUG"]].apply()
