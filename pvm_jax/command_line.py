"""What the command lines share: help that ends with examples."""

from argparse import RawDescriptionHelpFormatter

from jsonargparse import ArgumentParser, DefaultHelpFormatter


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Shows types and defaults, and the examples line by line."""


def command_parser(prog: str | None, description: str | None, examples: str) -> ArgumentParser:
    """A parser whose --help ends with `examples` as they are written."""
    return ArgumentParser(
        prog=prog, description=description, epilog=examples, formatter_class=HelpFormatter
    )
