"""The commands in docs/operations.md, as an operator types them."""

from tests.support.compose_files import ROOT

DOCUMENTATION = ROOT / "docs" / "operations.md"


def read_blocks(heading: str) -> list[str]:
    """Return the blocks of shell commands under a heading, up to the next heading of any level."""
    blocks, block, is_below = [], None, False
    for line in DOCUMENTATION.read_text().splitlines(keepends=True):
        if block is not None:
            if line == "```\n":
                blocks += [block[1]] if is_below and block[0] == "```bash\n" else []
                block = None
            else:
                block = (block[0], block[1] + line)
        elif line.startswith("```"):
            block = (line, "")
        elif line.startswith("#"):
            is_below = line.strip("# \n") == heading
    return blocks


def read_commands(heading: str, number: int = 0) -> list[str]:
    """Return the commands of one block under a heading: its lines, of which those that end in a backslash go on."""
    text = read_blocks(heading)[number].replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]
