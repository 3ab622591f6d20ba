"""Turns the comments of a header into those of Doxygen, which calls this with the path of a header.

The comment before `#pragma once` becomes that of the file; comments before declarations become theirs, and so
do comments behind members, values and declarations of one line. What is indented in a comment is shown as it
is: examples and formulas.
"""

import re
import sys

COMMENT = re.compile(r"^(\s*)// ?(.*)$")
BEHIND = re.compile(r"^(\s*\S.*?[;,{]\s+)// (.*)$")


def block(lines: list[str], indent: str, is_file: bool) -> list[str]:
    """The lines of one comment, without their slashes."""
    result = ["@file"] if is_file else []
    verbatim = False
    for line in lines:
        if line and line.startswith("  ") != verbatim:
            verbatim = not verbatim
            result.append("@verbatim" if verbatim else "@endverbatim")
        result.append(line)
    if verbatim:
        result.append("@endverbatim")
    return [f"{indent}/**", *result, f"{indent}*/"]


def convert(text: str) -> list[str]:
    """The lines of a header."""
    result: list[str] = []
    comment: list[str] = []
    record = False
    for line in [*text.splitlines(), ""]:
        if match := COMMENT.match(line):
            comment.append(match[2])
            indent = match[1]
            continue
        if comment:
            result += block(comment, indent, is_file=line == "#pragma once")
            comment = []
        record = bool(re.match(r"(struct|class|enum) .*{", line)) or (record and line != "};")
        declares = not line.startswith("   " if record else " ")  # deeper are the bodies of functions
        if declares and (match := BEHIND.match(line)):
            line = f"{match[1]}///< {match[2]}"
        result.append(line)
    return result


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as header:
        print("\n".join(convert(header.read())))
