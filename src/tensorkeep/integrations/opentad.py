"""OpenTAD with a quantized backbone, our average and checkpoints that can be trusted, by two lines of a config.

    custom_imports = dict(imports=["tensorkeep.integrations.opentad"])
    model = dict(backbone=dict(backbone=dict(type="VisionTransformerQLoRA", lora_r=16, ...)))

`tools/train.py` and `tools/test.py` run unmodified. They import the engine's names (`ModelEma`, `save_checkpoint`, ...)
into `__main__` before they read the config, and mmengine imports this module while the config is read. So an attribute
set on `opentad.utils` alone would change nothing: `__main__` holds the old object already. But a function looks its
globals up when it runs, and `main()` has not used any of them yet. Hence: every module of the process, `__main__`
included, whose name is bound to one of seven known objects of OpenTAD gets ours under that name. It is done by
identity, in the open (the log says so), and only where OpenTAD has all seven with the arguments known here; else this
import fails and nothing is changed. Patching methods or code objects in place would reach as far, but would leave
nothing of the original to call, and evaluation and the epoch itself stay OpenTAD's.

`--resume FILE` (`--checkpoint` of `tools/test.py`) is verified here, before torch opens it: afterwards only the tool
knows the path.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from tensorkeep.errors import TensorkeepError
from tensorkeep.integrations._opentad_backbone import VisionTransformerQLoRA
from tensorkeep.integrations._opentad_engine import EXPECTED, replacements, take_over
from tensorkeep.integrations._opentad_files import Run, read_resumed

log = logging.getLogger(__name__)


def install(arguments: list[str]) -> list[str]:
    """Register the backbone with mmengine and put our functions in the place of OpenTAD's.

    Args:
        arguments: the command line, whose `--resume` or `--checkpoint` is verified.

    Returns:
        The names that were changed, as `module.name`.

    Raises:
        TensorkeepError: OpenTAD or mmengine is missing or another than known, the backbone's name is taken, or the file
            is damaged.
    """
    try:
        registry = importlib.import_module("mmengine.registry").MODELS
        modules = {name: importlib.import_module(f"opentad.{name}") for name in EXPECTED}
    except ImportError as error:
        raise TensorkeepError(
            f"cannot be imported: {error}", where="OpenTAD", hint="name this module in a config of OpenTAD's tools"
        ) from error
    pairs = replacements(modules, run := Run())
    try:
        registry.register_module(module=VisionTransformerQLoRA)
    except KeyError as error:
        raise TensorkeepError(
            "another VisionTransformerQLoRA is registered",
            where="mmengine.registry.MODELS",
            hint="leave the module that registers it out of custom_imports",
        ) from error
    places = take_over(pairs)
    if any(place.startswith("__main__.") for place in places):
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--resume")
        parser.add_argument("--checkpoint", default="none")  # of tools/test.py, with its default
        given = parser.parse_known_args(arguments)[0]
        run.resumed = None if given.resume is None else read_resumed(given.resume)
        if given.checkpoint != "none":
            read_resumed(given.checkpoint)
    log.info("taken over: %s", ", ".join(places))
    return places


install(sys.argv[1:])
