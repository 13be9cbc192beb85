"""Tell which names of a pickle are somebody's own objects, which stay opaque, and which could do harm elsewhere.

Nothing is imported or called here, whatever a pickle names. The next program that opens the file may do both, so a name
that can run commands or change files when it is called is refused (F04). Those are names of Python's own library and of
packages that start programs. Names of other packages and of the user's own modules are objects beside the tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.pickle_values import Global

_PYTHON_2 = "__builtin__ commands copy_reg popen2 cPickle exceptions StringIO cStringIO urllib2 os2 dl user".split()
_STARTERS = (
    "IPython ipykernel pip setuptools pkg_resources distutils py pexpect fabric invoke sh plumbum jupyter".split()
)
_LIBRARY = frozenset([*sys.stdlib_module_names, *_PYTHON_2])
# modules of Python whose classes and functions only hold or compute values
_HARMLESS_MODULES = frozenset(
    "collections collections.abc datetime decimal fractions enum uuid numbers dataclasses typing pathlib "
    "pathlib._local array zoneinfo ipaddress string _decimal _datetime _collections_abc random _random "
    "torch.nn.functional torch._C._nn torch.nn.init "
    "numpy.random._pickle numpy.random.bit_generator".split()
)
_HARMLESS = frozenset(
    """
    types.SimpleNamespace types.MappingProxyType types.NoneType types.GenericAlias functools.partial re._compile
    copyreg._reconstructor copy_reg._reconstructor copyreg.__newobj__ copyreg.__newobj_ex__ operator.itemgetter
    operator.attrgetter _operator.itemgetter _operator.attrgetter logging.Logger logging.getLogger
    weakref.WeakValueDictionary weakref.WeakSet
    """.split()
    + [
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in "object tuple bytes type slice range NoneType Ellipsis NotImplemented long unicode basestring "
        "complex frozenset set dict list int float bool str bytearray Exception ValueError RuntimeError".split()
    ]
)
# packages that are no user's own, of which functions outside the allow-list are refused; their classes hold settings
_TENSOR_PACKAGES = ("torch", "numpy", "scipy", "pandas", "joblib", "cloudpickle", "dill")
# what another module may have imported under its own name
_RUNNERS = frozenset(
    "system popen Popen exec eval execfile compile getattr setattr delattr check_output check_call getoutput spawn "
    "open input breakpoint vars globals locals import_module run_path run_module".split()
)
# how a DTensor says where it lies; `dtensors` reads them
_OF_DTENSORS = tuple(f"torch.distributed.{part}" for part in ("tensor", "_tensor", "device_mesh", "_mesh_layout"))


def _of_python(name: Global) -> bool:
    return name.module.partition(".")[0] in _LIBRARY


def harmful(name: Global) -> bool:
    """Tell whether a name outside the allow-list could do harm to a program that loads the file.

    Args:
        name: what the pickle names.

    >>> harmful(Global("posix", "system")), harmful(Global("my_script", "Config")), harmful(Global("enum", "Enum"))
    (True, False, False)
    """
    package = name.module.partition(".")[0]
    spelled = str(name)
    if spelled in _HARMLESS or name.module in _HARMLESS_MODULES:
        return False
    if _of_python(name):
        return True
    parts = name.name.split(".")
    if package in _STARTERS or not name.module or not name.name or any(part.startswith("__") for part in parts):
        return True
    if _RUNNERS.intersection(parts) or (len(parts) > 1 and parts[0] in _LIBRARY):  # `my_module`, `os.system`
        return True
    # by Python's custom a class begins with a capital, a function does not
    return package in _TENSOR_PACKAGES and not parts[-1].lstrip("_")[:1].isupper()


def refuse(found: Collection[Global], allowed: Collection[str], where: object, opaque: set[str] | None = None) -> None:
    """Refuse a pickle that names what is outside an allow-list and may not stay opaque.

    Args:
        found: every name of the pickle.
        allowed: names that may occur, as `module.name`; an entry ending in `.*` allows a whole module.
        where: the file, for messages.
        opaque: gets the names of somebody's own objects; where it is None, these are refused like all others.

    Raises:
        TensorkeepError: F04 naming the first of them.
    """
    others = {g for g in found if str(g) not in allowed and f"{g.module}.*" not in allowed}
    if opaque is not None:
        own = {g for g in others if not harmful(g)}
        opaque.update(str(g) for g in own if not g.module.startswith(_OF_DTENSORS) and not _of_python(g))
        others -= own
    refused = sorted(map(str, others))
    if refused:
        more = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise TensorkeepError(
            f"the pickle inside names {', '.join(r[:120] for r in refused[:8])}{more}, which loading it would import "
            "and may run; nothing was run",
            where=where,
            code="F04",
            hint="do not load this file with torch.load(weights_only=False) or dcp.load; "
            "ask its author for safetensors",
        )
