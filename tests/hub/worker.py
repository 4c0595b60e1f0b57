"""Serve the functions of a program to the process that started this one: JSON lines in and out.

Clients of the Hub read its address and the token when they are imported, and what was loaded once
is in memory: who pushes, who loads and who works offline need processes of their own.

Usage: worker.py PROGRAM [MODULE ...], where the modules cannot be imported by the program.
"""

import json
import os
import runpy
import sys
import traceback
from importlib.abc import MetaPathFinder


class Hidden(MetaPathFinder):
    """Imports as they fail where packages are not installed."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def serve(program: str, hidden: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.meta_path.insert(0, Hidden(hidden))
    functions = runpy.run_path(program)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"value": functions[call["function"]](*call["args"], **call["kwargs"])}
        except Exception as error:  # noqa: BLE001 - the other process raises it
            traceback.print_exc()
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"kinds": kinds, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # all is said, and torch would take a second to end


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
