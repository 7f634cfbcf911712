"""`python -m trainers.convert source=<folder or Hub id> ...`: an adapter of weights that somebody else published."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainers.config import ConvertConfig, names_repository
from trainers.recipes import exit_on_error, plain_command

USAGE = """usage: python -m trainers.convert source=<folder, file or Hub id> backbone.name=... output=<folder> [...]

Reads what somebody else trained and writes an adapter.  method=medusa: heads in the layouts of the reference, TGI and
vLLM, in safetensors, calibrated on the backbone's own decode.  method=harmonica: Learning-to-Cache's released routers.
--print shows the resolved settings and exits."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Exit codes: 0 done, 1 refused source or backbone, 2 wrong settings."""
    config = plain_command(ConvertConfig, sys.argv[1:] if argv is None else argv, USAGE)
    if config is None:
        return 0
    try:
        run(config)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{config.output} is the adapter")
    return 0


def run(config: ConvertConfig) -> None:
    """Write the adapter.

    Raises:
        ValueError: the method converts nothing, or the source is missing or refused.
    """
    from trainers.evaluation import method_module

    convert = getattr(method_module(config.method), "convert", None)
    if convert is None:
        raise ValueError(f"method is '{config.method}', for which there is nothing to convert from")
    if not Path(config.source).exists() and not names_repository(config.source):
        wanted = ConvertConfig.model_fields["source"].description
        raise ValueError(f"source is {config.source}, and there is no such folder or file: give {wanted}")
    convert(config)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
