"""`python -m unlost`, and the command `unlost`."""

import signal
import sys


def main() -> int:
    # Until the commands are imported, Ctrl-C ends this process as it ends any other: without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from unlost.cli.main import main as run
    from unlost.cli.say import interrupt

    signal.signal(signal.SIGINT, interrupt)
    return run()


if __name__ == "__main__":
    sys.exit(main())
