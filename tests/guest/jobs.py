# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs several commands in a guest, one after the other; needs no more than Python's own library:

    jobs.py FOLDER LAST...

FOLDER/jobs.json has the commands by name. What NAME says goes to FOLDER/NAME.out, its status to FOLDER/NAME.status.
Then this becomes the command LAST.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the commands."""
    folder, last = Path(sys.argv[1]), sys.argv[2:]
    for name, words in json.loads((folder / "jobs.json").read_text()).items():
        with open(folder / f"{name}.out", "wb") as said:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, check=False)
        (folder / f"{name}.status").write_text(str(done.returncode))
    os.sync()
    os.execvp(last[0], last)


if __name__ == "__main__":
    main()
