"""The argument parser of all scripts."""

import argparse
import difflib
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, but an error is one line; for an unknown flag it suggests similar ones."""

    def __init__(self, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        _, unknown, flags = message.partition("unrecognized arguments: ")
        if unknown:
            flag = flags.split()[0].partition("=")[0]
            known = list(self._option_string_actions)
            near = [name for name in known if flag.strip("-") in name][:3] or difflib.get_close_matches(flag, known, 2)
            message = f"there is no flag {flag}" if flag.startswith("-") else f"unexpected argument {flag}"
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"error: {message} (--help lists all flags)", file=sys.stderr)
        sys.exit(2)
