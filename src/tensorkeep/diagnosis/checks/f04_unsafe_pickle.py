"""F04 unsafe pickle: it needs globals outside the allow-list, which are named.

What it is: `.pth` files and the `.metadata` of DCP folders are pickles, and a pickle may call any function while it
is loaded. tensorkeep reads its opcodes as data and calls nothing; names outside a short list stop it.
How it happens: somebody pickled whole objects (a model, a config class), or somebody means harm.
How it shows: `torch.load` with weights_only refuses it; DCP's reader does not: it would run the code.
What to do: if you trust its maker, load it in a sandbox with the program that wrote it and save the tensors alone.
Otherwise delete it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F04"


def check(case: Case) -> Iterator[Finding]:
    """What reading found."""
    yield from case.told(CODE)
